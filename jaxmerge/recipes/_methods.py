"""Merge methods by the names and parameters that recipes have for them."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxmerge import merging

#: What a parameter without a default has in its place.
REQUIRED: Any = inspect.Parameter.empty
Values = Mapping[str, Any]


class Call(NamedTuple):
  """A method with all that it is told of one tensor.

  Attributes:
    method: The method; None to copy the one tensor.
    weights: One for each model, or None.
    from_zero: Whether the models are taken for task vectors of zero.
    factor: What a copied tensor is multiplied by, or None.
    scope: "tensor", or "vector" for what is selected of all tensors together.
    rescale: How what TIES drops is made up for: None or "l1".
  """

  method: merging.RegisteredMethod | None
  weights: tuple[float, ...] | None = None
  from_zero: bool = False
  factor: float | None = None
  scope: str = "tensor"
  rescale: str | None = None


class Method(NamedTuple):
  """What a recipe may say of a method.

  Attributes:
    name: Its name in recipes.
    summary: One line.
    parameters: Parameters of the whole merge and their defaults.
    of_models: Parameters that each model has its own of, and their defaults.
    base: "needed"; "optional", what the models are seen from if it is given;
      or "model", one of the models like the others.
    least: The least number of models beside such a base.
    most: The largest one; None for any.
    build: `build(values, values_of_models, has_base) -> Call`.
  """

  name: str
  summary: str
  parameters: dict[str, Any]
  of_models: dict[str, Any]
  base: str
  least: int
  most: int | None
  build: Callable[[Values, Sequence[Values], bool], Call]


def _column(values: Sequence[Values], name: str) -> tuple[float, ...]:
  return tuple(float(one[name]) for one in values)


def _linear(values: Values, of_models: Sequence[Values], base: bool) -> Call:
  del base
  weights = _column(of_models, "weight")
  if values["normalize"]:
    return Call(merging.get("weighted_average"), weights)
  return Call(merging.get("task_arithmetic"), weights, from_zero=True)


def _slerp(values: Values, of_models: Sequence[Values], base: bool) -> Call:
  del of_models, base
  return Call(merging.get("slerp", t=float(values["t"])))


def _nuslerp(values: Values, of_models: Sequence[Values], base: bool) -> Call:
  method = merging.get(
    "nuslerp",
    task_vectors=base,
    flatten=bool(values["nuslerp_flatten"]),
    axis=0 if values["nuslerp_row_wise"] else -1,
  )
  return Call(method, _column(of_models, "weight"))


def _multislerp(
  values: Values, of_models: Sequence[Values], base: bool
) -> Call:
  method = merging.get(
    "multislerp",
    task_vectors=base,
    normalize_weights=bool(values["normalize_weights"]),
    eps=float(values["eps"]),
  )
  return Call(method, _column(of_models, "weight"))


def _karcher(values: Values, of_models: Sequence[Values], base: bool) -> Call:
  del base
  method = merging.get(
    "karcher_mean", max_iter=int(values["max_iter"]), tol=float(values["tol"])
  )
  return Call(method, (1.0,) * len(of_models))


def _model_stock(
  values: Values, of_models: Sequence[Values], base: bool
) -> Call:
  del of_models, base
  return Call(
    merging.get("model_stock", filter_wise=bool(values["filter_wise"]))
  )


def _nearswap(values: Values, of_models: Sequence[Values], base: bool) -> Call:
  del of_models, base
  return Call(merging.get("nearswap", t=float(values["t"])))


def _arcee_fusion(
  values: Values, of_models: Sequence[Values], base: bool
) -> Call:
  del values, of_models, base
  return Call(merging.get("arcee_fusion"))


def _sce(values: Values, of_models: Sequence[Values], base: bool) -> Call:
  del of_models, base
  topk = float(values["select_topk"])
  return Call(merging.get("sce", select_topk=topk))


def _passthrough(
  values: Values, of_models: Sequence[Values], base: bool
) -> Call:
  del values, base
  factor = of_models[0]["scale"]
  return Call(None, factor=None if factor is None else float(factor))


def _arithmetic(
  kind: str, ties: bool, values: Values, of_models: Sequence[Values], base: bool
) -> Call:
  """Sparsify, elect, combine: mergekit's generalised task arithmetic."""
  del base
  weights = _column(of_models, "weight")
  common: dict[str, Any] = {
    "scale": float(values["lambda"]),
    "normalize": bool(values["normalize"]),
  }
  if not kind:
    return Call(merging.get("task_arithmetic", **common), weights)
  density = list(_column(of_models, "density"))
  scope, rescale = "tensor", "l1" if values["rescale"] else None
  if kind == "ties":
    scope = values["scope"]
    del common["normalize"]
    common |= {
      "scope": "vector" if scope == "vector" else "leaf",
      "merge": "mean" if values["normalize"] else "sum",
      "zero_sign": values["zero_sign"],
      "elect": values["elect"],
    }
  else:
    common["variant"] = "ties" if ties else "linear"
    common["rescale"], rescale = rescale, None
  if kind == "breadcrumbs":
    common["gamma"] = list(_column(of_models, "gamma"))
  if kind == "della":
    for one, reach in zip(density, _column(of_models, "epsilon"), strict=True):
      if one < 1 and not (0 < one - reach and one + reach < 1):
        raise ValueError(
          "density - epsilon and density + epsilon must lie between 0 and 1;"
          f" got a density of {one} and an epsilon of {reach}"
        )
    # Probabilities reach from density - epsilon to density + epsilon.
    common["epsilon"] = [2 * one for one in _column(of_models, "epsilon")]
    common["axis"] = 1
  return Call(
    merging.get(kind, density=density, **common),
    weights,
    scope=scope,
    rescale=rescale,
  )


def _arithmetic_method(
  name: str,
  summary: str,
  kind: str,
  *,
  ties: bool = False,
  normalize: bool = False,
  rescale: bool = False,
  **of_models: float,
) -> Method:
  parameters: dict[str, Any] = {
    "lambda": 1.0,
    "normalize": normalize,
    "int8_mask": False,
  }
  own: dict[str, Any] = {"weight": REQUIRED}
  # A density that has no effect is read as mergekit reads it.
  own["density"] = 1.0
  parameters["rescale"] = rescale
  if kind == "ties":
    parameters |= {"scope": "tensor", "zero_sign": "positive", "elect": "mass"}
  return Method(
    name,
    summary,
    parameters,
    {**own, **of_models},
    "needed",
    1,
    None,
    functools.partial(_arithmetic, kind, ties),
  )


def _tunable_magmax(
  values: Values, of_models: Sequence[Values], base: bool
) -> Call:
  del base
  # Shares of the entries, which no task vector is multiplied by.
  shares = list(_column(of_models, "weight"))
  return Call(merging.get("tunable_magmax", preferences=shares, **values))


def _from_registry(name: str) -> Method:
  """A method that recipes know by its own name and options."""
  info = merging.info(name)

  def build(values: Values, of_models: Sequence[Values], base: bool) -> Call:
    del base
    weights = _column(of_models, "weight") if info.takes_weights else None
    return Call(merging.get(name, **values), weights)

  weight = REQUIRED if info.needs_weights else 1.0
  return Method(
    name,
    info.summary,
    dict(info.options),
    {"weight": weight} if info.takes_weights else {},
    "needed" if info.needs_base else "model",
    info.min_models,
    info.max_models,
    build,
  )


_WEIGHT = {"weight": REQUIRED}
_OWN = [
  Method(
    "linear",
    "Weighted mean, or sum, of models.",
    {"normalize": True},
    _WEIGHT,
    "model",
    1,
    None,
    _linear,
  ),
  Method(
    "slerp",
    "Spherical interpolation from the base to a model.",
    {"t": REQUIRED},
    {},
    "model",
    2,
    2,
    _slerp,
  ),
  Method(
    "nuslerp",
    "Spherical interpolation by weights, of models or of task vectors.",
    {"nuslerp_row_wise": False, "nuslerp_flatten": True},
    _WEIGHT,
    "optional",
    2,
    2,
    _nuslerp,
  ),
  Method(
    "multislerp",
    "Mean of directions, of models or of task vectors.",
    {"normalize_weights": True, "eps": 1e-8},
    _WEIGHT,
    "optional",
    1,
    None,
    _multislerp,
  ),
  Method(
    "karcher",
    "Mean on the sphere of all models.",
    {"max_iter": 10, "tol": 1e-5},
    {},
    "model",
    1,
    None,
    _karcher,
  ),
  Method(
    "model_stock",
    "From the base towards the mean, as far as the angles say.",
    {"filter_wise": False},
    {},
    "needed",
    2,
    None,
    _model_stock,
  ),
  Method(
    "nearswap",
    "The other model where it is near the base.",
    {"t": REQUIRED},
    {},
    "needed",
    1,
    1,
    _nearswap,
  ),
  Method(
    "arcee_fusion",
    "The other model's entries of outlying importance.",
    {},
    {},
    "needed",
    1,
    1,
    _arcee_fusion,
  ),
  Method(
    "sce",
    "Select by variance, calculate, erase.",
    {"select_topk": 1.0, "int8_mask": False},
    {},
    "needed",
    1,
    None,
    _sce,
  ),
  Method(
    "passthrough",
    "One model's tensors as they are, or scaled.",
    {},
    {"scale": None},
    "model",
    1,
    1,
    _passthrough,
  ),
  Method(
    "tunable_magmax",
    "Each entry from one task, the more the larger its weight.",
    {"scale": 0.5},
    {"weight": 1.0},
    "needed",
    1,
    None,
    _tunable_magmax,
  ),
  _arithmetic_method("task_arithmetic", "Weighted sum of task vectors.", ""),
  _arithmetic_method(
    "ties",
    "Trim task vectors, elect signs, merge what agrees.",
    "ties",
    ties=True,
    normalize=True,
  ),
  _arithmetic_method(
    "dare_ties",
    "Drop entries at random, rescale, elect signs.",
    "dare",
    ties=True,
    rescale=True,
  ),
  _arithmetic_method(
    "dare_linear", "Drop entries at random, rescale, sum.", "dare", rescale=True
  ),
  _arithmetic_method(
    "breadcrumbs",
    "Drop the largest and the smallest entries, sum.",
    "breadcrumbs",
    gamma=0.01,
  ),
  _arithmetic_method(
    "breadcrumbs_ties",
    "Drop the largest and the smallest entries, elect signs.",
    "breadcrumbs",
    ties=True,
    gamma=0.01,
  ),
  _arithmetic_method(
    "della",
    "Drop at random by rank, rescale, elect signs.",
    "della",
    ties=True,
    normalize=True,
    rescale=True,
    epsilon=0.15,
  ),
  _arithmetic_method(
    "della_linear",
    "Drop at random by rank, rescale, sum.",
    "della",
    rescale=True,
    epsilon=0.15,
  ),
]
# Known by another name above.
_RENAMED = ("average", "dare", "karcher_mean", "weighted_average")


@functools.cache
def table() -> dict[str, Method]:
  """All methods of recipes by name."""
  found = {method.name: method for method in _OWN}
  for name in merging.names():
    info = merging.info(name)
    # Statistics of data are no part of a checkpoint.
    if name not in found and name not in _RENAMED and not info.statistics:
      found[name] = _from_registry(name)
  return dict(sorted(found.items()))


def near(name: str, choices: Sequence[str]) -> str:
  """What may have been meant, for a message."""
  close = difflib.get_close_matches(name, choices, 1)
  if close:
    return f"Did you mean {close[0]}?"
  return f"Choose one of {', '.join(choices) or 'none'}."
