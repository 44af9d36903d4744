"""Adapters merged among themselves: their products, merged, and factored again.

The factors of adapters are no vectors that could be averaged: a product of
means is not the mean of products. So the rule is applied to the products,
tensor by tensor, and what comes out is cut to a rank by its singular values.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxmerge import checkpoints
from jaxmerge.recipes import (
  _factors,
  _lora,
  _methods,
  _models,
  _plan,
  _schema,
  _yaml,
)

Tensor = Any


class _Merged(NamedTuple):
  """A merged change, to be factored.

  Attributes:
    output: how it is merged.
    transposed: whether the tensor is [in, out], or an embedding.
    embedding: whether it is an embedding.
    rank: of the factors.
  """

  output: _plan.Output
  transposed: bool
  embedding: bool
  rank: int


def are_adapters(
  recipe: _schema.Recipe, models: Mapping[str, _models.OpenModel]
) -> bool:
  """Whether a recipe merges adapters among themselves.

  Args:
    recipe: the recipe.
    models: the opened models.

  Returns:
    Whether all are adapters.

  Raises:
    RecipeError: some are and others are not, or the recipe asks for a rank of
      networks, or for layers or vocabularies of adapters.
  """
  found = {
    name: opened.checkpoint.is_adapter for name, opened in models.items()
  }
  if not any(found.values()):
    if recipe.lora_rank is not None:
      raise _yaml.RecipeError(
        "lora_rank is the rank of merged adapters, and the models are none."
        " Leave it out, or use jaxmerge extract --rank afterwards."
      )
    return False
  if not all(found.values()):
    adapter = next(name for name, is_one in found.items() if is_one)
    raise _yaml.RecipeError(
      f"{adapter} is an adapter and other models are not. Write its network"
      " before it: network+adapter."
    )
  if not recipe.models or recipe.tokenizer or recipe.tokenizer_source:
    raise _yaml.RecipeError(
      "Adapters are merged whole: write models, without slices and tokenizer."
    )
  return True


def _factored(
  merged: _Merged, kept: dict[str, tuple[np.ndarray, np.ndarray]], place: int
) -> np.ndarray:
  """One of the two factors; both are made at once."""
  name = merged.output.name
  if name not in kept:
    change = _reckon(merged.output)
    if merged.transposed:
      change = change.T
    up, down = _factors.factors(change, merged.rank)
    kept[name] = down, up
  found = kept[name][place]
  if place == 1:
    del kept[name]
  return found.astype(merged.output.dtype)


def _reckon(output: _plan.Output) -> np.ndarray:
  """The merged change, in memory."""
  call = output.call
  assert call is not None
  arrays = [np.asarray(tensor) for tensor in output.tensors]
  if call.method is None:
    return arrays[0] * np.float32(1.0 if call.factor is None else call.factor)
  given: dict[str, Any] = {}
  if call.weights is not None:
    given["weights"] = list(call.weights)
  if call.method.info.needs_key:
    import jax

    given["key"] = jax.random.key(0)
  base = {output.name: np.zeros_like(arrays[0])}
  merged = call.method(
    base, [{output.name: array} for array in arrays], **given
  )
  return np.asarray(merged[output.name])


def factor(plan: _plan.Plan) -> _plan.Plan:
  """The plan with each merged change as two factors.

  Args:
    plan: of the products of adapters.

  Returns:
    The plan of an adapter.

  Raises:
    RecipeError: the method needs all tensors at once.
  """
  adapters = {
    name: _lora.read(opened.checkpoint) for name, opened in plan.models.items()
  }
  pairs = adapters[plan.donor].pairs
  ranks = [
    max(pair.down.shape[0] for pair in one.pairs.values())
    for one in adapters.values()
    if one.pairs
  ]
  rank = plan.recipe.lora_rank or sum(ranks)
  outputs: list[_plan.Output] = []
  for output in plan.outputs:
    if output.name not in pairs:
      outputs.append(output._replace(name=f"{_lora.PREFIX}{output.name}"))
      continue
    call = output.call
    if call is not None and (call.scope == "vector" or call.rescale):
      raise _yaml.RecipeError(
        f"{plan.method.name} of adapters works on each tensor alone, without"
        " rescale. Give scope: tensor."
      )
    if call is None:
      output = output._replace(call=_methods.Call(None))
    pair = pairs[output.name]
    embedding = pair.embedding
    merged = _Merged(output, pair.transposed, embedding, rank)
    outputs += _two(merged)
  config = {
    **adapters[plan.donor].config,
    "r": rank,
    # The products are whole: they are multiplied by one.
    "lora_alpha": rank,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
  }
  return plan._replace(outputs=outputs, config=config, adapter=True)


def _two(merged: _Merged) -> list[_plan.Output]:
  """The two factors of a merged change."""
  output, rank = merged.output, merged.rank
  shape = output.shape[::-1] if merged.transposed else output.shape
  module = output.name.removesuffix(".weight")
  kept: dict[str, tuple[np.ndarray, np.ndarray]] = {}
  parts = tuple(
    part for tensor in output.inputs for part in getattr(tensor, "parts", ())
  )
  found = []
  for place, (letter, size) in enumerate(
    (("A", (rank, shape[1])), ("B", (shape[0], rank)))
  ):
    kind = f"embedding_{letter}" if merged.embedding else f"{letter}.weight"
    name = f"{_lora.PREFIX}{module}.lora_{kind}"
    tensor = checkpoints.LoadedTensor(
      name,
      size,
      output.dtype,
      functools.partial(_factored, merged, kept, place),
      parts,
    )
    found.append(
      _plan.Output(
        name, size, output.dtype, None, (tensor,), output.models[:1], None
      )
    )
  return found
