"""What the statistics of data share: batches of examples, reductions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmerge import tree
from jaxmerge.merging import _sparsify

PyTree = Any
Array = jax.Array


def _is_array(leaf: Any) -> bool:
  return hasattr(leaf, "dtype") or isinstance(leaf, (bool, int, float, complex))


def split_arrays(params: PyTree) -> tuple[list[Any], Static]:
  """The arrays of a tree, and what is needed to put it together again."""
  leaves, treedef = jax.tree.flatten(params)
  flags = [_is_array(leaf) for leaf in leaves]
  others = tuple(
    None if flag else leaf for flag, leaf in zip(flags, leaves, strict=True)
  )
  arrays = [leaf for flag, leaf in zip(flags, leaves, strict=True) if flag]
  return arrays, Static(treedef, others)


def join_arrays(arrays: Sequence[Any], static: Static) -> PyTree:
  """The tree that was split."""
  rest = iter(arrays)
  return static.treedef.unflatten(
    next(rest) if other is None else other for other in static.others
  )


@jax.jit
def divide(sums: PyTree, count: Array) -> PyTree:
  """Sums over examples as means."""
  return jax.tree.map(lambda leaf: leaf / count.astype(leaf.dtype), sums)


def batch_size(batch: PyTree, number: int) -> int:
  """The number of examples in a batch, or an error that says what is wrong."""
  leaves = jax.tree.leaves(batch)
  names = tree.leaf_names(batch)
  if not leaves:
    raise ValueError(f"batch {number} holds no array")
  for leaf, name in zip(leaves, names, strict=True):
    if not np.ndim(leaf):
      raise ValueError(
        f"leaf '{name}' of batch {number} is a scalar; give arrays with a"
        " leading axis of examples"
      )
    if np.shape(leaf)[0] != np.shape(leaves[0])[0]:
      raise ValueError(
        f"leaf '{name}' of batch {number} has shape {np.shape(leaf)} but"
        f" '{names[0]}' has {np.shape(leaves[0])}; give all leaves one number"
        " of examples"
      )
  return int(np.shape(leaves[0])[0])


def check_reduction(reduction: str) -> None:
  """Raises unless the reduction over examples is known."""
  _sparsify.check_choice(reduction, "reduction", ("mean", "sum"))


def check_any(count: int) -> None:
  """Raises unless there was an example."""
  if not count:
    raise ValueError("batches hold no example; give at least one batch")


class Static(NamedTuple):
  """What of a tree is no array, so that the rest can be traced.

  Attributes:
    treedef: The structure.
    others: A leaf for each that is no array, None for each that is one.
  """

  treedef: Any
  others: tuple[Any, ...]
