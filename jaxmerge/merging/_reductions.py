"""Counts and sums of the entries of arrays, at the speed of reading them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def counts(marks: Sequence[Array]) -> list[Array]:
  """How many entries are true, of each of two or more arrays, in one pass.

  XLA's compiler for CPUs vectorises a reduction with several results; with a
  single one it stores the operand first, which takes ten times as long.

  Args:
    marks: Arrays of booleans, all of one shape.

  Returns:
    Their counts, uint32.
  """
  return jax.lax.reduce(
    [one.astype(jnp.uint32) for one in marks],
    [np.uint32(0)] * len(marks),
    lambda left, right: [a + b for a, b in zip(left, right, strict=True)],
    tuple(range(marks[0].ndim)),
  )


def sums(values: Sequence[Array]) -> list[Array]:
  """Sums over the last axis of two or more arrays, in one pass.

  As in `counts`, a reduction with several results is the fast one.

  Args:
    values: Arrays, all of one shape and dtype.

  Returns:
    Their sums.
  """
  zero = np.zeros((), values[0].dtype)
  return jax.lax.reduce(
    list(values),
    [zero] * len(values),
    lambda left, right: [a + b for a, b in zip(left, right, strict=True)],
    (values[0].ndim - 1,),
  )
