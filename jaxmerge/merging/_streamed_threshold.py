"""Exact selection by magnitude from a vector that is read in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from jaxmerge.merging import _threshold

Array = jax.Array

# Bits of a magnitude that one pass over the vector settles.
_DIGIT = 16
# So many entries are counted at once, lest the counting take much memory.
_BLOCK = 1 << 20

_bits = jax.jit(_threshold.magnitude_bits, static_argnames="dtype")


def streamed_kth_largest_bits(
  read: Callable[[], Iterable[Array]], k: int, dtype: Any = np.uint32
) -> np.unsignedinteger[Any]:
  """The k-th largest magnitude of a vector that is read in pieces, exactly.

  Each pass counts the next 16 bits of the magnitudes that agree with what is
  known so far: two passes for float32, four for float64.

  Args:
    read: Returns the pieces; called once a pass. One piece at a time is held.
    k: Which one, from 1; at most the number of entries.
    dtype: uint32, or uint64 if a piece is wider than 32 bits.

  Returns:
    What `_threshold.kth_largest_bits` returns.

  >>> import jax.numpy as jnp
  >>> pieces = [jnp.asarray([1.0, -4.0]), jnp.asarray([3.0, 2.0])]
  >>> bits = streamed_kth_largest_bits(lambda: pieces, 2)
  >>> print(bits.view(np.float32))
  3.0
  """
  kind = np.dtype(dtype)
  known = 0
  top = 8 * kind.itemsize - _DIGIT
  for shift in range(top, -1, -_DIGIT):
    counts = np.zeros(1 << _DIGIT, np.int64)
    for piece in read():
      bits = np.asarray(_bits(piece, dtype=kind)).ravel()
      for start in range(0, bits.size, _BLOCK):
        block = bits[start : start + _BLOCK] >> kind.type(shift)
        if shift < top:
          block = block[block >> kind.type(_DIGIT) == known >> _DIGIT]
        digits = block.astype(np.uint16)
        counts += np.bincount(digits, minlength=counts.size)
    # Entries of at least each digit.
    reach = np.cumsum(counts[::-1])[::-1]
    digit = int(np.flatnonzero(reach >= k)[-1])
    k -= int(reach[digit] - counts[digit])
    known = (known | digit) << (_DIGIT if shift else 0)
  return kind.type(known)
