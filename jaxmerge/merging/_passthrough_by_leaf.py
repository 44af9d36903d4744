"""Passthrough of checkpoints that are read leaf by leaf."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from jaxmerge import tree
from jaxmerge.merging import _lazy, _leaves, _passthrough

PyTree = Any
Array = jax.Array


def _wait(name: str, leaf: Any, owner: str) -> Any:
  """A leaf that is read when it is asked for."""
  if not hasattr(leaf, "shape"):
    return leaf
  read = functools.partial(_lazy.read_leaf, leaf, name, owner)
  return _lazy.LazyLeaf(tuple(leaf.shape), leaf.dtype, read)


def leaves(
  models: Sequence[PyTree],
  slices: Sequence[Any],
  *,
  allow_nonfinite: bool = False,
  dtype: Any = None,
  **options: Any,
) -> Iterator[tuple[str, Array]]:
  """Reads the leaves of the stacked layers, each when it is asked for.

  Args:
    models: See `passthrough`.
    slices: Likewise.
    allow_nonfinite: Likewise.
    dtype: Likewise.
    **options: Likewise.

  Returns:
    Iterator of the name and value of each leaf of the result.
  """
  unread = [
    tree.map_with_name(functools.partial(_wait, owner=f"model {i}"), params)
    for i, params in enumerate(models)
  ]
  # The layers are renamed, and nothing is read.
  result = _passthrough.passthrough(
    unread, slices, allow_nonfinite=True, **options
  )
  names = tree.leaf_names(result)
  _lazy.check_names(names)

  def values() -> Iterator[tuple[str, Array]]:
    for name, leaf in zip(names, jax.tree.leaves(result), strict=True):
      value = {name: leaf.read() if isinstance(leaf, _lazy.LazyLeaf) else leaf}
      if not allow_nonfinite:
        merged = _leaves.merged_leaves(value, None)
        _leaves.check_finite([value], ["the result"], merged)
      yield name, _leaves.rebuild(value, [], [], dtype)[name]

  return values()
