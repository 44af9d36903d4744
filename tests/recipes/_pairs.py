"""A network and what it was tuned to, on disk, for tests of what changed."""

from __future__ import annotations

import numpy as np

from jaxmerge import recipes
from tests.recipes import _on_disk


def peft_adapter(folder, tensors, **config):
  """Writes an adapter in PEFT's layout."""
  return _on_disk.write(
    folder,
    {f"base_model.model.{name}": one for name, one in tensors.items()},
    file="adapter_model.safetensors",
    adapter_config={"peft_type": "LORA", "r": 2, "lora_alpha": 6, **config},
  )


class PairTest(_on_disk.OnDiskTest):
  """Makes pairs, takes what changed, and adds it."""

  def pair(self, dtype=np.float32, **kwargs):
    """Writes a network and what became of it, and returns their tensors."""
    base = _on_disk.llama(dtype=dtype)
    tuned = _on_disk.tuned(base, **kwargs)
    self.write("base", base, _on_disk.CONFIG, tokenizer={"a": 1})
    self.write("tuned", tuned, {**_on_disk.CONFIG, "note": "tuned"})
    return base, tuned

  def extract(self, out="vector", **kwargs):
    """Extracts the task vector."""
    return recipes.extract(
      self.root / "base", self.root / "tuned", self.root / out, **kwargs
    )

  def lora(self, rank, out="lora", **kwargs):
    """Extracts an adapter."""
    return recipes.extract_lora(
      self.root / "base", self.root / "tuned", self.root / out, rank, **kwargs
    )

  def apply(self, vector="vector", out="out", **kwargs):
    """Adds a vector to the base, and returns what came out."""
    recipes.apply_vector(
      self.root / "base", self.root / vector, self.root / out, **kwargs
    )
    return _on_disk.read(self.root / out)
