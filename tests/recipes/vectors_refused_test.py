"""Tests of task vectors and adapters that cannot be taken, added or written."""

from __future__ import annotations

import os
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import checkpoints, recipes
from tests.recipes import _on_disk, _pairs


class RefusedTest(_pairs.PairTest):
  @parameterized.parameters("extract", "lora")
  def test_networks_that_do_not_fit(self, which):
    base, tuned = self.pair()
    run = self.extract if which == "extract" else lambda **k: self.lora(2, **k)
    name = "model.norm.weight"
    less = {key: one for key, one in tuned.items() if key != name}
    self.write("tuned", less)
    with self.assertRaisesRegex(
      recipes.RecipeError, rf"tuned has no tensor '{name}', which .*base has"
    ):
      run()
    run(select="mlp", out="selected")
    self.write("tuned", {**tuned, "more.weight": np.ones(2, np.float32)})
    with self.assertRaisesRegex(
      recipes.RecipeError, "base has no tensor 'more.weight'.*--select"
    ):
      run()
    self.write("tuned", {**tuned, name: np.ones(9, np.float32)})
    with self.assertRaisesRegex(
      recipes.RecipeError, rf"'{name}' has the shape \(9,\) in .*\(8,\) in"
    ):
      run()
    with self.assertRaisesRegex(recipes.RecipeError, "that 'absent' selects"):
      run(select="absent")
    with self.assertRaisesRegex(
      recipes.RecipeError, r"'\(' is no regular expression"
    ):
      run(select="(")
    with self.assertRaisesRegex(
      recipes.RecipeError, "no dtype 'int8'.*float16"
    ):
      run(dtype="int8")
    self.write("tuned", {**tuned, name: np.full(8, np.nan, np.float32)})
    with self.assertRaisesRegex(recipes.RecipeError, f"'{name}'.*not finite"):
      run()
    del base
    self.assert_nothing_left("base", "tuned", "selected")

  def test_overflow(self):
    self.write("base", {"w": np.zeros(2, np.float16)})
    self.write("tuned", {"w": np.full(2, 6e4, np.float16)})
    self.extract()
    with self.assertRaisesRegex(
      recipes.RecipeError, r"'w' .*6e\+05, which float16 cannot hold"
    ):
      self.apply(scale=10.0)
    self.assert_nothing_left("base", "tuned", "vector")

  def test_what_is_no_vector(self):
    base, _ = self.pair()
    with self.assertRaisesRegex(
      recipes.RecipeError, "neither jaxmerge_vector.json nor adapter_config"
    ):
      self.apply("tuned")
    self.extract()
    with self.assertRaisesRegex(recipes.RecipeError, "scale is nan"):
      self.apply(scale=float("nan"))
    for other, message in (
      ({"lm_head.weight": np.ones((3, 8))}, r"\(11, 8\), which is \(3, 8\)"),
      ({"other": np.ones(2)}, r"'[\w.]+', which .*base has not"),
      (
        {name: np.ones(one.shape, np.int32) for name, one in base.items()},
        r"'[\w.]+', which is int32",
      ),
    ):
      rest = base if "other" not in other else {}
      self.write("base", {**rest, **other})
      with self.assertRaisesRegex(recipes.RecipeError, message):
        self.apply()
    self.assert_nothing_left("base", "tuned", "vector")

  def test_places(self):
    self.pair()
    self.extract()
    with self.assertRaisesRegex(
      recipes.RecipeError, "vector exists.*overwrite"
    ):
      self.extract()
    old = _on_disk.read(self.root / "vector")
    self.extract(overwrite=True, dtype="float16")
    self.assertNotEqual(
      old["lm_head.weight"].dtype,
      _on_disk.read(self.root / "vector")["lm_head.weight"].dtype,
    )
    with self.assertRaisesRegex(recipes.RecipeError, "holds .*base, which is"):
      self.extract("base", overwrite=True)
    with self.assertRaisesRegex(recipes.RecipeError, "holds .*base, which is"):
      self.lora(1, "", overwrite=True)
    with self.assertRaisesRegex(recipes.RecipeError, "max_shard_bytes is 0"):
      self.extract("other", max_shard_bytes=0)
    (self.root / "file").write_text("")
    with self.assertRaisesRegex(recipes.RecipeError, "file is no folder"):
      self.extract("file", overwrite=True)
    with self.assertRaisesRegex(recipes.RecipeError, "merging cannot be writt"):
      self.extract("file/vector")
    with self.assertRaisesRegex(
      checkpoints.CheckpointError, "is no folder, and no id"
    ):
      recipes.extract(
        self.root / "absent", self.root / "tuned", self.root / "other"
      )
    self.assert_nothing_left("base", "tuned", "vector", "file")

  def test_an_error_while_writing(self):
    self.pair()
    self.extract()
    before = _on_disk.read(self.root / "vector")
    full = OSError(28, "No space left on device")
    with (
      mock.patch.object(os, "pwrite", side_effect=full),
      self.assertRaisesRegex(recipes.RecipeError, "No space is left"),
    ):
      self.extract(overwrite=True)
    with (
      mock.patch.object(os, "pwrite", side_effect=KeyboardInterrupt),
      self.assertRaises(KeyboardInterrupt),
    ):
      self.extract(overwrite=True)
    np.testing.assert_equal(_on_disk.read(self.root / "vector"), before)
    self.assert_nothing_left("base", "tuned", "vector")

  def test_what_a_killed_process_left_behind(self):
    self.pair()
    (self.root / ".vector.merging").mkdir()
    (self.root / ".vector.merging/model.safetensors").write_bytes(b"half")
    (self.root / ".vector.merging/other.json").write_text("{}")
    self.extract()
    self.assertFalse((self.root / "vector/other.json").exists())
    self.assertLen(_on_disk.read(self.root / "vector"), 15)
    self.assert_nothing_left("base", "tuned", "vector")

  def test_links_and_pickles(self):
    self.pair()
    (self.root / "secret.json").write_text("{}")
    (self.root / "base/generation.json").symlink_to(self.root / "secret.json")
    with self.assertRaisesRegex(recipes.RecipeError, "is a link to .*secret"):
      self.extract()
    (self.root / "base/generation.json").unlink()
    (self.root / "tuned/model.safetensors").unlink()
    (self.root / "tuned/pytorch_model.bin").write_bytes(b"cos\nsystem\n.")
    with self.assertRaisesRegex(checkpoints.CheckpointError, "is pickled"):
      self.extract()
    self.assert_nothing_left("base", "tuned", "secret.json")


if __name__ == "__main__":
  absltest.main()
