"""Tests of adapters that are applied, and merged among themselves."""

import json

import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import checkpoints, merging, recipes
from tests.recipes import _on_disk

_MODULE = "model.layers.0.mlp.up_proj"
_NAME = f"base_model.model.{_MODULE}"
_OUT, _IN = 6, 5


def _factors(seed, rank):
  draws = np.random.default_rng(seed)
  return (
    draws.normal(size=(rank, _IN)).astype(np.float32),
    draws.normal(size=(_OUT, rank)).astype(np.float32),
  )


class AdaptersTest(_on_disk.OnDiskTest):
  def _adapter(self, name, seed, rank, *, module=_NAME, more=None, **config):
    down, up = _factors(seed, rank)
    tensors = {
      f"{module}.lora_A.weight": down,
      f"{module}.lora_B.weight": up,
      **(more or {}),
    }
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, **config}
    self.write(
      name,
      tensors,
      file="adapter_model.safetensors",
      adapter_config=config,
    )
    scale = 4 / (np.sqrt(rank) if config.get("use_rslora") else rank)
    return scale * up @ down

  def _merge(self, method, names, *, weights=None, **more):
    weights = [1.0] * len(names) if weights is None else weights
    recipe = {
      "merge_method": method,
      "models": [
        {"model": self._path(name), "parameters": {"weight": weight}}
        for name, weight in zip(names, weights, strict=True)
      ],
      **more,
    }
    out = self.root / "out"
    recipes.merge_checkpoints(recipe, out, overwrite=True)
    return out

  def _path(self, name):
    return "+".join(str(self.root / part) for part in name.split("+"))

  def _product(self, out):
    found = _on_disk.read(out)
    config = json.loads((out / "adapter_config.json").read_text())
    up, down = found[f"{_NAME}.lora_B.weight"], found[f"{_NAME}.lora_A.weight"]
    self.assertEqual(len(down), config["r"])
    return config["lora_alpha"] / config["r"] * up @ down

  @parameterized.parameters(False, True)
  def test_applied_to_its_network(self, use_rslora):
    weight = np.random.default_rng(0).normal(size=(_OUT, _IN))
    self.write("net", {f"{_MODULE}.weight": weight.astype(np.float32)})
    change = self._adapter("a", 1, 2, use_rslora=use_rslora)
    out = self._merge("linear", ["net", "net+a"], weights=[0.25, 0.75])
    (found,) = _on_disk.read(out).values()
    np.testing.assert_allclose(found, weight + 0.75 * change, rtol=1e-5)

  def test_biases_and_layers_that_it_replaces(self):
    self.write(
      "net",
      {
        f"{_MODULE}.weight": np.zeros((_OUT, _IN), np.float32),
        f"{_MODULE}.bias": np.zeros(_OUT, np.float32),
        "lm_head.weight": np.zeros((2, 2), np.float32),
      },
    )
    self._adapter(
      "a",
      1,
      2,
      more={
        f"{_NAME}.base_layer.bias": np.ones(_OUT, np.float32),
        "base_model.model.lm_head.weight": np.ones((2, 2), np.float32),
      },
    )
    found = _on_disk.read(self._merge("linear", ["net+a"]))
    np.testing.assert_array_equal(found[f"{_MODULE}.bias"], 1)
    np.testing.assert_array_equal(found["lm_head.weight"], 1)

  def test_the_sum_of_products_is_whole(self):
    first, second = self._adapter("a", 1, 2), self._adapter("b", 2, 3)
    out = self._merge("task_arithmetic", ["a", "b"], weights=[1.0, -0.5])
    np.testing.assert_allclose(
      self._product(out), first - 0.5 * second, atol=1e-5
    )
    self.assertFalse((out / "config.json").exists())

  def test_ties_of_products_at_a_rank(self):
    changes = [self._adapter("a", 1, 2), self._adapter("b", 2, 3)]
    out = self._merge(
      "ties",
      ["a", "b"],
      lora_rank=2,
      parameters={"density": 0.5},
    )
    merged = merging.ties(
      {"w": np.zeros((_OUT, _IN), np.float32)},
      [{"w": change.astype(np.float32)} for change in changes],
      density=0.5,
      scope="leaf",
      zero_sign="positive",
    )["w"]
    left, values, right = np.linalg.svd(merged)
    best = (left[:, :2] * values[:2]) @ right[:2]
    np.testing.assert_allclose(self._product(out), best, atol=1e-4)

  def test_merged_again(self):
    first = self._adapter("a", 1, 2)
    out = self._merge("linear", ["a", "a"])
    renamed = out.rename(self.root / "again")
    self.write("net", {f"{_MODULE}.weight": np.zeros((_OUT, _IN), np.float32)})
    found = _on_disk.read(self._merge("linear", [f"net+{renamed.name}"]))
    np.testing.assert_allclose(found[f"{_MODULE}.weight"], first, atol=1e-5)

  @parameterized.parameters(
    (["a", "net"], {}, "is an adapter and other models are not"),
    (["net", "net"], {"lora_rank": 2}, "the models are none"),
    (["a", "c"], {}, "has 0 layers model.layers"),
    (["a", "a"], {"tokenizer_source": "union"}, "are merged whole"),
    (["net+d"], {}, "which the network has not"),
    (["net+wide"], {}, r"of shape \(6, 5\), which is \(3, 3\)"),
    (["net+dora"], {}, "is a DoRA adapter"),
    (["net+ia3"], {}, "of the type IA3"),
    (["net+half"], {}, "has the factors"),
    (["net+odd"], {}, "lora_alpha or alpha_pattern"),
    (["net+net"], {}, "has no adapter_config.json"),
  )
  def test_bad(self, names, more, message):
    self.write("net", {f"{_MODULE}.weight": np.zeros((3, 3), np.float32)})
    self._adapter("a", 1, 2)
    self._adapter("c", 1, 2, module="base_model.model.other")
    self._adapter("d", 1, 2, module="base_model.model.other")
    self._adapter("wide", 1, 2)
    self._adapter("dora", 1, 2, use_dora=True)
    self._adapter("ia3", 1, 2, peft_type="IA3")
    self._adapter("odd", 1, 2, lora_alpha="x")
    self.write(
      "half",
      {f"{_NAME}.lora_A.weight": np.zeros((2, 5), np.float32)},
      file="adapter_model.safetensors",
      adapter_config={"r": 2},
    )
    before = {path.name for path in self.root.iterdir()}
    with self.assertRaisesRegex(
      (recipes.RecipeError, checkpoints.CheckpointError), message
    ):
      self._merge("linear", names, **more)
    self.assertEqual({path.name for path in self.root.iterdir()}, before)

  def test_patterns_of_alpha(self):
    down, up = _factors(1, 2)
    self._adapter("a", 1, 2, alpha_pattern={"up_proj": 6})
    self.write("net", {f"{_MODULE}.weight": np.zeros((_OUT, _IN), np.float32)})
    (found,) = _on_disk.read(self._merge("linear", ["net+a"])).values()
    np.testing.assert_allclose(found, 3 * up @ down, rtol=1e-5)


if __name__ == "__main__":
  absltest.main()
