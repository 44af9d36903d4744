"""Weight matching: the permutations that bring two networks' weights close."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree
from jaxmerge.alignment import (
  _assignment,
  _derive_spec,
  _similarity,
  _spec,
)

PyTree = Any

_MAX_WORKERS = 8


def weight_matching(
  reference: PyTree,
  model: PyTree,
  spec: _spec.PermutationSpec | None = None,
  *,
  key: jax.Array,
  restarts: int = 2,
  max_sweeps: int = 100,
  tolerance: float = 1e-6,
  select: _similarity.Select = None,
) -> tuple[PyTree, _similarity.MatchingInfo]:
  r"""Permutes a network's neurons so that its weights lie near a reference's.

  .. math::
    \max_\sigma \sum_{\mathrm{leaves}}
      \langle \theta^{\mathrm{ref}}, \sigma\theta \rangle

  over the permutations of all groups, which is to minimise
  :math:`\|\theta^{\mathrm{ref}} - \sigma\theta\|`. Git Re-Basin's coordinate
  ascent: sweep after sweep, in random order, each group gets its best
  permutation with the others held, which is an assignment problem; until a
  sweep changes nothing. The first run starts from the identity, the others from
  random permutations, and the best result counts.

  Similarities are computed on the device and problems solved on the host,
  those of groups that share no leaf side by side. Only what has changed is done
  again: a group is left alone as long as its neighbours are as they were, and
  leaves without other groups are compared once.

  Args:
    reference: Any pytree of arrays.
    model: A tree of the same structure, shapes and dtypes.
    spec: The specification; by default that of `derive_spec`.
    key: PRNG key of the order of the groups, and of the random starts.
    restarts: Runs from random permutations after that from the identity; each
      takes as long as the first one.
    max_sweeps: Largest number of sweeps of each run; at least 1.
    tolerance: The smallest gain for which a group is permuted, as a fraction of
      the similarity of its neurons: gains below it are rounding.
    select: Which leaves count, a pattern or a function of their names. By
      default all but running statistics: leaves in a collection
      ``batch_stats``, or named ``mean`` or ``var``. All are permuted.

  Returns:
    The permuted parameters of ``model``, and the permutations with the
    objective after each sweep, which never falls.

  Raises:
    TreeMismatchError: If the trees differ in structure, shape or dtype.
    SpecError: If the specification does not fit them.
    TypeError: If the parameters are traced.
    ValueError: If an entry is not finite, or an option is out of range.

  References:
    Ainsworth et al., `Git Re-Basin: Merging models modulo permutation
    symmetries <https://arxiv.org/abs/2209.04836>`_, 2022

  >>> reference = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0], [4.0]])}
  >>> model = {"a": jnp.array([[2.0, 1.0]]), "b": jnp.array([[4.0], [3.0]])}
  >>> spec = {"hidden": (_spec.Axis("a", 1), _spec.Axis("b", 0, False))}
  >>> aligned, info = weight_matching(
  ...   reference, model, spec, key=jax.random.key(0)
  ... )
  >>> print(aligned["a"], info.permutations["hidden"])
  [[1. 2.]] [1 0]
  >>> info.objectives.tolist(), info.converged
  ([28.0, 30.0, 30.0], True)
  """
  check_options(restarts=restarts, max_sweeps=max_sweeps, tolerance=tolerance)
  tree.check_match(reference, model, names=["reference", "model"])
  if spec is None:
    spec = _derive_spec.derive_spec(reference)
  sizes = _spec.group_sizes(spec, reference)
  counted = _similarity.counted_leaves(reference, select)
  _similarity.check_finite(reference=reference, model=model)
  problem = Problem(spec, reference, model, counted)
  best = None
  for run, one in enumerate(jax.random.split(key, restarts + 1)):
    start_key, order_key = jax.random.split(one)
    start = (
      _spec.random_permutations(spec, reference, start_key)
      if run
      else {group: np.arange(n) for group, n in sizes.items()}
    )
    info = ascend(
      problem, start, order_key, max_sweeps=max_sweeps, tolerance=tolerance
    )
    if best is None or info.objectives[-1] > best.objectives[-1]:
      best = info
  assert best is not None
  return _spec.apply_permutations(spec, model, best.permutations), best


def check_options(*, restarts: int, max_sweeps: int, tolerance: float) -> None:
  """Raises ValueError if an option of weight matching is out of range."""
  if restarts < 0:
    raise ValueError(f"restarts must be at least 0; got {restarts}")
  if max_sweeps < 1:
    raise ValueError(f"max_sweeps must be at least 1; got {max_sweeps}")
  if not tolerance >= 0:
    raise ValueError(f"tolerance must be at least 0; got {tolerance}")


def ascend(
  problem: Problem,
  start: Mapping[str, Any],
  key: jax.Array,
  *,
  max_sweeps: int,
  tolerance: float,
) -> _similarity.MatchingInfo:
  """Coordinate ascent from one start.

  Args:
    problem: The two networks.
    start: A permutation of each group.
    key: PRNG key of the order of the groups.
    max_sweeps: As for `weight_matching`.
    tolerance: As for `weight_matching`.

  Returns:
    The permutations and their diagnostics.
  """
  permutations = {
    group: np.asarray(permutation, np.int32)
    for group, permutation in start.items()
  }
  groups = list(permutations)
  # How often each group has changed, and for which changes of its neighbours it
  # was solved last.
  versions = dict.fromkeys(groups, 0)
  solved: dict[str, tuple[int, ...]] = {}

  def neighbourhood(group: str) -> tuple[int, ...]:
    return tuple(versions[other] for other in problem.neighbours[group])

  objectives = [problem.objective(permutations)]
  converged = False
  problem.forget()
  workers = min(len(groups), os.cpu_count() or 1, _MAX_WORKERS)
  with futures.ThreadPoolExecutor(max(1, workers)) as pool:
    for one in jax.random.split(key, max_sweeps):
      order = np.asarray(jax.random.permutation(one, len(groups)))
      total = objectives[-1]
      converged = True
      for block in _independent([groups[i] for i in order], problem.neighbours):
        pending = [g for g in block if solved.get(g) != neighbourhood(g)]
        for group in pending:
          solved[group] = neighbourhood(group)
        for group, permutation, gain, scale in _solve(
          problem, pending, permutations, versions, pool, workers
        ):
          if gain > tolerance * scale:
            permutations[group] = permutation
            versions[group] += 1
            total += gain
            converged = False
      objectives.append(total)
      if converged:
        break
  return _similarity.MatchingInfo(
    permutations={
      group: jnp.asarray(permutation, jnp.int32)
      for group, permutation in permutations.items()
    },
    objectives=np.array(objectives),
    converged=converged,
    n_iters=len(objectives) - 1,
  )


def _independent(
  order: Sequence[str], neighbours: Mapping[str, tuple[str, ...]]
) -> Iterator[list[str]]:
  """Cuts an order into blocks of groups that do not depend on each other."""
  block: list[str] = []
  for group in order:
    if any(other in block for other in neighbours[group]):
      yield block
      block = []
    block.append(group)
  if block:
    yield block


def _solve(
  problem: Problem,
  groups: Sequence[str],
  permutations: Mapping[str, np.ndarray],
  versions: Mapping[str, int],
  pool: futures.Executor,
  workers: int,
) -> Iterator[tuple[str, np.ndarray, float, float]]:
  """The best permutations of groups, their gains, and the gains' scale.

  One problem more is held than there are workers.
  """
  waiting: collections.deque[tuple[str, futures.Future[Any]]] = (
    collections.deque()
  )

  def take() -> tuple[str, np.ndarray, float, float]:
    group, future = waiting.popleft()
    permutation, gain, scale = future.result()
    if group in problem.neighbours[group]:
      gain = problem.own_gain(group, permutations, permutation)
    return group, permutation, gain, scale

  for group in groups:
    similarity = problem.similarity(group, permutations, versions)
    if similarity is None:
      continue
    finish = _assignment.start(similarity)
    old = permutations[group]
    waiting.append((group, pool.submit(_finish, similarity, finish, old)))
    if len(waiting) > workers:
      yield take()
  while waiting:
    yield take()


def _finish(
  similarity: jax.Array, finish: Callable[[], np.ndarray], old: np.ndarray
) -> tuple[np.ndarray, float, float]:
  permutation = finish()
  values = np.asarray(similarity)
  rows = np.arange(len(old))
  before = np.sum(values[rows, old], dtype=np.float64)
  after = np.sum(values[rows, permutation], dtype=np.float64)
  return permutation, float(after - before), float(abs(after))


class Problem:
  """Two networks and their specification, ready to be matched.

  Attributes:
    neighbours: For each group those that share a leaf with it; itself where two
      axes of a leaf belong to it.
  """

  def __init__(
    self,
    spec: _spec.PermutationSpec,
    reference: PyTree,
    model: PyTree,
    counted: Sequence[bool],
  ) -> None:
    self._spec, self._counted = spec, counted
    self._trees = reference, model
    # On the device once, and not with each call.
    self._references, self._models = (
      [
        jnp.asarray(leaf) if is_counted else leaf
        for leaf, is_counted in zip(
          jax.tree.leaves(params), counted, strict=True
        )
      ]
      for params in (reference, model)
    )
    self._parts = _similarity.parts_of(spec, reference, counted)
    self._known: dict[tuple[str, int], tuple[tuple[int, ...], jax.Array]] = {}
    self.neighbours = {
      group: tuple(sorted({other for part in parts for other in part.others}))
      for group, parts in self._parts.items()
    }

  def objective(self, permutations: Mapping[str, np.ndarray]) -> float:
    """The inner product of the reference and the permuted model."""
    is_identity = all(
      np.array_equal(order, np.arange(len(order)))
      for order in permutations.values()
    )
    return _similarity.objective(
      self._spec,
      *self._trees,
      self._counted,
      None if is_identity else permutations,
    )

  def forget(self) -> None:
    """Drops what depends on permutations, before a new start."""
    self._known = {
      place: value for place, value in self._known.items() if not value[0]
    }

  def similarity(
    self,
    group: str,
    permutations: Mapping[str, np.ndarray],
    versions: Mapping[str, int],
  ) -> jax.Array | None:
    """Similarities of the neurons of a group; None where no leaf counts."""
    parts = self._parts[group]
    total = None
    for i, part in enumerate(parts):
      stamp = tuple(versions[other] for other in part.others)
      known = self._known.get((group, i))
      if known is not None and known[0] == stamp:
        value = known[1]
      else:
        value = self._part(part, permutations)
        # A single part is asked for only when it has changed, but one without
        # neighbours is the same in the next run.
        if len(parts) > 1 or not stamp:
          self._known[group, i] = stamp, value
      total = value if total is None else _add(total, value)
    return total

  def _part(
    self, part: _similarity.Part, permutations: Mapping[str, np.ndarray]
  ) -> jax.Array:
    return _similarity.similarity(
      part, self._references, self._models, permutations
    )

  def own_gain(
    self,
    group: str,
    permutations: Mapping[str, np.ndarray],
    permutation: np.ndarray,
  ) -> float:
    """The gain of a group that is not linear in its permutation."""
    rows = np.arange(len(permutation))

    def value(own: np.ndarray) -> float:
      total = 0.0
      for part in self._parts[group]:
        found = self._part(part, {**permutations, group: own})
        chosen = np.asarray(found)[rows, own]
        # Each axis of a leaf counts the leaf as a whole.
        times = 1 + part.others.count(group)
        total += float(np.sum(chosen, dtype=np.float64)) / times
      return total

    return value(permutation) - value(permutations[group])


@jax.jit
def _add(x: jax.Array, y: jax.Array) -> jax.Array:
  dtype = np.result_type(x.dtype, y.dtype)
  return x.astype(dtype) + y.astype(dtype)
