"""Values that may differ from leaf to leaf: weights, scales, densities."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree

PyTree = Any

# Kinds of dtypes: integers, floats, and those of ml_dtypes, such as bfloat16.
_NUMBERS = "biufcV"


def is_traced(value: Any) -> bool:
  """Whether a value is known only inside of a transformation."""
  return isinstance(value, jax.core.Tracer)


def _is_prefix(value: Mapping[Any, Any], base: PyTree) -> bool:
  try:
    jax.tree.broadcast(value, base)
  except ValueError:
    return False
  return True


def per_leaf(value: Any, base: PyTree, name: str) -> list[Any]:
  """Resolves a value to one scalar a leaf of `base`.

  Args:
    value: A scalar for all leaves; a prefix of the tree `base` (a dictionary
      of its first level, say); or a mapping from regular expressions to
      scalars, where the first one found in a leaf's name counts.
    base: The tree.
    name: What messages call the value.

  Returns:
    One scalar a leaf, in the order of `jax.tree.leaves(base)`.

  Raises:
    ValueError: If a leaf gets no value or one that is not a scalar.
  """
  count = len(jax.tree.leaves(base))
  if isinstance(value, Mapping) and not _is_prefix(value, base):
    values = [_first(value, leaf, name) for leaf in tree.leaf_names(base)]
  elif jax.tree_util.all_leaves([value]):
    values = [value] * count
  else:
    try:
      values = jax.tree.leaves(jax.tree.broadcast(value, base))
    except ValueError as error:
      raise ValueError(
        f"{name} is neither a scalar, nor a prefix of the parameters, nor a"
        " mapping from regular expressions to scalars"
      ) from error
  for leaf, found in zip(tree.leaf_names(base), values, strict=True):
    if jnp.ndim(found):
      raise ValueError(
        f"{name} must be a scalar for leaf '{leaf}'; got shape"
        f" {jnp.shape(found)}"
      )
    if not is_traced(found) and np.asarray(found).dtype.kind not in _NUMBERS:
      raise ValueError(
        f"{name} must be a number for leaf '{leaf}'; got {found!r}"
      )
    if not is_traced(found) and not np.isfinite(found):
      raise ValueError(
        f"{name} is {found} for leaf '{leaf}'; values must be finite"
      )
  return values


def _first(value: Mapping[Any, Any], leaf: str, name: str) -> Any:
  for pattern, found in value.items():
    if not isinstance(pattern, str):
      break
    try:
      if re.search(pattern, leaf):
        return found
    except re.error as error:
      raise ValueError(
        f"{name}: {pattern!r} is not a valid regular expression ({error})"
      ) from error
  raise ValueError(
    f"{name} has no value for leaf '{leaf}'; add a last entry '.*' for the"
    " leaves that nothing else matches"
  )


def per_model(value: Any, num_models: int, name: str) -> list[Any]:
  """One entry a model: a sequence as it is, anything else for all of them."""
  if isinstance(value, (jax.Array, np.ndarray)) and np.ndim(value):
    if value.ndim != 1:
      raise ValueError(
        f"{name} must have shape ({num_models},); got {value.shape}"
      )
    value = [value[i] for i in range(len(value))]
  if isinstance(value, str) or not isinstance(value, Sequence):
    return [value] * num_models
  if len(value) != num_models:
    raise ValueError(
      f"got {len(value)} {name} for {num_models} models; give one for each"
      " model"
    )
  return list(value)


def check_range(
  value: Any,
  name: str,
  low: float,
  high: float,
  *,
  open_low: bool = False,
) -> None:
  """Raises unless low <= value <= high; traced values pass.

  Args:
    value: A scalar, or a sequence or mapping of scalars.
    name: What the message calls it.
    low: Lower bound.
    high: Upper bound.
    open_low: Whether the lower bound itself is out of range.
  """
  for one in jax.tree.leaves(value):
    if is_traced(one):
      continue
    below = one <= low if open_low else one < low
    if np.any(below) or np.any(one > high) or not np.all(np.isfinite(one)):
      raise ValueError(
        f"{name} must lie in {'(' if open_low else '['}{low:g}, {high:g}];"
        f" got {one}"
      )


def check_key(key: Any) -> None:
  """Raises unless a PRNG key is one; None passes."""
  if key is None:
    return
  dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
  is_typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
  if shape != () if is_typed else dtype != np.uint32 or len(shape or ()) != 1:
    raise ValueError(
      "key must be one PRNG key, jax.random.key(seed); got"
      f" {key if dtype is None else f'{dtype} of shape {shape}'}"
    )
