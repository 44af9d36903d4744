"""Analysis of task vectors: cosines, consistency, shares."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmerge import tree
from jaxmerge.merging import (
  _combine,
  _leaves,
  _method,
  _multi_task,
  _task_arrays,
)

PyTree = Any
Array = jax.Array


class UpdateConsistency(NamedTuple):
  """What `update_consistency` returns, for a trajectory of T steps.

  Attributes:
    magnitudes: Mean magnitude of the task vector over the parameters of each
      count, float32 [T + 1]; 0 for a count that no parameter has.
    numbers: Number of parameters of each count, uint32 [T + 1].
    counts: Tree of the structure and shapes of the base: the count of each
      parameter, int32 from 0 to T. Leaves that are not floating-point have 0.
  """

  magnitudes: Array
  numbers: Array
  counts: PyTree


class SelectedShares(NamedTuple):
  """What `selected_shares` returns, for n models.

  Attributes:
    shares: Fraction of all parameters that is taken from each model, float32
      [n]; together with ``unchanged / total`` they sum to 1.
    numbers: Number of parameters that is taken from each model, uint32 [n].
    unchanged: Number of parameters that no model changed, uint32.
    total: Number of all parameters, uint32.
  """

  shares: Array
  numbers: Array
  unchanged: Array
  total: Array


@jax.jit
def _largest(leaf: Array) -> Array:
  return jnp.abs(leaf).max(initial=0)


@functools.partial(jax.jit, static_argnames="dtype")
def _gram(leaves: list[Array], bounds: Array, dtype: Any) -> Array:
  rows = jnp.stack([leaf.reshape(-1).astype(dtype) for leaf in leaves])
  rows = _combine.divide(rows, jnp.broadcast_to(bounds[:, None], rows.shape))
  return jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _cosines(gram: Array) -> Array:
  norms = jnp.sqrt(jnp.diagonal(gram))
  cosines = _combine.divide(gram, norms[:, None] * norms[None, :])
  # Rounding may leave a vector at another angle than zero to itself.
  own = jnp.diag((norms > 0).astype(gram.dtype))
  cosines = jnp.where(jnp.eye(len(gram), dtype=bool), own, cosines)
  return jnp.clip(cosines, -1, 1).astype(jnp.float32)


def cosine_matrix(
  task_vectors: Sequence[PyTree], *, allow_nonfinite: bool = False
) -> Array:
  r"""Cosines of the angles between task vectors.

  .. math::
    C_{ij} = \frac{\langle \tau_i, \tau_j \rangle}{\|\tau_i\| \|\tau_j\|}

  over all floating-point leaves taken as one vector. The cosine of a zero
  vector with any other, and with itself, is 0.

  Args:
    task_vectors: One or more trees of one structure, such as `task_vector`
      returns.
    allow_nonfinite: Whether NaN and infinity are let through.

  Returns:
    Symmetric array [n, n] of float32.

  Raises:
    TreeMismatchError: If the trees differ in structure, shape or dtype.
    ValueError: If there are no vectors, or a leaf holds NaN or infinity.

  >>> vectors = [{"w": jnp.asarray([1.0, 0.0])}, {"w": jnp.asarray([0.0, 2.0])}]
  >>> print(cosine_matrix(vectors))
  [[1. 0.]
   [0. 1.]]
  """
  vectors, merged = _task_arrays.check_vectors(
    task_vectors, 1, "cosine_matrix", allow_nonfinite
  )
  dtype = _task_arrays.wide_dtype(vectors[0])
  # Each vector is divided by its largest entry, lest its squares underflow.
  bounds = [jnp.zeros((), dtype)] * len(vectors)
  for i, leaves in enumerate(vectors):
    for leaf in leaves:
      bounds[i] = jnp.maximum(bounds[i], _largest(leaf).astype(dtype))
  gram = jnp.zeros((len(vectors), len(vectors)), dtype)
  for place in range(len(merged)):
    gram = gram + _gram(
      [leaves[place] for leaves in vectors], jnp.stack(bounds), dtype
    )
  return _cosines(gram)


@jax.jit
def _add_directions(
  counts: tuple[Array, Array], before: Array, after: Array
) -> tuple[Array, Array]:
  step = _leaves.widen(after) - _leaves.widen(before)
  up, down = counts
  return up + (step > 0).astype(jnp.int32), down + (step < 0).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="length")
def _numbers(labels: Array, length: int) -> Array:
  """How many entries have each label, from 0."""
  return jax.lax.map(
    lambda label: jnp.sum(labels == label, dtype=jnp.uint32),
    jnp.arange(length, dtype=labels.dtype),
  )


@functools.partial(jax.jit, static_argnames="length")
def _sums(base: Array, last: Array, labels: Array, length: int) -> Array:
  """The summed magnitude of the task vector over the entries of each label."""
  magnitude = jnp.abs(_leaves.widen(last) - _leaves.widen(base))
  return jax.lax.map(
    lambda label: jnp.sum(jnp.where(labels == label, magnitude, 0)),
    jnp.arange(length, dtype=labels.dtype),
  )


def update_consistency(
  base: PyTree,
  checkpoints: Sequence[PyTree],
  *,
  allow_nonfinite: bool = False,
) -> UpdateConsistency:
  r"""Relates consistent updates of a parameter to how far it moves.

  .. math::
    c = \max\left(\left|\{t : s_t = 1\}\right|,
      \left|\{t : s_t = -1\}\right|\right), \quad
    s_t = \mathrm{sgn}(\theta_t - \theta_{t-1}), \quad t = 1 \dots T

  for each parameter: the number of updates in the direction that it moved in
  most often. For each value of :math:`c`, the mean of
  :math:`|\theta_T - \theta_0|` over the parameters that have it.

  Args:
    base: :math:`\theta_0`, the parameters before the first task.
    checkpoints: :math:`\theta_1 \dots \theta_T`, trees of the structure of the
      base, each trained from the one before.
    allow_nonfinite: Whether NaN and infinity are let through.

  Returns:
    The mean magnitude and the number of parameters for each count from 0 to T,
    and the count of each parameter.

  Raises:
    TreeMismatchError: If a checkpoint differs from the base.
    ValueError: If there are no checkpoints, or one holds NaN or infinity.

  References:
    Marczak et al., `MagMax: Leveraging Model Merging for Seamless Continual
    Learning <https://arxiv.org/abs/2407.06322>`_, 2024, Figure 4

  >>> base = {"w": jnp.zeros(3)}
  >>> checkpoints = [{"w": jnp.asarray([1.0, 1.0, 0.0])}]
  >>> checkpoints += [{"w": jnp.asarray([3.0, 0.5, 0.0])}]
  >>> found = update_consistency(base, checkpoints)
  >>> print(found.counts["w"], found.magnitudes)
  [2 1 0] [0.  0.5 3. ]
  """
  checkpoints = _method.check_models(checkpoints)
  names = ["base", *(f"checkpoint {i}" for i in range(len(checkpoints)))]
  tree.check_match(base, *checkpoints, names=names)
  merged = _leaves.merged_leaves(base, None)
  if not allow_nonfinite:
    _leaves.check_finite([base, *checkpoints], names, merged)
  path = [
    [jnp.asarray(jax.tree.leaves(params)[leaf.place]) for leaf in merged]
    for params in (base, *checkpoints)
  ]
  _task_arrays.total(path[0])
  length = len(path)
  dtype = _task_arrays.wide_dtype(path[0])
  numbers = jnp.zeros((length,), jnp.uint32)
  sums = jnp.zeros((length,), dtype)
  results = []
  for leaves in zip(*path, strict=True):
    zeros = jnp.zeros(leaves[0].shape, jnp.int32)
    counts = (zeros, zeros)
    for before, after in zip(leaves, leaves[1:], strict=False):
      counts = _add_directions(counts, before, after)
    results.append(jnp.maximum(*counts))
    numbers = numbers + _numbers(results[-1], length)
    sums = sums + _sums(leaves[0], leaves[-1], results[-1], length).astype(
      dtype
    )
  return UpdateConsistency(
    _combine.divide(sums, numbers.astype(dtype)).astype(jnp.float32),
    numbers,
    _multi_task.place_leaves(base, merged, results, jnp.int32),
  )


@jax.jit
def _challenge(
  best: Array,
  winner: Array,
  base: Array,
  leaf: Array,
  weight: Array,
  number: Array,
) -> tuple[Array, Array]:
  tau = _leaves.widen(leaf) - _leaves.widen(base)
  tau = jnp.abs(weight.astype(tau.dtype) * tau)
  # On ties the later model wins, as in magmax; zeros are nobody's.
  wins = (tau >= best) & (tau > 0)
  return jnp.where(wins, tau, best), jnp.where(wins, number, winner)


def selected_shares(
  base: PyTree,
  models: Sequence[PyTree],
  *,
  weights: Any = None,
  allow_nonfinite: bool = False,
) -> SelectedShares:
  r"""Counts how many parameters `magmax` takes from each model.

  .. math::
    \text{share}_i = \frac{1}{n} \left|\{p :
      i = \arg\max_j |w_j \tau_{j,p}|, \tau_{i,p} \ne 0\}\right|

  with the later model where several are largest. Parameters that no model
  changed are counted apart.

  Args:
    base: :math:`\theta_0`, the parameters before the first task.
    models: One or more trees of the structure of the base.
    weights: :math:`w_i`, 1 by default; see `task_arithmetic`.
    allow_nonfinite: Whether NaN and infinity are let through.

  Returns:
    The shares and the counts.

  Raises:
    TreeMismatchError: If a model differs from the base.
    ValueError: If there are no models or a value is out of its range.

  >>> base, models = {"w": jnp.zeros(2)}, [{"w": jnp.asarray([1.0, 2.0])}]
  >>> models += [{"w": jnp.asarray([-3.0, 0.0])}]
  >>> print(selected_shares(base, models).shares)
  [0.5 0.5]
  """
  parts = _leaves.take_apart(
    base, models, weights, allow_nonfinite=allow_nonfinite
  )
  total = _task_arrays.total([jnp.asarray(one) for one in parts.bases])
  # Label 0 is for what nobody changed.
  numbers = jnp.zeros((len(models) + 1,), jnp.uint32)
  for one, leaves, scalars in zip(
    parts.bases, parts.models, parts.weights, strict=True
  ):
    start = jnp.asarray(one)
    best = jnp.zeros(start.shape, jnp.abs(_leaves.widen(start)).dtype)
    winner = jnp.zeros(start.shape, jnp.int32)
    for i, leaf in enumerate(leaves):
      best, winner = _challenge(
        best, winner, start, leaf, jnp.asarray(scalars[i]), jnp.int32(i + 1)
      )
    numbers = numbers + _numbers(winner, len(models) + 1)
  return SelectedShares(
    _task_arrays.ratio(numbers[1:], jnp.broadcast_to(total, (len(models),))),
    numbers[1:],
    numbers[0],
    total,
  )
