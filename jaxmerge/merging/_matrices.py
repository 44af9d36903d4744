"""Leaves as matrices, and the decompositions that spectral rules share."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmerge.merging import _leaves, _values

PyTree = Any
Array = jax.Array

# Flax's kernels have the outputs on the last axis, or, where attention splits
# them over heads, on the last two. Its biases may have an axis of heads, too.
_FLAX_ROWS = {
  r"(^|/)(query|key|value)/kernel$": 1,
  r"(^|/)bias$": 0,
  ".*": -1,
}


class Layout(NamedTuple):
  """How a leaf is a stack of matrices.

  Attributes:
    stack: Number of leading axes that count the matrices.
    rows: Number of axes after these that are the rows; the others are the
      columns. 0 for a leaf that is no matrix.
  """

  stack: int
  rows: int


def _whole(value: Any, name: str, leaf: str) -> int:
  """A number of axes, which must be known."""
  if not _values.is_traced(value):
    try:
      return operator.index(value)
    except TypeError:
      pass
  raise ValueError(
    f"{name} must be a known integer, a number of axes; got {value!r} for leaf"
    f" '{leaf}'"
  )


def _layout(leaf: str, shape: Sequence[int], rows: Any, stack: Any) -> Layout:
  rows = _whole(rows, "row_axes", leaf)
  stack = _whole(stack, "stack_axes", leaf)
  if stack < 0:
    raise ValueError(
      f"stack_axes is {stack} for leaf '{leaf}'; give 0 or more leading axes"
    )
  axes = len(shape) - stack
  if axes < 2:
    return Layout(0, 0)
  if not -axes < rows < axes:
    raise ValueError(
      f"row_axes is {rows} for leaf '{leaf}' of shape {tuple(shape)}, which"
      f" leaves no axis for the columns; give {1 - axes} to {axes - 1}, where 0"
      " makes it no matrix"
    )
  return Layout(stack, rows % axes)


def layouts(row_axes: Any, stack_axes: Any) -> _leaves.PerLeaf:
  """The option that says how each leaf is a matrix.

  Args:
    row_axes: Number of axes that are rows; Flax's layout if None.
    stack_axes: Number of leading axes that count matrices.

  Returns:
    The option; its values are `Layout`, static.
  """

  def compute(
    base: PyTree, merged: Sequence[_leaves.Leaf]
  ) -> list[_leaves.Static]:
    leaves = jax.tree.leaves(base)
    wanted = _FLAX_ROWS if row_axes is None else row_axes
    rows = _values.per_leaf(wanted, base, "row_axes")
    stacks = _values.per_leaf(stack_axes, base, "stack_axes")
    return [
      _leaves.Static(
        _layout(
          leaf.name,
          jnp.shape(leaves[leaf.place]),
          rows[leaf.place],
          stacks[leaf.place],
        )
      )
      for leaf in merged
    ]

  return _leaves.PerLeaf(compute)


def fractions(value: Any, name: str) -> _leaves.PerLeaf:
  """An option that is a known fraction for each leaf, static.

  Args:
    value: A scalar, a prefix of the tree or a mapping; None for all leaves.
    name: What messages call it.

  Returns:
    The option.
  """

  def compute(
    base: PyTree, merged: Sequence[_leaves.Leaf]
  ) -> list[_leaves.Static]:
    if value is None:
      return [_leaves.Static(None)] * len(merged)
    found = _values.per_leaf(value, base, name)
    for leaf in merged:
      if _values.is_traced(found[leaf.place]):
        raise ValueError(
          f"{name} must be a number, not a traced value: how many singular"
          " vectors are kept is counted before compilation"
        )
    return [_leaves.Static(float(found[leaf.place])) for leaf in merged]

  return _leaves.PerLeaf(compute)


def as_matrices(leaf: Array, layout: Layout) -> Array:
  """A leaf as a stack of matrices, [..., m, n]."""
  stack, rest = leaf.shape[: layout.stack], leaf.shape[layout.stack :]
  rows, columns = rest[: layout.rows], rest[layout.rows :]
  return leaf.reshape(*stack, math.prod(rows), math.prod(columns))


def task_vectors(base: Array, leaves: Sequence[Array], weights: Array) -> Array:
  """The weighted task vectors of a leaf, [T, ...]."""
  return jnp.stack(
    [
      weight * (leaf - base)
      for weight, leaf in zip(weights, leaves, strict=True)
    ]
  )


def svd(
  matrices: Array, rank: int | None = None, size: Array | None = None
) -> tuple[Array, Array, Array]:
  """Singular vectors and values, as far as a matrix determines them.

  The vectors of singular values that are zero but for rounding are arbitrary,
  differ from machine to machine, and would disturb those that they are made
  orthogonal with: they are set to zero, and so are their values.

  Args:
    matrices: Matrices [..., m, n].
    rank: How many are kept; all if None.
    size: Spectral norms [...] that rounding is relative to; by default the
      matrices'.

  Returns:
    The left vectors [..., m, k], the values [..., k] in falling order, and the
    right vectors [..., k, n].
  """
  u, s, vh = jnp.linalg.svd(matrices, full_matrices=False)
  size = s.max(axis=-1, initial=0) if size is None else size
  u, s, vh = u[..., :rank], s[..., :rank], vh[..., :rank, :]
  # Zeros come out as up to 5 eps of the norm, hardly more in large matrices.
  # Not the bound of pinv, which grows with the side: it would cut the small
  # values that large matrices have.
  bound = (4 + max(matrices.shape[-2:]) ** 0.5) * jnp.finfo(s.dtype).eps
  # Not `<=`, lest NaN be set to zero.
  is_zero = (s <= bound * size[..., None]) | (s == 0)
  return (
    jnp.where(is_zero[..., None, :], 0, u),
    jnp.where(is_zero, 0, s),
    jnp.where(is_zero[..., :, None], 0, vh),
  )


def polar(matrices: Array) -> Array:
  r"""The factor :math:`Q` of the polar decomposition :math:`A = Q P`.

  It is the nearest matrix with orthonormal columns (or rows, if there are more
  columns than rows); where that is not unique, because the columns depend on
  each other, the canonical one, which is zero where :math:`A` is.

  Args:
    matrices: Matrices [..., m, n].

  Returns:
    Matrices of the same shape.
  """
  u, _, vh = svd(matrices)
  return u @ vh


def join(columns: Array) -> Array:
  """Puts the columns of matrices [T, ..., m, k] beside each other."""
  columns = jnp.moveaxis(columns, 0, -2)
  return columns.reshape(*columns.shape[:-2], -1)


def isotropic(u: Array, s: Array, vh: Array) -> Array:
  """A product with all singular values replaced by their mean.

  Args:
    u: Left vectors [..., m, k].
    s: Singular values [..., k].
    vh: Right vectors [..., k, n].

  Returns:
    Matrices [..., m, n].
  """
  mean = s.mean(axis=-1).astype(u.dtype)
  return mean[..., None, None] * (u @ vh)
