"""The check that trees have the same structure, shapes and dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.tree import _names

PyTree = Any


def leaf_dtype(leaf: Any) -> Any:
  """The dtype of a leaf as JAX sees it, or None for what is not an array."""
  # ShapeDtypeStructs, tracers, PRNG keys and NumPy arrays all have a dtype.
  if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
    dtype = leaf.dtype
  elif isinstance(leaf, (bool, int, float, complex)):
    dtype = jnp.result_type(type(leaf))
  else:
    return None
  if jnp.issubdtype(dtype, jax.dtypes.extended):
    return dtype
  # NumPy's float64 and int64 become 32 bits wide unless x64 is enabled.
  return jax.dtypes.canonicalize_dtype(dtype)


def _shape(leaf: Any) -> tuple[int, ...]:
  return tuple(getattr(leaf, "shape", ()))


def _kind(leaf: Any) -> str:
  dtype = leaf_dtype(leaf)
  return type(leaf).__name__ if dtype is None else str(dtype)


def _structure_message(
  reference: PyTree, other: PyTree, name: str, other_name: str
) -> str:
  names = _names.leaf_names(reference)
  other_names = _names.leaf_names(other)
  for one, two, one_name, two_name in (
    (names, other_names, name, other_name),
    (other_names, names, other_name, name),
  ):
    known = set(two)
    for leaf_name in one:
      if leaf_name not in known:
        return (
          f"leaf '{leaf_name}' is in {one_name} but missing from {two_name};"
          " give trees of one architecture, or pass only the part that both"
          " have"
        )
  return (
    f"{name} and {other_name} have the same leaf names but other containers:"
    f" {jax.tree.structure(reference)} and {jax.tree.structure(other)};"
    " convert one of them, for example with"
    " jax.tree.unflatten(jax.tree.structure(reference),"
    " jax.tree.leaves(other))"
  )


def check_match(
  reference: PyTree,
  *others: PyTree,
  names: Sequence[str] | None = None,
  check_dtype: bool = True,
) -> None:
  """Raises unless all trees have one structure and equal shapes and dtypes.

  Only the shapes and dtypes of the leaves are read, so that tracers and
  ``jax.ShapeDtypeStruct`` leaves are as good as arrays. Python scalars count
  as arrays of shape ``()`` with JAX's default dtype; leaves that are not
  arrays at all (functions, strings) are compared by type. ``None`` is an
  empty node.

  Args:
    reference: The tree that the others are compared with.
    *others: Trees to be checked.
    names: What the message calls the trees, the reference first; by default
      "reference", "tree 1", "tree 2" and so on.
    check_dtype: Whether dtypes are compared as well.

  Raises:
    TreeMismatchError: At the first difference. The message has the name of
      the leaf, both sides and the remedy.

  >>> check_match({"w": 1.0}, {"w": 2.0})
  >>> check_match({"w": 1.0}, {"w": 2}, names=["A", "B"])
  Traceback (most recent call last):
    ...
  jaxmerge.tree._check.TreeMismatchError: leaf 'w' has dtype float32 in A but \
int32 in B; cast one of them with leaf.astype(...)
  """
  if names is None:
    names = ["reference", *(f"tree {i + 1}" for i in range(len(others)))]
  if len(names) != len(others) + 1:
    raise ValueError(
      f"names has {len(names)} entries for {len(others) + 1} trees; give one"
      " name for each tree, the reference first"
    )
  treedef: Any = jax.tree.structure(reference)
  leaves = jax.tree.leaves(reference)
  for other, other_name in zip(others, names[1:], strict=True):
    other_leaves = jax.tree.leaves(other)
    if treedef != jax.tree.structure(other):
      raise TreeMismatchError(
        _structure_message(reference, other, names[0], other_name)
      )
    for i, (leaf, other_leaf) in enumerate(
      zip(leaves, other_leaves, strict=True)
    ):
      if _shape(leaf) != _shape(other_leaf):
        raise TreeMismatchError(
          f"leaf '{_names.leaf_names(reference)[i]}' has shape {_shape(leaf)}"
          f" in {names[0]} but {_shape(other_leaf)} in {other_name}; give"
          " trees of one architecture and size"
        )
      if check_dtype and _kind(leaf) != _kind(other_leaf):
        raise TreeMismatchError(
          f"leaf '{_names.leaf_names(reference)[i]}' has dtype {_kind(leaf)}"
          f" in {names[0]} but {_kind(other_leaf)} in {other_name}; cast one"
          " of them with leaf.astype(...)"
        )


class TreeMismatchError(ValueError):
  """Two trees differ in structure, in a leaf's shape or in a leaf's dtype."""
