"""Checks of the weights of models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree
from jaxmerge.merging import _method, _values

PyTree = Any
Array = jax.Array


def check_sums(
  weights: Any,
  reference: PyTree,
  num_models: int,
  *,
  allow_negative: bool = True,
) -> None:
  """Raises for weights that cannot be divided by their sum; traced ones pass.

  Args:
    weights: One for each model, or None.
    reference: One of the models.
    num_models: Number of models.
    allow_negative: Whether weights may be negative.

  Raises:
    ValueError: If the weights of a leaf sum to zero, or one is negative that
      must not be.
  """
  if weights is None:
    return
  columns = [
    _values.per_leaf(entry, reference, f"weight {i}")
    for i, entry in enumerate(_values.per_model(weights, num_models, "weights"))
  ]
  for leaf, found in zip(
    tree.leaf_names(reference), zip(*columns, strict=True), strict=True
  ):
    if any(_values.is_traced(one) for one in found):
      continue
    values = np.asarray([np.asarray(one, np.float64) for one in found])
    if not allow_negative and (values < 0).any():
      raise ValueError(
        f"weights are {values.tolist()} for leaf '{leaf}'; give none that is"
        " negative"
      )
    # A sum as small as the rounding of the weights is noise.
    if abs(values.sum()) <= np.finfo(np.float32).eps * np.abs(values).sum():
      raise ValueError(
        f"weights sum to {values.sum():g} for leaf '{leaf}' and cannot be"
        " normalised; give weights whose sum is not zero"
      )


def normalized(weights: Array) -> Array:
  """Weights divided by their sum; equal ones where the sum is zero.

  Args:
    weights: The weights of one leaf; complex for a complex leaf.

  Returns:
    Real weights that sum to one.
  """
  weights = jnp.real(weights)
  total = weights.sum()
  is_zero = total == 0
  divisor = jnp.where(is_zero, jnp.ones_like(total), total)
  return jnp.where(
    is_zero, jnp.full_like(weights, 1 / len(weights)), weights / divisor
  )


def unweighted(
  method: _method.MergeMethod, name: str, remedy: str
) -> _method.MergeMethod:
  """A method whose update takes no weight but one.

  Args:
    method: The method.
    name: What messages call it.
    remedy: What a user may do instead.

  Returns:
    The method.
  """

  def update(
    state: _method.MergeState,
    params: PyTree,
    weight: Any = 1.0,
    statistics: Any = None,
    *,
    donate: bool = False,
  ) -> _method.MergeState:
    if any(
      _values.is_traced(one) or np.asarray(one) != 1
      for one in jax.tree.leaves(weight)
    ):
      raise ValueError(f"{name} takes no weights; {remedy}")
    return method.update(state, params, statistics=statistics, donate=donate)

  return method._replace(update=update)


def nonnegative(method: _method.MergeMethod) -> _method.MergeMethod:
  """A method whose update takes no weight that is negative, unless traced."""

  def update(
    state: _method.MergeState,
    params: PyTree,
    weight: Any = 1.0,
    statistics: Any = None,
    *,
    donate: bool = False,
  ) -> _method.MergeState:
    _values.check_range(weight, "weight", 0, np.inf)
    return method.update(state, params, weight, statistics, donate=donate)

  return method._replace(update=update)


def model_names(models: Sequence[PyTree]) -> list[str]:
  """What messages call models, the first of which is also the base."""
  return ["model 0", *(f"model {i}" for i in range(len(models)))]
