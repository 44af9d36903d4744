"""TIES before its mean: models with only what is trimmed and agrees in sign."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxmerge.merging import _leaves, _task_arrays, _threshold

Array = jax.Array


@jax.jit
def _bound(bases: list[Array], leaves: list[Array], keep: Array) -> Array:
  taus = [
    _leaves.widen(leaf) - _leaves.widen(base)
    for base, leaf in zip(bases, leaves, strict=True)
  ]
  return _threshold.kth_largest_bits(taus, keep)


def _trimmed(
  base: Array, leaves: Sequence[Array], bounds: Sequence[Array]
) -> list[Array]:
  found = []
  for leaf, bound in zip(leaves, bounds, strict=True):
    tau = _leaves.widen(leaf) - _leaves.widen(base)
    bits = _threshold.magnitude_bits(tau, bound.dtype)
    found.append(jnp.where(bits >= bound, tau, 0))
  return found


@jax.jit
def _votes(
  base: Array, leaves: Sequence[Array], bounds: Sequence[Array]
) -> Array:
  """The sum of the elected signs of a leaf."""
  taus = _trimmed(base, leaves, bounds)
  vote = sum(taus[1:], taus[0])
  return jnp.sign(vote).astype(jnp.int32).sum()


@jax.jit
def _agreeing(
  base: Array, leaves: Sequence[Array], bounds: Sequence[Array], majority: Array
) -> list[Array]:
  taus = _trimmed(base, leaves, bounds)
  vote = sum(taus[1:], taus[0])
  up = (vote > 0) | ((vote == 0) & (majority > 0))
  # The models' own entries, so that the task vectors are exact in any dtype.
  return [
    jnp.where(jnp.where(up, tau > 0, tau < 0), leaf, base)
    for tau, leaf in zip(taus, leaves, strict=True)
  ]


def agreeing_models(
  bases: Sequence[Array], models: Sequence[Sequence[Array]], density: float
) -> list[list[Array]]:
  """Models with what TIES keeps of their task vectors, the rest the base's.

  Args:
    bases: The base's leaves, real.
    models: The leaves of each model.
    density: Fraction of each task vector that is kept, of all leaves together;
      see `ties`.

  Returns:
    The leaves of each model.
  """
  bases = list(bases)
  keep = _threshold.keep_count(density, _task_arrays.size(bases))
  bounds = [_bound(bases, list(leaves), keep) for leaves in models]
  columns = list(zip(*models, strict=True))
  majority = jnp.sign(
    sum(
      _votes(base, leaves, bounds)
      for base, leaves in zip(bases, columns, strict=True)
    )
  )
  rows = [
    _agreeing(base, leaves, bounds, majority)
    for base, leaves in zip(bases, columns, strict=True)
  ]
  return [list(one) for one in zip(*rows, strict=True)]
