"""The Fisher information of a task's network on the task."""

from __future__ import annotations

from typing import Any

from jaxmerge import merging
from jaxmerge.continual import _problem

PyTree = Any


def check(samples: int | None, labels: str, head: str) -> None:
  """Raises ValueError where an option of `task_fisher` is out of its range.

  >>> check(None, "exact", "all")
  """
  if labels not in ("exact", "empirical"):
    raise ValueError(f"Unknown labels {labels!r}. Choose exact or empirical.")
  if samples is not None and samples < 1:
    raise ValueError(f"samples must be at least 1, got {samples}.")
  if head not in ("all", "seen", "task"):
    raise ValueError(f"Unknown head {head!r}. Choose all, seen or task.")


def task_fisher(
  problem: _problem.Problem,
  params: PyTree,
  task: int,
  *,
  samples: int | None,
  labels: str,
  head: str,
  reduction: str = "mean",
  chunk_size: int | None = None,
) -> PyTree:
  """The diagonal of the Fisher information of each seed's network.

  Args:
    problem: the problem.
    params: the networks, leaves with an axis of seeds.
    task: number of the task, whose training examples are taken.
    samples: how many of them, see `Problem.batches`; None for all.
    labels: as in `jaxmerge.merging.diagonal_fisher`: "exact" or "empirical".
    head: classes that the probabilities are over, see `own_logits`.
    reduction: as in `diagonal_fisher`.
    chunk_size: as in `diagonal_fisher`.

  Returns:
    A tree like `params`.
  """
  own = _problem.own_logits(problem, task, head)
  batches: list[Any] = [
    (own.prepare(batch["input"]), own.places[batch["label"]])
    for batch in problem.batches(task, samples)
  ]
  if labels == "exact":
    batches = [inputs for inputs, _ in batches]
  return _problem.per_seed(
    problem,
    lambda params: merging.diagonal_fisher(
      own.logits_fn,
      params,
      batches,
      labels=labels,
      reduction=reduction,
      chunk_size=chunk_size,
    ),
    params,
  )
