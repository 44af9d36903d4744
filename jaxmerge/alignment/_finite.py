"""Entries that are NaN or infinite, found before anything is computed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge import tree

PyTree = Any


def check(what: str, values: PyTree) -> None:
  """Raises if a floating-point leaf has an entry that is not finite.

  Args:
    what: What the message calls the tree.
    values: A pytree of arrays; traced ones are not checked.

  Raises:
    ValueError: If an entry is NaN or infinite; the message names the leaf.

  >>> check("data", {"x": jnp.array([1.0, jnp.inf])})
  Traceback (most recent call last):
  ...
  ValueError: leaf 'x' of data has entries that are NaN or infinite; ...
  """
  name = first_bad(values)
  if name is not None:
    leaf = f"leaf '{name}' of {what}" if name else what
    raise ValueError(
      f"{leaf} has entries that are NaN or infinite; there are no statistics"
      " of them: leave such examples out, or find out why training diverged"
    )


def first_bad(values: PyTree) -> str | None:
  """The name of the first leaf with an entry that is not finite.

  Args:
    values: A pytree of arrays; traced ones are not looked at, nor those that
      are not floating-point.

  Returns:
    The name, or None if all entries are finite.

  >>> first_bad({"a": jnp.ones(2), "x": jnp.array([1.0, jnp.inf])})
  'x'
  """
  leaves = jax.tree.leaves(values)
  # Values are known within a trace, too, where they do not depend on it.
  with jax.ensure_compile_time_eval():
    finite = jax.device_get(
      [
        _all_finite(leaf)
        if tree.is_float(leaf) and not isinstance(leaf, jax.core.Tracer)
        else True
        for leaf in leaves
      ]
    )
  for name, is_finite in zip(tree.leaf_names(values), finite, strict=True):
    if not is_finite:
      return name
  return None


@jax.jit
def _all_finite(leaf: jax.Array) -> jax.Array:
  """Whether all entries are finite, a bool scalar."""
  return jnp.isfinite(leaf).all()
