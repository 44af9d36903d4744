"""Iso-C and Iso-CTS: task matrices with all singular values alike."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from jaxmerge.merging import (
  _combine,
  _gathered,
  _leafwise,
  _leaves,
  _matrices,
  _method,
  _values,
)

PyTree = Any
Array = jax.Array
Values = dict[str, Any]


def _common_and_specific(
  taus: Array, full: int, fraction: float
) -> tuple[Array, Array, Array]:
  """The vectors and values of a sum, and of what it leaves of each task.

  Args:
    taus: Task matrices [T, ..., m, n].
    full: The smaller of m and n.
    fraction: Share of the common vectors.

  Returns:
    Left vectors [..., m, k], values [..., k], and right vectors [..., k, n].
  """
  tasks = taus.shape[0]
  # As many for each task, as in the paper's code, which does not see to it
  # that they are not more than there are.
  specific = min(full // tasks, round((full - int(full * fraction)) / tasks))
  common = full - tasks * specific
  u, s, vh = _matrices.svd(taus.sum(axis=0), common)
  if not specific:
    return u, s, vh
  inside = u @ (jnp.conj(jnp.swapaxes(u, -2, -1)) @ taus)
  # What is left of a task that lies inside is rounding.
  size = jnp.linalg.norm(taus, ord=2, axis=(-2, -1))
  us, ss, vhs = _matrices.svd(taus - inside, specific, size)
  vs = _matrices.join(jnp.swapaxes(vhs, -2, -1))
  return (
    jnp.concatenate([_matrices.join(us), u], axis=-1),
    jnp.concatenate([_matrices.join(ss), s], axis=-1),
    jnp.concatenate([jnp.swapaxes(vs, -2, -1), vh], axis=-2),
  )


@functools.cache
def _common_rule() -> _leafwise.LeafRule:
  def init(base: Array, zero: Array) -> tuple[Array, Array]:
    return jnp.full_like(base, zero), zero

  def update(
    accumulator: tuple[Array, Array],
    base: Array,
    leaf: Array,
    step: _leafwise.Step,
  ) -> tuple[Array, Array]:
    total, count = accumulator
    return total + step.weight * (leaf - base), count + 1

  def finalize(
    accumulator: tuple[Array, Array],
    base: Array,
    values: Values,
    summary: Array | None,
  ) -> Array:
    del summary
    total, count = accumulator
    layout = values["layout"].value
    if not layout.rows or not base.size:
      merged = _combine.divide(total, jnp.broadcast_to(count, total.shape))
    else:
      with jax.default_matmul_precision("highest"):
        factors = _matrices.svd(_matrices.as_matrices(total, layout))
        merged = _matrices.isotropic(*factors).reshape(base.shape)
    return base + values["scale"].astype(base.dtype) * merged

  return _leafwise.LeafRule(init, update, finalize)


@functools.cache
def _specific_rule() -> _gathered.GatherRule:
  def merge(
    base: Array, leaves: Sequence[Array], weights: Array, values: Values
  ) -> Array:
    layout = values["layout"].value
    fraction = values["common_fraction"].value
    taus = _matrices.task_vectors(base, leaves, weights)
    if not layout.rows:
      merged = taus.mean(axis=0)
    else:
      taus = jax.vmap(lambda tau: _matrices.as_matrices(tau, layout))(taus)
      with jax.default_matmul_precision("highest"):
        u, s, vh = _common_and_specific(taus, min(taus.shape[-2:]), fraction)
        merged = _matrices.isotropic(
          _matrices.polar(u), s, _matrices.polar(vh)
        ).reshape(base.shape)
    return base + values["scale"].astype(base.dtype) * merged

  return _gathered.GatherRule(merge)


def _options(scale: Any, row_axes: Any, stack_axes: Any) -> Values:
  return {
    "scale": scale,
    "layout": _matrices.layouts(row_axes, stack_axes),
  }


def _specific_options(
  common_fraction: Any, scale: Any, row_axes: Any, stack_axes: Any
) -> Values:
  _values.check_range(common_fraction, "common_fraction", 0, 1)
  return {
    "common_fraction": _matrices.fractions(common_fraction, "common_fraction"),
    **_options(scale, row_axes, stack_axes),
  }


def iso_c_method(
  *,
  scale: Any = 1.0,
  row_axes: Any = None,
  stack_axes: Any = 0,
  **options: Unpack[_leaves.MergeOptions],
) -> _method.MergeMethod:
  """Iso-C as a method that keeps the sum of the task vectors; see `iso_c`.

  Args:
    scale: See `iso_c`, as the rest.
    row_axes: How leaves are matrices.
    stack_axes: How leaves are stacks of them.
    **options: See `MergeOptions`.

  Returns:
    The method.

  >>> method = iso_c_method()
  >>> state = method.init({"w": jnp.zeros((2, 2))})
  >>> for tau in ([[3.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 2.0]]):
  ...   state = method.update(state, {"w": jnp.asarray(tau)})
  >>> merged = method.finalize(state)["w"]
  >>> print([round(x, 3) for x in jnp.diag(merged).tolist()])
  [3.0, 3.0]
  """
  return _leafwise.leafwise_method(
    _common_rule(), options=_options(scale, row_axes, stack_axes), **options
  )


def iso_c(
  base: PyTree,
  models: Sequence[PyTree],
  *,
  weights: Any = None,
  scale: Any = 1.0,
  row_axes: Any = None,
  stack_axes: Any = 0,
  **options: Unpack[_leaves.MergeOptions],
) -> PyTree:
  r"""Adds the sum of the task matrices with its singular values made equal.

  For each leaf that is a matrix, with r the smaller of its sides:

  .. math::
    \sum_i w_i \Delta_i = U \Sigma V^\top, \quad
    \bar\sigma = \frac{1}{r} \sum_j \sigma_j, \quad
    \theta = \theta_0 + \lambda \bar\sigma U V^\top

  Leaves that are no matrix (biases, scales) get the mean of the task vectors,
  :math:`\theta_0 + \frac{\lambda}{T} \sum_i w_i \tau_i`, as in the paper's
  code.

  The vectors of singular values that are zero are not determined by the sum,
  and the paper's code takes whatever the decomposition returns. Here they are
  left out; the mean is over all r values, as in the paper.

  Scales may be differentiated, models and weights only where singular values
  differ and are not zero: else singular vectors have no finite derivatives.

  Args:
    base: :math:`\theta_0`, the parameters that all models were tuned from.
    models: One or more trees of the structure of the base.
    weights: :math:`w_i`, 1 by default; see `task_arithmetic`.
    scale: :math:`\lambda`; see `magmax`. The paper chooses it on validation
      data.
    row_axes: How many axes of a leaf are the rows of the matrix; see
      `tsv_merge`.
    stack_axes: How many leading axes of a leaf count matrices; see
      `tsv_merge`.
    **options: See `MergeOptions`.

  Returns:
    The merged parameters, with the structure, shapes and dtypes of the base.

  Raises:
    TreeMismatchError: If a model differs from the base.
    ValueError: If there are no models, a value is out of its range, or no axis
      is left for the columns.

  References:
    Marczak et al., `No Task Left Behind: Isotropic Model Merging with Common
    and Task-Specific Subspaces <https://arxiv.org/abs/2502.04959>`_, 2025

  >>> models = [
  ...   {"w": jnp.asarray([[3.0, 0.0], [0.0, 0.0]])},
  ...   {"w": jnp.asarray([[1.0, 0.0], [0.0, 2.0]])},
  ... ]
  >>> merged = iso_c({"w": jnp.zeros((2, 2))}, models)["w"]
  >>> print([round(x, 3) for x in jnp.diag(merged).tolist()])
  [3.0, 3.0]
  """
  return _leafwise.merge(
    _common_rule(),
    base,
    models,
    weights,
    options=_options(scale, row_axes, stack_axes),
    **options,
  )


def iso_cts_method(
  *,
  common_fraction: Any = 0.8,
  scale: Any = 1.0,
  row_axes: Any = None,
  stack_axes: Any = 0,
  **options: Unpack[_leaves.MergeOptions],
) -> _method.MergeMethod:
  """Iso-CTS as a method, which keeps all models until the end; see `iso_cts`.

  Args:
    common_fraction: See `iso_cts`, as the rest.
    scale: Scale of the merged task vector.
    row_axes: How leaves are matrices.
    stack_axes: How leaves are stacks of them.
    **options: See `MergeOptions`.

  Returns:
    The method.

  >>> method = iso_cts_method(common_fraction=0.5)
  >>> state = method.init({"w": jnp.zeros((2, 2))})
  >>> for tau in ([[3.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 2.0]]):
  ...   state = method.update(state, {"w": jnp.asarray(tau)})
  >>> merged = method.finalize(state)["w"]
  >>> print([round(x, 3) for x in jnp.diag(merged).tolist()])
  [3.0, 3.0]
  """
  return _gathered.gathered_method(
    _specific_rule(),
    "iso_cts",
    options=_specific_options(common_fraction, scale, row_axes, stack_axes),
    **options,
  )


def iso_cts(
  base: PyTree,
  models: Sequence[PyTree],
  *,
  weights: Any = None,
  common_fraction: Any = 0.8,
  scale: Any = 1.0,
  row_axes: Any = None,
  stack_axes: Any = 0,
  **options: Unpack[_leaves.MergeOptions],
) -> PyTree:
  r"""Makes a common and each task's own subspace isotropic (Iso-CTS).

  For each leaf that is a matrix, with r the smaller of its sides, the k first
  singular vectors of the sum and the s first of what is left of each task:

  .. math::
    \sum_i w_i \Delta_i = U \Sigma V^\top, \quad
    w_i \Delta_i - U_{1:k} U_{1:k}^\top w_i \Delta_i
      = U^i \Sigma^i V^{i\top} \\
    U_* = [U^1_{1:s} \dots U^T_{1:s}\; U_{1:k}], \quad
    V_* = [V^1_{1:s} \dots V^T_{1:s}\; V_{1:k}], \quad k + T s = r \\
    \bar\sigma = \frac{1}{r} \Big( \sum_{j \le k} \sigma_j
      + \sum_i \sum_{j \le s} \sigma^i_j \Big), \quad
    \theta = \theta_0 + \lambda \bar\sigma U_\perp V_\perp^\top

  where :math:`U_\perp` and :math:`V_\perp` are the nearest matrices with
  orthonormal columns. :math:`s` is :math:`(1 - f) r / T`, rounded to a whole
  number, but at most :math:`r / T`; where it is zero (fewer vectors to share
  out than tasks), this is `iso_c`.

  Leaves that are no matrix, and vectors of singular values that are zero or
  that depend on each other, are treated as in `iso_c` and `tsv_merge`.

  Scales may be differentiated, models and weights may not: the singular values
  of orthonormal vectors are equal, and the derivatives infinite there.

  Args:
    base: :math:`\theta_0`, the parameters that all models were tuned from.
    models: One or more trees of the structure of the base.
    weights: :math:`w_i`, 1 by default; see `task_arithmetic`.
    common_fraction: :math:`f`, the share of the common vectors, in [0, 1]: a
      scalar, a prefix of the tree, or a mapping from regular expressions.
    scale: :math:`\lambda`; see `magmax`. The paper chooses it on validation
      data.
    row_axes: How many axes of a leaf are the rows of the matrix; see
      `tsv_merge`.
    stack_axes: How many leading axes of a leaf count matrices; see
      `tsv_merge`.
    **options: See `MergeOptions`.

  Returns:
    The merged parameters, with the structure, shapes and dtypes of the base.

  Raises:
    TreeMismatchError: If a model differs from the base.
    ValueError: If there are no models, a value is out of its range, or no axis
      is left for the columns.

  References:
    Marczak et al., `No Task Left Behind: Isotropic Model Merging with Common
    and Task-Specific Subspaces <https://arxiv.org/abs/2502.04959>`_, 2025

  >>> models = [
  ...   {"w": jnp.asarray([[3.0, 0.0], [0.0, 0.0]])},
  ...   {"w": jnp.asarray([[1.0, 0.0], [0.0, 2.0]])},
  ... ]
  >>> merged = iso_cts({"w": jnp.zeros((2, 2))}, models, common_fraction=0.5)
  >>> print([round(x, 3) for x in jnp.diag(merged["w"]).tolist()])
  [3.0, 3.0]
  """
  return _gathered.merge(
    _specific_rule(),
    "iso_cts",
    base,
    models,
    weights,
    options=_specific_options(common_fraction, scale, row_axes, stack_axes),
    **options,
  )
