"""Tests of comparing a result with its checksums."""

from __future__ import annotations

import numpy as np
from absl.testing import absltest, parameterized
from safetensors import numpy as safetensors_numpy

from jaxmerge import recipes
from tests.recipes import _merging


class VerifyTest(_merging.MergingTest):
  def test_verify(self):
    _, _, recipe = self.pair()
    self.merge(recipe, max_shard_bytes=200)
    out = self.root / "out"
    self.assertEqual(recipes.verify(out), [])
    file = self.root / "b/model.safetensors"
    before = file.read_bytes()
    file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    (problem,) = recipes.verify(out)
    self.assertRegex(problem, "b/model.safetensors: '.*' has changed")
    self.assertEqual(recipes.verify(out, inputs=False), [])
    file.write_bytes(before[:-1])
    self.assertRegex(recipes.verify(out)[0], "b/model.safetensors .*cut off")
    file.unlink()
    self.assertRegex(recipes.verify(out)[0], "b/model.safetensors does not")
    file.write_bytes(before)
    self.assertEqual(recipes.verify(out), [])
    shard = sorted(out.glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    (problem,) = recipes.verify(out)
    self.assertRegex(problem, f"{shard.name}: '.*' has changed")
    first = sorted(out.glob("*.safetensors"))[0]
    tensors = safetensors_numpy.load_file(first)
    name = min(tensors)
    tensors["other"] = tensors.pop(name)
    safetensors_numpy.save_file(tensors, first)
    self.assertIn(
      f"{first}: {name!r} is missing.", recipes.verify(out, inputs=False)
    )

  def test_a_result_that_was_moved(self):
    _, _, recipe = self.pair()
    self.merge(recipe)
    (self.root / "out").rename(self.root / "moved")
    self.assertEqual(recipes.verify(self.root / "moved"), [])

  @parameterized.parameters(
    None, "{", "[]", "{}", '{"outputs": {}}', '{"outputs": 1, "inputs": {}}'
  )
  def test_no_result_to_verify(self, text):
    (self.root / "x").mkdir()
    if text is not None:
      (self.root / "x/jaxmerge.json").write_text(text)
    with self.assertRaisesRegex(recipes.RecipeError, "holds no jaxmerge.json"):
      recipes.verify(self.root / "x")

  @parameterized.parameters(
    '{"outputs": {"x": 1}, "inputs": {}}',
    '{"outputs": {"x": ["a"]}, "inputs": {}}',
    "[" * 99_999,
  )
  def test_a_damaged_record(self, text):
    self.write("x", {"a": np.ones(2)}, file="x")
    (self.root / "x/jaxmerge.json").write_text(text)
    with self.assertRaisesRegex(recipes.RecipeError, "jaxmerge.json"):
      recipes.verify(self.root / "x")


if __name__ == "__main__":
  absltest.main()
