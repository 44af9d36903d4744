"""The leaves that a method merges: which, with what values, and back."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree
from jaxmerge.merging import _method, _values

PyTree = Any
Array = jax.Array


# Options that count once, after the last model.
_ONCE = frozenset({"ridge", "scale"})


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


class Leaf(NamedTuple):
  """A leaf that is merged: its place among all leaves, and its name."""

  place: int
  name: str
  seed: np.uint32


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Static:
  """An option's value for a leaf that kernels are compiled for.

  Attributes:
    value: Anything that can be hashed.
  """

  value: Hashable


class PerLeaf(NamedTuple):
  """An option whose values for the leaves are computed from the base.

  Attributes:
    compute: `compute(base, merged) -> values`, one for each merged leaf.
  """

  compute: Callable[[PyTree, Sequence[Leaf]], Sequence[Any]]


def check_shared(options: Mapping[str, Any], who: str) -> None:
  """Raises for options that are not those of `MergeOptions`."""
  known = MergeOptions.__annotations__
  for name in options:
    if name not in known:
      raise TypeError(f"{who}() got an unexpected keyword argument {name!r}")


class Parts(NamedTuple):
  """A base and models, checked, and taken apart.

  Attributes:
    merged: The leaves that are merged.
    bases: The base's, in their order.
    models: For each of them those of all models.
    weights: For each of them the models' weights [n].
  """

  merged: list[Leaf]
  bases: list[Any]
  models: list[list[Any]]
  weights: list[Any]


def widen(leaf: Any) -> Array:
  """A leaf in the dtype that it is computed in."""
  return jnp.asarray(leaf).astype(tree.accumulation_dtype(leaf))


@jax.jit
def difference(base: Array, leaf: Array) -> Array:
  """The task vector of a leaf."""
  return widen(leaf) - widen(base)


@jax.jit
def _has_finite_sum(leaf: Array) -> Array:
  """Whether a leaf is finite for sure; a sum is read at the memory's speed."""
  return jnp.isfinite(jnp.sum(leaf, dtype=tree.accumulation_dtype(leaf)))


@jax.jit
def _all_finite(leaf: Array) -> Array:
  return jnp.isfinite(leaf).all()


def merged_leaves(
  base: PyTree, pattern: str | Callable[[str], bool] | None
) -> list[Leaf]:
  """The leaves that are floating-point and selected."""
  names = tree.leaf_names(base)
  leaves = jax.tree.leaves(base)
  chosen = [True] * len(names)
  if pattern is not None:
    chosen = jax.tree.leaves(tree.select(base, pattern))
  return [
    # Not hash(), which differs from process to process.
    Leaf(place, name, np.uint32(zlib.crc32(name.encode())))
    for place, name in enumerate(names)
    if chosen[place] and tree.is_float(leaves[place])
  ]


def _known_finite(value: Any) -> bool:
  with jax.ensure_compile_time_eval():
    return bool(_all_finite(value))


def are_finite(leaves: Sequence[Array]) -> bool:
  """Whether arrays are finite for sure; not if one is traced."""
  if any(_values.is_traced(leaf) for leaf in leaves):
    return False
  return all(jax.device_get([_has_finite_sum(leaf) for leaf in leaves]))


def check_finite(
  trees: Sequence[PyTree], names: Sequence[str], merged: Sequence[Leaf]
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
          flags.append((_has_finite_sum(value), value, leaf.name, name))
  for flag, value, leaf_name, name in flags:
    # The sum of finite numbers may be infinite.
    if not flag and not _known_finite(value):
      raise ValueError(
        f"leaf '{leaf_name}' of {name} holds NaN or infinity; mend it, or let"
        " it through with allow_nonfinite=True"
      )


def resolve(
  options: dict[str, Any],
  base: PyTree,
  merged: Sequence[Leaf],
  derive: Callable[[dict[str, Any], int, int], dict[str, Any]] | None = None,
  num_models: int | None = None,
  per_model: bool = True,
) -> list[dict[str, Any]]:
  """The options' values for every merged leaf: arrays, or `Static`.

  Args:
    options: Values by name.
    base: The base.
    merged: The leaves that are merged.
    derive: See `_leafwise.LeafRule`.
    num_models: Number of models; None if it is not known yet.
    per_model: Whether an option may have one value a model.

  Returns:
    For each merged leaf the values by name.

  Raises:
    ValueError: If there are not as many values as models, or several of an
      option that has one.
  """
  leaves = jax.tree.leaves(base)
  sizes = [int(np.size(leaves[leaf.place])) for leaf in merged]
  found: list[dict[str, Any]] = [{} for _ in merged]
  for name, value in options.items():
    if isinstance(value, PerLeaf):
      for one, computed in zip(found, value.compute(base, merged), strict=True):
        one[name] = computed
      continue
    if isinstance(value, (jax.Array, np.ndarray)) and np.ndim(value):
      value = _values.per_model(value, len(value), name)
    # A NamedTuple is a prefix of a base of its kind.
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
      if not per_model or name in _ONCE:
        raise ValueError(
          f"{name} must be one value for all models: a scalar, a prefix of the"
          " tree, or a mapping from regular expressions; got a sequence of"
          f" {len(value)}"
        )
      if num_models is not None and len(value) != num_models:
        raise ValueError(
          f"got {len(value)} values of {name} for {num_models} models; give one"
          " value, or one for each model"
        )
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


def _as_array(value: Any) -> Any:
  if isinstance(value, Static):
    return value
  if isinstance(value, list):
    return jnp.stack([jnp.asarray(one) for one in value])
  return jnp.asarray(value)


def result_dtype(leaf: Any, dtype: Any) -> np.dtype:
  """The dtype of a merged leaf: the one asked for, or its own."""
  if dtype is not None and not jnp.issubdtype(dtype, jnp.inexact):
    raise ValueError(f"dtype must be floating-point; got {np.dtype(dtype)}")
  return np.dtype(jnp.asarray(leaf).dtype if dtype is None else dtype)


def rebuild(
  base: PyTree, merged: Sequence[Leaf], results: Sequence[Array], dtype: Any
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


def stack(scalars: Sequence[Any]) -> Any:
  """One array of scalars, on the host unless one is on a device."""
  dtype = jnp.result_type(float)
  if any(isinstance(scalar, jax.Array) for scalar in scalars):
    return jnp.stack([jnp.asarray(scalar, dtype) for scalar in scalars])
  return np.array(scalars, dtype)


def take_apart(
  base: PyTree,
  models: Sequence[PyTree],
  weights: Any = None,
  *,
  select: str | Callable[[str], bool] | None = None,
  allow_nonfinite: bool = False,
  names: Sequence[str] | None = None,
) -> Parts:
  """Checks what a list function is given, and takes it apart.

  Args:
    base: The base, see `MergeMethod`.
    models: The models.
    weights: One value for each model, or an array; each may be a scalar, a
      prefix of the tree, or a mapping from regular expressions. 1 if None.
    select: See `MergeOptions`, as the one that follows.
    allow_nonfinite: Whether NaN and infinity are let through.
    names: What messages call the base and the models.

  Returns:
    The parts.

  Raises:
    TreeMismatchError: If a model differs from the base.
    ValueError: If there are no models, a weight is missing or not a finite
      scalar, or a leaf holds NaN or infinity.
  """
  models = _method.check_models(models)
  if names is None:
    names = ["base", *(f"model {i}" for i in range(len(models)))]
  tree.check_match(base, *models, names=names)
  columns = [
    _values.per_leaf(entry, base, f"weight {i}")
    for i, entry in enumerate(
      _values.per_model(
        1.0 if weights is None else weights, len(models), "weights"
      )
    )
  ]
  merged = merged_leaves(base, select)
  if not allow_nonfinite:
    check_finite([base, *models], names, merged)
  bases = jax.tree.leaves(base)
  leaves = [jax.tree.leaves(params) for params in models]
  return Parts(
    merged,
    [bases[leaf.place] for leaf in merged],
    [[one[leaf.place] for one in leaves] for leaf in merged],
    [stack([column[leaf.place] for column in columns]) for leaf in merged],
  )
