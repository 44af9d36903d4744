"""Tests of adapters that are taken from tuned networks."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import unittest

import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import recipes
from tests.recipes import _on_disk, _pairs


class ExtractLoraTest(_pairs.PairTest):
  @parameterized.parameters(np.float32, _on_disk.BFLOAT16)
  def test_lora_of_full_rank(self, dtype):
    base, tuned = self.pair(dtype)
    report = self.lora(12, save_rest=True)
    self.assertAlmostEqual(report.share, 1.0, places=6)
    self.assertTrue(all(one.saved for one in report.left_out))
    found = self.apply("lora")
    for name, array in found.items():
      self.assertEqual(array.dtype, tuned[name].dtype)
      np.testing.assert_allclose(
        array.astype(np.float32),
        tuned[name].astype(np.float32),
        rtol=0 if dtype == np.float32 else 2**-7,
        atol=2e-6,
      )

  def test_lora_keeps_what_the_rank_can(self):
    base, tuned = self.pair()
    report = self.lora(3)
    found = self.apply("lora")
    squares = rest = 0.0
    shares = {one.name: one for one in report.kept}
    self.assertLen(shares, 9)
    for name, array in found.items():
      change = (tuned[name] - base[name]).astype(np.float64)
      squares += np.sum(change**2)
      if name not in shares:
        rest += np.sum(change**2)
        np.testing.assert_array_equal(array, base[name])
        continue
      left, values, right = np.linalg.svd(change, full_matrices=False)
      wanted = (left[:, :3] * values[:3]) @ right[:3]
      np.testing.assert_allclose(array, base[name] + wanted, rtol=0, atol=2e-6)
      share = np.sum(values[:3] ** 2) / np.sum(values**2)
      self.assertAlmostEqual(shares[name].share, share, places=5)
      self.assertAlmostEqual(
        shares[name].norm, np.linalg.norm(change), places=5
      )
      rest += (1 - share) * np.sum(values**2)
    self.assertAlmostEqual(report.share, 1 - rest / squares, places=5)
    left_out = {one.name: one for one in report.left_out}
    name = "model.embed_tokens.weight"
    self.assertEqual(left_out[name].why, "an embedding")
    self.assertAlmostEqual(
      left_out[name].norm, np.linalg.norm(tuned[name] - base[name]), places=5
    )
    self.assertFalse(any(one.saved for one in report.left_out))

  def test_layout_of_an_adapter(self):
    self.pair()
    self.lora(3, dtype="bfloat16")
    config = json.loads((self.root / "lora/adapter_config.json").read_text())
    self.assertEqual(config["peft_type"], "LORA")
    self.assertEqual(config["task_type"], "CAUSAL_LM")
    self.assertEqual((config["r"], config["lora_alpha"]), (3, 3))
    self.assertEqual(
      config["target_modules"],
      ["down_proj", "k_proj", "lm_head", "q_proj", "up_proj"],
    )
    self.assertEqual(config["base_model_name_or_path"], str(self.root / "base"))
    self.assertFalse(config["fan_in_fan_out"])
    self.assertIsNone(config["modules_to_save"])
    found = _on_disk.read(self.root / "lora")
    self.assertLen(found, 18)
    start = "base_model.model.model.layers.0.mlp.up_proj.lora_"
    self.assertEqual(found[f"{start}A.weight"].shape, (3, 8))
    self.assertEqual(found[f"{start}B.weight"].shape, (12, 3))
    self.assertEqual(found[f"{start}A.weight"].dtype, _on_disk.BFLOAT16)

  def test_targets_are_those_that_changed_alone(self):
    base, tuned = self.pair()
    same = "model.layers.0.mlp.up_proj.weight"
    self.write("tuned", {**tuned, same: base[same]})
    self.lora(2, select="proj")
    config = json.loads((self.root / "lora/adapter_config.json").read_text())
    self.assertEqual(
      config["target_modules"],
      ["down_proj", "k_proj", "q_proj", "model.layers.1.mlp.up_proj"],
    )

  def test_conv1d(self):
    draws = np.random.default_rng(0)
    base = {
      "h.0.attn.c_attn.weight": draws.normal(size=(4, 12)),
      "h.0.ln_1.weight": draws.normal(size=4),
      "wte.weight": draws.normal(size=(7, 4)),
    }
    base = {name: one.astype(np.float32) for name, one in base.items()}
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    tuned = _on_disk.tuned(base)
    self.write("base", base, config)
    self.write("tuned", tuned, config)
    self.lora(4, save_rest=True)
    found = _on_disk.read(self.root / "lora")
    start = "base_model.model.transformer."
    down = found[f"{start}h.0.attn.c_attn.lora_A.weight"]
    up = found[f"{start}h.0.attn.c_attn.lora_B.weight"]
    name = "h.0.attn.c_attn.weight"
    np.testing.assert_allclose(
      (up @ down).T, tuned[name] - base[name], rtol=0, atol=1e-6
    )
    written = json.loads((self.root / "lora/adapter_config.json").read_text())
    self.assertTrue(written["fan_in_fan_out"])
    self.assertEqual(written["target_modules"], ["c_attn"])
    # The scores are read off by the embedding, which PEFT would leave behind.
    self.assertCountEqual(
      written["modules_to_save"],
      ["transformer.h.0.ln_1", "transformer.wte", "lm_head"],
    )
    np.testing.assert_array_equal(
      found["base_model.model.lm_head.weight"], tuned["wte.weight"]
    )
    for name, array in self.apply("lora").items():
      np.testing.assert_allclose(array, tuned[name], rtol=0, atol=1e-6)

  def test_heads_that_peft_saves_itself(self):
    draws = np.random.default_rng(0)
    base = {
      "bert.layer.0.dense.weight": draws.normal(size=(4, 4)),
      "classifier.weight": draws.normal(size=(2, 4)),
      "classifier.bias": np.zeros(2),
    }
    config = {
      "model_type": "bert",
      "architectures": ["BertForSequenceClassification"],
    }
    tuned = _on_disk.tuned(base)
    self.write("base", base, config)
    self.write("tuned", tuned, config)
    report = self.lora(1)
    written = json.loads((self.root / "lora/adapter_config.json").read_text())
    self.assertEqual(written["task_type"], "SEQ_CLS")
    self.assertEqual(written["target_modules"], ["dense"])
    self.assertEqual(written["modules_to_save"], ["classifier"])
    self.assertTrue(all(one.saved for one in report.left_out))
    found = self.apply("lora")
    for name in ("classifier.weight", "classifier.bias"):
      np.testing.assert_array_equal(found[name], tuned[name])

  def test_modules_are_saved_whole(self):
    base = {
      "ln.weight": np.ones(3),
      "ln.bias": np.zeros(3),
      "q.weight": np.ones((3, 3)),
    }
    self.write("base", base)
    self.write("tuned", _on_disk.tuned(base))
    # PEFT wants all of a module that it finds in modules_to_save.
    self.lora(3, select="weight", save_rest=True)
    found = _on_disk.read(self.root / "lora")
    np.testing.assert_array_equal(
      found["base_model.model.ln.bias"], np.zeros(3)
    )

  def test_what_no_adapter_can_hold(self):
    draws = np.random.default_rng(0)
    base = {
      "vision.patch.weight": draws.normal(size=(4, 3, 2, 2)),
      "vision.scale": draws.normal(size=3),
      "vision.proj.weight": draws.normal(size=(4, 4)),
      "logit_scale": np.ones(()),
    }
    self.write("base", base)
    self.write("tuned", _on_disk.tuned(base))
    report = self.lora(2, save_rest=True)
    found = {one.name: one for one in report.left_out}
    self.assertEqual(found["vision.patch.weight"].why, "has 4 axes")
    self.assertTrue(found["vision.patch.weight"].saved)
    self.assertFalse(found["vision.scale"].saved)
    self.assertFalse(found["logit_scale"].saved)
    self.assertLess(report.share, 1)

  def test_ranks(self):
    base, _ = self.pair()
    with self.assertRaisesRegex(recipes.RecipeError, "rank is 0. Give 1"):
      self.lora(0)
    self.write("tuned", base)
    with self.assertRaisesRegex(
      recipes.RecipeError, "No weight of a linear layer differs"
    ):
      self.lora(1)
    self.assert_nothing_left("base", "tuned")

  def test_against_peft(self):
    if not all(
      map(importlib.util.find_spec, ("torch", "transformers", "peft"))
    ):
      raise unittest.SkipTest("needs torch, transformers and peft")
    made = subprocess.run(
      [sys.executable, "-c", _MAKE, str(self.root)],
      check=False,
      capture_output=True,
      text=True,
    )
    self.assertEqual(made.returncode, 0, made.stderr)
    for rank, rest, out in ((2, False, "lora"), (16, True, "whole")):
      self.lora(rank, out, save_rest=rest)
      self.apply(out, f"{out}-applied")
    compared = subprocess.run(
      [sys.executable, "-c", _COMPARE, str(self.root)],
      check=False,
      capture_output=True,
      text=True,
    )
    self.assertEqual(compared.returncode, 0, compared.stderr)


_MAKE = """
import sys, torch, transformers
torch.manual_seed(0)
config = transformers.LlamaConfig(
  vocab_size=50, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
  num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
network = transformers.LlamaForCausalLM(config)
network.save_pretrained(sys.argv[1] + "/base")
with torch.no_grad():
  for one in network.parameters():
    one += 0.05 * torch.randn_like(one)
network.save_pretrained(sys.argv[1] + "/tuned")
"""
_COMPARE = """
import sys, peft, torch, transformers
load = transformers.LlamaForCausalLM.from_pretrained
tokens = torch.arange(10)[None]
def scores(network):
  with torch.no_grad():
    return network.eval()(tokens).logits
for name in ("lora", "whole"):
  base = load(sys.argv[1] + "/base")
  adapted = peft.PeftModel.from_pretrained(base, sys.argv[1] + "/" + name)
  wanted = scores(adapted)
  found = scores(load(sys.argv[1] + "/" + name + "-applied"))
  assert torch.allclose(wanted, found, atol=1e-6), (wanted - found).abs().max()
tuned = scores(load(sys.argv[1] + "/tuned"))
assert torch.allclose(wanted, tuned, atol=1e-6), (wanted - tuned).abs().max()
"""


if __name__ == "__main__":
  absltest.main()
