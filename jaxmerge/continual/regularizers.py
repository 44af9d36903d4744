"""Regularisers: what a task's training is held by of the tasks before it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree as tree_lib
from jaxmerge.continual import _fisher, _objective, _problem

PyTree = Any
State = Any
Data = dict[str, Any]


class Regularizer(NamedTuple):
  """A regulariser: pure functions over a state, for any learner.

  Attributes:
    name: its name with its options; equal names, equal regularisers.
    init: `init(problem) -> state`, before the first task.
    terms: `terms(problem, state, start, task) -> {term: data}`, what it adds
      to the loss of a task (see `_objective`); `start` is the network that the
      task starts from.
    after_task: `after_task(problem, state, params, task, path) -> state`.
    follows: whether it needs the path integral of the training run.
  """

  name: str
  init: Callable[[_problem.Problem], State]
  terms: Callable[[_problem.Problem, State, PyTree, int], Data]
  after_task: Callable[
    [_problem.Problem, State, PyTree, int, Data | None], State
  ]
  follows: bool = False


def _quadratic(problem: _problem.Problem, state: Data, weight: float) -> Data:
  return {
    "quadratic": {
      "center": state["center"],
      "precision": state["precision"],
      "weight": _problem.seed_axis(problem, np.float32(weight)),
    }
  }


def _positive(**values: float) -> None:
  for name, value in values.items():
    if not value > 0:
      raise ValueError(f"{name} must be positive, got {value}.")


def _zeros(params: PyTree) -> PyTree:
  """A precision of zero, which half types are too coarse for."""
  return jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, tree_lib.accumulation_dtype(leaf)),
    params,
  )


def ewc(
  weight: float,
  *,
  online: bool = False,
  decay: float = 1.0,
  samples: int | None = None,
  labels: str = "exact",
  head: str = "all",
  chunk_size: int | None = None,
) -> Regularizer:
  """Elastic weight consolidation.

      penalty = weight / 2 * sum_i sum_t F_{t,i} (theta_i - theta_{t,i})^2

  with F_t the diagonal of the Fisher information of task t's network on task
  t's data, per example, over the classes of `head`, and theta_t that network.
  The sum of squares is kept as one square, of precision sum_t F_t around the
  weighted mean of the theta_t, from which it differs by a constant: the memory
  does not grow. Online, the precision is F_t + decay * (the precision before),
  around the last theta_t alone.

  Args:
    weight: strength of the penalty, positive.
    online: whether the penalty is around the last network alone.
    decay: of the precision, in (0, 1]; online only.
    samples: number of examples that the Fisher is estimated on, see
      `Problem.batches`; None for all.
    labels: as in `jaxmerge.merging.diagonal_fisher`: "exact" or "empirical".
    head: classes that the network's probabilities are over: "all", those "seen"
      so far, or those of the "task", as in its training; in a task-incremental
      stream always those of the task.
    chunk_size: as in `jaxmerge.merging.diagonal_fisher`: that of a large
      network must be small.

  Returns:
    The regulariser.

  Raises:
    ValueError: an option is out of its range.

  References:
    Kirkpatrick et al., `Overcoming catastrophic forgetting in neural networks
    <https://arxiv.org/abs/1612.00796>`_, 2017. Schwarz et al., `Progress &
    Compress <https://arxiv.org/abs/1805.06370>`_, 2018.

  >>> ewc(100.0).name
  'ewc(weight=100.0)'
  """
  _positive(weight=weight, decay=decay)
  if decay > 1 or (decay < 1 and not online):
    raise ValueError(
      f"decay must lie in (0, 1], and is for online=True alone; got {decay}."
    )
  _fisher.check(samples, labels, head)

  def init(problem: _problem.Problem) -> State:
    return {"center": problem.params, "precision": _zeros(problem.params)}

  def terms(
    problem: _problem.Problem, state: State, start: PyTree, task: int
  ) -> Data:
    del start, task  # Without a task before, the precision is zero.
    return _quadratic(problem, state, weight)

  def after_task(
    problem: _problem.Problem,
    state: State,
    params: PyTree,
    task: int,
    path: Data | None,
  ) -> State:
    del path
    fisher = _fisher.task_fisher(
      problem,
      params,
      task,
      samples=samples,
      labels=labels,
      head=head,
      chunk_size=chunk_size,
    )
    if online:
      precision = jax.tree.map(
        lambda old, new: decay * old + new, state["precision"], fisher
      )
      return {"center": params, "precision": precision}
    precision = tree_lib.add(state["precision"], fisher)

    def center(
      old: jax.Array, new: jax.Array, added: jax.Array, total: jax.Array
    ) -> jax.Array:
      known = total > 0
      share = jnp.where(known, added / jnp.where(known, total, 1.0), 1.0)
      way = share * (new - old).astype(share.dtype)
      return old + way.astype(old.dtype)

    return {
      "center": jax.tree.map(
        center, state["center"], params, fisher, precision
      ),
      "precision": precision,
    }

  name = f"ewc(weight={weight}"
  name += f", online, decay={decay}" if online else ""
  name += f", samples={samples}" if samples else ""
  name += f", {labels}" if labels != "exact" else ""
  name += f", head={head}" if head != "all" else ""
  return Regularizer(f"{name})", init, terms, after_task)


def si(weight: float, *, damping: float = 0.1) -> Regularizer:
  """Synaptic intelligence.

      penalty = weight * sum_i Omega_i (theta_i - theta_{t-1,i})^2
      Omega_i += max(0, w_i) / ((theta_{t,i} - theta_{t-1,i})^2 + damping)

  with w the path integral of task t's training, the sum over its steps of
  -gradient * step, the gradient being that of the task's loss alone.

  Args:
    weight: c, positive.
    damping: xi, positive.

  Returns:
    The regulariser.

  Raises:
    ValueError: an option is out of its range.

  References:
    Zenke et al., `Continual learning through synaptic intelligence
    <https://arxiv.org/abs/1703.04200>`_, 2017

  >>> si(0.1).follows
  True
  """
  _positive(weight=weight, damping=damping)

  def init(problem: _problem.Problem) -> State:
    return {"center": problem.params, "precision": _zeros(problem.params)}

  def terms(
    problem: _problem.Problem, state: State, start: PyTree, task: int
  ) -> Data:
    del start, task
    return _quadratic(problem, state, 2 * weight)

  def after_task(
    problem: _problem.Problem,
    state: State,
    params: PyTree,
    task: int,
    path: Data | None,
  ) -> State:
    del problem, task
    assert path is not None
    # The last step has not been followed yet.
    credit = _objective.follow(path, params, path["grads"])["credit"]
    precision = jax.tree.map(
      lambda total, w, new, old: (
        total
        + (jnp.maximum(w, 0) / ((new - old) ** 2 + damping)).astype(total.dtype)
      ),
      state["precision"],
      credit,
      params,
      state["center"],
    )
    return {"center": params, "precision": precision}

  name = f"si(weight={weight}, damping={damping})"
  return Regularizer(name, init, terms, after_task, follows=True)


def lwf(
  weight: float | None = None, *, temperature: float = 2.0, over: str = "old"
) -> Regularizer:
  """Learning without forgetting: distillation on the new task's examples.

      loss = a_t * cross-entropy + b_t * distillation(logits, old logits)

  of the classes of the earlier tasks, the teacher being the network that the
  task starts from. The distillation has the factor T^2.

  Args:
    weight: b_t, with a_t = 1; None for a_t = 1/t and b_t = 1 - 1/t at the t-th
      task, as van de Ven and Tolias have it.
    temperature: T of the distillation, positive.
    over: classes that the student's probabilities are over: "old" for those of
      the earlier tasks, which leaves the new logits free; "seen" for the task's
      own, too, to which the teacher gives 0, as van de Ven and Tolias have it.

  Returns:
    The regulariser.

  Raises:
    ValueError: an option is out of its range.

  References:
    Li and Hoiem, `Learning without forgetting
    <https://arxiv.org/abs/1606.09282>`_, 2016. van de Ven and Tolias, `Three
    scenarios for continual learning <https://arxiv.org/abs/1904.07734>`_, 2019

  >>> lwf().name
  'lwf(weight=None, temperature=2.0)'
  """
  _positive(temperature=temperature)
  if weight is not None:
    _positive(weight=weight)
  if over not in ("old", "seen"):
    raise ValueError(f"Unknown over {over!r}. Choose old or seen.")

  def terms(
    problem: _problem.Problem, state: State, start: PyTree, task: int
  ) -> Data:
    del state
    fill = functools.partial(_problem.seed_axis, problem)
    masks = np.zeros_like(_problem.head_masks(problem, "all", task))
    if task:
      # The old classes, whatever the task of the example.
      masks = _problem.head_masks(problem, "seen", task - 1)
    share = 1 - 1 / (task + 1)
    found: Data = {
      "distill": {
        "teacher": start,
        "masks": fill(masks),
        "temperature": fill(np.float32(temperature)),
        "weight": fill(np.float32(share if weight is None else weight)),
      }
    }
    if over == "seen":
      seen = _problem.head_masks(problem, "seen", task)
      found["distill"]["over"] = fill(seen)
    if weight is None:
      found["labels"] = {"weight": fill(np.float32(1 - share))}
    return found

  name = f"lwf(weight={weight}, temperature={temperature}"
  name += ", over=seen)" if over == "seen" else ")"
  return Regularizer(
    name, lambda problem: {}, terms, lambda problem, state, *args: state
  )
