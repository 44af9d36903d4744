"""How often task vectors disagree in sign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmerge.merging import (
  _sparsify,
  _task_arrays,
  _threshold,
  _values,
)

PyTree = Any
Array = jax.Array


class SignConflicts(NamedTuple):
  """What `sign_conflicts` returns; scalars.

  Attributes:
    rate: ``conflicts / kept``, float32; 0 where nothing is kept.
    conflicts: Number of parameters that are positive in one trimmed vector and
      negative in another, uint32.
    kept: Number of parameters that are not zero in at least one trimmed
      vector, uint32.
    shared: Number of those that are not zero in at least two, the ones that
      can conflict, uint32.
    total: Number of all parameters, uint32.
  """

  rate: Array
  conflicts: Array
  kept: Array
  shared: Array
  total: Array


@jax.jit
def _least_kept(leaves: list[Array], keep: Array) -> Array:
  return _threshold.kth_largest_bits(leaves, keep)


@jax.jit
def _add_signs(
  seen: tuple[Array, Array, Array], leaf: Array, least: Array
) -> tuple[Array, Array, Array]:
  """Which entries have been positive, negative, and kept twice."""
  positive, negative, shared = seen
  kept = _threshold.magnitude_bits(leaf, least.dtype) >= least
  up, down = kept & (leaf > 0), kept & (leaf < 0)
  shared |= (positive | negative) & (up | down)
  return positive | up, negative | down, shared


@jax.jit
def _count_signs(seen: Sequence[tuple[Array, Array, Array]]) -> list[Array]:
  counts = [jnp.zeros((), jnp.uint32)] * 3
  for positive, negative, shared in seen:
    for i, one in enumerate((positive & negative, positive | negative, shared)):
      counts[i] = counts[i] + jnp.sum(one, dtype=jnp.uint32)
  return counts


def sign_conflicts(
  task_vectors: Sequence[PyTree],
  density: float = 0.2,
  *,
  scope: str = "vector",
  allow_nonfinite: bool = False,
) -> SignConflicts:
  r"""Measures how often trimmed task vectors disagree in sign.

  .. math::
    \text{rate} = \frac{|\{p : \exists i, j:
      \hat\tau_{i,p} > 0 > \hat\tau_{j,p}\}|}
      {|\{p : \exists i: \hat\tau_{i,p} \ne 0\}|}

  where :math:`\hat\tau_i` is the task vector trimmed as in `ties`. The rate is
  thus taken over the parameters that at least one trimmed vector holds; the
  counts are returned for rates over others.

  Args:
    task_vectors: Two or more trees of one structure, such as `task_vector`
      returns.
    density: Fraction of each vector that is kept, the largest magnitudes; in
      (0, 1].
    scope: The fraction is of the "vector" as a whole, or of each "leaf".
    allow_nonfinite: Whether NaN and infinity are let through.

  Returns:
    The rate and the counts.

  Raises:
    TreeMismatchError: If the trees differ in structure, shape or dtype.
    ValueError: If there are fewer than two vectors, the density is out of its
      range, an option is unknown, or a leaf holds NaN or infinity.

  References:
    Marczak et al., `MagMax: Leveraging Model Merging for Seamless Continual
    Learning <https://arxiv.org/abs/2407.06322>`_, 2024, Figure 2

  >>> vectors = [
  ...   {"w": jnp.asarray([1.0, 2.0])},
  ...   {"w": jnp.asarray([-1.0, 1.0])},
  ... ]
  >>> found = sign_conflicts(vectors, density=1.0)
  >>> print(found.rate, found.conflicts, found.kept)
  0.5 1 2
  """
  _values.check_range(density, "density", 0, 1, open_low=True)
  _sparsify.check_choice(scope, "scope", _sparsify.SCOPES)
  vectors, _ = _task_arrays.check_vectors(
    task_vectors, 2, "sign_conflicts", allow_nonfinite
  )
  total = _task_arrays.total(vectors[0])
  whole = _threshold.keep_count(density, _task_arrays.size(vectors[0]))
  empty = [jnp.zeros(leaf.shape, bool) for leaf in vectors[0]]
  seen = [(one, one, one) for one in empty]
  for leaves in vectors:
    if scope == "vector" and leaves:
      bounds = [_least_kept(leaves, whole)] * len(leaves)
    else:
      bounds = [
        _least_kept(
          [leaf],
          _threshold.keep_count(density, _task_arrays.size([leaf])),
        )
        for leaf in leaves
      ]
    seen = [
      _add_signs(one, leaf, bound)
      for one, leaf, bound in zip(seen, leaves, bounds, strict=True)
    ]
  conflicts, kept, shared = _count_signs(seen)
  return SignConflicts(
    _task_arrays.ratio(conflicts, kept), conflicts, kept, shared, total
  )
