"""Model Stock: how far to go from the base to the mean of models."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from jaxmerge.merging import (
  _gathered,
  _leaves,
  _method,
  _spherical,
  _weights,
)

PyTree = Any
Array = jax.Array


@functools.cache
def _rule(axis: _spherical.Axes | None, clip: bool) -> _gathered.GatherRule:
  def merge(
    base: Array,
    leaves: Sequence[Array],
    weights: Array,
    values: dict[str, Array],
  ) -> Array:
    del weights, values
    axes = _spherical.vector_axes(base.ndim, axis)
    count = len(leaves)
    mean = total = jnp.zeros_like(base)
    squares: Array | float = 0.0
    for leaf in leaves:
      tau = leaf - base
      one, _ = _spherical.unit(tau, axes)
      mean = mean + tau / count
      total = total + one
      squares = squares + _spherical.dot(one, one, axes)
    # The square of a sum is the sum of squares and of all pairs, each twice.
    cosine = (_spherical.dot(total, total, axes) - squares) / (
      count * (count - 1)
    )
    divisor = 1 + (count - 1) * cosine
    # Rounding leaves a little of a divisor that is zero.
    is_zero = divisor <= math.sqrt(jnp.finfo(base.dtype).eps)
    divisor = jnp.where(is_zero, jnp.ones_like(divisor), divisor)
    t = jnp.where(is_zero, jnp.zeros_like(cosine), count * cosine / divisor)
    if clip:
      t = jnp.clip(t, 0, 1)
    return base + t.astype(base.dtype) * mean

  return _gathered.GatherRule(merge, min_models=2)


def model_stock_method(
  *,
  filter_wise: bool = False,
  axis: int | tuple[int, ...] = -1,
  clip: bool = False,
  **options: Unpack[_leaves.MergeOptions],
) -> _method.MergeMethod:
  """Model Stock as a method of two models or more; see `model_stock`.

  Args:
    filter_wise: See `model_stock`, as the rest.
    axis: The axes that a filter runs along.
    clip: Whether the ratio is kept in [0, 1].
    **options: See `MergeOptions`.

  Returns:
    The method. Its ``update`` takes no weights.

  >>> import jax.numpy as jnp
  >>> method = model_stock_method()
  >>> state = method.init({"w": jnp.zeros(2)})
  >>> for value in ([2.0, 0.0], [0.0, 2.0]):
  ...   state = method.update(state, {"w": jnp.array(value)})
  >>> print(method.finalize(state)["w"])
  [0. 0.]
  """
  axes = _spherical.check_axis(axis)
  return _weights.unweighted(
    _gathered.gathered_method(
      _rule(axes if filter_wise else None, clip), "model_stock", **options
    ),
    "model_stock",
    "the ratio follows from the angles",
  )


def model_stock(
  base: PyTree,
  models: Sequence[PyTree],
  *,
  filter_wise: bool = False,
  axis: int | tuple[int, ...] = -1,
  clip: bool = False,
  **options: Unpack[_leaves.MergeOptions],
) -> PyTree:
  r"""Goes from the base to the mean of models as far as their angles say.

  .. math::
    \theta = \theta_0 + t \frac{1}{N} \sum_i \tau_i, \quad
    t = \frac{N \cos \varphi}{1 + (N - 1) \cos \varphi}, \quad
    \tau_i = \theta_i - \theta_0

  The paper takes every two task vectors to have the same angle
  :math:`\varphi`; for :math:`\cos \varphi` the mean over all pairs is used, as
  in mergekit. A task vector that is zero has cosine 0 with every other. Models
  whose directions cancel, for which :math:`t` is undefined, give the base.

  Args:
    base: :math:`\theta_0`, the parameters that all models were tuned from.
    models: Two or more trees of the structure of the base.
    filter_wise: Whether each filter has its own angle, rather than each leaf,
      as in the paper.
    axis: Axis or axes that a filter runs along. A leaf that has none of them
      is one filter. mergekit's is the last axis of PyTorch's kernels [out, in];
      for kernels [in, out] it is axis -2, and with convolutions
      (-4, -3, -2).
    clip: Whether :math:`t` is kept in [0, 1]. The paper, whose angles are
      acute, has no need to; where the mean cosine is negative, the formula
      leads away from the models, and without bound.
    **options: See `MergeOptions`.

  Returns:
    The merged parameters, with the structure, shapes and dtypes of the base.

  Raises:
    TreeMismatchError: If a model differs from the base.
    ValueError: If there are fewer than two models.

  References:
    Jang et al., `Model Stock: all we need is just a few fine-tuned models
    <https://arxiv.org/abs/2403.19522>`_, 2024

  >>> import jax.numpy as jnp
  >>> models = [{"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([3.0, 0.0])}]
  >>> merged = model_stock({"w": jnp.zeros(2)}, models)["w"]
  >>> print([round(x, 3) for x in merged.tolist()])
  [2.25, 1.5]
  """
  axes = _spherical.check_axis(axis)
  return _gathered.merge(
    _rule(axes if filter_wise else None, clip),
    "model_stock",
    base,
    models,
    **options,
  )
