"""The ground cost between neurons."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmerge import tree


def squared_distances(x: jax.Array, y: jax.Array) -> jax.Array:
  r"""Squared Euclidean distances: :math:`C_{gj} = \|x_g - y_j\|^2`.

  The differences are squared and summed as they are. The cheaper expansion
  :math:`\|x\|^2 + \|y\|^2 - 2 x \cdot y` cancels where two points are close,
  which is where an assignment is decided.

  Args:
    x: Floating-point, shape [n, d].
    y: Floating-point, shape [m, d], of the dtype of ``x``.

  Returns:
    Shape [n, m]; float32 for half types, else the dtype of ``x``.

  Raises:
    ValueError: If the arguments are not two matrices of equal width.

  >>> print(squared_distances(jnp.array([[0.0]]), jnp.array([[1.0], [3.0]])))
  [[1. 9.]]
  """
  if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
    raise ValueError(
      "squared_distances needs two matrices with one row a point and equal"
      f" widths; got shapes {x.shape} and {y.shape}"
    )
  return _sum_squares(x, y)


@jax.jit
def _sum_squares(x: jax.Array, y: jax.Array) -> jax.Array:
  dtype = tree.accumulation_dtype(x)

  # One feature after the other: nothing larger than the result is held.
  def add_feature(
    total: jax.Array, feature: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, None]:
    a, b = feature
    return total + jnp.square(a[:, None] - b[None, :]), None

  start = jnp.zeros((x.shape[0], y.shape[0]), dtype)
  total, _ = jax.lax.scan(
    add_feature, start, (x.T.astype(dtype), y.T.astype(dtype)), unroll=8
  )
  return total
