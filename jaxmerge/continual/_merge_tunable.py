"""Tunable MagMax as a merge of a stream."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmerge import merging
from jaxmerge.continual import _merge, _problem

PyTree = Any

_SIMILARITIES = ("labels", "cosine", "mmd", "ot")


def tunable_magmax(
  *,
  scale: float = 0.5,
  preferences: Sequence[float] | None = None,
  similarity: str | None = None,
  target: Mapping[str, Any] | None = None,
  samples: int = 200,
  **options: Any,
) -> _merge.Merge:
  """MagMax whose task vectors have as many entries as the tasks are preferred.

  After task t, `jaxmerge.merging.tunable_magmax` of the networks so far, with
  the preferences of the first t tasks. These are given, or follow from how
  similar `target`, the data that the merged network is for, is to each task's:
  by labels, or by the logits that the initial network has for them. As long as
  no task has a label of the target's, preferences are equal.

  Args:
    scale: of the merged task vector.
    preferences: a number for each task of the stream, not negative; None for
      equal ones.
    similarity: "labels", "cosine", "mmd" or "ot", see
      `jaxmerge.merging.task_preferences`; None for the preferences given.
    target: examples: an "input", or, for "labels", a "label".
    samples: number of examples of each task that its labels or logits are kept
      of, evenly spaced, at most those of the smallest task; no example is kept.
    **options: of `task_preferences`.

  Returns:
    The merge; it holds all networks.

  Raises:
    ValueError: an option is unknown or out of its range.

  References:
    `Tunable MagMax <https://arxiv.org/abs/2605.20803>`_, 2026

  >>> tunable_magmax(preferences=(1, 2)).name
  'tunable_magmax(scale=0.5, preferences=(1, 2))'
  """
  _check(preferences, similarity, target, samples)
  if preferences is not None:
    preferences = tuple(preferences)
  known = inspect.signature(merging.task_preferences).parameters
  for name in options:
    if name not in known:
      raise ValueError(
        f"Unknown option {name!r}; those of a similarity are"
        f" {', '.join(list(known)[3:])}."
      )
    if similarity is None:
      raise ValueError(
        f"Option {name!r} is of a similarity: give similarity=..., or leave it"
        " out."
      )

  def seen(
    problem: _problem.Problem, params: PyTree, examples: Mapping[str, Any]
  ) -> np.ndarray:
    """What the tasks are compared by."""
    if similarity == "labels":
      return np.asarray(examples["label"], np.int32)
    return np.asarray(_logits(problem.logits_fn)(params, examples["input"]))

  def of_task(
    problem: _problem.Problem, params: PyTree, task: int
  ) -> np.ndarray:
    rows = problem.stream.tasks[task].train
    # An example that came twice would seem like itself.
    least = min(len(one.train) for one in problem.stream.tasks)
    count = min(samples, least)
    places = np.linspace(0, len(rows) - 1, count).round().astype(int)
    return seen(problem, params, problem.examples(rows[places]))

  def init(problem: _problem.Problem) -> _merge.State:
    if preferences is not None and len(preferences) != problem.num_tasks:
      raise ValueError(
        f"There are {len(preferences)} preferences for {problem.num_tasks}"
        " tasks: give one for each task of the stream."
      )
    state = {"experts": _merge.no_experts(problem)}
    if similarity == "labels":
      assert target is not None
      _check_labels(np.asarray(target["label"]), problem)
    if similarity is not None:

      def one(params: PyTree) -> np.ndarray:
        found = of_task(problem, params, 0)
        return np.zeros((problem.num_tasks, *found.shape), found.dtype)

      state["seen"] = _problem.per_seed(problem, one, problem.params)
    return state

  def wanted(
    problem: _problem.Problem, state: _merge.State, task: int, seed: int
  ) -> Sequence[float] | None:
    if similarity is None:
      return None if preferences is None else preferences[: task + 1]
    params = jax.tree.map(lambda leaf: leaf[seed], problem.params)
    sources = np.asarray(state["seen"][seed][: task + 1])
    assert target is not None
    if similarity == "labels" and not np.isin(target["label"], sources).any():
      return None  # The tasks that the target is like are still to come.
    found = merging.task_preferences(
      seen(problem, params, target),
      list(sources),
      similarity=similarity,
      **options,
    )
    return tuple(float(value) for value in found)

  def update(
    problem: _problem.Problem, state: _merge.State, step: _merge.Step
  ) -> tuple[PyTree, _merge.State]:
    held, models = _merge.with_expert(state["experts"], step)
    after = {"experts": held}
    if similarity is not None:
      new = _problem.per_seed(
        problem,
        lambda params: of_task(problem, params, step.task),
        problem.params,
      )
      after["seen"] = state["seen"].at[:, step.task].set(new)
    chosen = [
      wanted(problem, after, step.task, seed)
      for seed in range(problem.num_seeds)
    ]
    if problem.report is not None and chosen[0] is not None:
      problem.report(
        "tunable_magmax", step.task, {"preferences": np.array(chosen)}
      )
    keys = problem.keys_for("merge", "tunable_magmax")

    def one(
      seed: jax.Array, key: jax.Array, base: PyTree, models: list[PyTree]
    ) -> PyTree:
      return merging.tunable_magmax(
        base, models, key, preferences=chosen[int(seed)], scale=scale
      )

    numbers = np.arange(problem.num_seeds)
    merged = _problem.per_seed(
      problem, one, numbers, keys, problem.params, models
    )
    return merged, after

  parts = [f"scale={scale}"]
  parts += [f"preferences={preferences}"] if preferences is not None else []
  parts += [f"similarity={similarity}"] if similarity is not None else []
  return _merge.Merge(
    f"tunable_magmax({', '.join(parts)})",
    init,
    update,
    runs_network=similarity is not None,
    needs_initial=True,
  )


def _check(
  preferences: Sequence[float] | None,
  similarity: str | None,
  target: Mapping[str, Any] | None,
  samples: int,
) -> None:
  if preferences is not None and similarity is not None:
    raise ValueError(
      "Give preferences, or the similarity that they follow from, not both."
    )
  if preferences is not None:
    try:
      values = np.asarray(preferences, np.float64)
    except (TypeError, ValueError):
      values = np.full(1, np.nan)
    if values.ndim != 1 or not (np.isfinite(values) & (values >= 0)).all():
      raise ValueError(
        "preferences must be numbers that are not negative, one a task, got"
        f" {preferences!r}."
      )
    if not values[:1].sum() > 0:
      raise ValueError(
        "The preference of the first task must be positive, got"
        f" {preferences}: after that task there is no other."
      )
  if similarity is not None and similarity not in _SIMILARITIES:
    raise ValueError(
      f"Unknown similarity {similarity!r}. Choose one of "
      f"{', '.join(_SIMILARITIES)}."
    )
  if (similarity is None) != (target is None):
    raise ValueError(
      "A similarity needs the target data to compare with, and target data are"
      " for a similarity: give both, or none."
    )
  field = "label" if similarity == "labels" else "input"
  if target is not None and field not in target:
    raise ValueError(f"The target data of {similarity} need a {field!r}.")
  if samples < 1:
    raise ValueError(f"samples must be at least 1, got {samples}.")


def _check_labels(labels: np.ndarray, problem: _problem.Problem) -> None:
  """Raises ValueError for labels of a target that is like no task."""
  if labels.ndim != 1 or labels.dtype.kind not in "iu" or not labels.size:
    raise ValueError(
      "The label of the target data must be a vector of integers, not empty;"
      f" got shape {labels.shape} of {labels.dtype}."
    )
  known = np.concatenate([task.classes for task in problem.stream.tasks])
  if not np.isin(labels, known).any():
    raise ValueError(
      f"No task of the stream has a label of the target's, {labels[:6]}: give"
      " data of its classes."
    )


@functools.lru_cache(maxsize=16)
def _logits(
  logits_fn: _problem.LogitsFn,
) -> Callable[[PyTree, Any], jax.Array]:
  return jax.jit(logits_fn)
