"""From a recipe to a plan, before anything is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxmerge.checkpoints import hugging_face
from jaxmerge.recipes import (
  _alignment,
  _calls,
  _layers,
  _models,
  _plan,
  _schema,
  _slices,
  _tokens,
  _yaml,
)

Tensor = Any


def _is_buffer(name: str) -> bool:
  return any(re.fullmatch(one, name) for one in hugging_face.BUFFERS)


def _is_float(tensor: Tensor) -> bool:
  kind = np.dtype(tensor.dtype)
  return kind in _plan.DTYPES.values()


class _Planner:
  """Plans the tensors of one recipe."""

  def __init__(
    self,
    document: _yaml.Document,
    recipe: _schema.Recipe,
    models: dict[str, _models.OpenModel],
  ) -> None:
    self.document = document
    self.recipe = recipe
    self.models = models
    self.slicer = _slices.Slicer(document, recipe, models)
    self.caller = _calls.Caller(document, recipe, models)
    self.dtype = _plan.DTYPES.get(recipe.dtype or "")
    out = _plan.DTYPES.get(recipe.out_dtype or "")
    self.out_dtype = self.dtype if out is None else out
    self.select = self._pattern("select", recipe.select)
    self.exclude = self._pattern("exclude", recipe.exclude)
    self._layers: dict[str, dict[tuple[str, int], list[str]]] = {}

  def _pattern(self, key: str, text: str | None) -> re.Pattern[str] | None:
    if text is None:
      return None
    try:
      return re.compile(text)
    except re.error as error:
      raise self.document.error(
        (key,), f"{text!r} is no regular expression ({error})."
      ) from error

  def _tensor(
    self, model: str, name: str, wanted_by: str
  ) -> tuple[str, Tensor]:
    """A model's tensor, or the one that it is tied to."""
    opened = self.models[model]
    if name in opened:
      return name, opened[name]
    twin = opened.twin(name)
    if twin is not None:
      return twin, opened[twin]
    raise _yaml.RecipeError(
      f"{model} has no tensor {name!r}, which {wanted_by} has. Merge models of"
      " one architecture."
    )

  def _output(
    self,
    name: str,
    names: Sequence[tuple[_slices.Source, str]],
    one: _slices.Slice,
    t: float,
  ) -> _plan.Output:
    """The tensor `name`, of a tensor of each source."""
    owner = names[0][0].model
    # Whoever has it, for the message of one that has not.
    has = next(
      (s.model for s, held in names if held in self.models[s.model]), one.base
    )
    found = []
    for source, own_name in names:
      held, tensor = self._tensor(source.model, own_name, str(has))
      found.append((source, held, tensor))
    base = self._base_of(one, names[0][1])
    first = found[0][2] if base is None else base[1]
    whole = _is_float(first)
    merged = self._is_merged(name)
    out = self.out_dtype if whole else None
    dtype = np.dtype(first.dtype) if out is None else out
    if not whole or not merged:
      return _plan.Output(
        name,
        tuple(first.shape),
        dtype,
        None,
        (first,),
        (owner,),
        None,
        self.dtype if whole else None,
      )
    call, base_tensor, tensors, models = self.caller.call(
      name, found, base, one, t
    )
    result = _plan.Output(
      name,
      tuple(first.shape),
      dtype,
      base_tensor,
      tensors,
      models,
      call,
      self.dtype,
      "" if base is None else base[0],
    )
    self._check_shapes(result, one)
    return result

  def _is_merged(self, name: str) -> bool:
    if self.select is not None and not self.select.search(name):
      return False
    return self.exclude is None or not self.exclude.search(name)

  def _base_of(
    self, one: _slices.Slice, name: str
  ) -> tuple[str, Tensor] | None:
    """The base's tensor beside that of the first source."""
    if one.base is None:
      return None
    owner = one.sources[0].model
    for source in one.sources:
      if source.model == one.base:
        layer = _layers.find(name)
        if layer is not None:
          offset = layer.number - one.sources[0].first
          name = _layers.rename(name, source.first + offset)
        break
    return one.base, self._tensor(one.base, name, owner)[1]

  def _check_shapes(self, output: _plan.Output, one: _slices.Slice) -> None:
    for model, tensor in zip(output.models, output.tensors, strict=True):
      if tuple(tensor.shape) != output.shape:
        remedy = "Merge models of one size."
        if output.shape[1:] and tensor.shape[1:] == output.shape[1:]:
          remedy = (
            "If they have different vocabularies, give tokenizer_source: union"
            " or base."
          )
        raise _yaml.RecipeError(
          f"{output.name!r} has the shape {tuple(tensor.shape)} in {model} and"
          f" {output.shape} in {one.base or one.sources[0].model}. {remedy}"
        )

  def outputs(self, donor: _models.OpenModel) -> list[_plan.Output]:
    """All tensors of the result, in the order of the donor's."""
    stacks = self.slicer.by_stack(donor)
    if not stacks:
      inputs = self.recipe.models
      if not inputs:
        raise self.document.error(
          ("slices",),
          f"{donor.folder} has no layers that slices could name. Use models.",
        )
      plain = [self.slicer.of_models(inputs, (self.recipe.parameters,), 0)]
    else:
      plain = next(iter(stacks.values()))
    found: list[_plan.Output] = []
    placed: set[str] = set()
    for name in self._names(plain):
      layer = _layers.find(name)
      if layer is None or layer.stack not in stacks:
        one = plain[0] if _layers.is_before(name) else plain[-1]
        # As if in the first layer, before the stack and behind it.
        found.append(
          self._output(name, [(source, name) for source in one.sources], one, 0)
        )
      elif layer.stack not in placed:
        placed.add(layer.stack)
        found += self._layers_of(layer.stack, stacks[layer.stack])
    return found

  def _names(self, plain: list[_slices.Slice]) -> list[str]:
    """Names of tensors, in the order of the first model's files."""
    names: dict[str, None] = {}
    for one in plain:
      for owner in self._owners(one):
        names |= dict.fromkeys(self.models[owner])
    every = [self.models[source.model] for source in plain[0].sources]
    return [
      name
      for name in names
      # A buffer that some models lack is made anew by whoever loads them.
      if not _is_buffer(name) or all(name in opened for opened in every)
    ]

  def _layer(self, model: str, stack: str, number: int) -> list[str]:
    """Names of a layer's tensors."""
    if model not in self._layers:
      found: dict[tuple[str, int], list[str]] = {}
      for name in self.models[model]:
        layer = _layers.find(name)
        if layer is not None:
          found.setdefault((layer.stack, layer.number), []).append(name)
      self._layers[model] = found
    return self._layers[model].get((stack, number), [])

  def _owners(self, one: _slices.Slice) -> list[str]:
    """The models of a slice, with a base that task vectors start from."""
    found = [source.model for source in one.sources]
    if one.base is not None and self.caller.method.base == "needed":
      found.append(one.base)
    return found

  def _layers_of(
    self, stack: str, slices: Sequence[_slices.Slice]
  ) -> list[_plan.Output]:
    found = []
    number = 0
    for one in slices:
      for offset in range(one.length):
        t = offset / (one.length - 1) if one.length > 1 else 1.0
        first = one.sources[0].first + offset
        every: dict[str, None] = {}
        for source in one.sources:
          every |= dict.fromkeys(
            _layers.rename(name, first)
            for name in self._layer(source.model, stack, source.first + offset)
          )
        if one.base is not None and not self.recipe.slices:
          every |= dict.fromkeys(self._layer(one.base, stack, first))
        for name in every:
          names = [
            (source, _layers.rename(name, source.first + offset))
            for source in one.sources
          ]
          lacking = any(
            held not in self.models[source.model] for source, held in names
          )
          if not (lacking and _is_buffer(name)):
            found.append(
              self._output(_layers.rename(name, number), names, one, t)
            )
        number += 1
    return found


def make_plan(
  document: _yaml.Document,
  recipe: _schema.Recipe,
  models: Mapping[str, _models.OpenModel],
) -> _plan.Plan:
  """Plans a recipe: every tensor of the result, before anything is read.

  Args:
    document: what the recipe was read from, for the lines of messages.
    recipe: the recipe.
    models: the opened models by the names that the recipe has for them.

  Returns:
    The plan.

  Raises:
    RecipeError: the models do not fit each other or the recipe.
  """
  planner = _Planner(document, recipe, dict(models))
  donor = str(recipe.base_model or next(iter(models)))
  _tokens.check_template(document, recipe.chat_template)
  tokens = _tokens.merge_tokens(document, recipe, planner.models, donor)
  _alignment.align(recipe, planner.models, donor)
  outputs = planner.outputs(models[donor])
  config = models[donor].checkpoint.config()
  if tokens is not None:
    config = _with_vocabulary(config, tokens.size)
  taken = _taken_layers(recipe)
  if taken is not None:
    (before,) = _layers.stacks(models[donor]).values()
    config = _layers.with_layers(config, taken, before)
  if config and planner.out_dtype is not None:
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = recipe.out_dtype or recipe.dtype
  return _plan.Plan(
    recipe,
    planner.caller.method,
    planner.models,
    donor,
    outputs,
    config,
    tokens,
  )


def _with_vocabulary(config: dict[str, Any], size: int) -> dict[str, Any]:
  found = dict(config)
  if "vocab_size" in found or "text_config" not in found:
    found["vocab_size"] = size
  if isinstance(found.get("text_config"), dict):
    found["text_config"] = _with_vocabulary(found["text_config"], size)
  return found


def _taken_layers(recipe: _schema.Recipe) -> list[int] | None:
  slices = recipe.slices
  if recipe.modules and len(recipe.modules) == 1:
    slices = next(iter(recipe.modules.values())).slices
  if not slices:
    return None
  return [
    number for one in slices for number in range(*one.sources[0].layer_range)
  ]
