"""Uniform and weighted average of models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree
from jaxmerge.merging import _method

PyTree = Any


class AverageState(NamedTuple):
  """State of `average_method`.

  Attributes:
    base: The tree that ``init`` was given.
    total: Weighted sum of the floating-point leaves, half types in float32;
      ``None`` in place of the other leaves.
    weight: Sum of the weights, a scalar.
  """

  base: PyTree
  total: PyTree
  weight: jax.Array


def average_method() -> _method.MergeMethod:
  r"""The average as a method: :math:`\sum_i w_i \theta_i / \sum_i w_i`.

  The base itself is not averaged: it gives structure, shapes, dtypes and the
  leaves that are not floating-point. Before the first model, and wherever the
  weights sum to zero, ``finalize`` gives the base. Half types are summed in
  float32 and rounded once.

  Returns:
    A method whose ``update`` takes one scalar weight for each model.

  >>> method = average_method()
  >>> state = method.init({"w": 0.0})
  >>> state = method.update(state, {"w": 1.0})
  >>> state = method.update(state, {"w": 5.0}, weight=3.0)
  >>> print(method.finalize(state)["w"])
  4.0
  """

  def init(base: PyTree) -> AverageState:
    floats, _ = tree.partition(base)
    return AverageState(
      base=base,
      total=jax.tree.map(
        lambda x: jnp.zeros_like(x, dtype=tree.accumulation_dtype(x)), floats
      ),
      weight=jnp.zeros((), jnp.result_type(float)),
    )

  def update(
    state: AverageState, params: PyTree, weight: Any = 1.0
  ) -> AverageState:
    tree.check_match(state.base, params, names=["base", "params"])
    floats, _ = tree.partition(params)
    weight = jnp.asarray(weight)

    def on_leaf(total: jax.Array, x: Any) -> jax.Array:
      x = jnp.asarray(x).astype(total.dtype)
      return total + weight.astype(total.dtype) * x

    return AverageState(
      base=state.base,
      total=jax.tree.map(on_leaf, state.total, floats),
      weight=state.weight + weight.astype(state.weight.dtype),
    )

  def finalize(state: AverageState) -> PyTree:
    floats, rest = tree.partition(state.base)
    is_zero = state.weight == 0
    # The divisor is made harmless first, so that no gradient becomes NaN.
    divisor = jnp.where(is_zero, jnp.ones_like(state.weight), state.weight)

    def on_leaf(total: jax.Array, x: Any) -> jax.Array:
      x = jnp.asarray(x)
      mean = (total / divisor.astype(total.dtype)).astype(x.dtype)
      return jnp.where(is_zero, x, mean)

    return tree.combine(jax.tree.map(on_leaf, state.total, floats), rest)

  return _method.MergeMethod(init, update, finalize)


def average(models: Sequence[PyTree]) -> PyTree:
  r"""Averages models: :math:`\frac{1}{n} \sum_i \theta_i`.

  Half types are accumulated in float32; leaves that are not floating-point
  are those of the first model.

  Args:
    models: One or more trees of the same structure, shapes and dtypes.

  Returns:
    The average, with the structure, shapes and dtypes of the models.

  Raises:
    TreeMismatchError: If the models differ in structure, shape or dtype.
    ValueError: If there are no models.

  References:
    Wortsman et al., `Model soups: averaging weights of multiple fine-tuned
    models improves accuracy without increasing inference time
    <https://arxiv.org/abs/2203.05482>`_, 2022

  >>> print(average([{"w": 1.0}, {"w": 2.0}])["w"])
  1.5
  """
  models = _method.check_models(models)
  return _method.fold(average_method(), models[0], models)


def weighted_average(
  models: Sequence[PyTree], weights: Sequence[Any] | jax.Array
) -> PyTree:
  r"""Averages models with weights: :math:`\sum_i w_i \theta_i / \sum_i w_i`.

  Half types are accumulated in float32; leaves that are not floating-point
  are those of the first model.

  Args:
    models: One or more trees of the same structure, shapes and dtypes.
    weights: A scalar for each model, or an array of shape [n]. They are
      divided by their sum. Negative weights extrapolate. Traced weights are
      not checked; where these sum to zero, the first model is returned.

  Returns:
    The average, with the structure, shapes and dtypes of the models.

  Raises:
    TreeMismatchError: If the models differ in structure, shape or dtype.
    ValueError: If there are no models, not as many weights as models, or
      weights that are not finite or sum to zero.

  >>> print(weighted_average([{"w": 1.0}, {"w": 2.0}], [3, 1])["w"])
  1.25
  """
  models = _method.check_models(models)
  weights = _method.check_weights(weights, len(models))
  if not any(isinstance(weight, jax.core.Tracer) for weight in weights):
    values = np.asarray([np.asarray(weight, np.float64) for weight in weights])
    total, size = values.sum(), np.abs(values).sum()
    # A sum as small as the rounding of the weights is noise.
    if not abs(total) > np.finfo(np.float32).eps * size:
      raise ValueError(
        f"weights sum to {total:g} and cannot be normalised; give weights"
        " whose sum is not zero"
      )
  return _method.fold(average_method(), models[0], models, weights)
