"""NearSwap: parameters of another model, where they are near."""

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
  _values,
  _weights,
)

PyTree = Any
Array = jax.Array

_LARGEST = math.nextafter(math.inf, 0)


@functools.cache
def _rule() -> _gathered.GatherRule:
  def merge(
    base: Array,
    leaves: Sequence[Array],
    weights: Array,
    values: dict[str, Array],
  ) -> Array:
    del weights
    step = leaves[0] - base
    distance = jnp.abs(step)
    t = values["t"].astype(distance.dtype)
    is_near = distance <= t
    # The divisor is made harmless first, so that no gradient becomes NaN.
    divisor = jnp.where(is_near, jnp.ones_like(distance), distance)
    return jnp.where(
      is_near, leaves[0], base + (t / divisor).astype(step.dtype) * step
    )

  return _gathered.GatherRule(merge, max_models=1)


def nearswap_method(
  t: Any, **options: Unpack[_leaves.MergeOptions]
) -> _method.MergeMethod:
  """NearSwap as a method of one model; see `nearswap`.

  Args:
    t: See `nearswap`.
    **options: See `MergeOptions`.

  Returns:
    The method. Its ``update`` takes no weights: ``t`` is in their place.

  >>> method = nearswap_method(0.5)
  >>> state = method.update(method.init({"w": 1.0}), {"w": 3.0})
  >>> print(method.finalize(state)["w"])
  1.5
  """
  _values.check_range(t, "t", 0, _LARGEST)
  return _weights.unweighted(
    _gathered.gathered_method(_rule(), "nearswap", options={"t": t}, **options),
    "nearswap",
    "say how far to go with t",
  )


def nearswap(
  base: PyTree,
  model: PyTree,
  t: Any,
  **options: Unpack[_leaves.MergeOptions],
) -> PyTree:
  r"""Moves each parameter of the base towards a model, but not beyond t.

  .. math::
    \theta = \theta_0
      + \min\left(1, \frac{t}{|\tau|}\right) \tau, \quad
    \tau = \theta_1 - \theta_0

  Parameters no further apart than :math:`t` are the model's. mergekit divides
  by at least 1e-6, and so moves less where parameters are closer than that and
  :math:`t` is below 1e-6; the rule as it was published, and this one, do not.

  Args:
    base: :math:`\theta_0`.
    model: :math:`\theta_1`, of the structure of the base.
    t: How far a parameter may move, at least 0: a scalar, a prefix of the
      tree, or a mapping from regular expressions of leaf names to scalars.
    **options: See `MergeOptions`.

  Returns:
    The merged parameters, with the structure, shapes and dtypes of the base.

  Raises:
    TreeMismatchError: If the model differs from the base.
    ValueError: If a value is out of its range.

  References:
    alchemonaut, `QuartetAnemoi-70B-t0.0001
    <https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001>`_, 2024

  >>> import jax.numpy as jnp
  >>> base = {"w": jnp.array([0.0, 0.0])}
  >>> print(nearswap(base, {"w": jnp.array([0.25, -4.0])}, 0.5)["w"])
  [ 0.25 -0.5 ]
  """
  _values.check_range(t, "t", 0, _LARGEST)
  return _gathered.merge(
    _rule(),
    "nearswap",
    base,
    [model],
    options={"t": t},
    names=["base", "model"],
    **options,
  )
