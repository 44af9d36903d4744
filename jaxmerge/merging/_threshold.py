"""Exact selection by magnitude without sorting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.merging import _reductions

Array = jax.Array

# Bits that one pass finds, by counting against 2**_DIGIT - 1 bounds. With
# more, comparing takes longer than reading.
_DIGIT = 3


def entries_to_keep(density: Any, size: int) -> int:
  """Number of entries to keep of a vector of any length.

  Args:
    density: Fraction to keep, in (0, 1]; known, not traced.
    size: Number of entries.

  Returns:
    `int(density * size)`, at least 1 of a vector that has any.

  Raises:
    ValueError: If the density is traced.

  >>> entries_to_keep(0.5, 10**10)
  5000000000
  """
  if isinstance(density, jax.core.Tracer):
    raise ValueError(
      "density must be a number when entries are kept by magnitude, not a"
      " traced value: how many are kept is counted before compilation"
    )
  return min(size, max(1, int(float(density) * size)))


def keep_count(density: Any, size: int) -> np.uint32:
  """The same for a vector that is counted in 32 bits.

  Args:
    density: Fraction to keep, in (0, 1]; known, not traced.
    size: Number of entries.

  Returns:
    See `entries_to_keep`.

  Raises:
    ValueError: If the density is traced, or the vector too long to count.
  """
  keep = entries_to_keep(density, size)
  if size > np.iinfo(np.uint32).max:
    raise ValueError(
      f"a vector of {size} entries is too long to count in 32 bits in memory;"
      " merge it leaf by leaf with merge_leaves"
    )
  return np.uint32(keep)


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

  Found digit by digit from the highest: the largest t such that at least k
  entries reach it. Each digit takes one pass that counts, so that nothing is
  sorted or copied.

  Args:
    leaves: Arrays; their dtypes may differ.
    k: Which one, from 1; at most the number of entries.

  Returns:
    The magnitude as `magnitude_bits`; those that are not below it are the k
    largest, and more where there are equals.
  """
  sizes = [jnp.abs(leaf).dtype.itemsize for leaf in leaves]
  widest = jnp.dtype(f"uint{8 * max(4, *sizes)}")
  return kth_largest([magnitude_bits(leaf, widest) for leaf in leaves], k)


def kth_largest(bits: Sequence[Array], k: Array) -> Array:
  """The k-th largest of unsigned integers; see `kth_largest_bits`.

  Args:
    bits: Arrays of one dtype, uint32 or uint64, whose highest bit is not set.
    k: Which one, from 1; 0 gives more than any of them.

  Returns:
    The integer.
  """
  dtype = bits[0].dtype
  # The sign's bit is never set.
  width = 8 * dtype.itemsize - 1

  def body(i: Array, low: Array) -> Array:
    # The last digit may begin in the one before; what that leaves in doubt
    # is less than a digit.
    shift = jnp.maximum(width - _DIGIT * (i + 1), 0).astype(dtype)
    bounds = [
      low + (np.array(digit, dtype) << shift) for digit in range(1, 1 << _DIGIT)
    ]
    found = [
      _reductions.counts([values >= bound for bound in bounds])
      for values in bits
    ]
    totals = [sum(column) for column in zip(*found, strict=True)]
    digit = sum((total >= k).astype(dtype) for total in totals)
    return low + (digit << shift)

  passes = -(-width // _DIGIT)
  return jax.lax.fori_loop(0, passes, body, jnp.zeros((), dtype))
