"""Splitting a tree in two, and putting it together again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.tree import _check, _names

PyTree = Any


def _is_none(leaf: Any) -> bool:
  return leaf is None


def is_float(leaf: Any) -> bool:
  """Whether a leaf holds floating-point numbers, real or complex.

  Arrays of any framework with a shape and a dtype count, and so do tracers,
  ``jax.ShapeDtypeStruct`` and Python floats. Integers, booleans, PRNG keys,
  ``None``, strings and functions do not.

  Args:
    leaf: Anything.

  Returns:
    True for a floating-point leaf.

  >>> is_float(1.0), is_float(1), is_float(None)
  (True, False, False)
  """
  dtype = _check.leaf_dtype(leaf)
  return dtype is not None and bool(jnp.issubdtype(dtype, jnp.inexact))


def partition(
  tree: PyTree, predicate: Callable[[Any], bool] | PyTree = is_float
) -> tuple[PyTree, PyTree]:
  """Splits a tree into the leaves that are selected and the rest.

  Both parts have the containers of ``tree``, with ``None`` in the holes, so
  that ``combine(*partition(tree))`` is ``tree``. Leaves are not copied.

  Args:
    tree: Any pytree; it may contain ``None``.
    predicate: A function from a leaf to a bool, or a mask: a tree of Python
      bools of the same structure, such as `select` returns.

  Returns:
    The selected part and the rest.

  Raises:
    TreeMismatchError: If the mask has another structure than the tree.

  >>> partition({"step": 3, "w": 0.5})
  ({'step': None, 'w': 0.5}, {'step': 3, 'w': None})
  """
  treedef: Any = jax.tree.structure(tree)
  leaves = jax.tree.leaves(tree)
  flags = jax.tree.leaves(predicate)
  # A module with bools as leaves may be callable and is a mask nonetheless.
  is_mask = all(isinstance(flag, bool) for flag in flags)
  if callable(predicate) and not (flags and is_mask):
    flags = [bool(predicate(leaf)) for leaf in leaves]
  elif not is_mask:
    raise ValueError(
      "predicate must be a function of a leaf or a tree of Python bools; got"
      f" {predicate!r}"
    )
  elif treedef != jax.tree.structure(predicate):
    # Shapes are left out: a flag stands for a whole leaf.
    _check.check_match(
      treedef.unflatten([0] * len(leaves)),
      jax.tree.map(lambda _: 0, predicate),
      names=["tree", "mask"],
    )
  pairs = list(zip(leaves, flags, strict=True))
  selected = treedef.unflatten(leaf if flag else None for leaf, flag in pairs)
  rest = treedef.unflatten(None if flag else leaf for leaf, flag in pairs)
  return selected, rest


def combine(selected: PyTree, rest: PyTree) -> PyTree:
  """Puts the two parts of a partitioned tree together.

  Args:
    selected: A tree with ``None`` in the holes.
    rest: The tree with the leaves that fill these holes. Where both have
      ``None``, the result has ``None``.

  Returns:
    The tree with the leaves of both.

  Raises:
    TreeMismatchError: If the containers differ.
    ValueError: If both have a leaf at the same place.

  >>> combine({"step": None, "w": 0.5}, {"step": 3, "w": None})
  {'step': 3, 'w': 0.5}
  """
  treedef: Any = jax.tree.structure(selected, is_leaf=_is_none)
  other_treedef: Any = jax.tree.structure(rest, is_leaf=_is_none)
  leaves = jax.tree.leaves(selected, is_leaf=_is_none)
  others = jax.tree.leaves(rest, is_leaf=_is_none)
  if treedef != other_treedef:
    # None is made a leaf, so that the message names a real difference.
    _check.check_match(
      treedef.unflatten([0] * len(leaves)),
      other_treedef.unflatten([0] * len(others)),
      names=["selected", "rest"],
    )
  for i, (leaf, other) in enumerate(zip(leaves, others, strict=True)):
    if leaf is not None and other is not None:
      name = _names.leaf_names(treedef.unflatten(range(len(leaves))))[i]
      raise ValueError(
        f"leaf '{name}' is in both parts; combine takes the two parts that"
        " partition returned"
      )
  return treedef.unflatten(
    other if leaf is None else leaf
    for leaf, other in zip(leaves, others, strict=True)
  )
