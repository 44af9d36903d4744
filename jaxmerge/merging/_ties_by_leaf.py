"""TIES with a threshold over the whole vector, of leaves that are read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree
from jaxmerge.merging import (
  _combine,
  _leafwise,
  _leaves,
  _method,
  _sparsify,
  _streamed_threshold,
  _task_vectors,
  _threshold,
  _ties,
  _values,
)

Array = jax.Array
Read = Callable[[int, int], dict[str, Any]]


@functools.cache
def _rule(elect: str, merge: str, zero_sign: str) -> _leafwise.LeafRule:
  """TIES of one leaf that is told the vector's thresholds and majority."""

  def apply(tau: Array, step: _leafwise.Step) -> Array:
    least = step.values["threshold"]
    bits = _threshold.magnitude_bits(tau, least.dtype)
    return jnp.where(bits >= least, tau, 0)

  rule = _task_vectors.task_vector_rule(
    _combine.elected(elect, merge, zero_sign, "vector"),
    _sparsify.Sparsifier(apply),
  )

  def finalize(
    accumulator: Any, base: Array, values: dict[str, Array], total: Any
  ) -> Array:
    del total
    return rule.finalize(accumulator, base, values, values["majority"])

  return rule._replace(finalize=finalize)


@jax.jit
def _difference(base: Array, leaf: Array) -> Array:
  return _leaves.widen(leaf) - _leaves.widen(base)


@functools.partial(jax.jit, static_argnames="rule")
def _signs(rule: _leafwise.LeafRule, accumulator: Any) -> Array:
  """Positive elected signs less negative ones."""
  if rule.summarize is None:
    return jnp.zeros((), jnp.int32)
  return rule.summarize(accumulator)


def methods(
  leaves: Mapping[int, Any],
  read: Read,
  weights: Sequence[Sequence[Any]],
  options: Mapping[str, Any],
  bind: Callable[[int], Mapping[str, Any]],
) -> Callable[[int], _method.MergeMethod]:
  """Reads what TIES needs to know of the whole vector.

  Args:
    leaves: The leaves of the base that are merged, unread, by their places.
    read: `read(place, owner) -> {name: leaf}`, owner 0 being the base and
      `i + 1` model i.
    weights: For each model the weights of all leaves.
    options: All options of `ties`, and perhaps `dtype`.
    bind: The options that were given, resolved for the leaf of a place.

  Returns:
    A function from a leaf's place to the method that merges it.
  """
  elect, merge, zero_sign = (
    options[name] for name in ("elect", "merge", "zero_sign")
  )
  _ties.check_options(options["density"], "vector", elect, merge, zero_sign)
  densities = _values.per_model(options["density"], len(weights), "densities")
  size = sum(int(np.prod(leaf.shape)) for leaf in leaves.values())
  magnitudes = [
    np.abs(np.zeros((), tree.accumulation_dtype(leaf)))
    for leaf in leaves.values()
  ]
  kind = np.result_type(np.float32, *magnitudes)
  dtype = np.uint64 if kind.itemsize > 4 else np.uint32

  def taus(owner: int) -> Iterator[Array]:
    for place in leaves:
      (base,), (leaf,) = read(place, 0).values(), read(place, owner).values()
      yield _difference(base, leaf)

  thresholds = [
    _streamed_threshold.streamed_kth_largest_bits(
      functools.partial(taus, i + 1),
      int(_threshold.keep_count(density, size)),
      dtype,
    )
    for i, density in enumerate(densities)
  ]
  rule = _rule(elect, merge, zero_sign)

  def make(place: int, majority: int = 0) -> _method.MergeMethod:
    return _leafwise.leafwise_method(
      rule,
      options={
        "scale": bind(place).get("scale", options["scale"]),
        "threshold": thresholds,
        "majority": np.int32(majority),
      },
      dtype=options.get("dtype"),
      allow_nonfinite=True,
    )

  total = 0
  if rule.summarize is not None:
    for place in leaves:
      method = make(place)
      state = method.init(read(place, 0))
      for i, column in enumerate(weights):
        state = method.update(state, read(place, i + 1), column[place])
      total += sum(int(_signs(rule, one)) for one in state.accumulators)
  return lambda place: make(place, int(np.sign(total)))
