"""Merge methods that need all models at once, leaf by leaf."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree
from jaxmerge.merging import _leafwise, _method, _values

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
  wide = _leafwise.widen(base)
  return rule.merge(
    wide,
    [_leafwise.widen(leaf) for leaf in leaves],
    weights.astype(wide.dtype),
    values,
  ).astype(dtype)


def _check_number(rule: GatherRule, name: str, number: int) -> None:
  if rule.min_models <= number <= (rule.max_models or number):
    return
  least = rule.min_models
  if rule.max_models == least:
    wanted = f"exactly {least}"
  elif rule.max_models is None:
    wanted = f"at least {least}"
  else:
    wanted = f"{least} to {rule.max_models}"
  raise ValueError(
    f"{name} takes {wanted} model{'s' * (wanted != 'exactly 1')}; got {number}"
  )


def gathered_method(
  rule: GatherRule,
  name: str,
  *,
  options: dict[str, Any] | None = None,
  **shared: Unpack[_leafwise.MergeOptions],
) -> _method.MergeMethod:
  """Makes a method of a rule that needs all models.

  Its state grows with the number of models; leaf by leaf, it is small.

  Args:
    rule: The rule.
    name: What messages call it.
    options: Values by name: a scalar, a prefix of the tree or a mapping from
      regular expressions.
    **shared: See `MergeOptions`.

  Returns:
    The method; its state is a `GatheredState`.
  """

  def init(base: PyTree) -> GatheredState:
    return GatheredState(base, (), ())

  def update(
    state: GatheredState, params: PyTree, weight: Any = 1.0
  ) -> GatheredState:
    tree.check_match(state.base, params, names=["base", "params"])
    return GatheredState(
      state.base, (*state.models, params), (*state.weights, weight)
    )

  def finalize(state: GatheredState) -> PyTree:
    if not state.models:
      return state.base
    return merge(
      rule,
      name,
      state.base,
      state.models,
      state.weights,
      options=options,
      **shared,
    )

  return _method.MergeMethod(init, update, finalize)


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
    weights: See `_leafwise.merge`, as the rest.
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
  _check_number(rule, name, len(models))
  if names is None:
    names = ["base", *(f"model {i}" for i in range(len(models)))]
  tree.check_match(base, *models, names=names)
  entries = _values.per_model(
    1.0 if weights is None else weights, len(models), "weights"
  )
  columns = [
    _values.per_leaf(entry, base, f"weight {i}")
    for i, entry in enumerate(entries)
  ]
  merged = _leafwise.merged_leaves(base, select)
  values = _leafwise.resolve(options or {}, base, merged)
  if not allow_nonfinite:
    _leafwise.check_finite([base, *models], names, merged)
  bases = jax.tree.leaves(base)
  all_leaves = [jax.tree.leaves(params) for params in models]
  results = [
    _merge_leaf(
      rule,
      bases[leaf.place],
      [leaves[leaf.place] for leaves in all_leaves],
      _leafwise.stack([column[leaf.place] for column in columns]),
      one,
      _leafwise.result_dtype(bases[leaf.place], dtype),
    )
    if np.size(bases[leaf.place])
    else jnp.asarray(bases[leaf.place]).astype(
      _leafwise.result_dtype(bases[leaf.place], dtype)
    )
    for leaf, one in zip(merged, values, strict=True)
  ]
  return _leafwise.rebuild(base, merged, results, dtype)
