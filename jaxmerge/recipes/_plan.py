"""What a recipe makes: the tensors of the result, and what each is made of."""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxmerge.recipes import _methods, _models, _schema, _tokens

Tensor = Any

DTYPES: dict[str, np.dtype[Any]] = {
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
  **{name: np.dtype(name) for name in ("float16", "float32", "float64")},
}


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
    base_model: whose the base's tensor is, for messages.
  """

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype[Any]
  base: Tensor | None
  tensors: tuple[Tensor, ...]
  models: tuple[str, ...]
  call: _methods.Call | None
  read_dtype: np.dtype[Any] | None = None
  base_model: str = ""

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
