"""TSV-M: task singular vectors, made orthogonal and merged."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from jaxmerge.merging import (
  _gathered,
  _leaves,
  _matrices,
  _method,
  _values,
)

PyTree = Any
Array = jax.Array


def _merged_matrices(taus: Array, fraction: float | None) -> Array:
  """Merges task matrices [T, ..., m, n]."""
  tasks, full = taus.shape[0], min(taus.shape[-2:])
  # Not full * (1 / tasks), which may round to less.
  rank = full // tasks if fraction is None else int(fraction * full)
  u, s, vh = _matrices.svd(taus, max(1, rank))
  u, s = _matrices.join(u), _matrices.join(s)
  v = _matrices.join(jnp.swapaxes(vh, -2, -1))
  left, right = _matrices.polar(u), _matrices.polar(v)
  s = s.astype(left.dtype)
  return (left * s[..., None, :]) @ jnp.swapaxes(right, -2, -1)


@functools.cache
def _rule() -> _gathered.GatherRule:
  def merge(
    base: Array,
    leaves: Sequence[Array],
    weights: Array,
    values: dict[str, Any],
  ) -> Array:
    layout, fraction = values["layout"].value, values["rank_fraction"].value
    taus = _matrices.task_vectors(base, leaves, weights)
    if layout.rows:
      taus = jax.vmap(lambda tau: _matrices.as_matrices(tau, layout))(taus)
      # Accelerators multiply in less than float32 by default.
      with jax.default_matmul_precision("highest"):
        merged = _merged_matrices(taus, fraction).reshape(base.shape)
    else:
      merged = taus.mean(axis=0)
    return base + values["scale"].astype(base.dtype) * merged

  return _gathered.GatherRule(merge)


def _options(
  rank_fraction: Any, scale: Any, row_axes: Any, stack_axes: Any
) -> dict[str, Any]:
  if rank_fraction is not None:
    _values.check_range(rank_fraction, "rank_fraction", 0, 1, open_low=True)
  return {
    "rank_fraction": _matrices.fractions(rank_fraction, "rank_fraction"),
    "scale": scale,
    "layout": _matrices.layouts(row_axes, stack_axes),
  }


def tsv_merge_method(
  *,
  rank_fraction: Any = None,
  scale: Any = 1.0,
  row_axes: Any = None,
  stack_axes: Any = 0,
  **options: Unpack[_leaves.MergeOptions],
) -> _method.MergeMethod:
  """TSV-M as a method, which keeps all models until the end; see `tsv_merge`.

  Args:
    rank_fraction: See `tsv_merge`, as the rest.
    scale: Scale of the merged task vector.
    row_axes: How leaves are matrices.
    stack_axes: How leaves are stacks of them.
    **options: See `MergeOptions`.

  Returns:
    The method.

  >>> method = tsv_merge_method()
  >>> state = method.init({"w": jnp.zeros((2, 2))})
  >>> for tau in ([[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 3.0]]):
  ...   state = method.update(state, {"w": jnp.asarray(tau)})
  >>> merged = method.finalize(state)["w"]
  >>> print([round(x, 3) for x in jnp.diag(merged).tolist()])
  [2.0, 3.0]
  """
  return _gathered.gathered_method(
    _rule(),
    "tsv_merge",
    options=_options(rank_fraction, scale, row_axes, stack_axes),
    **options,
  )


def tsv_merge(
  base: PyTree,
  models: Sequence[PyTree],
  *,
  weights: Any = None,
  rank_fraction: Any = None,
  scale: Any = 1.0,
  row_axes: Any = None,
  stack_axes: Any = 0,
  **options: Unpack[_leaves.MergeOptions],
) -> PyTree:
  r"""Adds up task matrices whose singular vectors are made orthogonal (TSV-M).

  For each leaf that is a matrix, with the k largest singular values of each of
  T tasks and the nearest matrices with orthonormal columns:

  .. math::
    w_i \Delta_i &\approx U_i \Sigma_i V_i^\top, \quad
    U = [U_1 \dots U_T], \quad V = [V_1 \dots V_T] \\
    U_\perp &= U (U^\top U)^{-1/2}, \quad V_\perp = V (V^\top V)^{-1/2} \\
    \theta &= \theta_0 + \lambda U_\perp
      \mathrm{diag}(\Sigma_1, \dots, \Sigma_T) V_\perp^\top

  Leaves that are no matrix (biases, scales) get the mean of the task vectors,
  :math:`\theta_0 + \frac{\lambda}{T} \sum_i w_i \tau_i`, as in the paper's
  code.

  Where a singular value is zero, or vectors of several tasks depend on each
  other, the paper's factors are not unique and its code takes whatever the
  decomposition returns. Here such vectors are left out, and the inverse root
  is the pseudo-inverse: a task without a change in a leaf does not disturb the
  others, and equal models of rank k give that model.

  Scales may be differentiated, models and weights only where singular values
  differ and are not zero: else singular vectors have no finite derivatives.

  Args:
    base: :math:`\theta_0`, the parameters that all models were tuned from.
    models: One or more trees of the structure of the base.
    weights: :math:`w_i`, 1 by default; see `task_arithmetic`.
    rank_fraction: Fraction of the singular vectors that is kept of each task,
      in (0, 1]: k is its product with the smaller side of the matrix, rounded
      down, but at least one (the paper's code drops a leaf with fewer singular
      vectors than tasks). By default one T-th, as in the paper. A scalar, a
      prefix of the tree, or a mapping from regular expressions.
    scale: :math:`\lambda`; see `magmax`.
    row_axes: How many axes of a leaf are the rows of the matrix; the others
      are its columns. A negative number counts the columns' axes; 0 says that
      the leaf is no matrix. A scalar, a prefix of the tree, or a mapping from
      regular expressions. The default is the linear map that a Flax module
      applies: all but the last axis are rows (a convolution's HWIO becomes
      [HWI, O]), except for leaves ``(query|key|value)/kernel`` [d, heads,
      head_dim], with one axis of rows, and for those named ``bias``, which are
      no matrices. PyTorch's layout [O, I, ...] needs 1. The paper's code has
      leaves of more than two axes averaged, as ``{"conv": 0, ".*": -1}`` does.
    stack_axes: How many leading axes of a leaf count matrices, as those of
      scanned layers do, each of which is merged on its own; 0 by default. In
      the same forms. ``row_axes`` counts from there.
    **options: See `MergeOptions`.

  Returns:
    The merged parameters, with the structure, shapes and dtypes of the base.

  Raises:
    TreeMismatchError: If a model differs from the base.
    ValueError: If there are no models, a value is out of its range, or no axis
      is left for the columns.

  References:
    Gargiulo et al., `Task Singular Vectors: Reducing Task Interference in
    Model Merging <https://arxiv.org/abs/2412.00081>`_, 2024

  >>> base = {"w": jnp.zeros((2, 2))}
  >>> models = [
  ...   {"w": jnp.asarray([[2.0, 0.0], [0.0, 0.0]])},
  ...   {"w": jnp.asarray([[0.0, 0.0], [0.0, 3.0]])},
  ... ]
  >>> merged = tsv_merge(base, models)["w"]
  >>> print([round(x, 3) for x in jnp.diag(merged).tolist()])
  [2.0, 3.0]
  """
  return _gathered.merge(
    _rule(),
    "tsv_merge",
    base,
    models,
    weights,
    options=_options(rank_fraction, scale, row_axes, stack_axes),
    **options,
  )
