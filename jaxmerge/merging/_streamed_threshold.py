"""Exact selection by magnitude from vectors that are read in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
  read: Callable[[], Iterable[tuple[int, Array]]],
  ks: Sequence[int],
  dtype: Any = np.uint32,
) -> list[np.unsignedinteger[Any]]:
  """The k-th largest magnitudes of vectors that are read in pieces, exactly.

  Each pass counts the next 16 bits of the magnitudes that agree with what is
  known so far: two passes for float32, four for float64.

  Args:
    read: Returns pairs of a vector's place and a piece of it, in any order;
      called once a pass. One piece at a time is held.
    ks: Which one of each vector, from 1; at most its number of entries.
    dtype: uint32, or uint64 if a piece is wider than 32 bits.

  Returns:
    For each vector what `_threshold.kth_largest_bits` returns.

  >>> import jax.numpy as jnp
  >>> pieces = [(0, jnp.asarray([1.0, -4.0])), (0, jnp.asarray([3.0, 2.0]))]
  >>> (bits,) = streamed_kth_largest_bits(lambda: pieces, [2])
  >>> print(bits.view(np.float32))
  3.0
  """
  kind = np.dtype(dtype)
  known, ranks = [0] * len(ks), list(ks)
  top = 8 * kind.itemsize - _DIGIT
  for shift in range(top, -1, -_DIGIT):
    counts = np.zeros((len(ks), 1 << _DIGIT), np.int64)
    for vector, piece in read():
      bits = np.asarray(_bits(piece, dtype=kind)).ravel()
      for start in range(0, bits.size, _BLOCK):
        block = bits[start : start + _BLOCK] >> kind.type(shift)
        if shift < top:
          block = block[block >> kind.type(_DIGIT) == known[vector]]
        digits = block.astype(np.uint16)
        counts[vector] += np.bincount(digits, minlength=1 << _DIGIT)
    for vector, count in enumerate(counts):
      # Entries of at least each digit.
      reach = np.cumsum(count[::-1])[::-1]
      digit = int(np.flatnonzero(reach >= ranks[vector])[-1])
      ranks[vector] -= int(reach[digit] - count[digit])
      known[vector] = known[vector] << _DIGIT | digit
  return [kind.type(bits) for bits in known]
