"""Reading and checking a recipe."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import pydantic

from jaxmerge.recipes import _methods, _schema, _yaml


def load(
  source: str | os.PathLike[str] | Mapping[str, Any],
) -> tuple[_yaml.Document, _schema.Recipe]:
  """Reads a recipe and checks all of it that needs no model.

  Args:
    source: a file of YAML, or what such a file would hold.

  Returns:
    The document, for the lines of messages, and the recipe.

  Raises:
    RecipeError: it is not as recipes are; the line is named.
  """
  if isinstance(source, Mapping):
    import yaml

    document = _yaml.Document(yaml.safe_dump(dict(source)), "the recipe")
  else:
    document = _yaml.load(os.fspath(source))
  value = document.value
  if not isinstance(value, dict):
    raise document.error((), "is no mapping. Write merge_method: and models:.")
  try:
    recipe = _schema.Recipe.model_validate(value)
  except pydantic.ValidationError as error:
    raise _explain(document, error) from error
  names = sorted(_methods.table())
  if recipe.merge_method not in names:
    raise document.error(
      ("merge_method",),
      f"there is no method {recipe.merge_method!r}."
      f" {_methods.near(recipe.merge_method, names)}",
    )
  _check_parameters(document, recipe)
  return document, recipe


def _explain(
  document: _yaml.Document, error: pydantic.ValidationError
) -> _yaml.RecipeError:
  """The first thing that is wrong, with its line."""
  found = error.errors(include_url=False)
  # Of the kinds that a value may be, the one that fits best fails deepest.
  first = max(
    found,
    key=lambda one: (
      len(_place(document, one)),
      one["type"] in ("value_error", "missing", "extra_forbidden"),
      len(one["loc"]),
    ),
  )
  place = _place(document, first)
  if first["type"] == "extra_forbidden":
    key = str(first["loc"][-1])
    known = _known(place[:-1])
    return document.error(
      place, f"there is no key {key!r}. {_methods.near(key, known)}"
    )
  if first["type"] == "missing":
    return document.error(place, f"{first['loc'][-1]!r} is missing. Add it.")
  what = first["msg"].removeprefix("Value error, ")
  return document.error(place, f"{what}.")


def _place(document: _yaml.Document, error: Any) -> tuple[Any, ...]:
  """Where in the document an error is, without pydantic's own words."""
  value, place = document.value, []
  for part in error["loc"]:
    if isinstance(value, dict) and part in value:
      value = value[part]
    elif (
      isinstance(value, list) and isinstance(part, int) and part < len(value)
    ):
      value = value[part]
    else:
      continue
    place.append(part)
  return tuple(place)


def _known(place: tuple[Any, ...]) -> list[str]:
  """The keys that may stand somewhere."""
  kinds: dict[str, type[pydantic.BaseModel]] = {
    "models": _schema.Input,
    "slices": _schema.Slice,
    "sources": _schema.Source,
    "modules": _schema.Module,
    "tokenizer": _schema.Tokenizer,
    "tokens": _schema.Token,
    "alignment": _schema.Alignment,
    "model": _schema.Model,
    "base_model": _schema.Model,
  }
  names = [part for part in place if isinstance(part, str) and part in kinds]
  kind = kinds[names[-1]] if names else _schema.Recipe
  return sorted(kind.model_fields)


def _levels(
  recipe: _schema.Recipe,
) -> Iterator[tuple[tuple[Any, ...], _schema.Parameters | None, bool]]:
  """All places of parameters, and whether they are of one model."""
  yield (), recipe.parameters, False
  yield from _inputs((), recipe.models, recipe.slices)
  for name, module in (recipe.modules or {}).items():
    yield ("modules", name), module.parameters, False
    yield from _inputs(("modules", name), module.models, module.slices)


def _inputs(
  place: tuple[Any, ...],
  models: list[_schema.Input] | None,
  slices: list[_schema.Slice] | None,
) -> Iterator[tuple[tuple[Any, ...], _schema.Parameters | None, bool]]:
  for number, model in enumerate(models or []):
    yield (*place, "models", number), model.parameters, True
  for number, one in enumerate(slices or []):
    yield (*place, "slices", number), one.parameters, False
    for count, source in enumerate(one.sources):
      yield (
        (*place, "slices", number, "sources", count),
        source.parameters,
        True,
      )


def _check_parameters(document: _yaml.Document, recipe: _schema.Recipe) -> None:
  method = _methods.table()[recipe.merge_method]
  known = {**method.parameters, **method.of_models}
  for place, parameters, _ in _levels(recipe):
    for name, setting in (parameters or {}).items():
      where = (*place, "parameters", name)
      if name not in known:
        raise document.error(
          where,
          f"{method.name} has no parameter {name!r}."
          f" {_methods.near(name, sorted(known))}",
        )
      default = known[name]
      if isinstance(default, str):
        continue
      for value in _values(setting):
        if isinstance(value, str):
          raise document.error(where, f"must be a number; got {value!r}.")


def _values(setting: Any) -> Iterator[Any]:
  """All values of a setting."""
  if isinstance(setting, _schema.Conditional):
    yield from _values(setting.value)
  elif isinstance(setting, list):
    for one in setting:
      yield from _values(one)
  else:
    yield setting
