"""How a tensor of the result is merged: by which call, of which models."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmerge import checkpoints, merging
from jaxmerge.recipes import (
  _methods,
  _models,
  _schema,
  _settings,
  _slices,
  _yaml,
)

Tensor = Any

_SCOPES = ("tensor", "vector")


def _zeros(like: Tensor) -> Tensor:
  return checkpoints.LoadedTensor(
    like.name,
    like.shape,
    like.dtype,
    lambda: np.zeros(like.shape, like.dtype),
  )


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


class Caller:
  """Finds the calls of one recipe."""

  def __init__(
    self,
    document: _yaml.Document,
    recipe: _schema.Recipe,
    models: Mapping[str, _models.OpenModel],
  ) -> None:
    """See the class."""
    self._document = document
    self._recipe = recipe
    self.method = _methods.table()[recipe.merge_method]
    # Changes of adapters are task vectors: their base is zero.
    self._from_zero = all(
      opened.checkpoint.is_adapter for opened in models.values()
    )

  def call(
    self,
    name: str,
    found: Sequence[tuple[_slices.Source, str, Tensor]],
    base: tuple[str, Tensor] | None,
    one: _slices.Slice,
    t: float,
  ) -> tuple[_methods.Call, Tensor | None, tuple[Tensor, ...], tuple[str, ...]]:
    """How one tensor is merged.

    Args:
      name: the tensor's name in the result.
      found: for each source its own name of the tensor, and the tensor.
      base: whose the base's tensor is, and that tensor; None for no base.
      one: the slice that it is in.
      t: where in the slice, from 0 to 1.

    Returns:
      The call, the base's tensor if the method takes one, the models' tensors,
      and the models' names.

    Raises:
      RecipeError: a parameter or a base is missing, or wrong.
    """
    method = self.method
    if method.base == "needed" and base is None and self._from_zero:
      base = "", _zeros(found[0][2])
    if method.base == "needed" and base is None:
      raise self._document.error(
        ("merge_method",),
        f"{method.name} works on what models differ in from their base: give"
        " base_model.",
      )
    models = list(found)
    if base is not None:
      apart = method.base in ("needed", "optional")
      inside = [entry for entry in models if entry[0].model == base[0]]
      if apart:
        models = [entry for entry in models if entry[0].model != base[0]]
      elif not inside and method.name in ("slerp", "karcher"):
        source = _slices.Source(base[0], 0, ())
        models.insert(0, (source, name, base[1]))
      elif inside and method.name == "slerp":
        # From the base to the other.
        models.sort(key=lambda entry: entry[0].model != base[0])
    if method.name == "slerp" and base is None:
      raise self._document.error(
        ("merge_method",),
        "slerp leads from the base to the other model: give base_model.",
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
      raise self._document.error(
        ("parameters",), f"{name!r}: {error}"
      ) from error
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
      raise self._document.error(
        ("models",) if self._recipe.models else ("slices",),
        f"{method.name} merges {wanted} models"
        + (" beside the base" if method.base != "model" else "")
        + f"; there are {count}.",
      )

  def _value(
    self,
    parameter: str,
    default: Any,
    levels: _slices.Levels,
    name: str,
    t: float,
    model: str | None,
  ) -> Any:
    value = _settings.look_up(parameter, levels, name, t)
    if value is None:
      value = default
    if value is _methods.REQUIRED:
      owner = f" of {model}" if model else ""
      raise self._document.error(
        ("parameters",),
        f"{self.method.name} needs {parameter}{owner} for {name!r}: give it"
        " under parameters.",
      )
    return value
