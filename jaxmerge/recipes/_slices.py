"""The layers of a result: which layers of which models make them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxmerge.recipes import _layers, _models, _schema, _yaml

Levels = tuple[_schema.Parameters | None, ...]


class Source(NamedTuple):
  """One input of a slice: a model, its first layer, and its parameters."""

  model: str
  first: int
  levels: Levels


class Slice(NamedTuple):
  """Layers of the result."""

  sources: tuple[Source, ...]
  base: str | None
  length: int
  levels: Levels


class Slicer:
  """Divides the layers of a result."""

  def __init__(
    self,
    document: _yaml.Document,
    recipe: _schema.Recipe,
    models: Mapping[str, _models.OpenModel],
  ) -> None:
    """See the class."""
    self._document = document
    self._recipe = recipe
    self._models = models
    self._base = None if recipe.base_model is None else str(recipe.base_model)

  def of_models(
    self, inputs: Sequence[_schema.Input], levels: Levels, length: int
  ) -> Slice:
    """All layers of some models, one to one."""
    return Slice(
      tuple(Source(str(one.model), 0, (one.parameters,)) for one in inputs),
      self._base,
      length,
      levels,
    )

  def by_stack(self, donor: _models.OpenModel) -> dict[str, list[Slice]]:
    """The slices of each stack of layers.

    Args:
      donor: the model whose stacks the result has.

    Returns:
      The stack's name -> its slices; nothing for a network without layers.

    Raises:
      RecipeError: a stack has no slices, or a model lacks the layers.
    """
    stacks = self._stacks(donor)
    for stack, slices in stacks.items():
      for one in slices:
        self._check_slice(one, stack)
    return stacks

  def _of_slice(self, found: _schema.Slice, levels: Levels) -> Slice:
    first, stop = found.sources[0].layer_range
    base = self._base if found.base_model is None else str(found.base_model)
    return Slice(
      tuple(
        Source(str(one.model), one.layer_range[0], (one.parameters,))
        for one in found.sources
      ),
      base,
      stop - first,
      (found.parameters, *levels),
    )

  def _stacks(self, donor: _models.OpenModel) -> dict[str, list[Slice]]:
    recipe, counts = self._recipe, _layers.stacks(donor)
    own = (recipe.parameters,)
    if recipe.models:
      return {
        stack: [self.of_models(recipe.models, own, count)]
        for stack, count in counts.items()
      }
    if recipe.slices:
      if len(counts) != 1:
        raise self._document.error(
          ("slices",),
          f"{donor.folder} has {len(counts)} stacks of layers"
          f" ({', '.join(counts) or 'none'}): slices need one; name them with"
          " modules.",
        )
      (stack,) = counts
      return {stack: [self._of_slice(one, own) for one in recipe.slices]}
    found = {}
    for name, module in (recipe.modules or {}).items():
      matches = [stack for stack in counts if name in stack]
      if name == "default" and len(counts) == 1:
        matches = list(counts)
      if len(matches) != 1:
        raise self._document.error(
          ("modules", name),
          f"{name!r} names {len(matches)} stacks of layers; they are"
          f" {', '.join(counts) or 'none'}. Write a part of one alone.",
        )
      levels = (module.parameters, *own)
      (stack,) = matches
      if module.slices:
        found[stack] = [self._of_slice(one, levels) for one in module.slices]
      else:
        found[stack] = [
          self.of_models(module.models or [], levels, counts[stack])
        ]
    lost = sorted(set(counts) - set(found))
    if lost:
      raise self._document.error(
        ("modules",),
        f"no module is for the layers {', '.join(lost)}. Add one.",
      )
    return found

  def _check_slice(self, one: Slice, stack: str) -> None:
    names = {source.model for source in one.sources}
    names |= set() if one.base is None else {one.base}
    for name in names if self._recipe.models else ():
      count = _layers.stacks(self._models[name]).get(stack, 0)
      if count != one.length:
        raise self._document.error(
          ("models",),
          f"{name} has {count} layers {stack}, another model {one.length}, up"
          f" to {stack}.{max(count, one.length) - 1}. Merge models of one"
          " architecture, or write slices.",
        )
    for source in one.sources:
      count = _layers.stacks(self._models[source.model]).get(stack, 0)
      if source.first + one.length > count:
        raise self._document.error(
          ("slices",),
          f"{source.model} has {count} layers {stack}; those from"
          f" {source.first} to {source.first + one.length} are asked for.",
        )
