"""From a recipe to the tensors of the result: what each is made of."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from jaxmerge import checkpoints, merging
from jaxmerge.checkpoints import hugging_face
from jaxmerge.recipes import (
  _alignment,
  _layers,
  _methods,
  _models,
  _schema,
  _settings,
  _tokens,
  _yaml,
)

Tensor = Any
Levels = tuple[_schema.Parameters | None, ...]

DTYPES: dict[str, np.dtype[Any]] = {
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
  **{name: np.dtype(name) for name in ("float16", "float32", "float64")},
}


_SCOPES = ("tensor", "vector")


class Output(NamedTuple):
  """A tensor of the result.

  Attributes:
    name: its name.
    shape: its shape.
    dtype: its dtype.
    base: the base's tensor, or None.
    tensors: the models' tensors.
    models: places of the models among those of the plan.
    call: how they are merged; None for a copy of the first.
    read_dtype: what floating-point tensors are rounded to when they are read;
      None to leave them.
  """

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype[Any]
  base: Tensor | None
  tensors: tuple[Tensor, ...]
  models: tuple[str, ...]
  call: _methods.Call | None
  read_dtype: np.dtype[Any] | None = None

  @property
  def nbytes(self) -> int:
    """Its number of bytes."""
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

  @property
  def inputs(self) -> tuple[Tensor, ...]:
    """All tensors that it is made of, that of the base first."""
    return (() if self.base is None else (self.base,)) + self.tensors


class Plan(NamedTuple):
  """What a recipe makes.

  Attributes:
    recipe: the recipe.
    method: its method.
    models: the opened models, by the names that the recipe has for them.
    donor: the model whose configuration and tokenizer the result has.
    outputs: the tensors of the result.
    config: what its config.json holds.
    tokens: its tokenizer, if vocabularies are merged.
    adapter: whether it is an adapter, and config its adapter_config.json.
  """

  recipe: _schema.Recipe
  method: _methods.Method
  models: dict[str, _models.OpenModel]
  donor: str
  outputs: list[Output]
  config: dict[str, Any]
  tokens: _tokens.Tokens | None = None
  adapter: bool = False


class _Source(NamedTuple):
  """One input of a slice: a model, its first layer, and its parameters."""

  model: str
  first: int
  levels: Levels


class _Slice(NamedTuple):
  """Layers of the result."""

  sources: tuple[_Source, ...]
  base: str | None
  length: int
  levels: Levels


def _is_buffer(name: str) -> bool:
  return any(re.fullmatch(one, name) for one in hugging_face.BUFFERS)


def _zeros(like: Tensor) -> Tensor:
  return checkpoints.LoadedTensor(
    like.name,
    like.shape,
    like.dtype,
    lambda: np.zeros(like.shape, like.dtype),
  )


def _is_float(tensor: Tensor) -> bool:
  kind = np.dtype(tensor.dtype)
  return kind in DTYPES.values()


@functools.cache
def _checked(name: str, options: str) -> None:
  """Raises for options out of their range; `options` is JSON."""
  method = merging.get(name, **json.loads(options))
  method.method(jax.random.key(0) if method.info.needs_key else None)


def _check_call(call: _methods.Call) -> None:
  """Raises for values that a method does not take."""
  for weight in call.weights or ():
    if not math.isfinite(weight):
      raise ValueError(f"weight must be a finite number; got {weight}")
  if call.scope not in _SCOPES:
    raise ValueError(
      f"scope must be one of {', '.join(_SCOPES)}; got {call.scope!r}"
    )
  if call.method is not None:
    _checked(call.method.info.name, json.dumps(call.method.options))


class _Planner:
  """Plans one recipe."""

  def __init__(
    self,
    document: _yaml.Document,
    recipe: _schema.Recipe,
    models: dict[str, _models.OpenModel],
  ) -> None:
    self.document = document
    self.recipe = recipe
    self.models = models
    self.method = _methods.table()[recipe.merge_method]
    self.base = None if recipe.base_model is None else str(recipe.base_model)
    self.dtype = DTYPES.get(recipe.dtype or "")
    out = DTYPES.get(recipe.out_dtype or "")
    self.out_dtype = self.dtype if out is None else out
    self.select = self._pattern("select", recipe.select)
    self.exclude = self._pattern("exclude", recipe.exclude)
    self._layers: dict[str, dict[tuple[str, int], list[str]]] = {}
    # Changes of adapters are task vectors: their base is zero.
    self.from_zero = all(
      opened.checkpoint.is_adapter for opened in models.values()
    )

  def _pattern(self, key: str, text: str | None) -> re.Pattern[str] | None:
    if text is None:
      return None
    try:
      return re.compile(text)
    except re.error as error:
      raise self.document.error(
        (key,), f"{text!r} is no regular expression ({error})."
      ) from error

  def _error(self, what: str, place: Sequence[Any] = ()) -> _yaml.RecipeError:
    return self.document.error(place, what)

  # Slices.

  def _of_models(
    self, inputs: Sequence[_schema.Input], levels: Levels, length: int
  ) -> _Slice:
    return _Slice(
      tuple(_Source(str(one.model), 0, (one.parameters,)) for one in inputs),
      self.base,
      length,
      levels,
    )

  def _of_slice(self, found: _schema.Slice, levels: Levels) -> _Slice:
    first, stop = found.sources[0].layer_range
    base = self.base if found.base_model is None else str(found.base_model)
    return _Slice(
      tuple(
        _Source(str(one.model), one.layer_range[0], (one.parameters,))
        for one in found.sources
      ),
      base,
      stop - first,
      (found.parameters, *levels),
    )

  def _stacks(self, donor: _models.OpenModel) -> dict[str, list[_Slice]]:
    """The slices of each stack of layers."""
    recipe, counts = self.recipe, _layers.stacks(donor)
    own = (recipe.parameters,)
    if recipe.models:
      return {
        stack: [self._of_models(recipe.models, own, count)]
        for stack, count in counts.items()
      }
    if recipe.slices:
      if len(counts) != 1:
        raise self._error(
          f"{donor.folder} has {len(counts)} stacks of layers"
          f" ({', '.join(counts) or 'none'}): slices need one; name them with"
          " modules.",
          ("slices",),
        )
      (stack,) = counts
      return {stack: [self._of_slice(one, own) for one in recipe.slices]}
    found = {}
    for name, module in (recipe.modules or {}).items():
      matches = [stack for stack in counts if name in stack]
      if name == "default" and len(counts) == 1:
        matches = list(counts)
      if len(matches) != 1:
        raise self._error(
          f"{name!r} names {len(matches)} stacks of layers; they are"
          f" {', '.join(counts) or 'none'}. Write a part of one alone.",
          ("modules", name),
        )
      levels = (module.parameters, *own)
      (stack,) = matches
      if module.slices:
        found[stack] = [self._of_slice(one, levels) for one in module.slices]
      else:
        found[stack] = [
          self._of_models(module.models or [], levels, counts[stack])
        ]
    lost = sorted(set(counts) - set(found))
    if lost:
      raise self._error(
        f"no module is for the layers {', '.join(lost)}. Add one.",
        ("modules",),
      )
    return found

  def _check_slice(self, one: _Slice, stack: str) -> None:
    names = {source.model for source in one.sources}
    names |= set() if one.base is None else {one.base}
    for name in names if self.recipe.models else ():
      count = _layers.stacks(self.models[name]).get(stack, 0)
      if count != one.length:
        raise self._error(
          f"{name} has {count} layers {stack}, another model {one.length}, up"
          f" to {stack}.{max(count, one.length) - 1}. Merge models of one"
          " architecture, or write slices.",
          ("models",),
        )
    for source in one.sources:
      count = _layers.stacks(self.models[source.model]).get(stack, 0)
      if source.first + one.length > count:
        raise self._error(
          f"{source.model} has {count} layers {stack}; those from"
          f" {source.first} to {source.first + one.length} are asked for.",
          ("slices",),
        )

  # Tensors.

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
    self, name: str, names: Sequence[tuple[_Source, str]], one: _Slice, t: float
  ) -> Output:
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
      return Output(
        name,
        tuple(first.shape),
        dtype,
        None,
        (first,),
        (owner,),
        None,
        self.dtype if whole else None,
      )
    call, base_tensor, tensors, models = self._call(name, found, base, one, t)
    result = Output(
      name,
      tuple(first.shape),
      dtype,
      base_tensor,
      tensors,
      models,
      call,
      self.dtype,
    )
    self._check_shapes(result, one)
    return result

  def _is_merged(self, name: str) -> bool:
    if self.select is not None and not self.select.search(name):
      return False
    return self.exclude is None or not self.exclude.search(name)

  def _base_of(self, one: _Slice, name: str) -> tuple[str, Tensor] | None:
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

  def _call(
    self,
    name: str,
    found: Sequence[tuple[_Source, str, Tensor]],
    base: tuple[str, Tensor] | None,
    one: _Slice,
    t: float,
  ) -> tuple[_methods.Call, Tensor | None, tuple[Tensor, ...], tuple[str, ...]]:
    method = self.method
    if method.base == "needed" and base is None and self.from_zero:
      base = "", _zeros(found[0][2])
    if method.base == "needed" and base is None:
      raise self._error(
        f"{method.name} works on what models differ in from their base: give"
        " base_model.",
        ("merge_method",),
      )
    models = list(found)
    if base is not None:
      apart = method.base in ("needed", "optional")
      inside = [entry for entry in models if entry[0].model == base[0]]
      if apart:
        models = [entry for entry in models if entry[0].model != base[0]]
      elif not inside and method.name in ("slerp", "karcher"):
        source = _Source(base[0], 0, ())
        models.insert(0, (source, name, base[1]))
      elif inside and method.name == "slerp":
        # From the base to the other.
        models.sort(key=lambda entry: entry[0].model != base[0])
    if method.name == "slerp" and base is None:
      raise self._error(
        "slerp leads from the base to the other model: give base_model.",
        ("merge_method",),
      )
    self._check_number(len(models))
    values = {
      parameter: self._value(parameter, default, one.levels, name, t, None)
      for parameter, default in method.parameters.items()
    }
    of_models = [
      {
        parameter: self._value(
          parameter,
          default,
          (*source.levels, *one.levels),
          held,
          t,
          source.model,
        )
        for parameter, default in method.of_models.items()
      }
      for source, held, _ in models
    ]
    has_base = base is not None and method.base in ("needed", "optional")
    try:
      call = method.build(values, of_models, has_base)
      _check_call(call)
    except (TypeError, ValueError, OverflowError) as error:
      raise self._error(f"{name!r}: {error}", ("parameters",)) from error
    return (
      call,
      base[1] if has_base and base is not None else None,
      tuple(tensor for _, _, tensor in models),
      tuple(source.model for source, _, _ in models),
    )

  def _check_number(self, count: int) -> None:
    method = self.method
    if count < method.least or (method.most and count > method.most):
      wanted = f"{method.least} or more"
      if method.most:
        wanted = f"{method.least}"
        if method.most != method.least:
          wanted += f" to {method.most}"
      raise self._error(
        f"{method.name} merges {wanted} models"
        + (" beside the base" if method.base != "model" else "")
        + f"; there are {count}.",
        ("models",) if self.recipe.models else ("slices",),
      )

  def _value(
    self,
    parameter: str,
    default: Any,
    levels: Levels,
    name: str,
    t: float,
    model: str | None,
  ) -> Any:
    value = _settings.look_up(parameter, levels, name, t)
    if value is None:
      value = default
    if value is _methods.REQUIRED:
      owner = f" of {model}" if model else ""
      raise self._error(
        f"{self.method.name} needs {parameter}{owner} for {name!r}: give it"
        " under parameters.",
        ("parameters",),
      )
    return value

  def _check_shapes(self, output: Output, one: _Slice) -> None:
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

  def outputs(self, donor: _models.OpenModel) -> list[Output]:
    """All tensors of the result, in the order of the donor's."""
    stacks = self._stacks(donor)
    for stack, slices in stacks.items():
      for one in slices:
        self._check_slice(one, stack)
    if not stacks:
      inputs = self.recipe.models
      if not inputs:
        raise self._error(
          f"{donor.folder} has no layers that slices could name. Use models.",
          ("slices",),
        )
      plain = [self._of_models(inputs, (self.recipe.parameters,), 0)]
    else:
      plain = next(iter(stacks.values()))
    found: list[Output] = []
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

  def _names(self, plain: list[_Slice]) -> list[str]:
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

  def _owners(self, one: _Slice) -> list[str]:
    """The models of a slice, with a base that task vectors start from."""
    found = [source.model for source in one.sources]
    if one.base is not None and self.method.base == "needed":
      found.append(one.base)
    return found

  def _layers_of(self, stack: str, slices: Sequence[_Slice]) -> list[Output]:
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
) -> Plan:
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
  donor = planner.base if planner.base is not None else next(iter(models))
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
  return Plan(
    recipe, planner.method, planner.models, donor, outputs, config, tokens
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
