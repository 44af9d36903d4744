"""Tests of exact selection from a leaf that is read block by block."""

from __future__ import annotations

from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import merging
from jaxmerge.merging import _block_select, _by_block
from tests.merging import _in_blocks


def _vectors(kind, size, seed=0):
  """Task vectors of awkward kinds."""
  draws = np.random.default_rng(seed)
  found = draws.normal(size=size).astype(np.float32)
  if kind == "few values":
    found = draws.integers(-3, 4, size).astype(np.float32)
  elif kind == "zeros":
    found *= draws.uniform(size=size) < 0.2
  elif kind == "one value":
    found = np.where(found > 0, 2, -2).astype(np.float32)
  elif kind == "nothing":
    found = np.zeros(size, np.float32)
  elif kind == "tiny":
    # Subnormal in part.
    found = (found * 1e-38).astype(np.float32)
  elif kind == "signed zeros":
    found = np.where(found > 0.5, found, -0.0).astype(np.float32)
  return found


_KINDS = (
  *("normal", "few values", "zeros", "one value", "nothing"),
  "signed zeros",
)


def _blocks(tau, **kwargs):
  return _in_blocks.InBlocks([np.zeros_like(tau), tau], **kwargs)


class KthLargestTest(parameterized.TestCase):
  def _check(self, tau, k, **kwargs):
    blocks = _blocks(tau, **kwargs)
    (found,) = _block_select.kth_largest([blocks], [k])
    magnitudes = np.abs(tau)
    value = np.sort(magnitudes)[::-1][k - 1]
    self.assertEqual(np.uint32(found.bits).view(np.float32), value)
    self.assertEqual(found.above, int((magnitudes > value).sum()))
    equal = np.flatnonzero(magnitudes == value) if value else []
    np.testing.assert_array_equal(found.places, equal)
    self.assertEqual(blocks.held, 0)
    return blocks

  @parameterized.product(kind=_KINDS, size=(1, 7, 8, 100))
  def test_against_sorting(self, kind, size):
    tau = _vectors(kind, size)
    for k in {1, (size + 1) // 2, max(1, size - 1), size}:
      self._check(tau, k)

  @parameterized.product(
    kind=("normal", "few values", "zeros"), sample=("high", "low", "one")
  )
  def test_samples_that_mislead(self, kind, sample):
    tau = _vectors(kind, 300, seed=3)
    order = np.argsort(np.abs(tau))
    places = {
      "high": order[-40:],
      "low": order[:40],
      "one": np.full(40, order[150]),
    }[sample]
    with mock.patch.object(_block_select, "_SURE", 0):
      for k in (1, 2, 50, 150, 299, 300):
        blocks = self._check(tau, k, sample=places, block=64)
        self.assertLess(blocks.passes, 5)

  def test_a_good_sample_needs_one_pass(self):
    tau = _vectors("normal", 4096)
    for k in (400, 2000, 4000):
      self.assertEqual(self._check(tau, k, block=1024).passes, 1)

  def test_little_is_collected(self):
    # Of a large leaf what lies between the bounds of a sample is a part.
    draws = np.random.default_rng(0)
    size = 1 << 18
    tau = draws.normal(size=size).astype(np.float32)
    magnitudes = np.abs(tau).view(np.uint32)
    sample = magnitudes[:: size // 4096]
    for k in (100, 50_000, 200_000):
      low, high = _block_select._bracket(sample, k, size)
      inside = ((magnitudes >= low) & (magnitudes < high)).mean()
      self.assertLess(inside, 0.2)
      value = np.sort(magnitudes)[::-1][k - 1]
      self.assertTrue(low <= value < high)

  def test_models_with_ranks_of_their_own(self):
    taus = [_vectors(kind, 50, i) for i, kind in enumerate(_KINDS[:4])]
    base = _vectors("few values", 50, 9)
    blocks = _in_blocks.InBlocks([base, *(base + tau for tau in taus)])
    found = _block_select.kth_largest([blocks], [0, 3, 20, 50])
    self.assertIsNone(found[0])
    for i, k in ((1, 3), (2, 20), (3, 50)):
      moved = np.abs((base + taus[i]) - base)
      value = np.sort(moved)[::-1][k - 1]
      self.assertEqual(np.uint32(found[i].bits).view(np.float32), value)
    self.assertEqual(blocks.held, 0)

  @parameterized.parameters(*_KINDS)
  def test_a_vector_of_several_leaves(self, kind):
    tau = _vectors(kind, 200, 5)
    leaves = [_blocks(part) for part in np.split(tau, [1, 30, 110])]
    for k in (1, 20, 101, 200):
      (found,) = _block_select.kth_largest(leaves, [k], places=False)
      value = np.sort(np.abs(tau))[::-1][k - 1]
      self.assertEqual(np.uint32(found.bits).view(np.float32), value)
      self.assertEqual(found.above, int((np.abs(tau) > value).sum()))

  def test_a_block_that_is_padded_adds_no_zeros(self):
    # Nine entries in blocks of eight: seven zeros that are none.
    tau = np.arange(1, 10, dtype=np.float32)
    (found,) = _block_select.kth_largest([_blocks(tau)], [9])
    self.assertEqual(np.uint32(found.bits).view(np.float32), 1)


def _sum_rule(name, **options):
  return _by_block.block_rule(merging.get(name, **options)).rule


class SparsifierTest(parameterized.TestCase):
  def _kept(self, taus, values, name="breadcrumbs"):
    """What is left of each task vector."""
    rule = _sum_rule(name, density=0.5)
    found = []
    for i, tau in enumerate(taus):
      told = {
        **_by_block.numbers(merging.get(name, density=0.5)),
        **{key: value[i : i + 1] for key, value in values.items()},
        "factor": np.ones(1, np.float32),
        "density": np.ones(1, np.float32),
        "majority": np.int32(1),
      }
      merged, _ = _in_blocks.merge(rule, _blocks(tau), [1.0], told)
      found.append(merged)
    return found

  @parameterized.product(kind=_KINDS, density=(0.01, 0.2, 0.5, 0.99, 1.0))
  def test_largest(self, kind, density):
    tau = _vectors(kind, 60, seed=2)
    values = _block_select.largest(_blocks(tau), np.array([density]))
    (kept,) = self._kept([tau], values)
    count = 60 if density >= 1 else max(1, int(density * 60))
    # Of equals the first.
    first = np.argsort(-np.abs(tau), kind="stable")[:count]
    wanted = np.zeros_like(tau)
    wanted[first] = tau[first]
    np.testing.assert_array_equal(kept, wanted)

  @parameterized.product(
    kind=_KINDS,
    shares=((0.5, 0.1), (0.9, 0.3), (0.2, 0), (1.0, 0.2), (0.3, 1), (0.01, 0)),
  )
  def test_middle(self, kind, shares):
    density, gamma = shares
    tau = _vectors(kind, 60, seed=4)
    if gamma == 1 and kind in ("zeros", "signed zeros"):
      # See the next test.
      gamma = 0.15
    self._check_middle(tau, density, gamma)

  @parameterized.parameters("zeros", "signed zeros", "nothing")
  def test_more_outliers_than_entries_that_differ(self, kind):
    # All that differs is an outlier: the base is left.
    self._check_middle(_vectors(kind, 60, seed=4), 0.3, 1)

  def _check_middle(self, tau, density, gamma):
    values = _block_select.middle(
      _blocks(tau), np.array([density]), np.array([gamma])
    )
    (kept,) = self._kept([tau], values)
    keep = max(1, int(density * 60))
    outliers = 0 if density >= 1 else min(int(gamma * 60), 60 - keep)
    rising = np.argsort(np.abs(tau), kind="stable")
    chosen = rising[60 - outliers - keep : 60 - outliers]
    wanted = np.zeros_like(tau)
    wanted[chosen] = tau[chosen]
    np.testing.assert_array_equal(kept, wanted)

  def test_models_with_shares_of_their_own(self):
    taus = [_vectors("normal", 40, seed) for seed in range(3)]
    blocks = _in_blocks.InBlocks([np.zeros(40), *taus])
    density, gamma = np.array([0.5, 1, 0.25]), np.array([0.1, 0.5, 0])
    values = _block_select.middle(blocks, density, gamma)
    counts = [int((one != 0).sum()) for one in self._kept(taus, values)]
    self.assertEqual(counts, [20, 40, 10])
    values = _block_select.largest(blocks, density)
    counts = [int((one != 0).sum()) for one in self._kept(taus, values)]
    self.assertEqual(counts, [20, 40, 10])

  def test_everything(self):
    tau = _vectors("few values", 30)
    (kept,) = self._kept([tau], _block_select.everything(1))
    np.testing.assert_array_equal(kept, tau)


if __name__ == "__main__":
  absltest.main()
