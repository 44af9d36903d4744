"""A buffer of exemplars whose mean is near the mean of their class."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.continual import (
  _replay_balanced,
  _replay_batch,
  _replay_state,
  _replay_stream,
)
from jaxmerge.continual._replay_state import Replay, ReplayError, ReplayState

PyTree = Any


def herding(capacity: int, *, num_classes: int, per: str = "total") -> Replay:
  """Keeps the items whose mean feature is nearest to that of their class.

  Of the items of a class, with features f_i and their mean mu, the k-th that
  is chosen is

    p_k = argmin_i || mu - (f_i + f_p_1 + ... + f_p_(k-1)) / k ||,

  among those that are not chosen yet, the first of equal ones. A shorter list
  is the beginning of a longer one, so that dropping the last of a class leaves
  what would have been chosen. It draws no random numbers and takes no key.

  ``add`` must get all items of a class at once, and their features; items of
  the class that are in the buffer already are dropped. iCaRL divides the
  features by their norms first; do so if you want to. The sums are in float32.

  Args:
    capacity: Number of items to keep, >= 1: of each class, or of all, then
      >= num_classes.
    num_classes: Number of classes that there will be, >= 1.
    per: "class", or "total" for m = floor(capacity / classes seen so far) of
      each class. The classes before are then cut to the first m chosen.

  Returns:
    The policy. The state has the place in the order of choice as `rank`.

  Raises:
    ReplayError: If an argument is out of its range or missing.

  References:
    Rebuffi et al., "iCaRL: Incremental Classifier and Representation
    Learning", CVPR 2017.

  >>> buffer = herding(2, num_classes=2)
  >>> x = jnp.array([0.0, 4.0, 5.0, 9.0])
  >>> state = buffer.add(buffer.init(0.0), x, [0] * 4, 0, features=x[:, None])
  >>> state.items.tolist(), state.rank.tolist()
  ([4.0, 5.0], [0, 1])
  >>> state = buffer.add(state, x, [1] * 4, 1, features=x[:, None])
  >>> state.items.tolist(), state.label.tolist()
  ([4.0, 4.0], [0, 1])
  """
  capacity = _replay_state.check_positive("capacity", capacity)
  num_classes = _replay_state.check_positive("num_classes", num_classes)
  _replay_stream.check_per("herding", per, ("total", "class"))
  if per == "total":
    _replay_balanced.check_shares("herding", capacity, num_classes)
  return _herding(capacity, num_classes, per)


def _check_features(features: Any, n: int) -> jax.Array:
  if features is None:
    raise ReplayError(
      "herding chooses items by their features; give add the features, float"
      " [n, d]"
    )
  if np.ndim(features) != 2 or np.shape(features)[0] != n:
    raise ReplayError(
      f"features has the shape {np.shape(features)} for {n} labels; give one"
      " row for each item"
    )
  return jnp.asarray(features).astype(jnp.float32)


def _choose(
  features: jax.Array, group: jax.Array, sizes: jax.Array, quota: jax.Array
) -> jax.Array:
  """Chooses greedily in all classes at the same time.

  Args:
    features: float32 [n, d].
    group: int32 [n], the class, or num_classes for what takes no part.
    sizes: int32 [num_classes], the number of items of each class.
    quota: int32 scalar, the number to choose of each class.

  Returns:
    int32 [n], the order of choice from 0, -1 for what is not chosen.
  """
  # A class of its own for what takes no part, of which none is chosen.
  groups = sizes.size + 1
  limit = jnp.append(jnp.minimum(sizes, quota), 0)
  size = jnp.maximum(jnp.append(sizes, 0), 1).astype(jnp.float32)
  mean = jax.ops.segment_sum(features, group, groups) / size[:, None]
  index = jnp.arange(group.size, dtype=jnp.int32)

  def step(
    k: jax.Array, carry: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, jax.Array]:
    rank, total = carry
    target = (k + 1).astype(jnp.float32) * mean - total
    distance = jnp.square(target[group] - features).sum(-1)
    left = (rank < 0) & (k < limit[group])
    # Features that are not finite are chosen last.
    distance = jnp.where(left & ~jnp.isnan(distance), distance, jnp.inf)
    best = jax.ops.segment_min(distance, group, groups)
    nearest = left & (distance == best[group])
    first = jax.ops.segment_min(
      jnp.where(nearest, index, group.size), group, groups
    )
    rank = jnp.where(nearest & (index == first[group]), k, rank)
    chosen = features[jnp.minimum(first, group.size - 1)]
    total += jnp.where((k < limit)[:, None], chosen, 0.0)
    return rank, total

  rank, _ = jax.lax.fori_loop(
    jnp.int32(0),
    limit.max(),
    step,
    (jnp.full(group.size, -1, jnp.int32), jnp.zeros_like(mean)),
  )
  return rank


@functools.lru_cache(maxsize=64)
def _herding(capacity: int, num_classes: int, per: str) -> Replay:
  slots = capacity * (num_classes if per == "class" else 1)

  def init(example: PyTree) -> ReplayState:
    return _replay_state.empty(example, slots, num_classes, rank=True)

  def add(
    state: ReplayState,
    items: PyTree,
    labels: Any,
    tasks: Any,
    key: jax.Array | None = None,
    *,
    mask: Any = None,
    features: Any = None,
  ) -> ReplayState:
    del key
    state, batch = _replay_batch.prepare(
      state,
      items,
      labels,
      tasks,
      mask,
      slots=slots,
      groups=num_classes,
      num_classes=num_classes,
    )
    if state.rank is None:
      raise _replay_batch.other_policy("herding")
    n = batch.label.size
    features = _check_features(features, n)
    if not n:
      return state
    group = jnp.where(batch.keep, batch.label, num_classes)
    sizes = jnp.zeros(num_classes, jnp.int32)
    sizes = sizes.at[group].add(1, mode="drop")
    seen = state.seen + sizes
    quota = jnp.int32(capacity)
    if per == "total":
      classes = (seen > 0).sum(dtype=jnp.int32)
      quota //= jnp.maximum(classes, 1)
    rank = _choose(features, group, sizes, quota)

    stays = (
      _replay_state.valid(state)
      & (state.rank < quota)
      & (sizes[state.label] == 0)
    )
    state = state._replace(
      label=jnp.where(stays, state.label, -1),
      task=jnp.where(stays, state.task, -1),
      rank=jnp.where(stays, state.rank, -1),
      seen=seen,
    )
    # The chosen ones, by class and rank, into the free slots. What stays is
    # not moved.
    order = jnp.lexsort((rank, group, rank < 0)).astype(jnp.int32)
    free = jnp.argsort(stays, stable=True)
    number = min(n, slots)
    writer = jnp.full(slots, -1, jnp.int32)
    writer = writer.at[free[:number]].set(
      jnp.where(rank[order] < 0, -1, order)[:number]
    )
    return _replay_batch.write(state, batch, writer, rank)

  return Replay(
    init,
    add,
    _replay_stream.describe("herding", capacity, per),
    capacity,
    per,
    slots,
  )
