"""Exact selection by magnitude from a leaf that is read block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.merging import _by_block, _reductions, _threshold

Array = jax.Array

# So many entries say between which magnitudes the one looked for should be; of
# a vector of many leaves more, for fewer lie between then.
_SAMPLE, _MORE = 1 << 16, 1 << 20
# Standard deviations of its rank in the sample; samples are not independent.
_SURE = 8
_MOST = np.iinfo(np.uint32).max


class Bound(NamedTuple):
  """The k-th largest magnitude of one model's task vector.

  Attributes:
    bits: Its bits, as a uint32.
    above: How many entries are larger.
    places: Places of the entries that equal it, in rising order; none if it is
      zero, for zeros may be kept or dropped alike.
  """

  bits: int
  above: int
  places: np.ndarray


def _magnitudes(arrays: Any) -> list[np.ndarray]:
  """Bits of the magnitudes of the task vectors of host arrays."""
  base, *leaves = [np.asarray(array, np.float32) for array in arrays]
  return [np.abs(leaf - base).view(np.uint32) for leaf in leaves]


@jax.jit
def _count(
  arrays: list[Array], low: Array, high: Array
) -> tuple[list[Array], Array]:
  """Which magnitudes lie in [low, high), and how many reach each bound."""
  base, *leaves = [array.astype(jnp.float32) for array in arrays]
  marks, totals = [], []
  for i, leaf in enumerate(leaves):
    bits = jax.lax.bitcast_convert_type(jnp.abs(leaf - base), jnp.uint32)
    reach, exceed = bits >= low[i], bits >= high[i]
    marks.append(reach & ~exceed)
    totals.append(jnp.stack(_reductions.counts([reach, exceed])))
  return marks, jnp.stack(totals)


def _bracket(sample: np.ndarray, k: int, size: int) -> tuple[int, int]:
  """Bounds [low, high) that the k-th largest of `size` should lie in."""
  count = len(sample)
  rank = k / size * count
  spread = _SURE * np.sqrt(max(rank * (1 - k / size), 1.0)) + 2
  falling = np.sort(sample)[::-1]
  first, last = int(rank - spread), int(rank + spread)
  # Above the largest of the sample there is no bound but that of all numbers.
  high = _MOST if first < 0 else int(falling[first]) + 1
  low = 1 if last >= count else max(1, int(falling[last]))
  return low, high


def kth_largest(
  leaves: Sequence[_by_block.Blocks], ks: Sequence[int], *, places: bool = True
) -> list[Bound | None]:
  """The k-th largest magnitude of each model's task vector, exactly.

  A sample says between which magnitudes it should lie; one pass counts what is
  above and collects what lies between. Where the sample misled, the pass is
  done again with what the counts say.

  Args:
    leaves: The leaves that the vector consists of.
    ks: Which one, for each model; 0 for none.
    places: Whether the places of equals are wanted, of a single leaf.

  Returns:
    For each model where it is, None for a k of 0.
  """
  total = sum(leaf.size for leaf in leaves)
  wanted_in_all = _SAMPLE if places else _MORE
  samples = [
    _magnitudes(leaf.sample(-(-wanted_in_all * leaf.size // total)))
    for leaf in leaves
  ]
  brackets = [
    _bracket(np.concatenate(parts), k, total) if k else (0, 0)
    for parts, k in zip(zip(*samples, strict=True), ks, strict=True)
  ]
  found: list[Bound | None] = [None] * len(ks)
  wanted = [place for place, k in enumerate(ks) if k]
  while wanted:
    seen = _pass(leaves, brackets, wanted, places)
    for i, one in seen.items():
      rank = ks[i] - one.exceed
      if rank <= 0:
        brackets[i] = brackets[i][1], _MOST
        continue
      if one.reach < ks[i] and brackets[i][0] > 1:
        brackets[i] = 1, brackets[i][0]
        continue
      wanted.remove(i)
      if one.reach < ks[i]:
        found[i] = Bound(0, one.reach, np.zeros(0, np.uint32))
        continue
      split = len(one.bits) - rank
      least = int(np.partition(one.bits, split)[split])
      above = one.exceed + int((one.bits > least).sum())
      equal = one.places[one.bits == least] if places else one.places
      found[i] = Bound(least, above, equal)
  return found


class _Seen(NamedTuple):
  """What a pass found of one model.

  Attributes:
    reach: How many entries are not below the lower bound.
    exceed: How many are not below the upper one.
    bits: Magnitudes between the two.
    places: Where they are.
  """

  reach: int
  exceed: int
  bits: np.ndarray
  places: np.ndarray


def _pass(
  leaves: Sequence[_by_block.Blocks],
  brackets: Sequence[tuple[int, int]],
  wanted: Sequence[int],
  keep_places: bool,
) -> dict[int, _Seen]:
  """Reads the vector once. Zeros are below every bound."""
  low = np.array([max(1, bracket[0]) for bracket in brackets], np.uint32)
  high = np.array([max(1, bracket[1]) for bracket in brackets], np.uint32)
  counts = np.zeros((len(low), 2), np.int64)
  bits: dict[int, list[np.ndarray]] = {i: [] for i in wanted}
  places: dict[int, list[np.ndarray]] = {i: [] for i in wanted}
  for leaf in leaves:
    for block in leaf:
      marks, totals = _count(_by_block.on_device(block.arrays), low, high)
      counts += np.asarray(totals)
      for i in wanted:
        where = np.flatnonzero(np.asarray(marks[i]))
        picked = [block.arrays[0][where], block.arrays[i + 1][where]]
        bits[i].append(_magnitudes(picked)[0])
        if keep_places:
          places[i].append((where + block.start).astype(np.uint32))
      block.release()
  return {
    i: _Seen(
      int(counts[i, 0]),
      int(counts[i, 1]),
      np.concatenate(bits[i]),
      np.concatenate([np.zeros(0, np.uint32), *places[i]]),
    )
    for i in wanted
  }


def largest(blocks: _by_block.Blocks, density: np.ndarray) -> _by_block.Values:
  """Bounds that keep the `int(density * n)` largest magnitudes, at least one.

  Of equals at the border, the first are kept.

  Args:
    blocks: The leaf.
    density: One for each model, [n].

  Returns:
    What the sparsifier is told.
  """
  size = blocks.size
  keep = [
    0 if one >= 1 else _threshold.entries_to_keep(one, size) for one in density
  ]
  values = everything(len(density))
  for i, bound in enumerate(kth_largest([blocks], keep)):
    if bound is not None and bound.bits:
      last = bound.places[keep[i] - bound.above - 1]
      values["least"][i] = bound.bits
      values["least_to"][i] = last + 1
  return values


def middle(
  blocks: _by_block.Blocks, density: np.ndarray, gamma: np.ndarray
) -> _by_block.Values:
  """Bounds that drop the largest magnitudes, then the smallest.

  `int(gamma * n)` are outliers and `int(density * n)` are kept, as
  `breadcrumbs` counts. In rising order equals stand by their places: of those
  at the lower border the last are kept, of those at the upper one the first.

  Args:
    blocks: The leaf.
    density: One for each model, [n].
    gamma: Likewise.

  Returns:
    What the sparsifier is told.
  """
  size = blocks.size
  outliers, reach = [], []
  for one, share in zip(density, gamma, strict=True):
    keep = _threshold.entries_to_keep(one, size)
    top = 0 if one >= 1 else min(int(float(share) * size), size - keep)
    outliers.append(top)
    reach.append(0 if one >= 1 else top + keep)
  values = everything(len(density))
  lower = kth_largest([blocks], reach)
  upper = kth_largest([blocks], outliers)
  for i, (low, high) in enumerate(zip(lower, upper, strict=True)):
    if low is not None and low.bits:
      number = reach[i] - low.above
      values["least"][i] = low.bits
      values["least_from"][i] = low.places[len(low.places) - number]
    if high is not None and not high.bits:
      # Whatever is not zero is an outlier.
      values["largest"][i] = 0
    elif high is not None:
      number = outliers[i] - high.above
      values["largest"][i] = high.bits
      values["largest_to"][i] = high.places[len(high.places) - number]
  return values


def everything(count: int) -> _by_block.Values:
  """Bounds that keep all entries."""
  return {
    "least": np.zeros(count, np.uint32),
    "least_from": np.zeros(count, np.uint32),
    "least_to": np.full(count, _MOST, np.uint32),
    "largest": np.full(count, _MOST, np.uint32),
    "largest_to": np.full(count, _MOST, np.uint32),
  }
