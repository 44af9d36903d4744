"""TIES with a threshold over the whole vector, of leaves that are read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree
from jaxmerge.merging import (
  _combine,
  _leafwise,
  _leaves,
  _multi_task,
  _sparsify,
  _streamed_threshold,
  _task_vectors,
  _threshold,
  _values,
)

Array = jax.Array
Read = Callable[[int, int], dict[str, Any]]


@functools.cache
def told_rule(
  elect: str, merge: str, zero_sign: str, vector: bool = False
) -> _leafwise.LeafRule:
  """TIES of one leaf that is told the thresholds and the majority.

  Args:
    elect: See `ties`, as the two that follow.
    merge: "mean", "sum" or "max".
    zero_sign: "majority" or "positive".
    vector: Whether the result is the merged task vector alone.

  Returns:
    The rule; its options are `scale` and those of `Vector.values`.
  """

  def apply(tau: Array, step: _leafwise.Step) -> Array:
    least = step.values["threshold"]
    bits = _threshold.magnitude_bits(tau, least.dtype)
    return jnp.where(bits >= least, tau, 0)

  make = _multi_task.vector_rule if vector else _task_vectors.task_vector_rule
  rule = make(
    _combine.elected(elect, merge, zero_sign, "vector"),
    _sparsify.Sparsifier(apply),
  )

  def finalize(
    accumulator: Any, base: Array, values: dict[str, Array], total: Any
  ) -> Array:
    # The sum over this leaf alone.
    del total
    return rule.finalize(accumulator, base, values, values["majority"])

  return rule._replace(finalize=finalize)


@functools.partial(jax.jit, static_argnames="rule")
def _signs(rule: _leafwise.LeafRule, accumulator: Any) -> Array:
  """Positive elected signs less negative ones."""
  assert rule.summarize is not None
  return rule.summarize(accumulator)


class Vector(NamedTuple):
  """What TIES knows of the whole vector.

  Attributes:
    thresholds: The least magnitude that is kept of each model, as bits.
    majority: Sign of the majority of the elected signs.
  """

  thresholds: list[Any]
  majority: np.int32

  def values(self) -> dict[str, Any]:
    """As options of a rule."""
    return {"threshold": self.thresholds, "majority": self.majority}


def scan(
  leaves: Mapping[int, Any],
  read: Read,
  weights: Sequence[Sequence[Any]],
  density: Any,
  rule: _leafwise.LeafRule,
) -> Vector:
  """Reads what TIES needs to know of the whole vector.

  Args:
    leaves: The leaves of the base that are merged, unread, by their places.
    read: `read(place, owner) -> {name: leaf}`, owner 0 being the base and
      `i + 1` model i.
    weights: For each model the weights of all leaves.
    density: One for all models, or one for each.
    rule: What will merge the leaves, from `told_rule`.

  Returns:
    The thresholds and the majority.
  """
  densities = _values.per_model(density, len(weights), "densities")
  size = sum(int(np.prod(leaf.shape)) for leaf in leaves.values())
  magnitudes = [
    np.abs(np.zeros((), tree.accumulation_dtype(leaf)))
    for leaf in leaves.values()
  ]
  kind = np.result_type(np.float32, *magnitudes)
  dtype = np.uint64 if kind.itemsize > 4 else np.uint32

  def taus() -> Iterator[tuple[int, Array]]:
    for place in leaves:
      (base,) = read(place, 0).values()
      for i in range(len(weights)):
        (leaf,) = read(place, i + 1).values()
        yield i, _leaves.difference(base, leaf)

  thresholds: list[Any] = _streamed_threshold.streamed_kth_largest_bits(
    taus,
    [_threshold.entries_to_keep(density, size) for density in densities],
    dtype,
  )
  if rule.summarize is None:
    return Vector(thresholds, np.int32(0))
  options = {"scale": 1.0, **Vector(thresholds, np.int32(0)).values()}
  method = _leafwise.leafwise_method(
    rule, options=options, allow_nonfinite=True
  )
  total = 0
  for place in leaves:
    state = method.init(read(place, 0))
    for i, column in enumerate(weights):
      params = read(place, i + 1)
      state = method.update(state, params, column[place], donate=True)
    total += sum(int(_signs(rule, one)) for one in state.accumulators)
  return Vector(thresholds, np.int32(np.sign(total)))
