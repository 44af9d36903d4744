"""Tests of taking task vectors and adapters, and of adding them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import unittest
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import checkpoints, recipes
from jaxmerge.recipes import _blocks, _extract_lora
from tests.recipes import _on_disk


def _peft_adapter(folder, tensors, **config):
  return _on_disk.write(
    folder,
    {f"base_model.model.{name}": one for name, one in tensors.items()},
    file="adapter_model.safetensors",
    adapter_config={"peft_type": "LORA", "r": 2, "lora_alpha": 6, **config},
  )


class VectorsTest(_on_disk.OnDiskTest):
  def _pair(self, dtype=np.float32, **kwargs):
    base = _on_disk.llama(dtype=dtype)
    tuned = _on_disk.tuned(base, **kwargs)
    self.write("base", base, _on_disk.CONFIG, tokenizer={"a": 1})
    self.write("tuned", tuned, {**_on_disk.CONFIG, "note": "tuned"})
    return base, tuned

  def _extract(self, out="vector", **kwargs):
    return recipes.extract(
      self.root / "base", self.root / "tuned", self.root / out, **kwargs
    )

  def _lora(self, rank, out="lora", **kwargs):
    return recipes.extract_lora(
      self.root / "base", self.root / "tuned", self.root / out, rank, **kwargs
    )

  def _apply(self, vector="vector", out="out", **kwargs):
    recipes.apply_vector(
      self.root / "base", self.root / vector, self.root / out, **kwargs
    )
    return _on_disk.read(self.root / out)

  # Task vectors.

  @parameterized.parameters(1 << 22, 16)
  def test_vector_is_the_difference(self, block):
    base, tuned = self._pair()
    with mock.patch.object(_blocks, "BLOCK", block):
      report = self._extract()
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
    base, tuned = self._pair(dtype)
    self._extract()
    found = self._apply()
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
    self._extract(dtype="float64")
    np.testing.assert_array_equal(self._apply()["a.weight"], tuned["a.weight"])

  @parameterized.parameters(0.0, -1.0, 0.3)
  def test_scale(self, scale):
    base, tuned = self._pair()
    self._extract()
    found = self._apply(scale=scale)
    for name, array in found.items():
      wanted = base[name] + scale * (tuned[name] - base[name])
      np.testing.assert_allclose(array, wanted, rtol=0, atol=1e-6)

  @parameterized.parameters("bfloat16", "float16", "float64")
  def test_dtype_of_the_vector(self, dtype):
    base, tuned = self._pair()
    self._extract(dtype=dtype)
    found = _on_disk.read(self.root / "vector")
    for name, array in found.items():
      self.assertEqual(str(array.dtype), dtype)
      wanted = (tuned[name] - base[name]).astype(array.dtype)
      np.testing.assert_array_equal(array, wanted)

  def test_select_and_shards(self):
    base, tuned = self._pair()
    report = self._extract(select=r"mlp\.(up|down)", max_shard_bytes=400)
    self.assertLen(report.tensors, 4)
    self.assertEqual(report.left_out["lm_head.weight"], "not selected")
    self.assertLen(list((self.root / "vector").glob("model-*-of-*")), 4)
    seen = []
    found = self._apply(
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
    self._extract()
    found = _on_disk.read(self.root / "vector")
    np.testing.assert_array_equal(found["lm_head.weight"], np.full((2, 2), 2.0))

  def test_of_orbax(self):
    base, tuned = self._pair()
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
    base, _ = self._pair()
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

  # Adapters.

  @parameterized.parameters(1.0, 0.5)
  def test_apply_an_adapter(self, scale):
    base, _ = self._pair()
    draws = np.random.default_rng(3)
    down = draws.normal(size=(2, 8)).astype(np.float32)
    up = draws.normal(size=(12, 2)).astype(np.float32)
    norm = draws.normal(size=8).astype(np.float32)
    place = "model.layers.1.mlp.up_proj"
    _peft_adapter(
      self.root / "lora",
      {
        f"{place}.lora_A.weight": down,
        f"{place}.lora_B.weight": up,
        "model.norm.weight": norm,
        "model.layers.0.self_attn.q_proj.base_layer.bias": norm,
      },
    )
    with mock.patch.object(_blocks, "BLOCK", 16):
      found = self._apply("lora", scale=scale)
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
    _peft_adapter(
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
    found = self._apply("lora")
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

  @parameterized.parameters(np.float32, _on_disk.BFLOAT16)
  def test_lora_of_full_rank(self, dtype):
    base, tuned = self._pair(dtype)
    report = self._lora(12, save_rest=True)
    self.assertAlmostEqual(report.share, 1.0, places=6)
    self.assertTrue(all(one.saved for one in report.left_out))
    found = self._apply("lora")
    for name, array in found.items():
      self.assertEqual(array.dtype, tuned[name].dtype)
      np.testing.assert_allclose(
        array.astype(np.float32),
        tuned[name].astype(np.float32),
        rtol=0 if dtype == np.float32 else 2**-7,
        atol=2e-6,
      )

  def test_lora_keeps_what_the_rank_can(self):
    base, tuned = self._pair()
    report = self._lora(3)
    found = self._apply("lora")
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
    self._pair()
    self._lora(3, dtype="bfloat16")
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
    base, tuned = self._pair()
    same = "model.layers.0.mlp.up_proj.weight"
    self.write("tuned", {**tuned, same: base[same]})
    self._lora(2, select="proj")
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
    self._lora(4, save_rest=True)
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
    for name, array in self._apply("lora").items():
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
    report = self._lora(1)
    written = json.loads((self.root / "lora/adapter_config.json").read_text())
    self.assertEqual(written["task_type"], "SEQ_CLS")
    self.assertEqual(written["target_modules"], ["dense"])
    self.assertEqual(written["modules_to_save"], ["classifier"])
    self.assertTrue(all(one.saved for one in report.left_out))
    found = self._apply("lora")
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
    self._lora(3, select="weight", save_rest=True)
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
    report = self._lora(2, save_rest=True)
    found = {one.name: one for one in report.left_out}
    self.assertEqual(found["vision.patch.weight"].why, "has 4 axes")
    self.assertTrue(found["vision.patch.weight"].saved)
    self.assertFalse(found["vision.scale"].saved)
    self.assertFalse(found["logit_scale"].saved)
    self.assertLess(report.share, 1)

  @parameterized.product(
    shape=((90, 60), (60, 90)), own=(60, 3), dtype=(np.float32, np.float64)
  )
  def test_large_matrices_are_decomposed_in_part(self, shape, own, dtype):
    draws = np.random.default_rng(0)
    left, right = (
      draws.normal(size=(shape[0], own)),
      draws.normal(size=(own, shape[1])),
    )
    matrix = (left * 0.7 ** np.arange(own) @ right).astype(dtype)
    wanted = _extract_lora.factors(matrix, 5)
    with mock.patch.object(_extract_lora, "_MOST_WHOLE", 30):
      found = _extract_lora.factors(matrix, 5)
      again = _extract_lora.factors(matrix, 5)
      whole = _extract_lora.factors(matrix, 20)
    np.testing.assert_allclose(
      found[0] @ found[1],
      wanted[0] @ wanted[1],
      rtol=0,
      atol=1e-4 if dtype == np.float32 else 1e-10,
    )
    self.assertEqual(found[0].dtype, dtype)
    np.testing.assert_array_equal(found[0], again[0])
    np.testing.assert_array_equal(
      whole[0], _extract_lora.factors(matrix, 20)[0]
    )

  def test_where_the_decomposition_in_part_fails(self):
    from scipy.sparse import linalg

    matrix = np.diag(np.arange(1.0, 61.0))
    wanted = _extract_lora.factors(matrix, 2)
    failure = linalg.ArpackError(-9999)
    with (
      mock.patch.object(_extract_lora, "_MOST_WHOLE", 30),
      mock.patch.object(linalg, "svds", side_effect=failure),
    ):
      found = _extract_lora.factors(matrix, 2)
    np.testing.assert_array_equal(found[0], wanted[0])

  # What is wrong.

  @parameterized.parameters("extract", "lora")
  def test_networks_that_do_not_fit(self, which):
    base, tuned = self._pair()
    run = (
      self._extract if which == "extract" else lambda **k: self._lora(2, **k)
    )
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

  def test_ranks(self):
    base, _ = self._pair()
    with self.assertRaisesRegex(recipes.RecipeError, "rank is 0. Give 1"):
      self._lora(0)
    self.write("tuned", base)
    with self.assertRaisesRegex(
      recipes.RecipeError, "No weight of a linear layer differs"
    ):
      self._lora(1)
    self.assert_nothing_left("base", "tuned")

  def test_overflow(self):
    self.write("base", {"w": np.zeros(2, np.float16)})
    self.write("tuned", {"w": np.full(2, 6e4, np.float16)})
    self._extract()
    with self.assertRaisesRegex(
      recipes.RecipeError, r"'w' .*6e\+05, which float16 cannot hold"
    ):
      self._apply(scale=10.0)
    self.assert_nothing_left("base", "tuned", "vector")

  def test_what_is_no_vector(self):
    base, _ = self._pair()
    with self.assertRaisesRegex(
      recipes.RecipeError, "neither jaxmerge_vector.json nor adapter_config"
    ):
      self._apply("tuned")
    self._extract()
    with self.assertRaisesRegex(recipes.RecipeError, "scale is nan"):
      self._apply(scale=float("nan"))
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
        self._apply()
    self.assert_nothing_left("base", "tuned", "vector")

  def test_adapters_that_cannot_be_applied(self):
    self._pair()
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
      _peft_adapter(self.root / "lora", tensors, **config)
      with self.assertRaisesRegex(ValueError, message) as caught:
        self._apply("lora")
      self.assertIsInstance(
        caught.exception, (recipes.RecipeError, checkpoints.CheckpointError)
      )
    self.assert_nothing_left("base", "tuned", "lora")

  def test_places(self):
    self._pair()
    self._extract()
    with self.assertRaisesRegex(
      recipes.RecipeError, "vector exists.*overwrite"
    ):
      self._extract()
    old = _on_disk.read(self.root / "vector")
    self._extract(overwrite=True, dtype="float16")
    self.assertNotEqual(
      old["lm_head.weight"].dtype,
      _on_disk.read(self.root / "vector")["lm_head.weight"].dtype,
    )
    with self.assertRaisesRegex(recipes.RecipeError, "holds .*base, which is"):
      self._extract("base", overwrite=True)
    with self.assertRaisesRegex(recipes.RecipeError, "holds .*base, which is"):
      self._lora(1, "", overwrite=True)
    with self.assertRaisesRegex(recipes.RecipeError, "max_shard_bytes is 0"):
      self._extract("other", max_shard_bytes=0)
    (self.root / "file").write_text("")
    with self.assertRaisesRegex(recipes.RecipeError, "file is no folder"):
      self._extract("file", overwrite=True)
    with self.assertRaisesRegex(recipes.RecipeError, "merging cannot be writt"):
      self._extract("file/vector")
    with self.assertRaisesRegex(
      checkpoints.CheckpointError, "is no folder, and no id"
    ):
      recipes.extract(
        self.root / "absent", self.root / "tuned", self.root / "other"
      )
    self.assert_nothing_left("base", "tuned", "vector", "file")

  def test_an_error_while_writing(self):
    self._pair()
    self._extract()
    before = _on_disk.read(self.root / "vector")
    full = OSError(28, "No space left on device")
    with (
      mock.patch.object(os, "pwrite", side_effect=full),
      self.assertRaisesRegex(recipes.RecipeError, "No space is left"),
    ):
      self._extract(overwrite=True)
    with (
      mock.patch.object(os, "pwrite", side_effect=KeyboardInterrupt),
      self.assertRaises(KeyboardInterrupt),
    ):
      self._extract(overwrite=True)
    np.testing.assert_equal(_on_disk.read(self.root / "vector"), before)
    self.assert_nothing_left("base", "tuned", "vector")

  def test_what_a_killed_process_left_behind(self):
    self._pair()
    (self.root / ".vector.merging").mkdir()
    (self.root / ".vector.merging/model.safetensors").write_bytes(b"half")
    (self.root / ".vector.merging/other.json").write_text("{}")
    self._extract()
    self.assertFalse((self.root / "vector/other.json").exists())
    self.assertLen(_on_disk.read(self.root / "vector"), 15)
    self.assert_nothing_left("base", "tuned", "vector")

  def test_links_and_pickles(self):
    self._pair()
    (self.root / "secret.json").write_text("{}")
    (self.root / "base/generation.json").symlink_to(self.root / "secret.json")
    with self.assertRaisesRegex(recipes.RecipeError, "is a link to .*secret"):
      self._extract()
    (self.root / "base/generation.json").unlink()
    (self.root / "tuned/model.safetensors").unlink()
    (self.root / "tuned/pytorch_model.bin").write_bytes(b"cos\nsystem\n.")
    with self.assertRaisesRegex(checkpoints.CheckpointError, "is pickled"):
      self._extract()
    self.assert_nothing_left("base", "tuned", "secret.json")

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
      self._lora(rank, out, save_rest=rest)
      self._apply(out, f"{out}-applied")
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
