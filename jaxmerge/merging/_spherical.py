"""Geometry of leaves as vectors: lengths, directions and great circles.

A leaf is one vector, or holds one along some of its axes. Reductions keep the
axes that they sum over, so that their results multiply the leaf. A complex leaf
is taken for the real vector of its parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Axes = tuple[int, ...]


def check_axis(axis: Any) -> Axes:
  """The axes as a tuple, or an error that says what is wrong with them."""
  axes = tuple(axis) if isinstance(axis, Sequence) else (axis,)
  # A string is a sequence, and a bool is an int.
  if not axes or any(type(one) is not int for one in axes):
    raise ValueError(f"axis must be an int or a tuple of ints; got {axis!r}")
  return axes


def vector_axes(ndim: int, axis: Axes | None) -> Axes:
  """The axes that a vector runs along in a leaf.

  Args:
    ndim: Number of axes of the leaf.
    axis: The axes asked for, those that the leaf lacks among them; None for
      all.

  Returns:
    Axes from 0; all, if the leaf has none of those asked for.
  """
  found = {one % ndim for one in axis or () if -ndim <= one < ndim}
  return tuple(sorted(found)) or tuple(range(ndim))


def real_dtype(x: Array) -> Any:
  """The dtype of the parts of a leaf."""
  return jnp.finfo(x.dtype).dtype


def tiny(x: Array) -> float:
  """What is not told from zero among numbers of the order of one."""
  return 8 * float(jnp.finfo(x.dtype).eps)


def _square(x: Array) -> Array:
  if jnp.iscomplexobj(x):
    return x.real * x.real + x.imag * x.imag
  return x * x


def dot(x: Array, y: Array, axes: Axes) -> Array:
  """The inner product of the vectors along some axes."""
  product = (x.conj() * y).real if jnp.iscomplexobj(x) else x * y
  return product.sum(axis=axes, keepdims=True)


def norm(x: Array, axes: Axes) -> Array:
  """The length of the vectors; its gradient is 0 where it is 0."""
  # Divided by the largest entry, squares neither overflow nor vanish.
  largest = jax.lax.stop_gradient(jnp.abs(x).max(axis=axes, keepdims=True))
  is_zero = largest == 0
  divisor = jnp.where(is_zero, jnp.ones_like(largest), largest)
  squared = _square(x / divisor.astype(x.dtype)).sum(axis=axes, keepdims=True)
  length = divisor * jnp.sqrt(
    jnp.where(is_zero, jnp.ones_like(squared), squared)
  )
  return jnp.where(is_zero, jnp.zeros_like(length), length)


def unit(x: Array, axes: Axes) -> tuple[Array, Array]:
  """Directions, zero for zero vectors, and lengths."""
  length = norm(x, axes)
  divisor = jnp.where(length == 0, jnp.ones_like(length), length)
  return x / divisor.astype(x.dtype), length


def _angle(difference: Array, total: Array) -> Array:
  """The angle of two directions, from the lengths of u - v and of u + v.

  The arc cosine of the inner product loses half of the digits where the angle
  is near 0 or pi, as it is between fine-tuned models.
  """
  both = (difference == 0) & (total == 0)
  return 2 * jnp.arctan2(
    difference, jnp.where(both, jnp.ones_like(total), total)
  )


def interpolate(
  first: Array, second: Array, t: Array, axes: Axes, threshold: Array | float
) -> Array:
  """Spherical interpolation of the vectors along some axes.

  Args:
    first: The vectors at t = 0.
    second: The vectors at t = 1.
    t: A real scalar.
    axes: The axes that a vector runs along.
    threshold: Interpolation is linear where the magnitude of the cosine is
      above it, where a vector is zero, and where the sine vanishes.

  Returns:
    The vectors at `t`.
  """
  one, first_length = unit(first, axes)
  two, second_length = unit(second, axes)
  theta = _angle(norm(one - two, axes), norm(one + two, axes))
  is_linear = (
    (first_length == 0)
    | (second_length == 0)
    | (jnp.abs(jnp.cos(theta)) > threshold)
    | (jnp.abs(jnp.sin(theta)) < tiny(first))
  )
  # The angle is made harmless first, so that no gradient becomes NaN.
  theta = jnp.where(is_linear, jnp.full_like(theta, math.pi / 2), theta)
  sine = jnp.sin(theta)
  parts = [
    jnp.where(is_linear, part, jnp.sin(part * theta) / sine).astype(first.dtype)
    for part in (1 - t, t)
  ]
  return parts[0] * first + parts[1] * second
