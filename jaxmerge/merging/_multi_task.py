"""What the methods share that compare each model with the merged ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree
from jaxmerge.merging import (
  _combine,
  _leafwise,
  _leaves,
  _sparsify,
  _task_vectors,
)

PyTree = Any
Array = jax.Array


@functools.cache
def vector_rule(
  combiner: _combine.Combiner, sparsifier: _sparsify.Sparsifier | None = None
) -> _leafwise.LeafRule:
  """The rule of a merged task vector that is not added to the base."""

  def finalize(
    accumulator: Any, base: Array, values: Any, total: Array | None
  ) -> Array:
    del base, values
    return combiner.finalize(accumulator, total)

  rule = _task_vectors.task_vector_rule(combiner, sparsifier)
  return rule._replace(finalize=finalize)


def multi_task_vector(
  base: PyTree,
  models: Sequence[PyTree],
  weights: Any,
  rule: _leafwise.LeafRule,
  *,
  options: dict[str, Any] | None = None,
  select: str | Callable[[str], bool] | None = None,
  allow_nonfinite: bool = False,
) -> list[Array]:
  """The merged task vector, not yet added to the base nor rounded.

  Args:
    base: The base.
    models: The models.
    weights: One for each model, or None.
    rule: What merges the task vectors; see `vector_rule`.
    options: Values by name, those of the rule.
    select: See `MergeOptions`, as the other.
    allow_nonfinite: Whether NaN and infinity are let through.

  Returns:
    One array for each merged leaf, in the dtype that the leaf is computed in.

  Raises:
    TreeMismatchError: If a model differs from the base.
    ValueError: As `_leafwise.merge`.
  """
  merged = _leaves.merged_leaves(base, select)
  leaves = jax.tree.leaves(base)
  dtypes = [tree.accumulation_dtype(leaves[leaf.place]) for leaf in merged]
  vector = _leafwise.merge(
    rule,
    base,
    models,
    weights,
    options=options,
    select=select,
    dtype=np.result_type(np.float32, *dtypes),
    allow_nonfinite=allow_nonfinite,
  )
  leaves = jax.tree.leaves(vector)
  return [
    leaves[leaf.place].astype(dtype)
    for leaf, dtype in zip(merged, dtypes, strict=True)
  ]


def shaped_like(leaf: Any, dtype: Any) -> Array:
  """Zeros of the shape of a leaf, which may be a PRNG key or no array."""
  return jnp.zeros(getattr(leaf, "shape", ()), dtype)


def place_leaves(
  base: PyTree, merged: Sequence[Any], results: Sequence[Array], dtype: Any
) -> PyTree:
  """A tree of the merged leaves' results, and zeros for the other leaves."""
  treedef: Any = jax.tree.structure(base)
  found = {
    leaf.place: result for leaf, result in zip(merged, results, strict=True)
  }
  return treedef.unflatten(
    found[place] if place in found else shaped_like(leaf, dtype)
    for place, leaf in enumerate(jax.tree.leaves(base))
  )
