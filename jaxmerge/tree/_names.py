"""Names of leaves, and the choice of leaves by name."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

PyTree = Any
KeyPath = tuple[Any, ...]


def _is_value(key: Any) -> bool:
  return isinstance(key, jax.tree_util.GetAttrKey) and key.name == "value"


def path_names(paths: Sequence[KeyPath], separator: str = "/") -> list[str]:
  """Names of the leaves at ``paths``, which are all the paths of one tree."""
  # A leaf of an nnx.State sits at `kernel.value`, where `value` is the box
  # and not a name. It is dropped where nothing else is in the same box.
  parents = collections.Counter(path[:-1] for path in paths)
  return [
    jax.tree_util.keystr(
      path[:-1]
      if len(path) > 1 and _is_value(path[-1]) and parents[path[:-1]] == 1
      else path,
      simple=True,
      separator=separator,
    )
    for path in paths
  ]


def leaf_names(tree: PyTree, separator: str = "/") -> list[str]:
  """Names of the leaves of a tree, in the order of ``jax.tree.leaves``.

  A leaf of an ``nnx.State`` gets the name of its variable: ``kernel``, not
  ``kernel/value``. A tree that is a single leaf has the name ``""``. ``None``
  is an empty node and has no name.

  Args:
    tree: Any pytree; the leaves are not looked at.
    separator: What stands between the keys of a path.

  Returns:
    One name for each leaf.

  >>> leaf_names({"Dense_0": {"kernel": 1.0, "bias": 2.0}})
  ['Dense_0/bias', 'Dense_0/kernel']
  """
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
  return path_names(paths, separator)


def map_with_name(
  fn: Callable[[str, Any], Any], tree: PyTree, separator: str = "/"
) -> PyTree:
  """Maps ``fn(name, leaf)`` over the leaves of a tree.

  Args:
    fn: Function of a leaf's name (see `leaf_names`) and the leaf.
    tree: Any pytree.
    separator: What stands between the keys of a path.

  Returns:
    A tree of the same structure with the results of ``fn`` as leaves.

  >>> map_with_name(lambda name, leaf: f"{name}={leaf}", {"a": [1, 2]})
  {'a': ['a/0=1', 'a/1=2']}
  """
  treedef: Any = jax.tree.structure(tree)
  names = leaf_names(tree, separator)
  return treedef.unflatten(
    fn(name, leaf)
    for name, leaf in zip(names, jax.tree.leaves(tree), strict=True)
  )


def select(
  tree: PyTree, pattern: str | Callable[[str], bool], separator: str = "/"
) -> PyTree:
  r"""Marks the leaves whose name matches a pattern.

  The result is a mask, as `partition` and ``optax.masked`` take it.

  Args:
    tree: Any pytree.
    pattern: A regular expression that is looked for anywhere in the name
      (``re.search``: anchor it with ``^`` and ``$`` where the whole name is
      meant), or a function from a name to a bool.
    separator: What stands between the keys of a path.

  Returns:
    A tree of the same structure with a Python bool for each leaf.

  Raises:
    ValueError: If no leaf matches, or if the pattern is not a valid regular
      expression.

  >>> select({"Dense_0": 1.0, "head": 2.0}, "^Dense_")
  {'Dense_0': True, 'head': False}
  """
  if isinstance(pattern, str):
    try:
      search = re.compile(pattern).search
    except re.error as error:
      raise ValueError(
        f"pattern {pattern!r} is not a valid regular expression ({error});"
        " escape its special characters with re.escape"
      ) from error
    matches = lambda name: search(name) is not None  # noqa: E731
  else:
    matches = lambda name: bool(pattern(name))  # noqa: E731
  mask = map_with_name(lambda name, _: matches(name), tree, separator)
  if not any(jax.tree.leaves(mask)):
    names = leaf_names(tree, separator)
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    raise ValueError(
      f"no leaf name matches {pattern!r}; the names are: {shown or '(none)'}"
    )
  return mask
