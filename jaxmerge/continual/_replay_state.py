"""What a replay buffer holds, and what can be asked of it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


def empty(
  example: PyTree,
  slots: int,
  groups: int,
  *,
  rank: bool = False,
  full: bool = False,
) -> ReplayState:
  """A state without items.

  Args:
    example: One item: arrays, numbers or `jax.ShapeDtypeStruct`.
    slots: Number of slots.
    groups: Number of groups that are counted.
    rank: Whether the state has ranks.
    full: Whether the state marks classes as full.

  Returns:
    The state; the items are zeros.
  """
  # Shapes and dtypes as JAX sees them, without making arrays of them.
  like = jax.eval_shape(lambda one: jax.tree.map(jnp.asarray, one), example)
  none = jnp.full(slots, -1, jnp.int32)
  return ReplayState(
    jax.tree.map(
      lambda leaf: jnp.zeros((slots, *leaf.shape), leaf.dtype), like
    ),
    label=none,
    task=none,
    seen=jnp.zeros(groups, jnp.int32),
    rank=none if rank else None,
    full=jnp.zeros(groups, bool) if full else None,
  )


def valid(state: ReplayState) -> jax.Array:
  """Which slots hold an item.

  Args:
    state: The buffer, or buffers with leading axes of seeds.

  Returns:
    bool [slots], after the leading axes.
  """
  return jnp.asarray(state.label) >= 0


def filled(state: ReplayState) -> jax.Array:
  """Number of items in the buffer.

  Args:
    state: The buffer, or buffers with leading axes of seeds.

  Returns:
    int32 scalar in [0, slots], or one for each seed.
  """
  return jnp.sum(valid(state), axis=-1, dtype=jnp.int32)


def counts(state: ReplayState, num_classes: int) -> jax.Array:
  """Number of items in the buffer of each class.

  Args:
    state: The buffer (`jax.vmap` it over seeds).
    num_classes: Number of classes; items of later classes are not counted.

  Returns:
    int32 [num_classes].
  """
  # An index of -1 would mean the last class.
  index = jnp.where(valid(state), state.label, num_classes)
  ones = jnp.ones_like(index)
  return jnp.zeros(num_classes, jnp.int32).at[index].add(ones, mode="drop")


def sample(
  state: ReplayState,
  key: jax.Array,
  n: int,
  *,
  exclude_task: jax.Array | int | None = None,
) -> tuple[PyTree, jax.Array, jax.Array, jax.Array]:
  """Draws items uniformly, with replacement.

  Args:
    state: The buffer (`jax.vmap` it over seeds).
    key: PRNG key.
    n: Number of draws, >= 1; fixed when compiled.
    exclude_task: Items of this task are not drawn; may be traced.

  Returns:
    The items, leaves [n, ...]; their labels and tasks, int32 [n]; and a mask,
    bool [n], which is True everywhere, or False everywhere if there is no item
    to draw. Then the items are zeros and the labels and tasks -1.

  Raises:
    ReplayError: If n is below 1, or the state has an axis of seeds.

  >>> from jaxmerge.continual import replay
  >>> buffer = replay.ring(2)
  >>> state = buffer.add(buffer.init(0.0), np.float32([1, 2, 3]), [0, 1, 1], 0)
  >>> items, labels, tasks, mask = sample(state, jax.random.key(0), 4)
  >>> set(items.tolist()) <= {2.0, 3.0}, labels.tolist(), mask.all().item()
  (True, [1, 1, 1, 1], True)
  """
  check_positive("n", n)
  check_one_seed(state)
  state = on_device(state)
  drawable = valid(state)
  if exclude_task is not None:
    drawable &= state.task != jnp.asarray(exclude_task, jnp.int32)
  ends = jnp.cumsum(drawable, dtype=jnp.int32)
  number = ends[-1]
  draws = jax.random.randint(
    key, (n,), 0, jnp.maximum(number, 1), dtype=jnp.int32
  )
  slot = jnp.minimum(
    jnp.searchsorted(ends, draws, side="right"), state.label.size - 1
  )
  some = number > 0

  def take(leaf: jax.Array, missing: int) -> jax.Array:
    return jnp.where(some, leaf[slot], jnp.asarray(missing, leaf.dtype))

  return (
    jax.tree.map(lambda leaf: take(leaf, 0), state.items),
    take(state.label, -1),
    take(state.task, -1),
    jnp.broadcast_to(some, (n,)),
  )


def contents(state: ReplayState) -> tuple[PyTree, np.ndarray, np.ndarray]:
  """Copies what the buffer holds to the host.

  Args:
    state: The buffer of one seed.

  Returns:
    The items, leaves [filled, ...]; labels and tasks, int32 [filled]; NumPy
    arrays, in the order of the slots.

  Raises:
    ReplayError: If the state has an axis of seeds.

  >>> from jaxmerge.continual import replay
  >>> buffer = replay.ring(3)
  >>> contents(buffer.add(buffer.init(0), np.int32([5, 6]), [1, 0], 4))[0]
  array([5, 6], dtype=int32)
  """
  check_one_seed(state)
  held = np.asarray(state.label) >= 0

  def take(leaf: jax.Array) -> np.ndarray:
    return np.asarray(leaf)[held]

  return jax.tree.map(take, state.items), take(state.label), take(state.task)


def size_in_bytes(state: ReplayState) -> int:
  """Memory of the items in the buffer; empty slots do not count.

  Args:
    state: The buffer, or buffers with leading axes of seeds.

  Returns:
    Number of bytes, of all seeds together.

  >>> from jaxmerge.continual import replay
  >>> buffer = replay.ring(9)
  >>> size_in_bytes(buffer.add(buffer.init(0.0), np.float32([5, 6]), [1, 0], 4))
  8
  """
  axes = state.label.ndim
  each = sum(
    leaf.dtype.itemsize * math.prod(leaf.shape[axes:])
    for leaf in jax.tree.leaves(state.items)
  )
  return each * int(np.sum(np.asarray(state.label) >= 0))


def on_device(state: ReplayState) -> ReplayState:
  """The state as JAX arrays; one that was restored has NumPy arrays."""
  return jax.tree.map(jnp.asarray, state)


def check_one_seed(state: ReplayState) -> None:
  """Raises if the state has an axis of seeds."""
  if state.label.ndim != 1:
    raise ReplayError(
      "the state has leading axes of seeds, its label has the shape"
      f" {state.label.shape}; use jax.vmap, or take one seed with"
      " jax.tree.map(lambda leaf: leaf[seed], state)"
    )


def check_positive(name: str, value: Any) -> int:
  """The value as an integer, which must be at least one."""
  try:
    number = operator.index(value)
  except TypeError:
    number = 0
  if number < 1:
    raise ReplayError(f"{name} must be an integer of at least 1; got {value!r}")
  return number


class ReplayState(NamedTuple):
  """A replay buffer: a pytree of arrays of fixed shapes.

  It may be carried through `jax.lax.scan`, mapped over a leading axis of
  seeds by `jax.vmap`, and saved like any other tree.

  Attributes:
    items: What is stored, leaves [slots, ...]; whatever is in an empty slot
      has no meaning.
    label: int32 [slots]; -1 in an empty slot.
    task: int32 [slots]; -1 in an empty slot.
    seen: int32 [groups], the number of examples of each group offered so far,
      below 2^31 in all. Without groups there is one.
    rank: int32 [slots], the place of an item among those of its class in the
      order of choice, -1 in an empty slot; None unless the policy is herding.
    full: bool [groups], the classes that are or were the largest of a filled
      buffer; None unless the policy is class_balanced.
  """

  items: PyTree
  label: jax.Array
  task: jax.Array
  seen: jax.Array
  rank: jax.Array | None = None
  full: jax.Array | None = None


class AddFn(Protocol):
  """``add(state, items, labels, tasks, key=None, ...) -> state``."""

  def __call__(
    self,
    state: ReplayState,
    items: PyTree,
    labels: Any,
    tasks: Any,
    key: jax.Array | None = None,
    *,
    mask: Any = None,
    features: Any = None,
  ) -> ReplayState:
    """Offers a batch of n items to the buffer, in their order.

    Args:
      state: The buffer of one seed; `jax.vmap` serves several.
      items: Leaves [n, ...], otherwise like the example that ``init`` got.
      labels: Integers [n], not negative.
      tasks: Integers [n] or one for all, not negative.
      key: PRNG key; not used by ring and herding. The draws depend on the
        number of items seen before, too, so that one key may serve all calls,
        and the same stream in batches of any size then gives the same buffer.
      mask: bool [n], False for padding, which is passed over; by default
        everything is added.
      features: float [n, d], used by herding alone.

    Returns:
      The buffer afterwards.

    Raises:
      ReplayError: If there is another number of items than of labels, the key
        or the features are missing, or a label or task is negative or beyond
        the number of groups. The last is found only where labels, tasks and
        mask are not traced; inside `jax.jit` such items are passed over.
      TreeMismatchError: If the items have another structure, shape or dtype
        than those in the buffer.
    """


class Replay(NamedTuple):
  """A policy of what to keep: a pair of pure functions and what they are.

  Attributes:
    init: ``init(example) -> state``, an empty buffer. The example is one item,
      without an axis of examples: a pytree of arrays, numbers or
      `jax.ShapeDtypeStruct`.
    add: ``add(state, items, labels, tasks, key=None, *, mask=None,
      features=None) -> state``; see `AddFn`.
    description: Such as "reservoir, 500 per task".
    capacity: Number of items to keep at most, in total or per group.
    per: "total", "class" or "task".
    slots: Number of items to keep at most, in total.
  """

  init: Callable[[PyTree], ReplayState]
  add: AddFn
  description: str
  capacity: int
  per: str
  slots: int


class ReplayError(ValueError):
  """A replay buffer cannot be made or used as asked."""
