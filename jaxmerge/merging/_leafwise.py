"""Merge methods that are made of a rule for one leaf."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree
from jaxmerge.merging import _method, _values

PyTree = Any
Array = jax.Array

# So many models are merged by one kernel. A kernel is compiled for each number
# of models, and one of too many inputs takes long to compile.
_CHUNK = 16


class MergeOptions(TypedDict, total=False):
  """Options of every method.

  Attributes:
    select: Regular expression (`re.search`) or predicate of the names of the
      leaves that are merged; the others are those of the base. By default all
      floating-point leaves are merged.
    dtype: Dtype of the floating-point leaves of the result; by default each
      has that of the base.
    allow_nonfinite: Whether NaN and infinity are let through. By default they
      are an error that names the leaf, except within a transformation, where
      values are not known.
  """

  select: str | Callable[[str], bool] | None
  dtype: Any
  allow_nonfinite: bool


class Step(NamedTuple):
  """What a rule is told of one model.

  Attributes:
    weight: The model's weight for this leaf, a scalar.
    key: PRNG key of this model and leaf; None without a key.
    values: The options' values for this model and leaf, scalars by name.
    statistics: What `LeafRule.prepare` found in the whole model, or None.
  """

  weight: Array
  key: Array | None
  values: dict[str, Array]
  statistics: Any


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
    prepare: `prepare(bases, leaves, values) -> statistics` of a whole model,
      from all its leaves; None for a rule that treats each leaf alone.
    summarize: `summarize(accumulator) -> scalar`, summed over the leaves to
      the `total` that `finalize` is given; None likewise.
  """

  init: Callable[[Array, Array], Any]
  update: Callable[[Any, Array, Array, Step], Any]
  finalize: Callable[[Any, Array, dict[str, Array], Array | None], Array]
  derive: Callable[[dict[str, Any], int, int], dict[str, Any]] | None = None
  prepare: (
    Callable[[list[Array], list[Array], list[dict[str, Array]]], Any] | None
  ) = None
  summarize: Callable[[Any], Array] | None = None


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


class _Leaf(NamedTuple):
  """A leaf that is merged: its place among all leaves, and its name."""

  place: int
  name: str
  seed: np.uint32


def widen(leaf: Any) -> Array:
  """A leaf in the dtype that it is computed in."""
  return jnp.asarray(leaf).astype(tree.accumulation_dtype(leaf))


def _pick(values: dict[str, Array], index: Array) -> dict[str, Array]:
  """One model's values: those with an axis are of one value a model."""
  return {
    name: value[index] if value.ndim else value
    for name, value in values.items()
  }


@functools.partial(jax.jit, static_argnames="rule")
def _start(rule: LeafRule, base: Array, zero: Array) -> Any:
  base = widen(base)
  return rule.init(base, zero.astype(base.dtype))


def _updates(
  rule: LeafRule,
  accumulator: Any,
  base: Array,
  leaves: Sequence[Array],
  weights: Array,
  index: Array,
  key: Array | None,
  values: dict[str, Array],
  statistics: Sequence[Any],
) -> Any:
  for i, leaf in enumerate(leaves):
    step = Step(
      weight=weights[i].astype(base.dtype),
      key=None if key is None else jax.random.fold_in(key, index + i),
      values=_pick(values, index + i),
      statistics=statistics[i],
    )
    accumulator = rule.update(accumulator, base, widen(leaf), step)
  return accumulator


@functools.partial(jax.jit, static_argnames="rule")
def _advance(
  rule: LeafRule,
  accumulator: Any,
  base: Array,
  leaves: Sequence[Array],
  weights: Array,
  index: Array,
  key: Array | None,
  seed: Array,
  values: dict[str, Array],
  statistics: Sequence[Any],
) -> Any:
  key = None if key is None else jax.random.fold_in(key, seed)
  return _updates(
    rule,
    accumulator,
    widen(base),
    leaves,
    weights,
    index,
    key,
    values,
    statistics,
  )


@functools.partial(jax.jit, static_argnames=("rule", "dtype"))
def _finish(
  rule: LeafRule,
  accumulator: Any,
  base: Array,
  values: dict[str, Array],
  total: Array | None,
  count: Array,
  dtype: Any,
) -> Array:
  wide = widen(base)
  merged = rule.finalize(accumulator, wide, values, total)
  return jnp.where(count == 0, wide, merged).astype(dtype)


@functools.partial(jax.jit, static_argnames=("rule", "dtype"))
def _merge_leaf(
  rule: LeafRule,
  base: Array,
  leaves: Sequence[Array],
  weights: Array,
  key: Array | None,
  seed: Array,
  values: dict[str, Array],
  statistics: Sequence[Any],
  total: Array | None,
  zero: Array,
  dtype: Any,
) -> Array:
  """All at once: one kernel that reads each leaf once and keeps nothing."""
  wide = widen(base)
  accumulator = _updates(
    rule,
    rule.init(wide, zero.astype(wide.dtype)),
    wide,
    leaves,
    weights,
    jnp.int32(0),
    None if key is None else jax.random.fold_in(key, seed),
    values,
    statistics,
  )
  return rule.finalize(accumulator, wide, values, total).astype(dtype)


@functools.partial(jax.jit, static_argnames="rule")
def _prepare(
  rule: LeafRule,
  bases: list[Array],
  leaves: list[Array],
  values: list[dict[str, Array]],
  index: Array,
) -> Any:
  assert rule.prepare is not None
  return rule.prepare(
    [widen(base) for base in bases],
    [widen(leaf) for leaf in leaves],
    [_pick(one, index) for one in values],
  )


@functools.partial(jax.jit, static_argnames="rule")
def _summarize(rule: LeafRule, accumulator: Any) -> Array:
  assert rule.summarize is not None
  return rule.summarize(accumulator)


@functools.partial(jax.jit, static_argnames="rule")
def _summarize_models(
  rule: LeafRule,
  base: Array,
  leaves: Sequence[Array],
  weights: Array,
  key: Array | None,
  seed: Array,
  values: dict[str, Array],
  statistics: Sequence[Any],
  zero: Array,
) -> Array:
  """The summary of all models without storing the accumulator."""
  assert rule.summarize is not None
  wide = widen(base)
  return rule.summarize(
    _updates(
      rule,
      rule.init(wide, zero.astype(wide.dtype)),
      wide,
      leaves,
      weights,
      jnp.int32(0),
      None if key is None else jax.random.fold_in(key, seed),
      values,
      statistics,
    )
  )


@jax.jit
def _all_finite(leaf: Array) -> Array:
  return jnp.isfinite(leaf).all()


def merged_leaves(
  base: PyTree, pattern: str | Callable[[str], bool] | None
) -> list[_Leaf]:
  """The leaves that are floating-point and selected."""
  names = tree.leaf_names(base)
  leaves = jax.tree.leaves(base)
  chosen = [True] * len(names)
  if pattern is not None:
    chosen = jax.tree.leaves(tree.select(base, pattern))
  return [
    # Not hash(), which differs from process to process.
    _Leaf(place, name, np.uint32(zlib.crc32(name.encode())))
    for place, name in enumerate(names)
    if chosen[place] and tree.is_float(leaves[place])
  ]


def check_finite(
  trees: Sequence[PyTree], names: Sequence[str], merged: Sequence[_Leaf]
) -> None:
  """Raises for NaN or infinity in a leaf that is merged, unless traced."""
  flags = []
  for params, name in zip(trees, names, strict=True):
    leaves = jax.tree.leaves(params)
    for leaf in merged:
      value = leaves[leaf.place]
      if not _values.is_traced(value) and np.size(value):
        # A known array that a traced function closes over is known still.
        with jax.ensure_compile_time_eval():
          flags.append((_all_finite(value), leaf.name, name))
  for flag, leaf_name, name in flags:
    if not flag:
      raise ValueError(
        f"leaf '{leaf_name}' of {name} holds NaN or infinity; mend it, or let"
        " it through with allow_nonfinite=True"
      )


def resolve(
  options: dict[str, Any],
  base: PyTree,
  merged: Sequence[_Leaf],
  derive: Callable[[dict[str, Any], int, int], dict[str, Any]] | None = None,
) -> list[dict[str, Array]]:
  """The options' values for every merged leaf."""
  leaves = jax.tree.leaves(base)
  sizes = [int(np.size(leaves[leaf.place])) for leaf in merged]
  found: list[dict[str, Any]] = [{} for _ in merged]
  for name, value in options.items():
    if isinstance(value, (jax.Array, np.ndarray)) and np.ndim(value):
      value = _values.per_model(value, len(value), name)
    if isinstance(value, (list, tuple)):
      columns = [_values.per_leaf(one, base, name) for one in value]
      for one, leaf in zip(found, merged, strict=True):
        one[name] = [column[leaf.place] for column in columns]
    else:
      column = _values.per_leaf(value, base, name)
      for one, leaf in zip(found, merged, strict=True):
        one[name] = column[leaf.place]
  if derive is not None:
    found = [
      derive(one, size, sum(sizes))
      for one, size in zip(found, sizes, strict=True)
    ]
  return [
    {name: _as_array(value) for name, value in one.items()} for one in found
  ]


def _as_array(value: Any) -> Array:
  if isinstance(value, list):
    return jnp.stack([jnp.asarray(one) for one in value])
  return jnp.asarray(value)


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
    merged = merged_leaves(base, select)
    if not allow_nonfinite:
      check_finite([base], ["base"], merged)
    leaves = jax.tree.leaves(base)
    return LeafwiseState(
      base=base,
      accumulators=[
        _start(rule, leaves[leaf.place], np.float32(0)) for leaf in merged
      ],
      values=resolve(options or {}, base, merged, rule.derive),
      num_models=jnp.zeros((), jnp.int32),
    )

  def update(
    state: LeafwiseState, params: PyTree, weight: Any = 1.0
  ) -> LeafwiseState:
    tree.check_match(state.base, params, names=["base", "params"])
    merged = merged_leaves(state.base, select)
    if not allow_nonfinite:
      check_finite([params], ["params"], merged)
    weights = _values.per_leaf(weight, state.base, "weight")
    bases, leaves = jax.tree.leaves(state.base), jax.tree.leaves(params)
    statistics = None
    if rule.prepare is not None:
      statistics = _prepare(
        rule,
        [bases[leaf.place] for leaf in merged],
        [leaves[leaf.place] for leaf in merged],
        state.values,
        state.num_models,
      )
    accumulators = [
      _advance(
        rule,
        accumulator,
        bases[leaf.place],
        (leaves[leaf.place],),
        stack([weights[leaf.place]]),
        state.num_models,
        key,
        leaf.seed,
        values,
        (statistics,),
      )
      for leaf, accumulator, values in zip(
        merged, state.accumulators, state.values, strict=True
      )
    ]
    return state._replace(
      accumulators=accumulators, num_models=state.num_models + 1
    )

  def finalize(state: LeafwiseState) -> PyTree:
    merged = merged_leaves(state.base, select)
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
        result_dtype(bases[leaf.place], dtype),
      )
      for leaf, accumulator, values in zip(
        merged, state.accumulators, state.values, strict=True
      )
    ]
    return rebuild(state.base, merged, results, dtype)

  return _method.MergeMethod(init, update, finalize)


def result_dtype(leaf: Any, dtype: Any) -> np.dtype:
  """The dtype of a merged leaf: the one asked for, or its own."""
  return np.dtype(jnp.asarray(leaf).dtype if dtype is None else dtype)


def rebuild(
  base: PyTree, merged: Sequence[_Leaf], results: Sequence[Array], dtype: Any
) -> PyTree:
  """The base with the merged leaves in their places."""
  treedef: Any = jax.tree.structure(base)
  leaves = jax.tree.leaves(base)
  if dtype is not None:
    leaves = [
      jnp.asarray(leaf).astype(dtype) if tree.is_float(leaf) else leaf
      for leaf in leaves
    ]
  for leaf, result in zip(merged, results, strict=True):
    leaves[leaf.place] = result
  return treedef.unflatten(leaves)


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

  Returns:
    The merged parameters.

  Raises:
    TreeMismatchError: If a model differs from the base.
    ValueError: If there are no models, or a value is missing or out of range.
  """
  models = _method.check_models(models)
  if names is None:
    names = ["base", *(f"model {i}" for i in range(len(models)))]
  tree.check_match(base, *models, names=names)
  entries = _values.per_model(
    1.0 if weights is None else weights, len(models), "weights"
  )
  per_leaf = [
    _values.per_leaf(entry, base, f"weight {i}")
    for i, entry in enumerate(entries)
  ]
  merged = merged_leaves(base, select)
  values = resolve(options or {}, base, merged, rule.derive)
  if not allow_nonfinite:
    check_finite([base, *models], names, merged)
  bases = jax.tree.leaves(base)
  all_leaves = [jax.tree.leaves(params) for params in models]
  statistics: list[Any] = [None] * len(models)
  if rule.prepare is not None:
    statistics = [
      _prepare(
        rule,
        [bases[leaf.place] for leaf in merged],
        [leaves[leaf.place] for leaf in merged],
        values,
        np.int32(i),
      )
      for i, leaves in enumerate(all_leaves)
    ]
  zero = np.float32(0)
  inputs = [
    (
      [leaves[leaf.place] for leaves in all_leaves],
      stack([column[leaf.place] for column in per_leaf]),
    )
    for leaf in merged
  ]
  dtypes = [result_dtype(bases[leaf.place], dtype) for leaf in merged]
  total: Any = None
  if len(models) <= _CHUNK:
    if rule.summarize is not None:
      total = sum(
        _summarize_models(
          rule,
          bases[leaf.place],
          leaves,
          scalars,
          key,
          leaf.seed,
          one,
          statistics,
          zero,
        )
        for leaf, (leaves, scalars), one in zip(
          merged, inputs, values, strict=True
        )
      )
    results = [
      _merge_leaf(
        rule,
        bases[leaf.place],
        leaves,
        scalars,
        key,
        leaf.seed,
        one,
        statistics,
        total,
        zero,
        result_dtype,
      )
      for leaf, (leaves, scalars), one, result_dtype in zip(
        merged, inputs, values, dtypes, strict=True
      )
    ]
    return rebuild(base, merged, results, dtype)
  accumulators = []
  for leaf, (leaves, scalars), one in zip(merged, inputs, values, strict=True):
    accumulator = _start(rule, bases[leaf.place], zero)
    for first in range(0, len(models), _CHUNK):
      chunk = slice(first, first + _CHUNK)
      accumulator = _advance(
        rule,
        accumulator,
        bases[leaf.place],
        leaves[chunk],
        scalars[chunk],
        np.int32(first),
        key,
        leaf.seed,
        one,
        statistics[chunk],
      )
    accumulators.append(accumulator)
  if rule.summarize is not None:
    total = sum(_summarize(rule, one) for one in accumulators)
  results = [
    _finish(
      rule,
      accumulator,
      bases[leaf.place],
      one,
      total,
      np.int32(len(models)),
      result_dtype,
    )
    for leaf, accumulator, one, result_dtype in zip(
      merged, accumulators, values, dtypes, strict=True
    )
  ]
  return rebuild(base, merged, results, dtype)


def stack(scalars: Sequence[Any]) -> Any:
  """One array of scalars, on the host unless one is on a device."""
  dtype = jnp.result_type(float)
  if any(isinstance(scalar, jax.Array) for scalar in scalars):
    return jnp.stack([jnp.asarray(scalar, dtype) for scalar in scalars])
  return np.array(scalars, dtype)
