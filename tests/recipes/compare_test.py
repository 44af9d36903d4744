"""Tests of comparing checkpoints."""

from __future__ import annotations

import math
from unittest import mock

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import checkpoints, merging, recipes
from jaxmerge.recipes import _blocks, _measure
from tests.recipes import _on_disk

DTYPES = (np.float32, np.float64, np.float16, _on_disk.BFLOAT16)


def _cosine(a, b):
  return np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b))


class CompareTest(_on_disk.OnDiskTest):
  def _compare(self, a, b, base=None, **kwargs):
    for name, tensors in (("a", a), ("b", b), ("base", base)):
      if tensors is not None:
        self.write(name, tensors)
    return recipes.compare(
      self.root / "a",
      self.root / "b",
      base=None if base is None else self.root / "base",
      **kwargs,
    )

  @parameterized.product(dtype=DTYPES, block=(1 << 22, 1 << 12))
  def test_against_numpy(self, dtype, block):
    draws = np.random.default_rng(0)
    base, a, b = (
      {
        "w": draws.normal(size=(90, 100)).astype(dtype),
        "v": draws.normal(size=7).astype(dtype),
        "n": np.arange(4) * scale,
      }
      for scale in (1, 2, 3)
    )
    b["w"][:, :50] = a["w"][:, :50]
    seen = []
    with (
      mock.patch.object(_blocks, "BLOCK", block),
      mock.patch.object(_measure, "_CHUNK", 1000),
    ):
      found = self._compare(
        a, b, base, seen=lambda done, total: seen.append((done, total))
      )
    self.assertTrue(found.same_structure)
    self.assertEqual(seen[-1][0], seen[-1][1])
    rows = {one.name: one for one in found.tensors}
    self.assertCountEqual(rows, a)
    wide = [
      {name: one.astype(np.float64) for name, one in tensors.items()}
      for tensors in (a, b, base)
    ]
    whole = [
      {"total": np.concatenate([one["w"].reshape(-1), one["v"]])}
      for one in wide
    ]
    rows["total"] = found.total
    for name in ("w", "v", "n", "total"):
      one, two, three = (x[name] for x in (wide if name in a else whole))
      row = rows[name]
      change, u, v = two - one, one - three, two - three
      self.assertEqual(row.entries, one.size)
      self.assertEqual(row.changed, np.count_nonzero(change))
      self.assertEqual(row.odd, 0)
      near = {"rtol": 2e-6, "atol": 1e-12}
      norm = np.linalg.norm(change)
      np.testing.assert_allclose(row.norm, norm, **near)
      np.testing.assert_allclose(
        row.relative, norm / np.linalg.norm(one), **near
      )
      np.testing.assert_allclose(row.cosine, _cosine(one, two), **near)
      np.testing.assert_allclose(row.largest, np.abs(change).max(), **near)
      task = row.task
      np.testing.assert_allclose(task.norm_a, np.linalg.norm(u), **near)
      np.testing.assert_allclose(task.norm_b, np.linalg.norm(v), **near)
      np.testing.assert_allclose(task.cosine, _cosine(u, v), rtol=1e-5)
      self.assertEqual(task.conflicts, np.count_nonzero(u * v < 0))
      self.assertEqual(task.shared, np.count_nonzero((u != 0) & (v != 0)))
      self.assertEqual(task.kept, np.count_nonzero((u != 0) | (v != 0)))

  def test_conflicts_are_those_of_the_package(self):
    draws = np.random.default_rng(0)

    def values():
      return draws.integers(-2, 3, size=200).astype(np.float32)

    base, a, b = ({"w": values(), "v": values()[:9]} for _ in range(3))
    found = self._compare(a, b, base).total.task
    vectors = [
      {name: jnp.asarray(one[name] - base[name]) for name in one}
      for one in (a, b)
    ]
    wanted = merging.sign_conflicts(vectors, density=1.0)
    self.assertEqual(found.conflicts, wanted.conflicts)
    self.assertEqual(found.kept, wanted.kept)
    self.assertEqual(found.shared, wanted.shared)
    self.assertAlmostEqual(found.rate, float(wanted.rate), places=6)

  def test_structure(self):
    a = {
      "both": np.ones(2, np.float32),
      "first": np.ones(2),
      "shape": np.ones((2, 3)),
      "dtype": np.ones(2, np.float32),
    }
    b = {
      "both": np.ones(2, np.float32),
      "second": np.ones(2),
      "shape": np.ones((3, 2)),
      "dtype": np.full(2, 3.0, np.float16),
    }
    found = self._compare(a, b, {"both": np.zeros(2, np.float32)})
    self.assertFalse(found.same_structure)
    self.assertEqual(found.only_a, ["first"])
    self.assertEqual(found.only_b, ["second"])
    self.assertEqual(found.shapes, {"shape": ((2, 3), (3, 2))})
    self.assertEqual(found.dtypes, {"dtype": ("float32", "float16")})
    self.assertEqual(found.no_base, ["dtype"])
    rows = {one.name: one for one in found.tensors}
    self.assertCountEqual(rows, ["both", "dtype"])
    self.assertAlmostEqual(rows["dtype"].norm, math.sqrt(8), places=6)
    self.assertIsNone(rows["dtype"].task)
    self.assertEqual(rows["both"].task.kept, 2)

  @parameterized.parameters(*DTYPES, np.int64, np.uint8, np.bool_)
  def test_equal(self, dtype):
    a = {"w": np.asarray([0, 1, 1], dtype)}
    found = self._compare(a, a).total if dtype in DTYPES else None
    (row,) = self._compare(a, a).tensors
    self.assertEqual((row.changed, row.norm, row.largest), (0, 0.0, 0.0))
    self.assertAlmostEqual(row.cosine, 1.0, places=6)
    self.assertEqual(row.relative, 0.0)
    if found is not None:
      self.assertEqual(
        found._replace(name="w"), row._replace(shape=(), dtypes=("", ""))
      )

  def test_zeros_and_nothing(self):
    zero, one = np.zeros(2, np.float32), np.ones(2, np.float32)
    none = np.ones((0, 3), np.float32)
    found = self._compare({"w": zero, "e": none}, {"w": one, "e": none})
    rows = {row.name: row for row in found.tensors}
    self.assertEqual(rows["w"].relative, math.inf)
    self.assertTrue(math.isnan(rows["w"].cosine))
    self.assertEqual(rows["e"].entries, 0)
    self.assertTrue(math.isnan(rows["e"].relative))

  @parameterized.parameters(1e30, 1e-30)
  def test_squares_beyond_single_precision(self, scale):
    a = {"w": (scale * np.arange(1, 5)).astype(np.float32)}
    b = {"w": (scale * np.arange(2, 6)).astype(np.float32)}
    (row,) = self._compare(a, b).tensors
    np.testing.assert_allclose(row.norm, 2 * scale, rtol=1e-6)
    np.testing.assert_allclose(row.cosine, 40 / math.sqrt(30 * 54), rtol=1e-6)

  @parameterized.parameters(np.float32, np.float64, _on_disk.BFLOAT16)
  def test_what_is_no_number(self, dtype):
    a = {"w": np.asarray([np.nan, 1, np.inf, 2], dtype)}
    b = {"w": np.asarray([np.nan, 1, 3, 5], dtype)}
    (row,) = self._compare(a, b).tensors
    self.assertEqual((row.changed, row.odd), (2, 2))
    self.assertTrue(math.isnan(row.norm))
    (row,) = self._compare(a, a).tensors
    self.assertEqual((row.changed, row.odd), (0, 2))

  def test_integers_that_doubles_do_not_tell_apart(self):
    a = {"w": np.asarray([2**60, 1, 0], np.int64)}
    b = {"w": np.asarray([2**60 + 1, 1, 0], np.int64)}
    (row,) = self._compare(a, b).tensors
    self.assertEqual(row.changed, 1)
    # Unsigned ones do not wrap.
    a = {"w": np.asarray([0, 255], np.uint8)}
    b = {"w": np.asarray([255, 0], np.uint8)}
    (row,) = self._compare(a, b).tensors
    self.assertEqual(row.largest, 255.0)

  def test_other_dtypes(self):
    a = {"c": np.asarray([1 + 1j], np.complex64)}
    b = {"c": np.asarray([1 - 2j], np.complex64)}
    (row,) = self._compare(a, b).tensors
    self.assertEqual(row.norm, 3.0)
    a = {"f": np.asarray([1, 2], ml_dtypes.float8_e4m3fn)}
    b = {"f": np.asarray([1, 4], ml_dtypes.float8_e4m3fn)}
    (row,) = self._compare(a, b).tensors
    self.assertEqual((row.norm, row.changed), (2.0, 1))

  def test_layouts(self):
    a = {"x": {"w": np.arange(6.0).reshape(2, 3)}}
    checkpoints.hugging_face.save(self.root / "a", a, max_shard_bytes=1)
    recipes.convert(self.root / "a", self.root / "b")
    recipes.convert(self.root / "b", self.root / "c")
    found = recipes.compare(self.root / "a", self.root / "c")
    self.assertTrue(found.same_structure)
    self.assertEqual(found.total.changed, 0)
    found = recipes.compare(self.root / "b", self.root / "b")
    self.assertEqual(found.total.changed, 0)

  def test_what_is_not_there(self):
    self.write("a", {"w": np.ones(2)})
    with self.assertRaisesRegex(
      checkpoints.CheckpointError, "absent is no fol"
    ):
      recipes.compare(self.root / "a", self.root / "absent")
    (self.root / "a/model.safetensors").write_bytes(b"\1")
    with self.assertRaisesRegex(
      checkpoints.CheckpointError, "no whole safeten"
    ):
      recipes.compare(self.root / "a", self.root / "a")


if __name__ == "__main__":
  absltest.main()
