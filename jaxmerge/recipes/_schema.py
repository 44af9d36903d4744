"""Recipes as they are written: mergekit's configuration, and what we add.

The fields are those that mergekit documents; unknown ones are errors. Ours are
`select`, `exclude`, `seed`, `alignment`, `lora_rank`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic

Scalar = bool | int | float | str
DTYPES = ("float16", "bfloat16", "float32", "float64")


class _Strict(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(
    extra="forbid", frozen=True, populate_by_name=True
  )


class Place(_Strict):
  """A folder, or a hub's id with its revision."""

  path: str = pydantic.Field(min_length=1)
  revision: str | None = None

  @pydantic.model_validator(mode="before")
  @classmethod
  def _from_text(cls, value: Any) -> Any:
    if not isinstance(value, str):
      return value
    path, at, revision = value.partition("@")
    if "@" in revision or (at and not revision):
      raise ValueError(
        f"{value!r} is no place of a model: write path or owner/name@revision"
      )
    return {"path": path, "revision": revision or None}

  def __str__(self) -> str:
    """As it is written."""
    return f"{self.path}@{self.revision}" if self.revision else self.path


class Model(_Strict):
  """A model, with an adapter that is applied to it."""

  model: Place
  lora: Place | None = None
  override_architecture: str | None = None

  @pydantic.model_validator(mode="before")
  @classmethod
  def _from_text(cls, value: Any) -> Any:
    if not isinstance(value, str):
      return value
    model, plus, lora = value.partition("+")
    if "+" in lora or (plus and not lora):
      raise ValueError(f"{value!r} is no model: write model or model+adapter")
    return {"model": model, "lora": lora or None}

  def __str__(self) -> str:
    """As it is written."""
    return f"{self.model}+{self.lora}" if self.lora else str(self.model)


class Conditional(_Strict):
  """A value for the tensors whose names contain the filter."""

  value: Scalar | list[Scalar]
  filter: str | None = None

  @pydantic.field_validator("value")
  @classmethod
  def _not_empty(cls, value: Any) -> Any:
    return _check_gradient(value)


def _check_gradient(value: Any) -> Any:
  if isinstance(value, list) and not value:
    raise ValueError("an empty list: give a value, or one a layer at least")
  return value


Setting = Annotated[
  Scalar | list[Scalar] | list[Conditional] | Conditional,
  pydantic.AfterValidator(_check_gradient),
]
Parameters = dict[str, Setting]


class Input(_Strict):
  """A model that is merged whole."""

  model: Model
  parameters: Parameters | None = None


class Source(_Strict):
  """Layers of a model."""

  model: Model
  layer_range: tuple[int, int]
  parameters: Parameters | None = None

  @pydantic.field_validator("layer_range")
  @classmethod
  def _in_order(cls, value: tuple[int, int]) -> tuple[int, int]:
    if not 0 <= value[0] < value[1]:
      raise ValueError(
        f"[{value[0]}, {value[1]}] holds no layer: the first one and the one"
        " after the last, from 0"
      )
    return value


class Slice(_Strict):
  """Layers of the result, merged of layers of the sources."""

  sources: list[Source] = pydantic.Field(min_length=1)
  base_model: Model | None = None
  parameters: Parameters | None = None

  @pydantic.model_validator(mode="after")
  def _same_length(self) -> Slice:
    spans = {stop - start for start, stop in _ranges(self.sources)}
    if len(spans) > 1:
      raise ValueError(
        "the sources of a slice have different numbers of layers:"
        f" {sorted(spans)}"
      )
    return self


def _ranges(sources: list[Source]) -> list[tuple[int, int]]:
  return [source.layer_range for source in sources]


class Module(_Strict):
  """One stack of layers, of a model that has several."""

  slices: list[Slice] | None = None
  models: list[Input] | None = None
  parameters: Parameters | None = None

  @pydantic.model_validator(mode="after")
  def _one(self) -> Module:
    if bool(self.slices) == bool(self.models):
      raise ValueError("give either slices or models")
    return self


class TokenSource(_Strict):
  """Where the embedding of a token comes from."""

  kind: Literal["zero", "model_token"]
  model: Model | None = None
  token_id: int | None = pydantic.Field(None, ge=0)
  token: str | None = None

  @pydantic.model_validator(mode="after")
  def _complete(self) -> TokenSource:
    if self.kind == "model_token" and (
      self.model is None or (self.token is None) == (self.token_id is None)
    ):
      raise ValueError("model_token needs a model, and token or token_id")
    return self


class Token(_Strict):
  """A token that is added, or whose embedding is given."""

  source: TokenSource | Model | None = None
  force: bool = False


class Tokenizer(_Strict):
  """The tokenizer of the result."""

  source: Literal["union", "base"] | Model = "union"
  tokens: dict[str, Token] | None = None
  pad_to_multiple_of: int | None = pydantic.Field(None, ge=1)


class Alignment(_Strict):
  """Bringing neurons into one order before merging."""

  method: Literal["weight_matching"] = "weight_matching"
  restarts: int = pydantic.Field(1, ge=1)


class Recipe(_Strict):
  """What is merged, and how."""

  models: list[Input] | None = None
  slices: list[Slice] | None = None
  modules: dict[str, Module] | None = None
  merge_method: str
  base_model: Model | None = None
  parameters: Parameters | None = None
  dtype: Literal["float16", "bfloat16", "float32", "float64"] | None = None
  out_dtype: Literal["float16", "bfloat16", "float32", "float64"] | None = None
  tokenizer_source: Literal["union", "base"] | Model | None = None
  tokenizer: Tokenizer | None = None
  chat_template: str | None = None
  name: str | None = None
  # Ours.
  select: str | None = None
  exclude: str | None = None
  seed: int = 0
  alignment: Alignment | None = None
  lora_rank: int | None = pydantic.Field(None, ge=1)

  @pydantic.model_validator(mode="after")
  def _one(self) -> Recipe:
    given = [
      one for one in ("models", "slices", "modules") if getattr(self, one)
    ]
    if len(given) != 1:
      raise ValueError(
        "give exactly one of models, slices and modules"
        + (f", not {' and '.join(given)}" if given else "")
      )
    if self.tokenizer and self.tokenizer_source:
      raise ValueError("give either tokenizer or tokenizer_source")
    return self
