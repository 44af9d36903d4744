"""A leaf of several models in memory, given out block by block."""

from __future__ import annotations

import numpy as np

from jaxmerge.merging import _by_block


class InBlocks:
  """One leaf of a base and of models.

  Attributes:
    passes: how often it was read.
    held: how many blocks were given out and not released.
  """

  def __init__(self, arrays, block=8, sample=None):
    self.arrays = [np.asarray(one, np.float32).reshape(-1) for one in arrays]
    self.size = self.arrays[0].size
    self.passes = self.held = 0
    self._block = block
    self._sample = sample

  def __iter__(self):
    self.passes += 1
    for start in range(0, self.size, self._block):
      parts = [one[start : start + self._block] for one in self.arrays]
      size = len(parts[0])
      padded = [np.pad(part, (0, self._block - size)) for part in parts]
      self.held += 1
      yield _by_block.Block(start, size, padded, self._release)

  def _release(self):
    self.held -= 1

  def sample(self, count):
    if self._sample is not None:
      places = np.asarray(self._sample)
    else:
      places = np.linspace(0, self.size - 1, min(count, self.size)).astype(int)
    return [one[places] for one in self.arrays]


def merge(rule, blocks, weights, values, key=None, masks=None, dtype="float32"):
  """All of a merged leaf, and how many of its entries are not finite."""
  if masks is None:
    masks = _by_block.Masks(None, np.zeros(0))
  parts, odd = [], 0
  for block, merged, count in _by_block.merge_blocks(
    rule,
    blocks,
    np.asarray(weights, np.float32),
    values,
    key,
    masks,
    np.dtype(dtype),
  ):
    parts.append(np.asarray(merged)[: block.size])
    odd += int(count)
    block.release()
  return np.concatenate(parts), odd
