"""Merge methods that are made of a rule for one leaf."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree
from jaxmerge.merging import _leaves, _method, _values

PyTree = Any
Array = jax.Array

# So many models are merged by one kernel. A kernel is compiled for each number
# of models, and one of too many inputs takes long to compile.
_CHUNK = 32


class Step(NamedTuple):
  """What a rule is told of one model.

  Attributes:
    weight: The model's weight for this leaf, a scalar.
    key: PRNG key of this model and leaf; None without a key.
    values: The options' values for this model and leaf, scalars by name.
    prepared: What `LeafRule.prepare` found in the whole model, or None.
    statistics: Statistics of the model's data for this leaf, or None.
  """

  weight: Array
  key: Array | None
  values: dict[str, Array]
  prepared: Any
  statistics: Any


class Statistics(NamedTuple):
  """Which statistics of the data a rule needs.

  Attributes:
    noun: What messages call those of one model.
    collector: The function that a user gets them from.
    read: `read(statistics, base, merged, names, allow_nonfinite) -> entries`,
      one for each merged leaf, arrays or None; raises for what does not fit.
      `names` are what messages call the base and the statistics.
  """

  noun: str
  collector: str
  read: Callable[
    [Any, PyTree, Sequence[_leaves.Leaf], tuple[str, str], bool], list[Any]
  ]


class LeafRule(NamedTuple):
  """How one floating-point leaf is merged; half types come as float32.

  Attributes:
    init: `init(base, zero) -> accumulator`, any pytree of arrays. `zero` is 0,
      but unknown to the compiler: sums that start from it are rounded alike,
      whether models come one at a time or all at once.
    update: `update(accumulator, base, leaf, step) -> accumulator`.
    finalize: `finalize(accumulator, base, values, total) -> leaf`.
    derive: `derive(values, size, total_size) -> values`, computes what
      depends on the number of elements, on the host; None if nothing does.
    prepare: `prepare(bases, leaves, values, statistics) -> prepared`, of a
      whole model, from all its leaves; None for a rule that treats each leaf
      alone.
    summarize: `summarize(accumulator) -> scalar`, summed over the leaves to
      the `total` that `finalize` is given; None likewise.
    statistics: The statistics of data that it needs; None if it needs none.
    spreads: Whether a merged entry is NaN or infinite wherever the base, an
      accumulated model or its weight is, so that looking at it is enough.
  """

  init: Callable[[Array, Array], Any]
  update: Callable[[Any, Array, Array, Step], Any]
  finalize: Callable[[Any, Array, dict[str, Array], Array | None], Array]
  derive: Callable[[dict[str, Any], int, int], dict[str, Any]] | None = None
  prepare: (
    Callable[[list[Array], list[Array], list[dict[str, Array]], list[Any]], Any]
    | None
  ) = None
  summarize: Callable[[Any], Array] | None = None
  statistics: Statistics | None = None
  spreads: bool = False


class LeafwiseState(NamedTuple):
  """State of a method that is made of a rule for one leaf.

  Attributes:
    base: The tree that ``init`` was given.
    accumulators: What the rule keeps of each merged leaf.
    values: The options' values for each merged leaf.
    num_models: Number of models so far, int32.
  """

  base: PyTree
  accumulators: list[Any]
  values: list[dict[str, Array]]
  num_models: Array


class _Batch(NamedTuple):
  """What a kernel is told of some models, for one leaf.

  Attributes:
    leaves: Their leaves.
    weights: Their weights [n].
    first: Place of the first of them among all models.
    key: PRNG key; None without one.
    seed: Number that makes the key one of the leaf.
    values: The options' values; with an axis, one value a model.
    prepared: What `LeafRule.prepare` found in each.
    statistics: Statistics of their data.
  """

  leaves: Sequence[Array]
  weights: Array
  first: jax.typing.ArrayLike
  key: Array | None
  seed: jax.typing.ArrayLike
  values: dict[str, Array]
  prepared: Sequence[Any]
  statistics: Sequence[Any]


def _pick(values: dict[str, Array], index: Array) -> dict[str, Array]:
  """One model's values: those with an axis are of one value a model."""
  return {
    name: value[index]
    if not isinstance(value, _leaves.Static) and value.ndim
    else value
    for name, value in values.items()
  }


def _update(
  rule: LeafRule, accumulator: Any, base: Array, batch: _Batch
) -> Any:
  key = batch.key
  if key is not None:
    key = jax.random.fold_in(key, batch.seed)
  for i, leaf in enumerate(batch.leaves):
    index = jnp.asarray(batch.first) + i
    step = Step(
      weight=batch.weights[i].astype(base.dtype),
      key=None if key is None else jax.random.fold_in(key, index),
      values=_pick(batch.values, index),
      prepared=batch.prepared[i],
      statistics=batch.statistics[i],
    )
    accumulator = rule.update(accumulator, base, _leaves.widen(leaf), step)
  return accumulator


@functools.cache
def _marking(rule: LeafRule) -> LeafRule:
  """The rule, with NaN wherever the base or a model is not finite.

  A result without NaN then shows that all inputs are finite, which saves
  reading them once more.
  """

  def init(base: Array, zero: Array) -> tuple[Any, Array]:
    return rule.init(base, zero), 0 * base

  def update(
    accumulator: tuple[Any, Array], base: Array, leaf: Array, step: Step
  ) -> tuple[Any, Array]:
    inner, mark = accumulator
    # Zero, but NaN once a leaf is not finite: one operation a model.
    return rule.update(inner, base, leaf, step), mark + 0 * leaf

  def finalize(
    accumulator: tuple[Any, Array],
    base: Array,
    values: dict[str, Array],
    total: Array | None,
  ) -> Array:
    inner, mark = accumulator
    merged = rule.finalize(inner, base, values, total)
    return jnp.where(mark == 0, merged, jnp.nan)

  summarize = rule.summarize
  return rule._replace(
    init=init,
    update=update,
    finalize=finalize,
    summarize=(
      None
      if summarize is None
      else lambda accumulator: summarize(accumulator[0])
    ),
  )


def _accumulate(rule: LeafRule, base: Array, zero: Array, batch: _Batch) -> Any:
  start = rule.init(base, zero.astype(base.dtype))
  return _update(rule, start, base, batch)


@functools.partial(jax.jit, static_argnames="rule")
def _start(rule: LeafRule, base: Array, zero: Array) -> Any:
  base = _leaves.widen(base)
  return rule.init(base, zero.astype(base.dtype))


@functools.partial(jax.jit, static_argnames="rule")
def _advance(
  rule: LeafRule, accumulator: Any, base: Array, batch: _Batch
) -> Any:
  return _update(rule, accumulator, _leaves.widen(base), batch)


@functools.partial(jax.jit, static_argnames="rule")
def _begin(rule: LeafRule, base: Array, zero: Array, batch: _Batch) -> Any:
  return _accumulate(rule, _leaves.widen(base), zero, batch)


@functools.partial(jax.jit, static_argnames="rule", donate_argnames="arrays")
def _overwrite(
  rule: LeafRule, arrays: Any, scalars: Any, base: Array, batch: _Batch
) -> Any:
  accumulator = tree.combine(arrays, scalars)
  return _update(rule, accumulator, _leaves.widen(base), batch)


def _advance_in_place(
  rule: LeafRule, accumulator: Any, base: Array, batch: _Batch
) -> Any:
  """`_advance` in the memory of the accumulator, which is lost."""
  # Scalars may share a buffer, which cannot be given away twice.
  arrays = jax.tree.map(lambda x: x if x.ndim else None, accumulator)
  scalars = jax.tree.map(lambda x: None if x.ndim else x, accumulator)
  return _overwrite(rule, arrays, scalars, base, batch)


@functools.partial(jax.jit, static_argnames="rule")
def _summarize(rule: LeafRule, accumulator: Any) -> Array:
  assert rule.summarize is not None
  return rule.summarize(accumulator)


@functools.partial(jax.jit, static_argnames=("rule", "dtype"))
def _finish(
  rule: LeafRule,
  accumulator: Any,
  base: Array,
  values: dict[str, Array],
  total: Array | None,
  num_models: Array,
  dtype: Any,
) -> Array:
  wide = _leaves.widen(base)
  merged = rule.finalize(accumulator, wide, values, total)
  return jnp.where(num_models == 0, wide, merged).astype(dtype)


@functools.partial(jax.jit, static_argnames="rule")
def _summarize_all(
  rule: LeafRule, base: Array, zero: Array, batch: _Batch
) -> Array:
  """The summary of all models without storing the accumulator."""
  assert rule.summarize is not None
  return rule.summarize(_accumulate(rule, _leaves.widen(base), zero, batch))


@functools.partial(jax.jit, static_argnames=("rule", "dtype"))
def _merge_all(
  rule: LeafRule,
  base: Array,
  zero: Array,
  batch: _Batch,
  total: Array | None,
  dtype: Any,
) -> Array:
  """All at once: one kernel that reads each leaf once and keeps nothing."""
  wide = _leaves.widen(base)
  accumulator = _accumulate(rule, wide, zero, batch)
  return rule.finalize(accumulator, wide, batch.values, total).astype(dtype)


@functools.partial(jax.jit, static_argnames="rule")
def _prepare(
  rule: LeafRule,
  bases: list[Array],
  leaves: list[Array],
  values: list[dict[str, Array]],
  index: Array,
  statistics: list[Any],
) -> Any:
  assert rule.prepare is not None
  return rule.prepare(
    [_leaves.widen(base) for base in bases],
    [_leaves.widen(leaf) for leaf in leaves],
    [_pick(one, index) for one in values],
    statistics,
  )


def _read(
  rule: LeafRule,
  statistics: Any,
  base: PyTree,
  merged: Sequence[_leaves.Leaf],
  names: tuple[str, str],
  allow_nonfinite: bool,
) -> list[Any]:
  """One model's statistics for every merged leaf, checked."""
  needed = rule.statistics
  if needed is None:
    _method.check_no_statistics(statistics)
    return [None] * len(merged)
  if statistics is None:
    raise ValueError(
      f"{names[1]} is missing: this merge method needs statistics of the data"
      f" of each model; collect them with {needed.collector}"
    )
  return needed.read(statistics, base, merged, names, allow_nonfinite)


def _check_values(state: LeafwiseState) -> None:
  """Raises if an option has no value for the next model."""
  given = {
    name: value.shape[0]
    for values in state.values
    for name, value in values.items()
    if not isinstance(value, _leaves.Static) and value.ndim
  }
  if not given or _values.is_traced(state.num_models):
    return
  for name, number in given.items():
    if number <= int(state.num_models):
      raise ValueError(
        f"got {number} values of {name}, but this is model"
        f" {int(state.num_models) + 1}; give one value, or one for each model"
      )


def leafwise_method(
  rule: LeafRule,
  *,
  options: dict[str, Any] | None = None,
  key: Array | None = None,
  select: str | Callable[[str], bool] | None = None,
  dtype: Any = None,
  allow_nonfinite: bool = False,
) -> _method.MergeMethod:
  """Makes a method of a rule for one leaf.

  Args:
    rule: The rule.
    options: Values by name: a scalar, a prefix of the tree or a mapping from
      regular expressions, or a sequence of these, one a model.
    key: PRNG key for a rule that draws random numbers.
    select: See `MergeOptions`, as the two that follow.
    dtype: Dtype of the result.
    allow_nonfinite: Whether NaN and infinity are let through.

  Returns:
    The method; its state is a `LeafwiseState`.
  """

  def init(base: PyTree) -> LeafwiseState:
    merged = _leaves.merged_leaves(base, select)
    if not allow_nonfinite:
      _leaves.check_finite([base], ["base"], merged)
    _values.check_key(key)
    leaves = jax.tree.leaves(base)
    return LeafwiseState(
      base=base,
      accumulators=[
        _start(rule, leaves[leaf.place], np.float32(0)) for leaf in merged
      ],
      values=_leaves.resolve(options or {}, base, merged, rule.derive),
      num_models=jnp.zeros((), jnp.int32),
    )

  def update(
    state: LeafwiseState,
    params: PyTree,
    weight: Any = 1.0,
    statistics: Any = None,
    *,
    donate: bool = False,
  ) -> LeafwiseState:
    tree.check_match(state.base, params, names=["base", "params"])
    merged = _leaves.merged_leaves(state.base, select)
    if not allow_nonfinite:
      _leaves.check_finite([params], ["params"], merged)
    weights = _values.per_leaf(weight, state.base, "weight")
    _check_values(state)
    noun = "statistics" if rule.statistics is None else rule.statistics.noun
    found = _read(
      rule, statistics, state.base, merged, ("base", noun), allow_nonfinite
    )
    bases, leaves = jax.tree.leaves(state.base), jax.tree.leaves(params)
    prepared = None
    if rule.prepare is not None:
      prepared = _prepare(
        rule,
        [bases[leaf.place] for leaf in merged],
        [leaves[leaf.place] for leaf in merged],
        state.values,
        state.num_models,
        found,
      )
    advance = _advance_in_place if donate else _advance
    accumulators = [
      advance(
        rule,
        accumulator,
        bases[leaf.place],
        _Batch(
          (leaves[leaf.place],),
          _leaves.stack([weights[leaf.place]]),
          state.num_models,
          key,
          leaf.seed,
          values,
          (prepared,),
          (one,),
        ),
      )
      for leaf, accumulator, values, one in zip(
        merged, state.accumulators, state.values, found, strict=True
      )
    ]
    return state._replace(
      accumulators=accumulators, num_models=state.num_models + 1
    )

  def finalize(state: LeafwiseState) -> PyTree:
    merged = _leaves.merged_leaves(state.base, select)
    total = None
    if rule.summarize is not None and state.accumulators:
      total = sum(_summarize(rule, one) for one in state.accumulators)
    bases = jax.tree.leaves(state.base)
    results = [
      _finish(
        rule,
        accumulator,
        bases[leaf.place],
        values,
        total,
        state.num_models,
        _leaves.result_dtype(bases[leaf.place], dtype),
      )
      for leaf, accumulator, values in zip(
        merged, state.accumulators, state.values, strict=True
      )
    ]
    return _leaves.rebuild(state.base, merged, results, dtype)

  return _method.MergeMethod(init, update, finalize)


def _chunk_size(rule: LeafRule, key: Array | None) -> int:
  """How many models one kernel merges.

  A rule that draws, selects within the leaf or reads statistics gets them one
  by one, as in a stream: of longer kernels the compiler stores intermediate
  results, which takes as long as to store the accumulator, and it rounds sums
  of products in another way.
  """
  selects = rule.derive is not None and rule.prepare is None
  is_light = key is None and rule.statistics is None and not selects
  return _CHUNK if is_light else 1


def merge(
  rule: LeafRule,
  base: PyTree,
  models: Sequence[PyTree],
  weights: Any = None,
  *,
  options: dict[str, Any] | None = None,
  key: Array | None = None,
  select: str | Callable[[str], bool] | None = None,
  dtype: Any = None,
  allow_nonfinite: bool = False,
  names: Sequence[str] | None = None,
  statistics: Sequence[Any] | None = None,
) -> PyTree:
  """Merges a list of models; the same bits as the streamed method.

  Each leaf takes one kernel that reads every model once.

  Args:
    rule: The rule.
    base: The base, see `MergeMethod`.
    models: The models.
    weights: One value for each model, or an array; each may be a scalar, a
      prefix of the tree, or a mapping from regular expressions.
    options: See `leafwise_method`, as those that follow.
    key: PRNG key.
    select: Leaves to merge.
    dtype: Dtype of the result.
    allow_nonfinite: Whether NaN and infinity are let through.
    names: What messages call the base and the models.
    statistics: One entry for each model, for a rule that needs them.

  Returns:
    The merged parameters.

  Raises:
    TreeMismatchError: If a model differs from the base.
    ValueError: If there are no models, or a value is missing or out of range.
  """
  models = _method.check_models(models)
  count = len(models)
  if names is None:
    names = ["base", *(f"model {i}" for i in range(count))]
  parts = _leaves.take_apart(
    base,
    models,
    weights,
    select=select,
    allow_nonfinite=True,
    names=names,
  )
  merged, bases = parts.merged, parts.bases
  _values.check_key(key)
  values = _leaves.resolve(options or {}, base, merged, rule.derive, count)
  # What is not finite is found in the result, unless values are not known, or
  # marks had to be stored between kernels.
  knows = not any(
    _values.is_traced(one) for one in jax.tree.leaves([base, *models])
  )
  chunk = _chunk_size(rule, key)
  looks = knows and (rule.spreads or count <= chunk) and not allow_nonfinite
  if not allow_nonfinite and not looks:
    _leaves.check_finite([base, *models], names, merged)
  if looks and not rule.spreads:
    rule = _marking(rule)
  noun = "statistics" if rule.statistics is None else rule.statistics.noun
  found = [
    _read(
      rule,
      one,
      base,
      merged,
      (names[0], f"{noun} {i}"),
      allow_nonfinite,
    )
    for i, one in enumerate(_method.per_model_statistics(statistics, count))
  ]
  prepared: list[Any] = [None] * count
  if rule.prepare is not None:
    prepared = [
      _prepare(
        rule,
        bases,
        [leaves[i] for leaves in parts.models],
        values,
        np.int32(i),
        found[i],
      )
      for i in range(count)
    ]
  zero = np.float32(0)
  # For each leaf the models by the batch, mostly one.
  batches = [
    [
      _Batch(
        leaves[first : first + chunk],
        weight[first : first + chunk],
        np.int32(first),
        key,
        leaf.seed,
        one,
        prepared[first : first + chunk],
        [entries[place] for entries in found[first : first + chunk]],
      )
      for first in range(0, count, chunk)
    ]
    for place, (leaf, leaves, weight, one) in enumerate(
      zip(merged, parts.models, parts.weights, values, strict=True)
    )
  ]
  dtypes = [_leaves.result_dtype(one, dtype) for one in bases]
  total: Any = None
  if count <= chunk and chunk > 1:
    if rule.summarize is not None:
      total = sum(
        _summarize_all(rule, one, zero, batch)
        for one, (batch,) in zip(bases, batches, strict=True)
      )
    results = [
      _merge_all(rule, one, zero, batch, total, result)
      for one, (batch,), result in zip(bases, batches, dtypes, strict=True)
    ]
  else:
    # What is differentiated may need the accumulator again.
    inputs = (base, models, parts.weights, values, found, key)
    is_traced = any(_values.is_traced(one) for one in jax.tree.leaves(inputs))
    advance = _advance if is_traced else _advance_in_place
    accumulators = []
    for one, (first, *others) in zip(bases, batches, strict=True):
      if chunk == 1:
        accumulator = _advance(rule, _start(rule, one, zero), one, first)
      else:
        accumulator = _begin(rule, one, zero, first)
      for batch in others:
        accumulator = advance(rule, accumulator, one, batch)
      accumulators.append(accumulator)
    if rule.summarize is not None:
      total = sum(_summarize(rule, one) for one in accumulators)
    results = [
      _finish(
        rule, accumulator, one, batch.values, total, np.int32(count), kind
      )
      for accumulator, one, (batch, *_), kind in zip(
        accumulators, bases, batches, dtypes, strict=True
      )
    ]
  if looks and not _leaves.are_finite(results):
    _leaves.check_finite([base, *models], names, merged)
  return _leaves.rebuild(base, merged, results, dtype)
