"""Stored examples in the training of a task."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.continual import _problem
from jaxmerge.continual import replay as replay_lib

Data = dict[str, Any]


class Rehearsal(NamedTuple):
  """How stored examples take part in the training of a task.

  Attributes:
    batch_size: number of stored examples a step.
    weight: of their cross-entropy, beside that of the task's own batch; None
      for 1/t of the own and 1 - 1/t of theirs at the t-th task.
    soft_weight: of the squared distance to the logits that were stored with
      them (DER's alpha), on a batch of its own.
    online: fill the buffer while training, batch by batch, rather than after
      the task; the task's own examples are then replayed, too.
    project: use them to project the gradient (A-GEM) instead of in the loss.
    augment: whether the problem's augmentation is applied to them.
  """

  batch_size: int = 32
  weight: float | None = 1.0
  soft_weight: float = 0.0
  online: bool = False
  project: bool = False
  augment: bool = False


def check(rehearsal: Rehearsal, problem: _problem.Problem) -> None:
  """Raises ValueError for what rehearsal cannot do on this problem."""
  if rehearsal.batch_size < 1:
    raise ValueError(
      f"Rehearsal's batch_size must be at least 1, got {rehearsal.batch_size}."
    )
  for name in ("weight", "soft_weight"):
    if (getattr(rehearsal, name) or 0) < 0:
      raise ValueError(f"Rehearsal's {name} must not be negative.")
  if rehearsal.project and rehearsal.soft_weight:
    raise ValueError("project and soft_weight exclude each other.")
  if (rehearsal.soft_weight or rehearsal.project) and not rehearsal.online:
    raise ValueError(
      "soft_weight and project work on a buffer that is filled while training: "
      "set online=True."
    )
  if problem.replay is None:
    raise ValueError(
      "The strategy replays stored examples, but the problem has no replay "
      "buffer. Give make_problem(replay=...), or choose a strategy that needs "
      "no data."
    )


def init_online(
  rehearsal: Rehearsal | None, problem: _problem.Problem
) -> replay_lib.ReplayState | None:
  """The empty buffer that is filled while training, or None for none."""
  if rehearsal is None or not rehearsal.online:
    return None
  assert problem.replay is not None
  example: Data = {
    name: jax.ShapeDtypeStruct(values.shape[1:], values.dtype)
    for name, values in problem.stream.train.items()
  }
  if rehearsal.soft_weight:
    example["logits"] = jax.ShapeDtypeStruct(
      (problem.stream.num_classes,), jnp.float32
    )
  state = problem.replay.init(example)
  return jax.tree.map(lambda leaf: _problem.seed_axis(problem, leaf), state)


def terms(
  rehearsal: Rehearsal,
  problem: _problem.Problem,
  task: int,
  buffer: np.ndarray,
) -> tuple[list[str], dict[str, Data]]:
  """The terms of the loss that stored examples make.

  Args:
    rehearsal: the settings.
    problem: the problem.
    task: number of the task.
    buffer: int32 `[seeds, n]`, rows of the stored examples.

  Returns:
    The terms' names, and the data of each by name; beside them `buffer`, the
    stored examples, and `labels`, where the task's own examples weigh less.
  """
  fill = functools.partial(_problem.seed_axis, problem)
  own = problem.stream.scenario == "task-incremental"
  masks = fill(_problem.head_masks(problem, "task" if own else "seen", task))
  one = fill(np.float32(1))
  data: dict[str, Data] = {}
  weight = rehearsal.weight
  if weight is None:
    share = 1 / (task + 1)
    weight = 1 - share
    data["labels"] = {"weight": fill(np.float32(share))}
  if not rehearsal.online:
    assert problem.replay is not None
    count = buffer.shape[1]
    rows = np.zeros((problem.num_seeds, problem.replay.slots), np.int32)
    rows[:, :count] = buffer
    data["buffer"] = {
      "items": problem.examples(rows),
      "count": fill(np.float32(count)),
    }
  if rehearsal.project:
    return ["project"], data | {"replay": {"masks": masks, "weight": one}}
  names = []
  if weight or not rehearsal.online:
    names.append("replay")
    data["replay"] = {"masks": masks, "weight": fill(np.float32(weight))}
  if rehearsal.soft_weight:
    names.append("soft_replay")
    data["soft_replay"] = {"weight": fill(np.float32(rehearsal.soft_weight))}
  return names, data
