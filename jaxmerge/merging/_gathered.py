"""Merge methods that need all models at once, leaf by leaf."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree
from jaxmerge.merging import _leaves, _method

PyTree = Any
Array = jax.Array


class GatherRule(NamedTuple):
  """How one floating-point leaf is merged; half types come as float32.

  Attributes:
    merge: `merge(base, leaves, weights, values) -> leaf`, with the weights
      `[n]` and the options' values for the leaf, scalars by name.
    min_models: The least number of models.
    max_models: The largest number of models; None for any.
  """

  merge: Callable[[Array, Sequence[Array], Array, dict[str, Array]], Array]
  min_models: int = 1
  max_models: int | None = None


class MergeFn(Protocol):
  """``merge(base, models, weights=weights) -> params``."""

  def __call__(
    self, base: PyTree, models: Sequence[PyTree], *, weights: Any
  ) -> PyTree:
    """Returns the merge of a list of models."""


class GatheredState(NamedTuple):
  """State of a method that needs all models: it keeps them.

  Attributes:
    base: The tree that ``init`` was given.
    models: The models so far.
    weights: Their weights.
  """

  base: PyTree
  models: tuple[PyTree, ...]
  weights: tuple[Any, ...]


@functools.partial(jax.jit, static_argnames=("rule", "dtype"))
def _merge_leaf(
  rule: GatherRule,
  base: Array,
  leaves: Sequence[Array],
  weights: Array,
  values: dict[str, Array],
  dtype: Any,
) -> Array:
  wide = _leaves.widen(base)
  return rule.merge(
    wide,
    [_leaves.widen(leaf) for leaf in leaves],
    weights.astype(wide.dtype),
    values,
  ).astype(dtype)


def gathering_method(
  merge_fn: MergeFn, **options: Unpack[_leaves.MergeOptions]
) -> _method.MergeMethod:
  """Makes a method of a function of a list: it keeps the models.

  Its state grows with the number of models; leaf by leaf, it is small.

  Args:
    merge_fn: The function, with its options bound, the shared ones too.
    **options: See `MergeOptions`.

  Returns:
    The method; its state is a `GatheredState`.
  """

  def check(params: PyTree, name: str, base: PyTree) -> None:
    if not options.get("allow_nonfinite", False):
      merged = _leaves.merged_leaves(base, options.get("select"))
      _leaves.check_finite([params], [name], merged)

  def init(base: PyTree) -> GatheredState:
    check(base, "base", base)
    return GatheredState(base, (), ())

  def update(
    state: GatheredState,
    params: PyTree,
    weight: Any = 1.0,
    statistics: Any = None,
    *,
    donate: bool = False,
  ) -> GatheredState:
    # The state holds the models as they are given: nothing to take over.
    del donate
    _method.check_no_statistics(statistics)
    tree.check_match(state.base, params, names=["base", "params"])
    check(params, "params", state.base)
    return GatheredState(
      state.base, (*state.models, params), (*state.weights, weight)
    )

  def finalize(state: GatheredState) -> PyTree:
    if not state.models:
      return _leaves.rebuild(state.base, [], [], options.get("dtype"))
    return merge_fn(state.base, state.models, weights=state.weights)

  return _method.MergeMethod(init, update, finalize)


def gathered_method(
  rule: GatherRule,
  name: str,
  *,
  options: dict[str, Any] | None = None,
  **shared: Unpack[_leaves.MergeOptions],
) -> _method.MergeMethod:
  """Makes a method of a rule that needs all models.

  Args:
    rule: The rule.
    name: What messages call it.
    options: Values by name: a scalar, a prefix of the tree or a mapping from
      regular expressions.
    **shared: See `MergeOptions`.

  Returns:
    The method; its state is a `GatheredState`.
  """
  merge_fn = functools.partial(merge, rule, name, options=options, **shared)
  return gathering_method(merge_fn, **shared)


def merge(
  rule: GatherRule,
  name: str,
  base: PyTree,
  models: Sequence[PyTree],
  weights: Any = None,
  *,
  options: dict[str, Any] | None = None,
  names: Sequence[str] | None = None,
  select: str | Callable[[str], bool] | None = None,
  dtype: Any = None,
  allow_nonfinite: bool = False,
) -> PyTree:
  """Merges a list of models by a rule that needs them all.

  Args:
    rule: The rule.
    name: What messages call it.
    base: The base, see `MergeMethod`.
    models: The models.
    weights: See `_leaves.merge`, as the rest.
    options: Values by name.
    names: What messages call the base and the models.
    select: Leaves to merge.
    dtype: Dtype of the result.
    allow_nonfinite: Whether NaN and infinity are let through.

  Returns:
    The merged parameters.

  Raises:
    TreeMismatchError: If a model differs from the base.
    ValueError: If there are too few models or too many, or a value is missing
      or out of its range.
  """
  models = _method.check_models(models)
  _method.check_number(name, len(models), rule.min_models, rule.max_models)
  parts = _leaves.take_apart(
    base,
    models,
    weights,
    select=select,
    allow_nonfinite=allow_nonfinite,
    names=names,
  )
  values = _leaves.resolve(options or {}, base, parts.merged, per_model=False)
  results = []
  for one, leaves, weight, value in zip(
    parts.bases, parts.models, parts.weights, values, strict=True
  ):
    kind = _leaves.result_dtype(one, dtype)
    if np.size(one):
      results.append(_merge_leaf(rule, one, leaves, weight, value, kind))
    else:
      results.append(jnp.asarray(one).astype(kind))
  return _leaves.rebuild(base, parts.merged, results, dtype)
