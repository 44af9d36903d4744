"""Uniform, weighted and running averages of models."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from jaxmerge.merging import _leafwise, _leaves, _method, _values, _weights

PyTree = Any
Array = jax.Array
Values = dict[str, Any]


@functools.cache
def _average_rule() -> _leafwise.LeafRule:
  def init(base: Array, zero: Array) -> tuple[Array, Array]:
    return jnp.full_like(base, zero), zero

  def update(
    accumulator: tuple[Array, Array],
    base: Array,
    leaf: Array,
    step: _leafwise.Step,
  ) -> tuple[Array, Array]:
    del base
    total, weight = accumulator
    return total + step.weight * leaf, weight + step.weight

  def finalize(
    accumulator: tuple[Array, Array],
    base: Array,
    values: Values,
    summary: Array | None,
  ) -> Array:
    del values, summary
    total, weight = accumulator
    is_zero = weight == 0
    # The divisor is made harmless first, so that no gradient becomes NaN.
    divisor = jnp.where(is_zero, jnp.ones_like(weight), weight)
    return jnp.where(is_zero, base, total / divisor)

  return _leafwise.LeafRule(init, update, finalize, spreads=True)


def average_method(
  **options: Unpack[_leaves.MergeOptions],
) -> _method.MergeMethod:
  r"""The average as a method: :math:`\sum_i w_i \theta_i / \sum_i w_i`.

  The base itself is not averaged: it gives structure, shapes, dtypes and the
  leaves that are not merged. Before the first model, and wherever the weights
  sum to zero, ``finalize`` gives the base.

  Args:
    **options: See `MergeOptions`.

  Returns:
    A method whose ``update`` takes one weight for each model.

  >>> method = average_method()
  >>> state = method.init({"w": 0.0})
  >>> state = method.update(state, {"w": 1.0})
  >>> state = method.update(state, {"w": 5.0}, weight=3.0)
  >>> print(method.finalize(state)["w"])
  4.0
  """
  return _leafwise.leafwise_method(_average_rule(), **options)


def average(
  models: Sequence[PyTree], **options: Unpack[_leaves.MergeOptions]
) -> PyTree:
  r"""Averages models: :math:`\frac{1}{n} \sum_i \theta_i`.

  Half types are accumulated in float32; leaves that are not floating-point
  are those of the first model.

  Args:
    models: One or more trees of the same structure, shapes and dtypes.
    **options: See `MergeOptions`.

  Returns:
    The average, with the structure, shapes and dtypes of the models.

  Raises:
    TreeMismatchError: If the models differ in structure, shape or dtype.
    ValueError: If there are no models, or one holds NaN or infinity.

  References:
    Wortsman et al., `Model soups: averaging weights of multiple fine-tuned
    models improves accuracy without increasing inference time
    <https://arxiv.org/abs/2203.05482>`_, 2022

  >>> print(average([{"w": 1.0}, {"w": 2.0}])["w"])
  1.5
  """
  models = _method.check_models(models)
  return _leafwise.merge(
    _average_rule(),
    models[0],
    models,
    names=_weights.model_names(models),
    **options,
  )


def weighted_average(
  models: Sequence[PyTree],
  weights: Sequence[Any] | Array,
  **options: Unpack[_leaves.MergeOptions],
) -> PyTree:
  r"""Averages models with weights: :math:`\sum_i w_i \theta_i / \sum_i w_i`.

  Half types are accumulated in float32; leaves that are not floating-point
  are those of the first model.

  Args:
    models: One or more trees of the same structure, shapes and dtypes.
    weights: One for each model: a scalar, a prefix of the tree, or a mapping
      from regular expressions of leaf names to scalars; or an array of shape
      [n]. They are divided by their sum. Negative weights extrapolate. Traced
      weights are not checked; where these sum to zero, the first model is
      returned.
    **options: See `MergeOptions`.

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
  _weights.check_sums(weights, models[0], len(models))
  return _leafwise.merge(
    _average_rule(),
    models[0],
    models,
    weights,
    names=_weights.model_names(models),
    **options,
  )


@functools.cache
def _ema_rule() -> _leafwise.LeafRule:
  def init(base: Array, zero: Array) -> Array:
    return base + zero

  def update(
    accumulator: Array, base: Array, leaf: Array, step: _leafwise.Step
  ) -> Array:
    del base
    rate = step.weight * (1 - step.values["decay"].astype(leaf.dtype))
    return accumulator + rate * (leaf - accumulator)

  def finalize(
    accumulator: Array, base: Array, values: Values, summary: Array | None
  ) -> Array:
    del base, values, summary
    return accumulator

  return _leafwise.LeafRule(init, update, finalize, spreads=True)


def ema_method(
  decay: Any = 0.9, **options: Unpack[_leaves.MergeOptions]
) -> _method.MergeMethod:
  """The running average as a method; see `ema`.

  Args:
    decay: See `ema`.
    **options: See `MergeOptions`.

  Returns:
    The method.

  >>> method = ema_method(0.5)
  >>> state = method.update(method.init({"w": 0.0}), {"w": 1.0})
  >>> print(method.finalize(state)["w"])
  0.5
  """
  _values.check_range(decay, "decay", 0, 1)
  return _leafwise.leafwise_method(
    _ema_rule(), options={"decay": decay}, **options
  )


def ema(
  base: PyTree,
  models: Sequence[PyTree],
  decay: Any = 0.9,
  *,
  weights: Any = None,
  **options: Unpack[_leaves.MergeOptions],
) -> PyTree:
  r"""Exponential moving average over models, in their order.

  .. math::
    \bar\theta_0 = \theta_0, \quad
    \bar\theta_i = \bar\theta_{i-1}
      + w_i (1 - d) (\theta_i - \bar\theta_{i-1})

  Args:
    base: The average so far.
    models: One or more trees of the structure of the base.
    decay: :math:`d`, in [0, 1]: a scalar, a prefix of the tree, a mapping
      from regular expressions of leaf names, or one of these for each model.
    weights: :math:`w_i`, in the same forms; 1 by default.
    **options: See `MergeOptions`.

  Returns:
    The average after the last model.

  Raises:
    TreeMismatchError: If a model differs from the base.
    ValueError: If there are no models or a value is out of its range.

  References:
    Polyak and Juditsky, Acceleration of stochastic approximation by
    averaging, 1992

  >>> print(ema({"w": 0.0}, [{"w": 1.0}, {"w": 1.0}], decay=0.5)["w"])
  0.75
  """
  _values.check_range(decay, "decay", 0, 1)
  return _leafwise.merge(
    _ema_rule(), base, models, weights, options={"decay": decay}, **options
  )
