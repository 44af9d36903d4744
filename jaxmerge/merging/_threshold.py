"""Exact selection by magnitude without sorting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def keep_count(density: Any, size: int) -> np.uint32:
  """Number of entries to keep: at least one of a vector that has any.

  Args:
    density: Fraction to keep, in (0, 1]; known, not traced.
    size: Number of entries.

  Returns:
    `int(density * size)`, at least 1.

  Raises:
    ValueError: If the density is traced, or the vector too long to count.
  """
  if isinstance(density, jax.core.Tracer):
    raise ValueError(
      "density must be a number when entries are kept by magnitude, not a"
      " traced value: how many are kept is counted before compilation"
    )
  if size > np.iinfo(np.uint32).max:
    raise ValueError(
      f"a vector of {size} entries is too long to count in 32 bits; trim leaf"
      " by leaf with scope='leaf'"
    )
  return np.uint32(min(size, max(1, int(float(density) * size))))


def magnitude_bits(x: Array, dtype: Any = jnp.uint32) -> Array:
  """Integers in the order of the magnitudes of numbers.

  Args:
    x: Numbers, complex ones too.
    dtype: uint32 or uint64, not narrower than the magnitudes: that of another
      array's bits, to be compared with.

  Returns:
    Unsigned integers of the shape of `x`.
  """
  # The bit patterns of IEEE numbers that are not negative are in their order.
  magnitude = jnp.abs(x)
  size = max(jnp.dtype(dtype).itemsize, magnitude.dtype.itemsize)
  return jax.lax.bitcast_convert_type(
    magnitude.astype(f"float{8 * size}"), jnp.dtype(f"uint{8 * size}")
  )


def kth_largest_bits(leaves: Sequence[Array], k: Array) -> Array:
  """The k-th largest magnitude among all entries of some arrays, exactly.

  Found bit by bit: the largest t such that at least k entries reach it. Each
  bit takes one pass that counts, so that nothing is sorted or copied.

  Args:
    leaves: Arrays; their dtypes may differ.
    k: Which one, from 1; at most the number of entries.

  Returns:
    The magnitude as `magnitude_bits`; those that are not below it are the k
    largest, and more where there are equals.
  """
  sizes = [jnp.abs(leaf).dtype.itemsize for leaf in leaves]
  widest = jnp.dtype(f"uint{8 * max(4, *sizes)}")
  bits = [magnitude_bits(leaf, widest) for leaf in leaves]
  dtype = bits[0].dtype
  # The sign's bit is never set.
  top = 8 * dtype.itemsize - 2
  one = jnp.ones((), dtype)

  def body(i: Array, low: Array) -> Array:
    candidate = low | (one << (top - i).astype(dtype))
    count = sum(
      jnp.sum(values >= candidate, dtype=jnp.uint32) for values in bits
    )
    return jnp.where(count >= k, candidate, low)

  return jax.lax.fori_loop(0, top + 1, body, jnp.zeros((), dtype))
