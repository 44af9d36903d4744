"""Tests of `jaxmerge info`."""

from __future__ import annotations

import json

import numpy as np
from absl.testing import absltest

from tests.cli import _command
from tests.recipes import _on_disk


class InfoTest(_on_disk.OnDiskTest):
  def test_text(self):
    folder = self.write("a", _on_disk.llama(), _on_disk.CONFIG)
    found = _command.run("info", folder)
    self.assertEqual(found.status, 0)
    self.assertRegex(
      found.out, r"model\.layers\.1\.mlp\.up_proj\.weight +float32 +12x8 +384 B"
    )
    self.assertRegex(found.out, r"16 tensors, 797 parameters, 3\.21 kB\n")
    self.assertRegex(found.out, r"  int64: 1 tensors, 5 parameters, 40 B\n")
    self.assertRegex(found.out, r"  architectures: LlamaForCausalLM\n")
    self.assertRegex(found.out, r"layers:\n  model\.layers: 2\n")

  def test_adapter_and_ties(self):
    matrix = np.arange(6.0).reshape(2, 3)
    folder = self.write(
      "a",
      {"a.weight": matrix, "b.weight": matrix, "s": np.ones(())},
      adapter_config={
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["v", "q"],
        "rank_pattern": {"x": 3},
      },
    )
    found = _command.run("info", folder)
    self.assertRegex(found.out, r"s +float64 +scalar +8 B")
    self.assertIn(
      "adapter:\n  type: LORA\n  rank: 2\n  alpha: 4\n  targets: q, v\n"
      "  ranks:\n    x: 3\n",
      found.out,
    )
    self.assertIn("tied: a.weight = b.weight\n", found.out)

  def test_json(self):
    folder = self.write("a", _on_disk.llama(), _on_disk.CONFIG)
    found = json.loads(_command.run("info", folder, "--json").out)
    self.assertEqual(found["parameters"], 797)
    self.assertEqual(found["dtypes"]["int64"]["nbytes"], 40)
    self.assertLen(found["tensors"], 16)
    self.assertIn(
      {
        "name": "model.norm.weight",
        "dtype": "float32",
        "shape": [8],
        "nbytes": 32,
      },
      found["tensors"],
    )

  def test_bad_input(self):
    found = _command.run("info", self.root / "absent")
    self.assertEqual(found.status, 2)
    self.assertRegex(found.err, "^error: .*absent is no folder")
    folder = self.write("a", {"w": np.ones(2)})
    (folder / "model.safetensors").rename(self.root / "weights")
    (folder / "model.safetensors").symlink_to(self.root / "weights")
    found = _command.run("info", folder)
    self.assertEqual(found.status, 2)
    self.assertRegex(found.err, "^error: .*is a link to .*weights")


if __name__ == "__main__":
  absltest.main()
