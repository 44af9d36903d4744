"""Parts of a task vector: the largest, the smallest, or random entries."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.merging import (
  _leaves,
  _sparsify,
  _task_arrays,
  _threshold,
  _values,
)

PyTree = Any
Array = jax.Array


def _random_scores(keys: Array, shapes: Sequence[tuple[int, ...]]) -> Any:
  """Random numbers whose magnitudes are in the order of random integers."""
  for key, shape in zip(keys, shapes, strict=True):
    # The bits of numbers below 2, so that none of them is NaN.
    bits = jax.random.bits(key, shape, jnp.uint32) >> 2
    yield jax.lax.bitcast_convert_type(bits, jnp.float32)


def _first_largest(leaves: Sequence[Array], keep: Array) -> list[Array]:
  """Marks exactly so many largest magnitudes, the first ones among equals."""
  least = _threshold.kth_largest_bits(leaves, keep)
  bits = [_threshold.magnitude_bits(leaf) for leaf in leaves]
  spare = keep - sum(jnp.sum(one > least, dtype=jnp.uint32) for one in bits)
  marks = []
  for one in bits:
    equals = (one == least).reshape(-1)
    ranks = jnp.cumsum(equals, dtype=jnp.uint32)
    first = (equals & (ranks <= spare)).reshape(one.shape)
    spare = spare - jnp.sum(first, dtype=jnp.uint32)
    marks.append((one > least) | first)
  return marks


@functools.partial(jax.jit, static_argnames="which")
def _keep(
  leaves: list[Array], keep: Array, keys: Array | None, which: str
) -> list[Array]:
  """Keeps some of the entries of the leaves taken together."""
  if which == "random":
    assert keys is not None
    scores = list(_random_scores(keys, [leaf.shape for leaf in leaves]))
    marks = _first_largest(scores, keep)
  else:
    rank = keep
    if which == "bottom":
      # The k-th smallest.
      rank = jnp.uint32(_task_arrays.size(leaves) + 1) - keep
    bound = _threshold.kth_largest_bits(leaves, rank)
    bits = [_threshold.magnitude_bits(leaf, bound.dtype) for leaf in leaves]
    marks = [one >= bound if which == "top" else one <= bound for one in bits]
  return [
    jnp.where(mark, leaf, 0) for mark, leaf in zip(marks, leaves, strict=True)
  ]


def keep(
  task_vector: PyTree,
  density: float,
  *,
  which: str = "top",
  scope: str = "vector",
  key: Array | None = None,
  allow_nonfinite: bool = False,
) -> PyTree:
  r"""Keeps a part of a task vector and sets the rest to zero.

  With :math:`k = \max(1, \lfloor d n \rfloor)` of :math:`n` entries kept, and
  the k-th largest or k-th smallest magnitude as the bound :math:`b`:

  .. math::
    \hat\tau = \tau \cdot 1\{|\tau| \ge b\} \text{ (top)}, \quad
    \hat\tau = \tau \cdot 1\{|\tau| \le b\} \text{ (bottom)}

  Entries that equal the bound are all kept, as in `ties`. At "random" exactly
  k entries are kept, all sets of k alike.

  Args:
    task_vector: A tree, such as `task_vector` returns.
    density: Fraction :math:`d` that is kept, in (0, 1].
    which: The "top" magnitudes, the "bottom" ones, or "random" entries.
    scope: The fraction is of the "vector" as a whole, or of each "leaf".
    key: PRNG key for "random".
    allow_nonfinite: Whether NaN and infinity are let through.

  Returns:
    A tree of the structure, shapes and dtypes of the task vector. Leaves that
    are not floating-point are passed through.

  Raises:
    ValueError: If the density is out of its range, an option is unknown, the
      key is missing, or a leaf holds NaN or infinity.

  References:
    Marczak et al., `MagMax: Leveraging Model Merging for Seamless Continual
    Learning <https://arxiv.org/abs/2407.06322>`_, 2024, Figure 1

  >>> vector = {"w": jnp.asarray([1.0, -4.0, 2.0, 3.0])}
  >>> print(keep(vector, 0.5)["w"], keep(vector, 0.5, which="bottom")["w"])
  [ 0. -4.  0.  3.] [1. 0. 2. 0.]
  """
  _values.check_range(density, "density", 0, 1, open_low=True)
  _sparsify.check_choice(which, "which", ("top", "bottom", "random"))
  _sparsify.check_choice(scope, "scope", _sparsify.SCOPES)
  if which == "random" and key is None:
    raise ValueError(
      "which='random' needs a key; give key=jax.random.key(seed)"
    )
  (leaves,), merged = _task_arrays.check_vectors(
    [task_vector], 1, "keep", allow_nonfinite
  )
  groups = (
    [range(len(leaves))]
    if scope == "vector"
    else [range(i, i + 1) for i in range(len(leaves))]
  )
  results: list[Array] = []
  for group in groups:
    members = [leaves[i] for i in group]
    if not members:
      continue
    keys = None
    if which == "random":
      assert key is not None
      keys = jnp.stack([jax.random.fold_in(key, merged[i].seed) for i in group])
    count = _threshold.keep_count(density, _task_arrays.size(members))
    results += _keep(members, count, keys, which)
  return _leaves.rebuild(task_vector, merged, results, None)
