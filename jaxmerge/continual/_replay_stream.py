"""Buffers that take items as they come: a reservoir, and the last ones."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.continual import _replay_batch, _replay_state
from jaxmerge.continual._replay_state import Replay, ReplayError, ReplayState

PyTree = Any


def reservoir(
  capacity: int, *, per: str = "total", num_groups: int | None = None
) -> Replay:
  """Keeps a uniform sample, without replacement, of everything seen.

  Algorithm R. Of a group of which s items came before, the next one is put
  into slot s while s < capacity; after that into slot j ~ U{0, ..., s} if
  j < capacity, and nowhere otherwise. At any time every set of ``capacity``
  items is equally likely, however the stream was cut into batches.

  Args:
    capacity: Number of items to keep, >= 1: of the stream, or of each group.
    per: "total" for one sample of the stream, "class" for one of each class,
      "task" for one of each task.
    num_groups: Number of classes or tasks; needed unless ``per`` is "total".

  Returns:
    The policy. Group g has the slots from g * capacity on.

  Raises:
    ReplayError: If an argument is out of its range or missing.

  References:
    Vitter, "Random Sampling with a Reservoir", ACM Transactions on
    Mathematical Software 11, 1985.

  >>> buffer = reservoir(3)
  >>> stream = jnp.arange(9)
  >>> state = buffer.add(
  ...   buffer.init(0), stream, jnp.zeros(9, int), 0, jax.random.key(0)
  ... )
  >>> buffer.description, len(set(state.items.tolist())), state.seen.tolist()
  ('reservoir, 3 in total', 3, [9])
  """
  return _reservoir(*_check("reservoir", capacity, per, num_groups))


def ring(
  capacity: int, *, per: str = "total", num_groups: int | None = None
) -> Replay:
  """Keeps the last items: first in, first out.

  The item of a group of which s came before goes into the group's slot
  s mod capacity. It draws no random numbers and takes no key.

  Args:
    capacity: Number of items to keep, >= 1: of the stream, or of each group.
    per: "total" for the last of the stream, "class" for the last of each
      class, "task" for the last of each task.
    num_groups: Number of classes or tasks; needed unless ``per`` is "total".

  Returns:
    The policy. Group g has the slots from g * capacity on.

  Raises:
    ReplayError: If an argument is out of its range or missing.

  References:
    Chaudhry et al., "On Tiny Episodic Memories in Continual Learning", 2019,
    arXiv:1902.10486.

  >>> buffer = ring(3)
  >>> stream = jnp.arange(5)
  >>> buffer.add(buffer.init(0), stream, stream, 0).items.tolist()
  [3, 4, 2]
  """
  return _ring(*_check("ring", capacity, per, num_groups))


def describe(policy: str, capacity: int, per: str) -> str:
  """The description of a policy."""
  return f"{policy}, {capacity} {'in' if per == 'total' else 'per'} {per}"


def check_per(policy: str, per: Any, known: tuple[str, ...]) -> None:
  """Raises unless a policy knows what the capacity is counted per."""
  if per not in known:
    raise ReplayError(
      f"unknown per {per!r} for {policy}; choose from {', '.join(known)}"
    )


def _check(
  policy: str, capacity: Any, per: Any, num_groups: Any
) -> tuple[int, str, int]:
  """The arguments of a policy, checked; one group for the whole stream."""
  capacity = _replay_state.check_positive("capacity", capacity)
  check_per(policy, per, ("total", "class", "task"))
  if per == "total":
    return capacity, per, 1
  if num_groups is None:
    raise ReplayError(
      f"{policy} per {per} needs the number of groups; give num_groups, how"
      f" many {'classes' if per == 'class' else 'tasks'} there will be"
    )
  return capacity, per, _replay_state.check_positive("num_groups", num_groups)


def _group(
  per: str, num_groups: int, batch: _replay_batch.Batch
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The group of each item, its place there, and the groups' sizes."""
  groups = {
    "total": jnp.zeros_like(batch.label),
    "class": batch.label,
    "task": batch.task,
  }
  # What is out of range is not kept, but must not index anything either.
  group = jnp.where(batch.keep, groups[per], 0)
  return group, *_replay_batch.places(group, batch.keep, num_groups)


def _limits(per: str, num_groups: int) -> dict[str, int]:
  names = {"class": "num_classes", "task": "num_tasks"}
  return {names[per]: num_groups} if per in names else {}


# Equal arguments give the same functions, and so one compilation.
@functools.lru_cache(maxsize=64)
def _reservoir(capacity: int, per: str, num_groups: int) -> Replay:
  slots = capacity * num_groups

  def init(example: PyTree) -> ReplayState:
    return _replay_state.empty(example, slots, num_groups)

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
    del features
    state, batch = _replay_batch.prepare(
      state,
      items,
      labels,
      tasks,
      mask,
      slots=slots,
      groups=num_groups,
      **_limits(per, num_groups),
    )
    keys = _replay_batch.item_keys(key, state, batch.keep)
    if not batch.label.size:
      return state
    group, place, sizes = _group(per, num_groups, batch)
    before = state.seen[group] + place

    def draw(key: jax.Array, before: jax.Array) -> jax.Array:
      return jax.random.randint(key, (), 0, before + 1, dtype=jnp.int32)

    place = jnp.where(before < capacity, before, jax.vmap(draw)(keys, before))
    slot = jnp.where(
      batch.keep & (place < capacity), group * capacity + place, slots
    )
    writer = _replay_batch.last_writers(slot, slots)
    state = _replay_batch.write(state, batch, writer)
    return state._replace(seen=state.seen + sizes)

  return Replay(
    init, add, describe("reservoir", capacity, per), capacity, per, slots
  )


@functools.lru_cache(maxsize=64)
def _ring(capacity: int, per: str, num_groups: int) -> Replay:
  slots = capacity * num_groups

  def init(example: PyTree) -> ReplayState:
    return _replay_state.empty(example, slots, num_groups)

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
    del key, features
    state, batch = _replay_batch.prepare(
      state,
      items,
      labels,
      tasks,
      mask,
      slots=slots,
      groups=num_groups,
      **_limits(per, num_groups),
    )
    if not batch.label.size:
      return state
    group, place, sizes = _group(per, num_groups, batch)
    place = (state.seen[group] + place) % capacity
    slot = jnp.where(batch.keep, group * capacity + place, slots)
    writer = _replay_batch.last_writers(slot, slots)
    state = _replay_batch.write(state, batch, writer)
    return state._replace(seen=state.seen + sizes)

  return Replay(
    init, add, describe("ring", capacity, per), capacity, per, slots
  )
