"""Sums over the entries of two tensors, read in blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxmerge.recipes import _blocks, _writing

Tensor = Any
# Entries that stay in a core's cache while they are looked at several times.
_CHUNK = 1 << 16
# Mean squares below are not to be had of float32.
_TINY = 1e-24
_NARROW = (
  np.dtype(np.float32),
  np.dtype(np.float16),
  np.dtype(ml_dtypes.bfloat16),
)


class Sums(NamedTuple):
  """Sums over entries a and b, and c of a base.

  Attributes:
    entries: number of the entries.
    changed: of those where a and b differ.
    odd: of those where a or b is not finite.
    largest: the largest ``|b - a|``.
    aa: sum of ``a * a``.
    bb: sum of ``b * b``.
    ab: sum of ``a * b``.
    dd: sum of ``(b - a) ** 2``.
    uu: sum of ``(a - c) ** 2``.
    vv: sum of ``(b - c) ** 2``.
    uv: sum of ``(a - c) * (b - c)``.
    kept: number of entries where a or b differs from c.
    shared: of those where both do.
    conflicts: of those where they do so in different directions.
  """

  entries: int = 0
  changed: int = 0
  odd: int = 0
  largest: float = 0.0
  aa: float = 0.0
  bb: float = 0.0
  ab: float = 0.0
  dd: float = 0.0
  uu: float = 0.0
  vv: float = 0.0
  uv: float = 0.0
  kept: int = 0
  shared: int = 0
  conflicts: int = 0

  def plus(self, other: Sums) -> Sums:
    """The sums over the entries of both.

    Args:
      other: sums over other entries.

    Returns:
      The sums.
    """
    pairs: Any = zip(self, other, strict=True)
    found = Sums(*(one + two for one, two in pairs))
    # Not max, which drops NaN.
    largest = float(np.maximum(self.largest, other.largest))
    return found._replace(largest=largest)

  def is_sound(self) -> bool:
    """Whether sums of float32 neither ran over nor vanished."""
    zero = {"dd": self.changed == 0, "uu": self.kept == 0, "vv": self.kept == 0}
    for name in ("aa", "bb", "dd", "uu", "vv"):
      value = getattr(self, name)
      if not math.isfinite(value):
        return False
      if value < _TINY * self.entries and not zero.get(name, False):
        return False
    return True


def measure(
  first: Tensor,
  second: Tensor,
  base: Tensor | None = None,
  seen: Callable[[int], None] = lambda size: None,
) -> Sums:
  """Compares two tensors of one shape, a block of them in memory at a time.

  Complex numbers count as two real ones.

  Args:
    first: a.
    second: b.
    base: c, if there is one.
    seen: told the bytes of each block that is read.

  Returns:
    The sums.
  """
  tensors = [first, second] + ([] if base is None else [base])
  narrow = all(np.dtype(one.dtype) in _NARROW for one in tensors)
  if narrow:
    found = _sums(_read_ahead(tensors, seen), np.dtype(np.float32))
    if found.is_sound():
      return found
  return _sums(_read(tensors, seen), np.dtype(np.float64))


def _read_ahead(
  tensors: Sequence[Tensor], seen: Callable[[int], None]
) -> Iterator[Sequence[np.ndarray]]:
  with futures.ThreadPoolExecutor(1, "reader") as reader:
    blocks = _blocks.TensorBlocks(
      tensors, _blocks.Pool(), reader, block=_blocks.BLOCK, seen=seen
    )
    for block in blocks:
      yield [array[: block.size] for array in block.arrays]
      block.release()


def _read(
  tensors: Sequence[Tensor], seen: Callable[[int], None]
) -> Iterator[Sequence[np.ndarray]]:
  """Reads without rounding, whatever the dtype."""
  for start, stop in _writing.spans(tensors[0].size):
    found = [one.read(start, stop) for one in tensors]
    seen(sum(one.nbytes for one in found))
    yield [
      one.view(one.real.dtype) if np.iscomplexobj(one) else one for one in found
    ]


def _sums(blocks: Iterator[Sequence[np.ndarray]], wide: np.dtype[Any]) -> Sums:
  total = Sums()
  with np.errstate(all="ignore"):
    for arrays in blocks:
      for start in range(0, arrays[0].size, _CHUNK):
        total = total.plus(
          _chunk([one[start : start + _CHUNK] for one in arrays], wide)
        )
  return total


def _count(array: np.ndarray) -> int:
  return int(np.count_nonzero(array))


def _chunk(raw: Sequence[np.ndarray], wide: np.dtype[Any]) -> Sums:
  a, b, *rest = [one.astype(wide, copy=False) for one in raw]
  d = b - a
  dd = float(d @ d)
  odd = 0
  if math.isfinite(dd) and raw[0].dtype.itemsize < 8:
    changed = _count(d)
  else:
    # Integers of 64 bits are more than float64 tells apart.
    same = (raw[0] == raw[1]) | (np.isnan(a) & np.isnan(b))
    changed = same.size - _count(same)
    odd = same.size - _count(np.isfinite(a) & np.isfinite(b))
  found = Sums(
    a.size,
    changed,
    odd,
    float(np.abs(d).max()),
    float(a @ a),
    float(b @ b),
    float(a @ b),
    dd,
  )
  if not rest:
    return found
  (c,) = rest
  u, v = a - c, b - c
  up, down = u > 0, u < 0
  kept = _count(u), _count(v)
  shared = _count((u != 0) & (v != 0))
  return found._replace(
    uu=float(u @ u),
    vv=float(v @ v),
    uv=float(u @ v),
    kept=kept[0] + kept[1] - shared,
    shared=shared,
    conflicts=_count(up & (v < 0)) + _count(down & (v > 0)),
  )
