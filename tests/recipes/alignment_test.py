"""Tests of recipes that align networks before merging them."""

import json

import jax
import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import alignment, checkpoints, recipes
from jaxmerge.recipes import _alignment
from tests.recipes import _on_disk

_WIDTH, _HIDDEN = 8, 12


def _llama(leaf):
  """Two layers with four heads, of which two share their keys."""
  found = {"model.embed_tokens.weight": leaf(11, _WIDTH)}
  for layer in range(2):
    start = f"model.layers.{layer}."
    found |= {
      f"{start}input_layernorm.weight": leaf(_WIDTH),
      f"{start}post_attention_layernorm.weight": leaf(_WIDTH),
      f"{start}self_attn.q_proj.weight": leaf(_WIDTH, _WIDTH),
      f"{start}self_attn.q_proj.bias": leaf(_WIDTH),
      f"{start}self_attn.k_proj.weight": leaf(4, _WIDTH),
      f"{start}self_attn.v_proj.weight": leaf(4, _WIDTH),
      f"{start}self_attn.o_proj.weight": leaf(_WIDTH, _WIDTH),
      f"{start}mlp.gate_proj.weight": leaf(_HIDDEN, _WIDTH),
      f"{start}mlp.up_proj.weight": leaf(_HIDDEN, _WIDTH),
      f"{start}mlp.down_proj.weight": leaf(_WIDTH, _HIDDEN),
    }
  return found | {"model.norm.weight": leaf(_WIDTH)}


_CONFIG = {
  "model_type": "llama",
  "hidden_size": _WIDTH,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
}


def _forward(tensors, tokens):
  """A network of Llama's type without positions, in float64."""
  tensors = {name: np.asarray(t, np.float64) for name, t in tensors.items()}

  def norm(x, name):
    return x / np.sqrt((x**2).mean(-1, keepdims=True)) * tensors[name]

  x = tensors["model.embed_tokens.weight"][tokens]
  for layer in range(2):
    start = f"model.layers.{layer}."
    seen = norm(x, f"{start}input_layernorm.weight")
    queries = (
      seen @ tensors[f"{start}self_attn.q_proj.weight"].T
      + tensors[f"{start}self_attn.q_proj.bias"]
    ).reshape(-1, 2, 2, 2)
    keys = seen @ tensors[f"{start}self_attn.k_proj.weight"].T
    values = seen @ tensors[f"{start}self_attn.v_proj.weight"].T
    scores = np.einsum("qgsd,kgd->gsqk", queries, keys.reshape(-1, 2, 2))
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    heads = np.einsum("gsqk,kgd->qgsd", scores, values.reshape(-1, 2, 2))
    x = x + heads.reshape(-1, _WIDTH) @ (
      tensors[f"{start}self_attn.o_proj.weight"].T
    )
    seen = norm(x, f"{start}post_attention_layernorm.weight")
    gate = seen @ tensors[f"{start}mlp.gate_proj.weight"].T
    up = seen @ tensors[f"{start}mlp.up_proj.weight"].T
    hidden = gate / (1 + np.exp(-gate)) * up
    x = x + hidden @ tensors[f"{start}mlp.down_proj.weight"].T
  x = norm(x, "model.norm.weight")
  return x @ tensors["model.embed_tokens.weight"].T


class AlignmentTest(_on_disk.OnDiskTest):
  def setUp(self):
    super().setUp()
    draws = np.random.default_rng(0)
    self.base = _llama(
      lambda *shape: draws.normal(size=shape).astype(np.float32)
    )
    self.model = _on_disk.tuned(self.base, scale=0.05)
    self.spec = _alignment.make_spec(self.model, _CONFIG)
    permutations = alignment.random_permutations(
      self.spec, self.model, jax.random.key(1)
    )
    self.permuted = {
      name: np.asarray(array)
      for name, array in alignment.apply_permutations(
        self.spec, self.model, permutations
      ).items()
    }
    self.write("base", self.base, _CONFIG)
    self.write("permuted", self.permuted, _CONFIG)

  def _merge(self, **more):
    names = ("base", "permuted")
    recipe = {
      "merge_method": "linear",
      "base_model": str(self.root / "base"),
      "models": [
        {"model": str(self.root / name), "parameters": {"weight": weight}}
        for name, weight in zip(names, (0.0, 1.0), strict=True)
      ],
      **more,
    }
    out = self.root / "out"
    recipes.merge_checkpoints(recipe, out, overwrite=True)
    return _on_disk.read(out)

  def test_a_permuted_network_is_the_same_function(self):
    tokens = np.array([1, 5, 2, 7])
    wanted = _forward(self.model, tokens)
    np.testing.assert_allclose(
      _forward(self.permuted, tokens), wanted, atol=1e-5
    )
    # Two groups of heads, two hidden layers, one stream.
    self.assertLen(self.spec, 5)
    self.assertGreater(np.abs(_forward(self.base, tokens) - wanted).max(), 0.1)

  def test_finds_the_order_of_the_base(self):
    found = self._merge(alignment={"method": "weight_matching"})
    for name, array in self.model.items():
      np.testing.assert_array_equal(found[name], array, name)

  def test_not_asked_for(self):
    found = self._merge()
    name = "model.layers.0.mlp.up_proj.weight"
    np.testing.assert_array_equal(found[name], self.permuted[name])

  @parameterized.parameters("gpt2", "bert")
  def test_all_tensors_of_other_networks_have_a_rule(self, kind):
    if kind == "gpt2":
      config = {"model_type": kind, "n_embd": 8, "n_head": 2}
      tensors = {
        "transformer.wte.weight": np.zeros((5, 8)),
        "transformer.h.0.attn.c_attn.weight": np.zeros((8, 24)),
        "transformer.h.0.attn.c_attn.bias": np.zeros(24),
        "transformer.h.0.attn.c_proj.weight": np.zeros((8, 8)),
        "transformer.h.0.mlp.c_fc.weight": np.zeros((8, 32)),
        "transformer.h.0.mlp.c_proj.weight": np.zeros((32, 8)),
        "transformer.h.0.mlp.c_proj.bias": np.zeros(8),
        "transformer.ln_f.bias": np.zeros(8),
      }
    else:
      config = {
        "model_type": kind,
        "hidden_size": 8,
        "num_attention_heads": 2,
      }
      tensors = {
        "embeddings.word_embeddings.weight": np.zeros((5, 8)),
        "embeddings.LayerNorm.weight": np.zeros(8),
        "encoder.layer.0.attention.self.query.weight": np.zeros((8, 8)),
        "encoder.layer.0.attention.output.dense.weight": np.zeros((8, 8)),
        "encoder.layer.0.attention.output.LayerNorm.bias": np.zeros(8),
        "encoder.layer.0.intermediate.dense.weight": np.zeros((32, 8)),
        "encoder.layer.0.output.dense.weight": np.zeros((8, 32)),
        "encoder.layer.0.output.dense.bias": np.zeros(8),
        "pooler.dense.weight": np.zeros((8, 8)),
        "pooler.dense.bias": np.zeros(8),
      }
    spec = _alignment.make_spec(tensors, config)
    self.assertEqual(
      alignment.group_sizes(spec, tensors),
      {"stream": 8, "layer/0/heads": 2, "layer/0/hidden": 32},
    )

  @parameterized.parameters(
    ({"model_type": "mamba"}, {}, "not the model_type 'mamba'"),
    ({"model_type": "llama"}, {}, "says none of num_attention_heads"),
    (_CONFIG, {"model.odd": np.zeros(2)}, "not know the tensor 'model.odd'"),
  )
  def test_unknown_networks(self, config, more, message):
    with self.assertRaisesRegex(recipes.RecipeError, message):
      _alignment.make_spec({**self.model, **more}, config)

  def test_networks_that_differ(self):
    tensors = {**self.permuted}
    tensors["model.embed_tokens.weight"] = np.zeros((9, _WIDTH), np.float32)
    self.write("permuted", tensors, _CONFIG)
    with self.assertRaisesRegex(recipes.RecipeError, "cannot be aligned"):
      self._merge(alignment={})
    with self.assertRaisesRegex(recipes.RecipeError, "weight_matching"):
      self._merge(alignment={"method": "magic"})

  def test_the_inputs_are_recorded(self):
    self._merge(alignment={})
    record = json.loads((self.root / "out" / "jaxmerge.json").read_text())
    file = str(self.root / "permuted" / "model.safetensors")
    self.assertCountEqual(record["inputs"][file], self.permuted)
    self.assertEqual(recipes.verify(self.root / "out"), [])
    self.assertLen(checkpoints.open(self.root / "out"), len(self.base))


if __name__ == "__main__":
  absltest.main()
