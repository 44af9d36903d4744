"""Analysis of task vectors: parts, conflicts, cosines, consistency, shares."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree
from jaxmerge.merging import (
  _combine,
  _leaves,
  _method,
  _multi_task,
  _sparsify,
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


def _check_vectors(
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


def _size(leaves: Sequence[Array]) -> int:
  return sum(int(np.size(leaf)) for leaf in leaves)


def _total(leaves: Sequence[Array]) -> Array:
  size = _size(leaves)
  if size > np.iinfo(np.uint32).max:
    raise ValueError(
      f"{size} parameters are too many to count in 32 bits; give a part of"
      " the tree"
    )
  return jnp.asarray(np.uint32(size))


def _wide_dtype(leaves: Sequence[Array]) -> np.dtype:
  """One dtype for all leaves, so that their magnitudes can be compared."""
  return np.result_type(
    np.float32, *(tree.accumulation_dtype(leaf) for leaf in leaves)
  )


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
    dtype = _wide_dtype(leaves)
    wide = [leaf.astype(dtype) for leaf in leaves]
    bits = [_threshold.magnitude_bits(leaf) for leaf in wide]
    if which == "top":
      least = _threshold.kth_largest_bits(wide, keep)
      marks = [one >= least for one in bits]
    else:
      # The k-th smallest.
      rank = jnp.uint32(_size(leaves) + 1) - keep
      most = _threshold.kth_largest_bits(wide, rank)
      marks = [one <= most for one in bits]
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
  (leaves,), merged = _check_vectors([task_vector], 1, "keep", allow_nonfinite)
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
    count = _threshold.keep_count(density, _size(members))
    results += _keep(members, count, keys, which)
  return _leaves.rebuild(task_vector, merged, results, None)


@functools.partial(jax.jit, static_argnames="dtype")
def _least_kept(leaves: list[Array], keep: Array, dtype: Any) -> Array:
  return _threshold.kth_largest_bits(
    [leaf.astype(dtype) for leaf in leaves], keep
  )


@functools.partial(jax.jit, static_argnames="dtype")
def _add_signs(
  seen: tuple[Array, Array, Array], leaf: Array, least: Array, dtype: Any
) -> tuple[Array, Array, Array]:
  """Which entries have been positive, negative, and kept twice."""
  positive, negative, shared = seen
  kept = _threshold.magnitude_bits(leaf.astype(dtype)) >= least
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


@jax.jit
def _ratio(numerator: Array, divisor: Array) -> Array:
  return _combine.divide(
    numerator.astype(jnp.float32), divisor.astype(jnp.float32)
  )


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
  vectors, _ = _check_vectors(
    task_vectors, 2, "sign_conflicts", allow_nonfinite
  )
  total = _total(vectors[0])
  dtype = _wide_dtype(vectors[0])
  whole = _threshold.keep_count(density, _size(vectors[0]))
  empty = [jnp.zeros(leaf.shape, bool) for leaf in vectors[0]]
  seen = [(one, one, one) for one in empty]
  for leaves in vectors:
    if scope == "vector" and leaves:
      bounds = [_least_kept(leaves, whole, dtype)] * len(leaves)
    else:
      bounds = [
        _least_kept(
          [leaf], _threshold.keep_count(density, _size([leaf])), dtype
        )
        for leaf in leaves
      ]
    seen = [
      _add_signs(one, leaf, bound, dtype)
      for one, leaf, bound in zip(seen, leaves, bounds, strict=True)
    ]
  conflicts, kept, shared = _count_signs(seen)
  return SignConflicts(_ratio(conflicts, kept), conflicts, kept, shared, total)


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
  vectors, merged = _check_vectors(
    task_vectors, 1, "cosine_matrix", allow_nonfinite
  )
  dtype = _wide_dtype(vectors[0])
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
  _total(path[0])
  length = len(path)
  dtype = _wide_dtype(path[0])
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
  total = _total([jnp.asarray(one) for one in parts.bases])
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
    _ratio(numbers[1:], jnp.broadcast_to(total, (len(models),))),
    numbers[1:],
    numbers[0],
    total,
  )
