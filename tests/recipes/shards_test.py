"""Tests of dividing a result, and of the memory of its blocks."""

from __future__ import annotations

import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge.recipes import _blocks, _shards


class PartsTest(parameterized.TestCase):
  @parameterized.parameters(
    ([], 10, [()]),
    ([5, 5, 5], 10, [(0, 1), (2,)]),
    ([5, 50, 5], 10, [(0,), (1,), (2,)]),
    ([50, 1, 1], 10, [(0,), (1, 2)]),
    ([0, 10, 0, 1], 10, [(0, 1, 2), (3,)]),
    ([1, 2, 3], 6, [(0, 1, 2)]),
  )
  def test_division(self, sizes, most, wanted):
    found = _shards.divide(sizes, most)
    self.assertEqual([shard.tensors for shard in found], wanted)
    names = [shard.name for shard in found]
    count = len(wanted)
    self.assertEqual(
      names,
      ["model.safetensors"]
      if count == 1
      else [
        f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)
      ],
    )

  @parameterized.parameters(
    (0, 4096), (1, 4096), (4096, 4096), (4097, 8192), (10**6, 2**20)
  )
  def test_padded(self, size, wanted):
    self.assertEqual(_blocks.padded(size), wanted)

  def test_buffers_are_aligned_and_used_again(self):
    pool = _blocks.Pool()
    first = pool.take(100, np.dtype(np.float32))
    other = pool.take(100, np.dtype(np.float32))
    self.assertFalse(np.shares_memory(first, other))
    for one in (first, other):
      self.assertEqual(one.ctypes.data % 64, 0)
      self.assertEqual((one.size, one.dtype), (100, np.float32))
    pool.give(first)
    self.assertTrue(
      np.shares_memory(pool.take(200, np.dtype(np.float16)), first)
    )
    self.assertFalse(
      np.shares_memory(pool.take(100, np.dtype(np.float32)), first)
    )


if __name__ == "__main__":
  absltest.main()
