"""Tests of describing checkpoints."""

from __future__ import annotations

import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import checkpoints, recipes
from tests.recipes import _on_disk


class DescribeTest(_on_disk.OnDiskTest):
  def test_tensors_and_architecture(self):
    tensors = _on_disk.llama(dtype=_on_disk.BFLOAT16)
    folder = self.write("a", tensors, _on_disk.CONFIG)
    found = recipes.describe(folder)
    self.assertEqual(found.layout, "safetensors")
    self.assertEqual(found.path, str(folder))
    rows = {one.name: one for one in found.tensors}
    self.assertCountEqual(rows, tensors)
    for name, array in tensors.items():
      self.assertEqual(rows[name].shape, array.shape)
      self.assertEqual(rows[name].dtype, str(array.dtype))
      self.assertEqual(rows[name].nbytes, array.nbytes)
    self.assertEqual(
      found.parameters, sum(one.size for one in tensors.values())
    )
    self.assertEqual(found.nbytes, sum(one.nbytes for one in tensors.values()))
    self.assertEqual(found.dtypes["int64"], (1, 5, 40))
    halves = found.parameters - 5
    self.assertEqual(
      found.dtypes["bfloat16"], (len(tensors) - 1, halves, 2 * halves)
    )
    self.assertEqual(
      found.architecture,
      {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8,
        "layers": 2,
        "heads": 2,
        "vocabulary": 11,
      },
    )
    self.assertEqual(found.stacks, {"model.layers": 2})
    self.assertEqual(found.tied, [])
    self.assertIsNone(found.adapter)

  def test_other_words_for_sizes_and_parts(self):
    folder = self.write(
      "a",
      {"w": np.ones(2)},
      {
        "model_type": "clip",
        "n_embd": 4,
        "n_layer": None,
        "n_layers": 3,
        "torch_dtype": "float16",
        "text_config": {"hidden_size": 5, "model_type": "text"},
        "vision_config": {"other": 1},
        "quantization_config": {"dtype": "int8"},
      },
    )
    self.assertEqual(
      recipes.describe(folder).architecture,
      {
        "model_type": "clip",
        "hidden_size": 4,
        "layers": 3,
        "dtype": "float16",
        "text_config": {"model_type": "text", "hidden_size": 5},
      },
    )

  def test_tied(self):
    draws = np.random.default_rng(0)
    matrix = draws.normal(size=(300, 4)).astype(np.float32)
    other = matrix.copy()
    other[150, 0] += 1
    tensors = {
      "a.weight": matrix,
      "b.weight": matrix,
      "c.weight": other,
      "d.weight": np.zeros((300, 4), np.float32),
      "e.weight": np.zeros((300, 4), np.float32),
      "f.weight": np.ones(4),
      "g.weight": np.ones(4),
      "h.weight": matrix.astype(np.float16),
    }
    found = recipes.describe(self.write("a", tensors))
    self.assertEqual(
      [sorted(names) for names in found.tied], [["a.weight", "b.weight"]]
    )

  @parameterized.parameters(
    ({"architectures": ["GPT2LMHeadModel"]}, True),
    ({"architectures": ["GPT2Model"]}, False),
    ({}, False),
    ({"architectures": ["LlamaForCausalLM"]}, True),
    (
      {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False},
      False,
    ),
  )
  def test_scores_that_the_file_lacks(self, config, is_tied):
    tensors = {"transformer.wte.weight": np.ones((3, 2))}
    found = recipes.describe(self.write("a", tensors, config))
    wanted = [["transformer.wte.weight", "lm_head.weight"]] if is_tied else []
    self.assertEqual(found.tied, wanted)
    tensors["lm_head.weight"] = np.zeros((3, 2))
    self.assertEqual(
      recipes.describe(self.write("a", tensors, config)).tied, []
    )

  def test_adapter(self):
    folder = self.write(
      "a",
      {
        "base_model.model.q.lora_A.weight": np.ones((2, 3)),
        "base_model.model.q.lora_B.weight": np.ones((3, 2)),
      },
      file="adapter_model.safetensors",
      adapter_config={
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["v", "q"],
        "rank_pattern": {},
        "modules_to_save": None,
        "use_rslora": True,
        "use_dora": False,
        "base_model_name_or_path": "someone/something",
      },
    )
    found = recipes.describe(folder)
    self.assertEqual(
      found.adapter,
      {
        "type": "LORA",
        "rank": 2,
        "alpha": 4,
        "targets": ["q", "v"],
        "base": "someone/something",
        "use_rslora": True,
        "factors": 1,
      },
    )

  def test_orbax(self):
    self.write("a", _on_disk.llama(), _on_disk.CONFIG)
    recipes.convert(self.root / "a", self.root / "b")
    one, two = (recipes.describe(self.root / name) for name in "ab")
    self.assertEqual(two.layout, "orbax")
    self.assertEqual(two.parameters, one.parameters)
    self.assertEqual(two.architecture, one.architecture)
    self.assertEqual(two.stacks, {"model/layers": 2})

  def test_what_is_damaged(self):
    folder = self.write("a", {"w": np.ones(2)})
    (folder / "config.json").write_text("{")
    with self.assertRaisesRegex(
      checkpoints.CheckpointError, "config.json is damaged"
    ):
      recipes.describe(folder)
    (folder / "config.json").write_text("[]")
    with self.assertRaisesRegex(
      checkpoints.CheckpointError, "config.json holds no mapping"
    ):
      recipes.describe(folder)
    (folder / "config.json").unlink()
    (folder / "model.safetensors").write_bytes(b"0123456789")
    with self.assertRaisesRegex(checkpoints.CheckpointError, "no whole safet"):
      recipes.describe(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n.")
    with self.assertRaisesRegex(checkpoints.CheckpointError, "is pickled"):
      recipes.describe(folder)


if __name__ == "__main__":
  absltest.main()
