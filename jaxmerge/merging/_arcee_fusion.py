"""Arcee Fusion: the parameters of another model that matter most."""

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
  _threshold,
  _weights,
)

PyTree = Any
Array = jax.Array

# Below this the divergence is computed from a series, of so many terms that
# what is left out is below the rounding of float64.
_NEAR = 0.1
_LAST_POWER = 12


def _divergence(x: Array, y: Array, axes: _spherical.Axes) -> Array:
  """KL(softmax x || softmax y) along some axes, which are kept."""

  def mean(values: Array) -> Array:
    return (weights * values).sum(axis=axes, keepdims=True)

  weights = jax.nn.softmax(y, axis=axes)
  shift = x - y
  shift = shift - mean(shift)
  is_near = jnp.abs(shift).max(axis=axes, keepdims=True) < _NEAR
  logs = jax.nn.log_softmax(x, axis=axes)
  far = (jnp.exp(logs) * (logs - jax.nn.log_softmax(y, axis=axes))).sum(
    axis=axes, keepdims=True
  )
  # Fine-tuned models are so near that their divergence, a second-order term, is
  # lost in the rounding of the logarithms above. With s the shift, and m() the
  # mean under softmax y, for which m(s) = 0, it is m(s e^s) / z - log z, where
  # z = m(e^s). First-order terms vanish, and are left out.
  shift = jnp.where(is_near, shift, jnp.zeros_like(shift))
  series = jnp.zeros_like(shift)
  for power in range(_LAST_POWER, 1, -1):
    series = series * shift + 1 / math.factorial(power)
  second = shift * shift * series  # e^s - 1 - s
  excess = mean(second)
  near = mean(shift * (shift + second)) / (1 + excess) - jnp.log1p(excess)
  return jnp.maximum(jnp.where(is_near, near, far), 0)


def _quantile(x: Array, numerator: int, denominator: int) -> Array:
  """The entry at the place q (n - 1), rounded down, of those in order."""
  place = numerator * (x.size - 1) // denominator
  bits = _threshold.kth_largest_bits([x], jnp.uint32(x.size - place))
  return jax.lax.bitcast_convert_type(bits, x.dtype)


@functools.cache
def _rule(axis: _spherical.Axes) -> _gathered.GatherRule:
  def merge(
    base: Array,
    leaves: Sequence[Array],
    weights: Array,
    values: dict[str, Array],
  ) -> Array:
    del weights, values
    if jnp.iscomplexobj(base):
      raise ValueError(
        "arcee_fusion ranks real parameters only; leave complex leaves out"
        " with select"
      )
    axes = _spherical.vector_axes(base.ndim, axis)
    # Only compared with one another: no gradient flows through.
    old, new = map(jax.lax.stop_gradient, (base, leaves[0]))
    importance = jnp.abs(new - old) * _divergence(new, old, axes)
    low, median, high = (_quantile(importance, i, 4) for i in (1, 2, 3))
    threshold = median + 1.5 * (high - low)
    return jnp.where(importance >= threshold, leaves[0], base)

  return _gathered.GatherRule(merge, max_models=1)


def arcee_fusion_method(
  *,
  axis: int | tuple[int, ...] = -1,
  **options: Unpack[_leaves.MergeOptions],
) -> _method.MergeMethod:
  """Arcee Fusion as a method of one model; see `arcee_fusion`.

  Args:
    axis: See `arcee_fusion`.
    **options: See `MergeOptions`.

  Returns:
    The method. Its ``update`` takes no weights.

  >>> import jax.numpy as jnp
  >>> method = arcee_fusion_method()
  >>> state = method.init({"w": jnp.zeros(8)})
  >>> state = method.update(state, {"w": jnp.arange(8.0) ** 4})
  >>> print(method.finalize(state)["w"])
  [   0.    0.    0.    0.    0.    0. 1296. 2401.]
  """
  return _weights.unweighted(
    _gathered.gathered_method(
      _rule(_spherical.check_axis(axis)), "arcee_fusion", **options
    ),
    "arcee_fusion",
    "the threshold follows from the parameters",
  )


def arcee_fusion(
  base: PyTree,
  model: PyTree,
  *,
  axis: int | tuple[int, ...] = -1,
  **options: Unpack[_leaves.MergeOptions],
) -> PyTree:
  r"""Takes from a model the parameters whose change matters most.

  .. math::
    s = |\theta_1 - \theta_0| \cdot \mathrm{KL}\bigl(
      \mathrm{softmax}(\theta_1) \,\|\, \mathrm{softmax}(\theta_0) \bigr),
    \quad
    \theta = \theta_1 \text{ where } s \ge q_{1/2} + 1.5 (q_{3/4} - q_{1/4}),
    \text{ else } \theta_0

  The divergence is taken along ``axis`` and belongs to all entries of the
  vector; :math:`q_p` are the quantiles of :math:`s` in the leaf, the entries at
  the place :math:`p (n - 1)` rounded down. mergekit adds 1e-8 to the
  probabilities, and estimates the quantiles of leaves of more than a million
  entries from a random sample; here both are exact. Where :math:`s` is zero
  throughout, as for scalars, the leaf is the model's.

  Args:
    base: :math:`\theta_0`.
    model: :math:`\theta_1`, of the structure of the base.
    axis: Axis or axes of the softmax. A leaf that has none of them is one
      vector. mergekit's is the last axis of PyTorch's kernels [out, in]; for
      kernels [in, out] it is axis -2, and with convolutions (-4, -3, -2).
    **options: See `MergeOptions`.

  Returns:
    The merged parameters, with the structure, shapes and dtypes of the base.

  Raises:
    TreeMismatchError: If the model differs from the base.
    ValueError: If a leaf to merge is complex.

  References:
    Goddard et al., `Arcee's MergeKit: a toolkit for merging large language
    models <https://arxiv.org/abs/2403.13257>`_, 2024

  >>> import jax.numpy as jnp
  >>> base, model = {"w": jnp.zeros(8)}, {"w": jnp.arange(8.0) ** 4}
  >>> print(arcee_fusion(base, model)["w"])
  [   0.    0.    0.    0.    0.    0. 1296. 2401.]
  """
  return _gathered.merge(
    _rule(_spherical.check_axis(axis)),
    "arcee_fusion",
    base,
    [model],
    names=["base", "model"],
    **options,
  )
