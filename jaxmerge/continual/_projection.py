"""Gradient projection memory: steps that the tasks before do not notice."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.continual import _problem, _training

PyTree = Any
Projectors = dict[str, jax.Array]
_OTHERS = ("frozen", "free")
# Part of the inputs' squared norm that float32 may have made.
_ROUNDING = 1e-6


class Projection(NamedTuple):
  """A training whose steps spare the inputs of the tasks before.

  Each layer's step is U - P U, with P the projector on the directions that
  hold the share `threshold` of the squared norm of its inputs on the examples
  of each task so far; see `grown`.

  Attributes:
    threshold: epsilon, in (0, 1]; the larger, the less is forgotten, and the
      less is learned.
    growth: is added to it at every task, up to 1.
    samples: number of a task's examples that the directions are found on; None
      for all.
    others: parameters that are no kernel of a linear layer (biases, norms,
      embeddings): "frozen" after the first task, or "free".
    training: the settings of this training; None for those of the learner.
    release: whether the learner's own training, without projection, follows.

  References:
    Saha et al., `Gradient projection memory for continual learning
    <https://arxiv.org/abs/2103.09762>`_, 2021
  """

  threshold: float = 0.97
  growth: float = 0.003
  samples: int | None = 125
  others: str = "frozen"
  training: _training.Training | None = None
  release: bool = True


def check(projection: Projection) -> None:
  """Raises ValueError where a setting is out of its range.

  >>> check(Projection())
  """
  if not 0 < projection.threshold <= 1 or not projection.growth >= 0:
    raise ValueError(
      "threshold must lie in (0, 1] and growth must not be negative, got "
      f"{projection.threshold} and {projection.growth}."
    )
  if projection.others not in _OTHERS:
    raise ValueError(
      f"Unknown others {projection.others!r}. Choose {' or '.join(_OTHERS)}."
    )
  if projection.samples is not None and projection.samples < 1:
    raise ValueError(f"samples must be at least 1, got {projection.samples}.")
  if projection.training is not None:
    _training.check(projection.training, "projection.training")


def _grams(
  problem: _problem.Problem, params: PyTree, batches: list[Any]
) -> dict[str, jax.Array]:
  return _problem.per_seed(
    problem,
    lambda params: _problem.gram_matrices(
      problem, params, batches, reduction="sum"
    ),
    params,
  )


def init(problem: _problem.Problem) -> Projectors:
  """Projectors before the first task: zero, by the names of the kernels."""
  example = problem.examples(problem.stream.tasks[0].train[:1])["input"]
  return jax.tree.map(
    jnp.zeros_like, _grams(problem, problem.params, [example])
  )


def data(
  projection: Projection, projectors: Projectors, task: int
) -> dict[str, Any]:
  """What `_updates.project` needs to know, with an axis of seeds."""
  seeds = len(next(iter(projectors.values())))
  free = projection.others == "free" or task == 0
  return {
    "projectors": projectors,
    "free": jnp.full(seeds, free, jnp.float32),
  }


def grown(
  projector: np.ndarray, gram: np.ndarray, threshold: float
) -> np.ndarray:
  """A projector with the directions that a task adds.

  The fewest eigenvectors of (I - P) G (I - P), largest first, are added so that

      tr(P G) >= threshold * tr(G)

  Args:
    projector: P, `[n, n]`.
    gram: G, the Gram matrix of the layer's inputs on the task, `[n, n]`.
    threshold: in (0, 1].

  Returns:
    The projector, float64 `[n, n]`.

  >>> grown(np.zeros((2, 2)), np.diag([9.0, 1.0]), 0.9).round(6).tolist()
  [[1.0, 0.0], [0.0, 0.0]]
  """
  gram = gram.astype(np.float64)
  basis = _range(projector.astype(np.float64))
  projector = basis @ basis.T
  total = np.trace(gram)
  rest = np.eye(len(gram)) - projector
  values, vectors = np.linalg.eigh(rest @ gram @ rest)
  values, vectors = values[::-1], vectors[:, ::-1]
  # Rounding must not add directions that hold nothing: those in P among them.
  real = int((values > _ROUNDING * total).sum())
  missing = threshold * total - np.trace(projector @ gram)
  if missing <= _ROUNDING * total or not real:
    return projector
  sums = values[:real].cumsum()
  enough = np.flatnonzero(sums >= missing - _ROUNDING * total)
  count = int(enough[0]) + 1 if enough.size else real
  return projector + vectors[:, :count] @ vectors[:, :count].T


def _range(projector: np.ndarray) -> np.ndarray:
  """An orthonormal basis of what a projector keeps, rounded or not."""
  values, vectors = np.linalg.eigh((projector + projector.T) / 2)
  return vectors[:, values > 0.5]


def after_task(
  problem: _problem.Problem,
  projection: Projection,
  projectors: Projectors,
  params: PyTree,
  task: int,
) -> Projectors:
  """The projectors with the directions of a task.

  Args:
    problem: the problem.
    projection: the settings.
    projectors: those of the tasks before.
    params: the network after the task, with an axis of seeds.
    task: its number.

  Returns:
    The projectors.
  """
  threshold = min(1.0, projection.threshold + task * projection.growth)
  batches = [
    batch["input"] for batch in problem.batches(task, projection.samples)
  ]
  grams = _grams(problem, params, batches)
  return {
    name: jnp.stack(
      [
        jnp.asarray(grown(p, g, threshold), jnp.float32)
        for p, g in zip(np.asarray(held), np.asarray(grams[name]), strict=True)
      ]
    )
    for name, held in projectors.items()
  }
