"""Tests of adding adapters in PEFT's layout to a network."""

from __future__ import annotations

from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import checkpoints, recipes
from jaxmerge.recipes import _blocks
from tests.recipes import _on_disk, _pairs


class ApplyAdapterTest(_pairs.PairTest):
  @parameterized.parameters(1.0, 0.5)
  def test_apply_an_adapter(self, scale):
    base, _ = self.pair()
    draws = np.random.default_rng(3)
    down = draws.normal(size=(2, 8)).astype(np.float32)
    up = draws.normal(size=(12, 2)).astype(np.float32)
    norm = draws.normal(size=8).astype(np.float32)
    place = "model.layers.1.mlp.up_proj"
    _pairs.peft_adapter(
      self.root / "lora",
      {
        f"{place}.lora_A.weight": down,
        f"{place}.lora_B.weight": up,
        "model.norm.weight": norm,
        "model.layers.0.self_attn.q_proj.base_layer.bias": norm,
      },
    )
    with mock.patch.object(_blocks, "BLOCK", 16):
      found = self.apply("lora", scale=scale)
    wanted = dict(base)
    wanted[f"{place}.weight"] = base[f"{place}.weight"] + scale * 3 * (
      up @ down
    )
    for name in ("model.norm.weight", "model.layers.0.self_attn.q_proj.bias"):
      wanted[name] = base[name] + scale * (norm - base[name])
    for name, array in found.items():
      np.testing.assert_allclose(array, wanted[name], rtol=0, atol=2e-6)

  def test_apply_an_adapter_of_conv1d_and_an_embedding(self):
    draws = np.random.default_rng(3)

    def leaf(*shape):
      return draws.normal(size=shape).astype(_on_disk.BFLOAT16)

    base = {"h.0.attn.c_attn.weight": leaf(4, 12), "wte.weight": leaf(7, 4)}
    self.write("base", base)
    down, up, rows, columns = leaf(2, 4), leaf(12, 2), leaf(2, 7), leaf(4, 2)
    start = "transformer.h.0.attn.c_attn"
    _pairs.peft_adapter(
      self.root / "lora",
      {
        f"{start}.lora_A.weight": down,
        f"{start}.lora_B.weight": up,
        "transformer.wte.lora_embedding_A": rows,
        "transformer.wte.lora_embedding_B": columns,
      },
      fan_in_fan_out=True,
      use_rslora=True,
    )
    found = self.apply("lora")
    wide = {name: one.astype(np.float64) for name, one in base.items()}
    down, up, rows, columns = (
      one.astype(np.float64) for one in (down, up, rows, columns)
    )
    scale = 6 / np.sqrt(2)
    for name, change in (
      ("h.0.attn.c_attn.weight", (up @ down).T),
      ("wte.weight", (columns @ rows).T),
    ):
      wanted = wide[name] + scale * change
      np.testing.assert_allclose(
        found[name].astype(np.float64), wanted, rtol=2**-8, atol=1e-6
      )

  def test_adapters_that_cannot_be_applied(self):
    self.pair()
    place = "model.layers.1.mlp.up_proj.lora_"
    down = np.ones((2, 8), np.float32)
    for tensors, config, message in (
      ({"x.lora_A.weight": down}, {}, "'x' has the factors"),
      ({f"{place}A.weight": down}, {"use_dora": True}, "DoRA"),
      (
        {f"{place}A.weight": down, f"{place}B.weight": np.ones((3, 2))},
        {},
        r"of shape \(3, 8\), which is \(12, 8\)",
      ),
      (
        {"x.lora_A.weight": down, "x.lora_B.weight": np.ones((3, 2))},
        {},
        "'x.weight', which .*base has not",
      ),
      ({"head.weight": down}, {}, "'head.weight', which .*base has not"),
    ):
      _pairs.peft_adapter(self.root / "lora", tensors, **config)
      with self.assertRaisesRegex(ValueError, message) as caught:
        self.apply("lora")
      self.assertIsInstance(
        caught.exception, (recipes.RecipeError, checkpoints.CheckpointError)
      )
    self.assert_nothing_left("base", "tuned", "lora")


if __name__ == "__main__":
  absltest.main()
