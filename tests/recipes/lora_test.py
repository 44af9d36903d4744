"""Tests of adapters that are applied to their base while merging."""

from __future__ import annotations

import json

import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import checkpoints, recipes
from tests.recipes import _merging


class LoraTest(_merging.MergingTest):
  def _adapter(self, name, tensors, prefix="base_model.model.", **config):
    self.write(
      name,
      {prefix + key: value for key, value in tensors.items()},
      file="adapter_model.safetensors",
      adapter_config={"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config},
    )

  def _factors(self, seed=0, rank=2, out=4, into=4):
    draws = np.random.default_rng(seed)
    return (
      draws.normal(size=(rank, into)).astype(np.float32),
      draws.normal(size=(out, rank)).astype(np.float32),
    )

  @parameterized.parameters(
    ({}, 4 / 2),
    ({"use_rslora": True}, 4 / np.sqrt(2)),
    ({"lora_alpha": 1}, 1 / 2),
    ({"alpha_pattern": {"mlp.up_proj": 6}}, 6 / 2),
    ({"alpha_pattern": {"other": 6}}, 4 / 2),
  )
  def test_applied(self, config, scale):
    a = self.model("a")
    down, up = self._factors()
    place = "model.layers.1.mlp.up_proj"
    self._adapter(
      "lora",
      {f"{place}.lora_A.weight": down, f"{place}.lora_B.weight": up},
      **config,
    )
    found = self.merge(
      self.of("passthrough", ("a+" + str(self.root / "lora"),))
    )
    self.assertCountEqual(found, a)
    for name, array in a.items():
      wanted = array
      if name == f"{place}.weight":
        wanted = array + scale * (up @ down)
      np.testing.assert_allclose(found[name], wanted, rtol=1e-5, atol=1e-5)

  def test_embeddings_and_modules_that_are_saved(self):
    a = self.model("a")
    draws = np.random.default_rng(3)
    down = draws.normal(size=(2, 6)).astype(np.float32)
    up = draws.normal(size=(4, 2)).astype(np.float32)
    head = np.ones((6, 4), np.float32)
    self._adapter(
      "lora",
      {
        "model.embed_tokens.lora_embedding_A": down,
        "model.embed_tokens.lora_embedding_B": up,
        "lm_head.modules_to_save.default.weight": head,
      },
    )
    found = self.merge(
      self.of("passthrough", ("a+" + str(self.root / "lora"),))
    )
    np.testing.assert_allclose(
      found["model.embed_tokens.weight"],
      a["model.embed_tokens.weight"] + 2 * (up @ down).T,
      rtol=1e-5,
      atol=1e-5,
    )
    np.testing.assert_array_equal(found["lm_head.weight"], head)

  def test_merged_with_its_base(self):
    a = self.model("a")
    down, up = self._factors()
    place = "model.layers.0.self_attn.q_proj"
    self._adapter(
      "lora", {f"{place}.lora_A.weight": down, f"{place}.lora_B.weight": up}
    )
    recipe = self.of(
      "task_arithmetic", ("a+" + str(self.root / "lora"),), "a", weight=0.25
    )
    found = self.merge(recipe)
    np.testing.assert_allclose(
      found[f"{place}.weight"],
      a[f"{place}.weight"] + 0.25 * 2 * (up @ down),
      rtol=1e-5,
      atol=1e-5,
    )
    # The adapter's own tensors have checksums.
    record = json.loads((self.root / "out/jaxmerge.json").read_text())
    file = self.root / "lora/adapter_model.safetensors"
    self.assertLen(record["inputs"][str(file)], 2)
    self.assertEqual(recipes.verify(self.root / "out"), [])
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    self.assertLen(recipes.verify(self.root / "out"), 1)

  @parameterized.parameters(
    ({"peft_type": "IA3"}, {}, "of the type IA3"),
    ({"use_dora": True}, {}, "DoRA"),
    ({}, {"x.lora_A.weight": np.ones((2, 4))}, "'x' has the factors"),
    (
      {},
      {
        "x.lora_A.weight": np.ones((2, 4)),
        "x.lora_B.weight": np.ones((4, 2)),
      },
      "'x.weight', which the network has not",
    ),
    (
      {},
      {
        "model.norm.lora_A.weight": np.ones((2, 4)),
        "model.norm.lora_B.weight": np.ones((4, 2)),
      },
      r"of shape \(4, 4\), which is \(4,\)",
    ),
    (
      {},
      {
        "model.norm.lora_A.weight": np.ones((2, 4)),
        "model.norm.lora_B.weight": np.ones((4, 3)),
      },
      "no LoRA of a linear layer",
    ),
    ({}, {"model.norm.weight": np.ones(5)}, "replaces .*has not"),
  )
  def test_what_does_not_fit(self, config, tensors, message):
    self.model("a")
    self._adapter("lora", tensors or {"x": np.ones(2)}, **config)
    with self.assertRaisesRegex(checkpoints.CheckpointError, message):
      self.merge(self.of("passthrough", ("a+" + str(self.root / "lora"),)))
    self.assert_nothing_left("a", "lora")


if __name__ == "__main__":
  absltest.main()
