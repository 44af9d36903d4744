"""Small checkpoints on disk, for tests of what reads them."""

from __future__ import annotations

import json
import pathlib
import tempfile

import ml_dtypes
import numpy as np
from absl.testing import parameterized
from safetensors import numpy as safetensors_numpy

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def write(folder, tensors, config=None, file="model.safetensors", **others):
  """Writes tensors as one file, with JSON files beside it."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  tensors = {k: np.asarray(v, order="C") for k, v in tensors.items()}
  safetensors_numpy.save_file(tensors, folder / file, {"format": "pt"})
  if config is not None:
    others["config"] = config
  for name, content in others.items():
    (folder / f"{name}.json").write_text(json.dumps(content))
  return folder


def read(folder):
  """All tensors of a folder, by the safetensors library."""
  found = {}
  for file in sorted(pathlib.Path(folder).glob("*.safetensors")):
    found |= safetensors_numpy.load_file(file)
  return found


def llama(seed=0, dtype=np.float32, scale=1.0):
  """Tensors of two layers of a network of Llama's type."""
  draws = np.random.default_rng(seed)

  def leaf(*shape):
    return (scale * draws.normal(size=shape)).astype(dtype)

  found = {"model.embed_tokens.weight": leaf(11, 8)}
  for layer in range(2):
    start = f"model.layers.{layer}."
    found |= {
      start + "input_layernorm.weight": leaf(8),
      start + "self_attn.q_proj.weight": leaf(8, 8),
      start + "self_attn.q_proj.bias": leaf(8),
      start + "self_attn.k_proj.weight": leaf(4, 8),
      start + "mlp.up_proj.weight": leaf(12, 8),
      start + "mlp.down_proj.weight": leaf(8, 12),
    }
  found["model.norm.weight"] = leaf(8)
  found["lm_head.weight"] = leaf(11, 8)
  found["model.rotary.position_ids"] = np.arange(5)
  return found


CONFIG = {
  "architectures": ["LlamaForCausalLM"],
  "model_type": "llama",
  "hidden_size": 8,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "vocab_size": 11,
  "tie_word_embeddings": False,
}


def tuned(tensors, seed=1, scale=0.1):
  """The tensors moved a little; integers stay."""
  draws = np.random.default_rng(seed)
  return {
    name: array
    if array.dtype.kind in "iub"
    else (
      array.astype(np.float32) + scale * draws.normal(size=array.shape)
    ).astype(array.dtype)
    for name, array in tensors.items()
  }


class OnDiskTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.root = pathlib.Path(folder.name)

  def write(self, name, *args, **kwargs):
    return write(self.root / name, *args, **kwargs)

  def assert_nothing_left(self, *expected):
    """Nothing is in the folder but what was there, hidden or not."""
    self.assertCountEqual([p.name for p in self.root.iterdir()], expected)
