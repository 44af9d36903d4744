"""A buffer shared evenly by the classes seen so far."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge.continual import _replay_batch, _replay_state, _replay_stream
from jaxmerge.continual._replay_state import Replay, ReplayError, ReplayState

PyTree = Any


def class_balanced(capacity: int, *, num_classes: int) -> Replay:
  """Class-balancing reservoir sampling.

  Everything is stored until the buffer is filled. From then on a class is
  full once it has been the largest, or one of several. An item of a class
  that is not full takes the place of a random one of the largest classes. The
  n-th item of a full class with m items in the buffer is stored with the
  probability m / n, in the place of a random one of its class. So the items of
  a class are a uniform sample of those seen, and the sizes of classes that
  have had items enough differ by one at most.

  Here a class is full only by being the largest of a buffer that is filled:
  the lead that a class has before that is chance, and would last.

  The items are gone through one after the other, each looking at all slots.

  Args:
    capacity: Number of items to keep of all classes, >= num_classes.
    num_classes: Number of classes that there will be, >= 1.

  Returns:
    The policy.

  Raises:
    ReplayError: If an argument is out of its range.

  References:
    Chrysakis and Moens, "Online Continual Learning from Imbalanced Data",
    ICML 2020.

  >>> buffer = class_balanced(4, num_classes=2)
  >>> state = buffer.init(0)
  >>> key = jax.random.key(0)
  >>> state = buffer.add(state, jnp.arange(90), jnp.zeros(90, int), 0, key)
  >>> state = buffer.add(state, jnp.arange(9), jnp.ones(9, int), 1, key)
  >>> _replay_state.counts(state, 2).tolist()
  [2, 2]
  """
  capacity = _replay_state.check_positive("capacity", capacity)
  num_classes = _replay_state.check_positive("num_classes", num_classes)
  check_shares("class_balanced", capacity, num_classes)
  return _class_balanced(capacity, num_classes)


def check_shares(policy: str, capacity: int, num_classes: int) -> None:
  """Raises unless there is a slot for every class."""
  if capacity < num_classes:
    raise ReplayError(
      f"{policy} shares {capacity} slots between {num_classes} classes; give a"
      f" capacity of at least {num_classes}"
    )


@functools.lru_cache(maxsize=64)
def _class_balanced(capacity: int, num_classes: int) -> Replay:
  def init(example: PyTree) -> ReplayState:
    return _replay_state.empty(example, capacity, num_classes, full=True)

  def step(carry: Any, item: Any) -> tuple[Any, None]:
    """Finds the slot of one item."""
    held, writer, sizes, seen, full = carry
    index, label, keep, key = item
    stored = sizes.sum(dtype=jnp.int32)
    is_filled = stored == capacity
    largest = sizes == sizes.max()
    # Where the item may go. No slot is empty when this is used.
    place = jnp.where(full[label], held == label, largest[held])
    ends = jnp.cumsum(place, dtype=jnp.int32)
    number = jnp.where(full[label], seen[label] + 1, ends[-1])
    # Beyond the places, an item of a full class is not stored.
    draw = jax.random.randint(
      key, (), 0, jnp.maximum(number, 1), dtype=jnp.int32
    )
    slot = jnp.searchsorted(ends, draw, side="right").astype(jnp.int32)
    slot = jnp.where(is_filled, slot, stored)
    slot = jnp.where(keep, slot, capacity)
    goes = slot < capacity
    left = jnp.where(goes & is_filled, held[slot], num_classes)
    sizes = sizes.at[left].add(-1, mode="drop")
    sizes = sizes.at[jnp.where(goes, label, num_classes)].add(1, mode="drop")
    held = held.at[slot].set(label, mode="drop")
    writer = writer.at[slot].set(index, mode="drop")
    seen = seen.at[label].add(keep.astype(jnp.int32))
    full |= (sizes == sizes.max()) & (sizes.sum() == capacity)
    return (held, writer, sizes, seen, full), None

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
      slots=capacity,
      groups=num_classes,
      num_classes=num_classes,
    )
    if state.full is None:
      raise _replay_batch.other_policy("class_balanced")
    keys = _replay_batch.item_keys(key, state, batch.keep)
    n = batch.label.size
    if not n:
      return state
    carry = (
      state.label,
      jnp.full(capacity, -1, jnp.int32),
      _replay_state.counts(state, num_classes),
      state.seen,
      state.full,
    )
    label = jnp.where(batch.keep, batch.label, 0)
    index = jnp.arange(n, dtype=jnp.int32)
    (_, writer, _, seen, full), _ = jax.lax.scan(
      step, carry, (index, label, batch.keep, keys)
    )
    state = _replay_batch.write(state, batch, writer)
    return state._replace(seen=seen, full=full)

  return Replay(
    init,
    add,
    _replay_stream.describe("class_balanced", capacity, "total"),
    capacity,
    "total",
    capacity,
  )
