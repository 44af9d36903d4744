"""What a merge is, and what merges share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.continual import _problem

PyTree = Any
State = Any


class Step(NamedTuple):
  """What a merge is given after a task.

  Attributes:
    current: what the strategy has made of the tasks before.
    expert: the network of this task.
    task: its number.
    buffer: int32 `[seeds, n]`, rows of the stored examples, this task's among
      them; `[seeds, 0]` in a data-free run.
    anchor: where the last part of the expert's training started.
    path: snapshots along it, leaves `[seeds, snapshots, ...]`, or None.
  """

  current: PyTree
  expert: PyTree
  task: int
  buffer: np.ndarray
  anchor: PyTree = None
  path: PyTree = None


class Merge(NamedTuple):
  """A merge: pure functions over a state.

  Attributes:
    name: its name with its options.
    init: `init(problem) -> state`, before the first task.
    update: `update(problem, state, step) -> (merged, state)`.
    needs_replay: whether it looks at stored examples.
    runs_network: whether it runs or aligns the network, for which it needs its
      parameters rather than adapters.
    needs_start: whether it merges the expert with where its training started,
      which must then be what was merged before.
    needs_path: whether it needs snapshots of the expert's training.
    needs_initial: whether it reads the initial network at every task without
      having it in its state.
  """

  name: str
  init: Callable[[_problem.Problem], State]
  update: Callable[[_problem.Problem, State, Step], tuple[PyTree, State]]
  needs_replay: bool = False
  runs_network: bool = False
  needs_start: bool = False
  needs_path: bool = False
  needs_initial: bool = False


def no_state(problem: _problem.Problem) -> State:
  """The state of a merge that has none."""
  del problem
  return {}


def share(weight: str | float, task: int) -> float:
  """The weight of the new network: a number, or one over the tasks so far."""
  return 1 / (task + 1) if weight == "1/t" else float(weight)


def check_weight(weight: str | float) -> None:
  """Raises ValueError where it is neither "1/t" nor in [0, 1]."""
  if weight != "1/t" and not (
    isinstance(weight, (int, float)) and 0 <= weight <= 1
  ):
    raise ValueError(f"weight must be '1/t' or lie in [0, 1], got {weight!r}.")


def no_experts(problem: _problem.Problem) -> PyTree:
  """Room for the networks of all tasks, `[seeds, tasks, ...]`."""
  return jax.tree.map(
    lambda leaf: jnp.zeros(
      (len(leaf), problem.num_tasks, *leaf.shape[1:]), leaf.dtype
    ),
    problem.params,
  )


def with_expert(held: PyTree, step: Step) -> tuple[PyTree, list[PyTree]]:
  """The networks held with one more, and those so far as a list."""
  held = jax.tree.map(
    lambda all_of, one: all_of.at[:, step.task].set(one), held, step.expert
  )
  return held, [
    jax.tree.map(lambda leaf, t=t: leaf[:, t], held)
    for t in range(step.task + 1)
  ]
