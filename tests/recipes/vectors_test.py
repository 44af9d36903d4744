"""Tests of taking task vectors, and of adding them."""

from __future__ import annotations

import json
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import recipes
from jaxmerge.recipes import _blocks
from tests.recipes import _on_disk, _pairs


class VectorsTest(_pairs.PairTest):
  @parameterized.parameters(1 << 22, 16)
  def test_vector_is_the_difference(self, block):
    base, tuned = self.pair()
    with mock.patch.object(_blocks, "BLOCK", block):
      report = self.extract()
    found = _on_disk.read(self.root / "vector")
    self.assertCountEqual(found, report.tensors)
    self.assertEqual(
      report.left_out,
      {"model.rotary.position_ids": "holds no floating-point numbers"},
    )
    for name, array in found.items():
      self.assertEqual(array.dtype, np.float32)
      np.testing.assert_array_equal(array, tuned[name] - base[name])
    record = json.loads((self.root / "vector/jaxmerge_vector.json").read_text())
    self.assertEqual(record["base"], str(self.root / "base"))
    self.assertEqual(record["tuned"], str(self.root / "tuned"))
    config = json.loads((self.root / "vector/config.json").read_text())
    self.assertEqual(config["note"], "tuned")

  @parameterized.parameters(np.float32, np.float16, _on_disk.BFLOAT16)
  def test_extract_and_apply_give_the_tuned_network(self, dtype):
    base, tuned = self.pair(dtype)
    self.extract()
    found = self.apply()
    self.assertCountEqual(found, base)
    for name, array in found.items():
      self.assertEqual(array.dtype, tuned[name].dtype)
      if dtype == np.float32:
        np.testing.assert_allclose(array, tuned[name], rtol=0, atol=5e-7)
      else:
        # Half precision fits into float32 with its sums.
        np.testing.assert_array_equal(array, tuned[name])
    self.assertEqual(
      json.loads((self.root / "out/config.json").read_text()), _on_disk.CONFIG
    )
    self.assertTrue((self.root / "out/tokenizer.json").exists())

  def test_double_precision_is_kept(self):
    base = {"a.weight": np.array([1.0, 2.0])}
    tuned = {"a.weight": np.array([1.0 + 1e-12, 2.0])}
    self.write("base", base)
    self.write("tuned", tuned)
    self.extract(dtype="float64")
    np.testing.assert_array_equal(self.apply()["a.weight"], tuned["a.weight"])

  @parameterized.parameters(0.0, -1.0, 0.3)
  def test_scale(self, scale):
    base, tuned = self.pair()
    self.extract()
    found = self.apply(scale=scale)
    for name, array in found.items():
      wanted = base[name] + scale * (tuned[name] - base[name])
      np.testing.assert_allclose(array, wanted, rtol=0, atol=1e-6)

  @parameterized.parameters("bfloat16", "float16", "float64")
  def test_dtype_of_the_vector(self, dtype):
    base, tuned = self.pair()
    self.extract(dtype=dtype)
    found = _on_disk.read(self.root / "vector")
    for name, array in found.items():
      self.assertEqual(str(array.dtype), dtype)
      wanted = (tuned[name] - base[name]).astype(array.dtype)
      np.testing.assert_array_equal(array, wanted)

  def test_select_and_shards(self):
    base, tuned = self.pair()
    report = self.extract(select=r"mlp\.(up|down)", max_shard_bytes=400)
    self.assertLen(report.tensors, 4)
    self.assertEqual(report.left_out["lm_head.weight"], "not selected")
    self.assertLen(list((self.root / "vector").glob("model-*-of-*")), 4)
    seen = []
    found = self.apply(
      max_shard_bytes=400, seen=lambda done, total: seen.append((done, total))
    )
    self.assertEqual(seen[-1][0], seen[-1][1])
    for name, array in found.items():
      wanted = tuned if "mlp" in name else base
      np.testing.assert_allclose(array, wanted[name], rtol=0, atol=5e-7)

  def test_a_tied_tensor_of_the_tuned_network(self):
    base = {"lm_head.weight": np.ones((2, 2)), "wte.weight": np.ones((2, 2))}
    self.write("base", base)
    self.write("tuned", {"wte.weight": np.full((2, 2), 3.0)})
    self.extract()
    found = _on_disk.read(self.root / "vector")
    np.testing.assert_array_equal(found["lm_head.weight"], np.full((2, 2), 2.0))

  def test_of_orbax(self):
    base, tuned = self.pair()
    for name in ("base", "tuned"):
      recipes.convert(self.root / name, self.root / f"{name}-orbax")
    recipes.extract(
      self.root / "base-orbax", self.root / "tuned-orbax", self.root / "vector"
    )
    recipes.apply_vector(
      self.root / "base-orbax", self.root / "vector", self.root / "out"
    )
    found = _on_disk.read(self.root / "out")
    self.assertLen(found, len(base))
    for name, array in found.items():
      np.testing.assert_allclose(
        array, tuned[name.replace("/", ".")], rtol=0, atol=5e-7
      )
    self.assertCountEqual(
      [one.name for one in (self.root / "out").iterdir()],
      ["config.json", "model.safetensors", "tokenizer.json"],
    )

  def test_of_one_file(self):
    base, _ = self.pair()
    for name in ("base", "tuned"):
      (self.root / name / "config.json").unlink()
      (self.root / name / "model.safetensors").rename(
        self.root / name / "weights.safetensors"
      )
    report = recipes.extract(
      self.root / "base/weights.safetensors",
      self.root / "tuned/weights.safetensors",
      self.root / "vector",
    )
    self.assertLen(report.tensors, len(base) - 1)
    recipes.apply_vector(
      self.root / "base/weights.safetensors",
      self.root / "vector",
      self.root / "out",
    )
    # Whatever lies beside a file need not belong to it.
    self.assertEqual(
      [one.name for one in (self.root / "out").iterdir()],
      ["model.safetensors"],
    )


if __name__ == "__main__":
  absltest.main()
