"""Combiners: from several task vectors to one, a model at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmerge.merging import _draws, _leafwise, _reductions

Array = jax.Array


class Combiner(NamedTuple):
  """How task vectors are combined; see `_leafwise.LeafRule`.

  Attributes:
    init: `init(base, zero) -> accumulator`.
    update: `update(accumulator, tau, step) -> accumulator`.
    finalize: `finalize(accumulator, total) -> tau`.
    summarize: As in a `LeafRule`, as the one that follows.
    spreads: Whether what is not finite shows in the result.
  """

  init: Callable[[Array, Array], Any]
  update: Callable[[Any, Array, _leafwise.Step], Any]
  finalize: Callable[[Any, Array | None], Array]
  summarize: Callable[[Any], Array] | None = None
  spreads: bool = False


def divide(numerator: Array, divisor: Array) -> Array:
  """The quotient, and 0 where the divisor is 0; no gradient becomes NaN."""
  is_zero = divisor == 0
  safe = jnp.where(is_zero, jnp.ones_like(divisor), divisor)
  return jnp.where(is_zero, jnp.zeros_like(numerator), numerator / safe)


@functools.cache
def total(normalize: bool = False) -> Combiner:
  """The weighted sum, or the weighted mean."""

  def init(base: Array, zero: Array) -> tuple[Array, Array]:
    return jnp.full_like(base, zero), zero

  def update(
    accumulator: tuple[Array, Array], tau: Array, step: _leafwise.Step
  ) -> tuple[Array, Array]:
    values, weight = accumulator
    return values + step.weight * tau, weight + step.weight

  def finalize(
    accumulator: tuple[Array, Array], summary: Array | None
  ) -> Array:
    del summary
    values, weight = accumulator
    if normalize:
      return divide(values, jnp.broadcast_to(weight, values.shape))
    return values

  return Combiner(init, update, finalize, spreads=not normalize)


@functools.cache
def largest() -> Combiner:
  """Per entry the weighted task vector of the largest magnitude."""

  def init(base: Array, zero: Array) -> Array:
    return jnp.full_like(base, zero)

  def update(accumulator: Array, tau: Array, step: _leafwise.Step) -> Array:
    tau = step.weight * tau
    # On ties the later task wins.
    return jnp.where(jnp.abs(tau) >= jnp.abs(accumulator), tau, accumulator)

  def finalize(accumulator: Array, summary: Array | None) -> Array:
    del summary
    return accumulator

  return Combiner(init, update, finalize)


@functools.cache
def chosen() -> Combiner:
  """Per entry one task vector, drawn in proportion to the weights."""

  def init(base: Array, zero: Array) -> tuple[Array, Array]:
    return jnp.full_like(base, zero), zero

  def update(
    accumulator: tuple[Array, Array], tau: Array, step: _leafwise.Step
  ) -> tuple[Array, Array]:
    assert step.key is not None
    values, weight = accumulator
    weight = weight + step.weight
    # Reservoir sampling: the newcomer replaces with probability w_k / sum.
    drawn = _draws.uniform(step.key, tau.shape)
    takes = drawn.astype(weight.dtype) * weight < step.weight
    return jnp.where(takes, tau, values), weight

  def finalize(
    accumulator: tuple[Array, Array], summary: Array | None
  ) -> Array:
    del summary
    return accumulator[0]

  return Combiner(init, update, finalize)


@functools.cache
def elected(by: str, merge: str, zero_sign: str, scope: str) -> Combiner:
  """Entries that agree with the elected sign, merged."""

  def init(base: Array, zero: Array) -> dict[str, Array]:
    names = ["vote", "positive", "negative"]
    if merge == "mean":
      names += ["positive_weight", "negative_weight"]
    return {name: jnp.full_like(base, zero) for name in names}

  def update(
    accumulator: dict[str, Array], tau: Array, step: _leafwise.Step
  ) -> dict[str, Array]:
    tau = step.weight * tau
    up, down = tau > 0, tau < 0
    new = {
      "vote": accumulator["vote"] + (tau if by == "mass" else jnp.sign(tau))
    }
    for name, agrees in (("positive", up), ("negative", down)):
      old = accumulator[name]
      if merge == "max":
        further = jnp.abs(tau) > jnp.abs(old)
        new[name] = jnp.where(agrees & further, tau, old)
      else:
        new[name] = jnp.where(agrees, old + tau, old)
      if merge == "mean":
        old = accumulator[f"{name}_weight"]
        new[f"{name}_weight"] = jnp.where(
          agrees, old + jnp.abs(step.weight), old
        )
    return new

  def summarize(accumulator: dict[str, Array]) -> Array:
    vote = accumulator["vote"]
    up, down = _reductions.counts([vote > 0, vote < 0])
    return up.astype(jnp.int32) - down.astype(jnp.int32)

  def finalize(accumulator: dict[str, Array], summary: Array | None) -> Array:
    sign = jnp.sign(accumulator["vote"])
    majority = jnp.ones((), sign.dtype)
    if zero_sign == "majority":
      if summary is None:
        summary = summarize(accumulator)
      majority = jnp.sign(summary).astype(sign.dtype)
    is_up = jnp.where(sign == 0, majority, sign) > 0
    merged = jnp.where(is_up, accumulator["positive"], accumulator["negative"])
    if merge != "mean":
      return merged
    weight = jnp.where(
      is_up, accumulator["positive_weight"], accumulator["negative_weight"]
    )
    return divide(merged, weight)

  whole = zero_sign == "majority" and scope == "vector"
  return Combiner(init, update, finalize, summarize if whole else None)
