"""Recipes and their models on disk, for tests of merging."""

from __future__ import annotations

import pathlib
import textwrap

import numpy as np

from jaxmerge import recipes
from jaxmerge.recipes import _merge
from tests.recipes import _on_disk


def network(layers=2, seed=0, dtype=np.float32, extra=()):
  """A few tensors of a network of Llama's type."""
  draws = np.random.default_rng(seed)

  def leaf(*shape):
    return draws.normal(size=shape).astype(dtype)

  found = {"model.embed_tokens.weight": leaf(6, 4)}
  for layer in range(layers):
    found |= {
      f"model.layers.{layer}.self_attn.q_proj.weight": leaf(4, 4),
      f"model.layers.{layer}.mlp.up_proj.weight": leaf(4, 4),
    }
  found |= {"model.norm.weight": leaf(4), "lm_head.weight": leaf(6, 4)}
  return found | {name: leaf(4, 4) for name in extra}


def config(layers=2, **others):
  return {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": layers,
    "vocab_size": 6,
    **others,
  }


def file_bytes(folder):
  """What all files of a folder hold, by their names."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in pathlib.Path(folder).rglob("*")
    if path.is_file()
  }


class MergingTest(_on_disk.OnDiskTest):
  """Makes models, and merges them."""

  def model(self, name, tensors=None, layers=2, **kwargs):
    """Writes a model, and returns its tensors."""
    if tensors is None:
      tensors = network(layers, seed=sum(map(ord, name)))
    kwargs.setdefault("config", config(layers))
    self.write(name, tensors, **kwargs)
    return tensors

  def pair(self, **kwargs):
    """Writes two models; their tensors, and a recipe of their mean."""
    a = self.model("a", tokenizer={"a": 1}, generation_config={}, **kwargs)
    b = self.model("b", **kwargs)
    return a, b, self.of("linear", weight=1)

  def recipe(self, text):
    """Writes a recipe, in which $a is the folder of the model a."""
    path = self.root / "recipe.yml"
    path.write_text(textwrap.dedent(text).replace("$", f"{self.root}/"))
    return path

  def plan(self, text):
    """The outputs of the recipe by name."""
    source = self.recipe(text) if isinstance(text, str) else text
    _, plan = _merge._prepare(source, False)
    return {output.name: output for output in plan.outputs}

  def merge(self, text, out="out", **kwargs):
    """The merged tensors by name."""
    source = self.recipe(text) if isinstance(text, str) else text
    recipes.merge_checkpoints(source, self.root / out, **kwargs)
    return _on_disk.read(self.root / out)

  def assert_refused(self, text, message, **kwargs):
    """Asserts that nothing is merged, and that nothing is left behind."""
    before = sorted(path.name for path in self.root.iterdir())
    with self.assertRaisesRegex(recipes.RecipeError, message):
      self.merge(text, **kwargs)
    after = {path.name for path in self.root.iterdir()} - {"recipe.yml"}
    self.assertCountEqual(after, set(before) - {"recipe.yml"})

  def of(self, method, names="ab", base=None, **parameters):
    """A recipe as a mapping."""
    found = {
      "merge_method": method,
      "models": [{"model": str(self.root / name)} for name in names],
    }
    if base is not None:
      found["base_model"] = str(self.root / base)
    if parameters:
      found["parameters"] = parameters
    return found
