"""BECAME: a Bayesian coefficient between a projected and a free training."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree as tree_lib
from jaxmerge.continual import _fisher, _merge, _problem

PyTree = Any


def became_coefficient(step: PyTree, new: PyTree, old: PyTree) -> jax.Array:
  """The share of the free training: `D'FD / D'(F + F_old)D`.

  It minimises the sum of the two quadratic losses along the line from the
  projected to the free training's end: that of the new task, of curvature F
  around the free one, and that of the tasks before, of curvature F_old around
  the projected one.

  Args:
    step: D, the free training's parameters less the projected one's.
    new: F, the diagonal Fisher information of the task there.
    old: F_old, the sum of those of the tasks before.

  Returns:
    A scalar in [0, 1]; NaN where the two products are not finite and positive,
    or both zero.

  >>> print(became_coefficient({"w": 2.0}, {"w": 1.0}, {"w": 3.0}))
  0.25
  """

  def square(leaf: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.asarray(leaf).astype(jnp.asarray(like).dtype) ** 2

  squares = jax.tree.map(square, step, new)
  own, others = tree_lib.dot(squares, new), tree_lib.dot(squares, old)
  share = own / (own + others)
  return jnp.where(jnp.isfinite(own) & jnp.isfinite(others), share, jnp.nan)


_coefficients = jax.jit(jax.vmap(became_coefficient))


@jax.jit
def _lerp(first: PyTree, second: PyTree, shares: jax.Array) -> PyTree:
  """`first + shares (second - first)`, a share each seed."""
  return jax.vmap(tree_lib.lerp)(first, second, shares)


def became(
  *,
  samples: int | None = None,
  labels: str = "exact",
  reduction: str = "mean",
  head: str = "all",
  chunk_size: int | None = None,
) -> _merge.Merge:
  """BECAME's closed-form merge of two stages of training.

      lambda = D'F_t D / D'(F_t + sum_{i<t} F_i) D,  D = theta_hat - theta_GP
      theta_t = (1 - lambda) theta_GP + lambda theta_hat

  with theta_GP where the projected training of the task has ended (see
  `Projection`), theta_hat where the one without projection has that went on
  from there, F_t the diagonal Fisher information at theta_hat on the task. Then
  F_t at theta_t joins the sum: two vectors are held, whatever the number of
  tasks. Without a projection theta_GP is where the task's training has started.

  Args:
    samples: number of examples of a task that the Fisher is estimated on; None
      for all.
    labels: as in `jaxmerge.merging.diagonal_fisher`: "exact" or "empirical".
    reduction: "mean", or "sum" over the examples, by which tasks with more of
      them count more. lambda depends on it only where their numbers differ.
    head: classes that the probabilities are over: "all", those "seen" so far,
      or those of the "task".
    chunk_size: as in `jaxmerge.merging.diagonal_fisher`.

  Returns:
    The merge; it needs a learner whose tasks start at the merged network.

  Raises:
    ValueError: an option is out of its range; while merging, a Fisher
      information that is not finite, or zero wherever the training has moved.

  References:
    Li et al., `BECAME: Bayesian continual learning with adaptive model merging
    <https://arxiv.org/abs/2504.02666>`_, 2025

  >>> became().name
  'became(mean, exact)'
  """
  _fisher.check(samples, labels, head)
  if reduction not in ("mean", "sum"):
    raise ValueError(f"Unknown reduction {reduction!r}. Choose mean or sum.")

  def fisher(problem: _problem.Problem, params: PyTree, task: int) -> PyTree:
    return _fisher.task_fisher(
      problem,
      params,
      task,
      samples=samples,
      labels=labels,
      head=head,
      reduction=reduction,
      chunk_size=chunk_size,
    )

  def init(problem: _problem.Problem) -> _merge.State:
    return {
      "fisher": jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, tree_lib.accumulation_dtype(leaf)),
        problem.params,
      )
    }

  def update(
    problem: _problem.Problem, state: _merge.State, step: _merge.Step
  ) -> tuple[PyTree, _merge.State]:
    merged, shares = step.expert, None
    if step.task:
      way = tree_lib.sub(step.expert, step.anchor)
      new = fisher(problem, step.expert, step.task)
      shares = _coefficients(way, new, state["fisher"])
      _check_shares(np.asarray(shares), step.task)
      merged = _lerp(step.anchor, step.expert, shares)
    at_merge = fisher(problem, merged, step.task)
    _check_fisher(at_merge, step.task)
    if problem.report is not None and shares is not None:
      problem.report("became", step.task, {"coefficient": np.asarray(shares)})
    return merged, {"fisher": tree_lib.add(state["fisher"], at_merge)}

  parts = [reduction, labels]
  parts += [f"samples={samples}"] if samples else []
  parts += [f"head={head}"] if head != "all" else []
  return _merge.Merge(
    f"became({', '.join(parts)})",
    init,
    update,
    runs_network=True,
    needs_start=True,
  )


def _check_fisher(fisher: PyTree, task: int) -> None:
  """Raises ValueError for a Fisher information that tells nothing."""
  totals = np.asarray(_totals(fisher))
  bad = np.flatnonzero(~(np.isfinite(totals) & (totals > 0)))
  if bad.size:
    raise ValueError(
      f"The Fisher information of task {task} (seed {bad[0]}) is"
      f" {'zero' if totals[bad[0]] == 0 else 'not finite'}. Take more samples,"
      " look whether the task's training has diverged, or, where the task has"
      " one class, take the probabilities over more: head='seen' or 'all'."
    )


@jax.jit
@jax.vmap
def _totals(fisher: PyTree) -> jax.Array:
  return jnp.stack([leaf.sum() for leaf in jax.tree.leaves(fisher)]).sum()


def _check_shares(shares: np.ndarray, task: int) -> None:
  bad = np.flatnonzero(~np.isfinite(shares))
  if bad.size:
    raise ValueError(
      f"The Fisher information of task {task} (seed {bad[0]}) is not finite, or"
      " zero wherever the training has moved: the coefficient is undefined."
      " Take more samples, or look whether the task's training has diverged."
    )
