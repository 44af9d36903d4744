"""Neurons of several networks brought into one order before they are merged."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxmerge import checkpoints
from jaxmerge.recipes import _models, _schema, _yaml

if TYPE_CHECKING:
  from jaxmerge import alignment

Tensor = Any

_STREAM, _HEADS, _HIDDEN = "stream", "heads", "hidden"


class _Rule(NamedTuple):
  """The axes of a tensor.

  Attributes:
    pattern: of the whole name; its first group is the number of the layer.
    axes: number of the axis -> its group, with "<" before it where the tensor
      leads on from the neurons.
  """

  pattern: str
  axes: dict[int, str]


def _linear(reads: str, writes: str) -> dict[int, str]:
  """The axes of a weight [out, in]."""
  return {0: writes, 1: f"<{reads}"}


_LAYER = r"model\.layers\.(\d+)\."
_LLAMA = (
  _Rule(r"model\.embed_tokens\.weight", {1: _STREAM}),
  _Rule(rf"{_LAYER}\w+_layernorm\.weight", {0: _STREAM}),
  _Rule(rf"{_LAYER}self_attn\.q_proj\.weight", _linear(_STREAM, "queries")),
  _Rule(rf"{_LAYER}self_attn\.q_proj\.bias", {0: "queries"}),
  _Rule(rf"{_LAYER}self_attn\.[kv]_proj\.weight", _linear(_STREAM, _HEADS)),
  _Rule(rf"{_LAYER}self_attn\.[kv]_proj\.bias", {0: _HEADS}),
  _Rule(rf"{_LAYER}self_attn\.[qk]_norm\.weight", {}),
  _Rule(rf"{_LAYER}self_attn\.o_proj\.weight", _linear("queries", _STREAM)),
  _Rule(rf"{_LAYER}mlp\.(?:gate|up)_proj\.weight", _linear(_STREAM, _HIDDEN)),
  _Rule(rf"{_LAYER}mlp\.(?:gate|up)_proj\.bias", {0: _HIDDEN}),
  _Rule(rf"{_LAYER}mlp\.down_proj\.weight", _linear(_HIDDEN, _STREAM)),
  _Rule(rf"{_LAYER}(?:self_attn\.o|mlp\.down)_proj\.bias", {0: _STREAM}),
  _Rule(r"model\.norm\.weight", {0: _STREAM}),
  _Rule(r"lm_head\.weight", {1: f"<{_STREAM}"}),
)
_TOP = r"(?:transformer\.)?"
_BLOCK = rf"{_TOP}h\.(\d+)\."
# Its layers have weights [in, out].
_GPT2 = (
  _Rule(rf"{_TOP}w[tp]e\.weight", {1: _STREAM}),
  _Rule(rf"{_BLOCK}ln_\d\.(?:weight|bias)", {0: _STREAM}),
  _Rule(rf"{_BLOCK}attn\.c_attn\.weight", {0: f"<{_STREAM}", 1: "fused"}),
  _Rule(rf"{_BLOCK}attn\.c_attn\.bias", {0: "fused"}),
  _Rule(rf"{_BLOCK}attn\.c_proj\.weight", {0: f"<{_HEADS}", 1: _STREAM}),
  _Rule(rf"{_BLOCK}(?:attn|mlp)\.c_proj\.bias", {0: _STREAM}),
  _Rule(rf"{_BLOCK}mlp\.c_fc\.weight", {0: f"<{_STREAM}", 1: _HIDDEN}),
  _Rule(rf"{_BLOCK}mlp\.c_fc\.bias", {0: _HIDDEN}),
  _Rule(rf"{_BLOCK}mlp\.c_proj\.weight", {0: f"<{_HIDDEN}", 1: _STREAM}),
  _Rule(rf"{_TOP}ln_f\.(?:weight|bias)", {0: _STREAM}),
  _Rule(r"lm_head\.weight", {1: f"<{_STREAM}"}),
)
_BERT_TOP = r"(?:bert\.)?"
_BERT_LAYER = rf"{_BERT_TOP}encoder\.layer\.(\d+)\."
_BERT = (
  _Rule(rf"{_BERT_TOP}embeddings\.\w+_embeddings\.weight", {1: _STREAM}),
  _Rule(rf"{_BERT_TOP}embeddings\.LayerNorm\.(?:weight|bias)", {0: _STREAM}),
  _Rule(
    rf"{_BERT_LAYER}attention\.self\.\w+\.weight", _linear(_STREAM, _HEADS)
  ),
  _Rule(rf"{_BERT_LAYER}attention\.self\.\w+\.bias", {0: _HEADS}),
  _Rule(
    rf"{_BERT_LAYER}attention\.output\.dense\.weight", _linear(_HEADS, _STREAM)
  ),
  _Rule(
    rf"{_BERT_LAYER}intermediate\.dense\.weight", _linear(_STREAM, _HIDDEN)
  ),
  _Rule(rf"{_BERT_LAYER}intermediate\.dense\.bias", {0: _HIDDEN}),
  _Rule(rf"{_BERT_LAYER}output\.dense\.weight", _linear(_HIDDEN, _STREAM)),
  _Rule(rf"{_BERT_LAYER}(?:attention\.)?output\.dense\.bias", {0: _STREAM}),
  _Rule(
    rf"{_BERT_LAYER}(?:attention\.)?output\.LayerNorm\.(?:weight|bias)",
    {0: _STREAM},
  ),
  _Rule(rf"{_BERT_TOP}pooler\.dense\.weight", {1: f"<{_STREAM}"}),
  _Rule(rf"{_BERT_TOP}pooler\.dense\.bias", {}),
  _Rule(r"classifier\.(?:weight|bias)", {}),
)
_KNOWN = {
  "bert": _BERT,
  "gpt2": _GPT2,
  "llama": _LLAMA,
  "mistral": _LLAMA,
  "qwen2": _LLAMA,
  "qwen3": _LLAMA,
}


def _number(config: Mapping[str, Any], *names: str) -> int:
  for name in names:
    if config.get(name):
      return int(config[name])
  raise _yaml.RecipeError(
    f"config.json says none of {', '.join(names)}, which alignment needs. Give"
    " the whole configuration."
  )


def make_spec(
  tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> alignment.PermutationSpec:
  """Which axes of a network's tensors share neurons.

  The residual stream is one group, the hidden neurons of each layer are
  another, and so are its attention heads, which are permuted as wholes, with
  grouped queries by the head of keys that they share.

  Args:
    tensors: by name, in the layout of transformers.
    config: what config.json holds.

  Returns:
    The specification.

  Raises:
    RecipeError: the architecture is not known, or a tensor of it is not.
  """
  from jaxmerge import alignment

  kind = str(config.get("model_type"))
  if kind not in _KNOWN:
    raise _yaml.RecipeError(
      f"Alignment knows {', '.join(_KNOWN)}, and not the model_type {kind!r}."
      " Leave alignment out."
    )
  heads = _number(config, "num_attention_heads", "n_head")
  width = _number(config, "hidden_size", "n_embd")
  shared = int(config.get("num_key_value_heads") or heads)
  size = int(config.get("head_dim") or width // heads)
  sizes = {
    _HEADS: (1, size),
    # Queries that share a head of keys, in a row.
    "queries": (1, heads // shared * size),
    # Queries, keys and values in one tensor.
    "fused": (3, size),
  }
  groups: dict[str, list[alignment.Axis]] = {}
  unknown = []
  for name in tensors:
    rules = [
      (rule, found)
      for rule in _KNOWN[kind]
      if (found := re.fullmatch(rule.pattern, name))
    ]
    if not rules:
      unknown.append(name)
      continue
    rule, found = rules[0]
    for axis, entry in rule.axes.items():
      group = entry.removeprefix("<")
      outer, inner = sizes.get(group, (1, 1))
      if group in sizes:
        group = _HEADS
      if group != _STREAM:
        group = f"layer/{found[1]}/{group}"
      groups.setdefault(group, []).append(
        alignment.Axis(name, axis, not entry.startswith("<"), outer, inner)
      )
  if unknown:
    raise _yaml.RecipeError(
      f"Alignment of {kind} does not know the tensor {unknown[0]!r}"
      f" ({len(unknown)} in all). Leave alignment out."
    )
  return {group: tuple(axes) for group, axes in groups.items()}


def align(
  recipe: _schema.Recipe,
  models: Mapping[str, _models.OpenModel],
  reference: str,
) -> None:
  """Permutes the neurons of all models so that they fit those of one.

  Two whole models are in memory meanwhile.

  Args:
    recipe: the recipe; nothing is done unless it asks for alignment.
    models: the models; tensors are replaced by ones that are permuted when they
      are read.
    reference: the model whose order counts.

  Raises:
    RecipeError: the architecture is not known, or the models differ in it.
  """
  if recipe.alignment is None:
    return
  import jax

  # Only merges that align pay for what it imports.
  from jaxmerge import alignment
  from jaxmerge.alignment import _spec

  target = models[reference]
  spec = make_spec(target, target.checkpoint.config())
  by_leaf = _spec.axes_by_leaf(spec)
  whole = {name: np.asarray(target[name]) for name in target}
  for number, (name, opened) in enumerate(models.items()):
    if name == reference:
      continue
    shapes = {one: tuple(tensor.shape) for one, tensor in opened.items()}
    if shapes != {one: array.shape for one, array in whole.items()}:
      raise _yaml.RecipeError(
        f"{name} has not the tensors of {reference}, in the same shapes: they"
        " cannot be aligned. Leave alignment out."
      )
    try:
      _, info = alignment.weight_matching(
        whole,
        {one: np.asarray(opened[one]) for one in whole},
        spec,
        key=jax.random.fold_in(jax.random.key(recipe.seed), number),
        restarts=recipe.alignment.restarts,
      )
    except ValueError as error:
      raise _yaml.RecipeError(f"{name} cannot be aligned: {error}") from error
    opened.replace(
      {
        one: checkpoints.LoadedTensor(
          one,
          tensor.shape,
          tensor.dtype,
          functools.partial(_permute, tensor, by_leaf[one], info.permutations),
          (tensor,),
        )
        for one, tensor in opened.items()
        if one in by_leaf
      }
    )


def _permute(
  tensor: Tensor, axes: Any, permutations: Mapping[str, Any]
) -> np.ndarray:
  from jaxmerge.alignment import _spec

  found: Any = np.asarray(tensor)
  for group, axis in axes:
    found = _spec.take(found, axis, permutations[group])
  return np.asarray(found)
