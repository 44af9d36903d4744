"""What the analyses of task vectors share: their arrays, and counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree
from jaxmerge.merging import (
  _combine,
  _leaves,
  _method,
)

PyTree = Any
Array = jax.Array


def check_vectors(
  vectors: Sequence[PyTree], least: int, who: str, allow_nonfinite: bool
) -> tuple[list[list[Array]], list[Any]]:
  """The floating-point leaves of task vectors, and what is known of them."""
  vectors = _method.check_models(vectors)
  if len(vectors) < least:
    raise ValueError(
      f"{who} takes at least {least} task vectors; got {len(vectors)}"
    )
  names = [f"task vector {i}" for i in range(len(vectors))]
  tree.check_match(*vectors, names=names)
  merged = _leaves.merged_leaves(vectors[0], None)
  if not allow_nonfinite:
    _leaves.check_finite(vectors, names, merged)
  all_leaves = [jax.tree.leaves(vector) for vector in vectors]
  found = [
    [jnp.asarray(leaves[leaf.place]) for leaf in merged]
    for leaves in all_leaves
  ]
  return found, merged


def size(leaves: Sequence[Array]) -> int:
  """Number of entries of some arrays."""
  return sum(int(np.size(leaf)) for leaf in leaves)


def total(leaves: Sequence[Array]) -> Array:
  """The same as an array; an error if 32 bits do not hold it."""
  count = size(leaves)
  if count > np.iinfo(np.uint32).max:
    raise ValueError(
      f"{count} parameters are too many to count in 32 bits; give a part of"
      " the tree"
    )
  return jnp.asarray(np.uint32(count))


def wide_dtype(leaves: Sequence[Array]) -> np.dtype:
  """One dtype that holds all leaves, for sums over them."""
  return np.result_type(
    np.float32, *(tree.accumulation_dtype(leaf) for leaf in leaves)
  )


@jax.jit
def ratio(numerator: Array, divisor: Array) -> Array:
  """A quotient of counts, float32; 0 where the divisor is 0."""
  return _combine.divide(
    numerator.astype(jnp.float32), divisor.astype(jnp.float32)
  )
