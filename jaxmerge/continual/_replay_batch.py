"""What every replay policy does with a batch: check, count and store."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree
from jaxmerge.continual import _replay_state
from jaxmerge.continual._replay_state import ReplayError, ReplayState

PyTree = Any

# Beyond every label that int32 holds.
_NO_LIMIT = 2**31 - 1


def prepare(
  state: ReplayState,
  items: PyTree,
  labels: Any,
  tasks: Any,
  mask: Any,
  *,
  slots: int,
  groups: int,
  num_classes: int | None = None,
  num_tasks: int | None = None,
) -> tuple[ReplayState, Batch]:
  """Checks a batch and brings it and the state into one form.

  Args:
    state: The buffer.
    items: Leaves [n, ...].
    labels: Integers [n].
    tasks: Integers [n] or a scalar.
    mask: bool [n] or None.
    slots: Number of slots that the state should have.
    groups: Number of groups that the state should count.
    num_classes: Labels must be below it, if given.
    num_tasks: Tasks must be below it, if given.

  Returns:
    The state as JAX arrays, and the batch.

  Raises:
    ReplayError: See `AddFn`.
    TreeMismatchError: See `AddFn`.
  """
  _replay_state.check_one_seed(state)
  shape = (state.label.size, state.seen.size)
  if shape != (slots, groups):
    raise ReplayError(
      f"the state has {shape[0]} slots and counts {shape[1]} groups, but the"
      f" policy has {slots} and {groups}; use the init function of the same"
      " policy"
    )
  labels, tasks = _integers("labels", labels), _integers("tasks", tasks)
  if labels.ndim != 1:
    raise ReplayError(
      f"labels must have the shape [n]; got {labels.shape}; give one label for"
      " each item"
    )
  n = labels.size
  if tasks.shape not in ((), (n,)):
    raise ReplayError(
      f"tasks has the shape {tasks.shape} for {n} labels; give one task for"
      " each item or one number for all"
    )
  if mask is not None:
    mask = _array(mask)
    if mask.shape != (n,) or mask.dtype != bool:
      raise ReplayError(
        f"mask has the shape {mask.shape} and the dtype {mask.dtype} for {n}"
        " labels; give one bool for each item"
      )
  _check_items(state.items, items, n)
  limits = (num_classes or _NO_LIMIT, num_tasks or _NO_LIMIT)
  for name, values, limit in zip(
    ("labels", "tasks"), (labels, tasks), limits, strict=True
  ):
    _check_range(name, values, mask, limit)
  keep = jnp.ones(n, bool) if mask is None else jnp.asarray(mask)
  for values, limit in zip((labels, tasks), limits, strict=True):
    keep &= jnp.asarray((values >= 0) & (values < limit))
  batch = Batch(
    jax.tree.map(jnp.asarray, items),
    jnp.asarray(labels).astype(jnp.int32),
    jnp.broadcast_to(jnp.asarray(tasks).astype(jnp.int32), (n,)),
    keep,
  )
  return _replay_state.on_device(state), batch


def other_policy(policy: str) -> ReplayError:
  """The error for a state that lacks what a policy needs."""
  return ReplayError(
    f"the state is not of {policy}; use the init function of the same policy"
  )


def places(
  group: jax.Array, keep: jax.Array, num_groups: int
) -> tuple[jax.Array, jax.Array]:
  """Numbers the items of each group in their order.

  Args:
    group: int32 [n] in [0, num_groups).
    keep: bool [n]; items that are not kept are not numbered.
    num_groups: Number of groups.

  Returns:
    The number of each item, int32 [n] from 0, without meaning for those that
    are not kept; and the size of each group, int32 [num_groups].
  """
  group = jnp.where(keep, group, num_groups)
  # Sorting needs n log n steps and no array [n, num_groups].
  order = jnp.argsort(group, stable=True)
  ordered = group[order]
  starts = jnp.searchsorted(
    ordered, jnp.arange(num_groups + 1, dtype=jnp.int32)
  ).astype(jnp.int32)
  place = jnp.arange(group.size, dtype=jnp.int32) - starts[ordered]
  place = jnp.zeros_like(group).at[order].set(place, unique_indices=True)
  return place, jnp.diff(starts)


def item_keys(
  key: jax.Array | None, state: ReplayState, keep: jax.Array
) -> jax.Array:
  """A key for each item, made of its position in the stream.

  Args:
    key: PRNG key.
    state: The buffer, which knows how many items came before.
    keep: bool [n]; padding takes up no position.

  Returns:
    Keys [n].

  Raises:
    ReplayError: If there is no key.
  """
  if key is None:
    raise ReplayError(
      "this policy draws random numbers; give add a PRNG key,"
      " jax.random.key(seed)"
    )
  position = jnp.cumsum(keep, dtype=jnp.int32) - keep.astype(jnp.int32)
  position += state.seen.sum(dtype=jnp.int32)
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, position)


def last_writers(slot: jax.Array, slots: int) -> jax.Array:
  """The last item that goes into each slot.

  Args:
    slot: int32 [n], the slot of each item; `slots` for an item without one.
    slots: Number of slots.

  Returns:
    int32 [slots], the index of an item, or -1.
  """
  index = jnp.arange(slot.size, dtype=jnp.int32)
  return jnp.full(slots, -1, jnp.int32).at[slot].max(index, mode="drop")


def write(
  state: ReplayState,
  batch: Batch,
  writer: jax.Array,
  rank: jax.Array | None = None,
) -> ReplayState:
  """Stores items.

  Args:
    state: The buffer.
    batch: The batch.
    writer: int32 [slots], the index of the item that goes into the slot, -1 to
      leave it as it is. No item may go into two slots.
    rank: int32 [n], the ranks of the items, if the state has some.

  Returns:
    The buffer with the items; `seen` and `full` are unchanged.
  """
  slots, n = writer.size, batch.label.size
  written = writer >= 0

  if n < slots:
    # Few rows: touch only these. Inside a scan they are written in place.
    # Distinct indices beyond the end, so that indices are unique.
    slot = slots + jnp.arange(n, dtype=jnp.int32)
    slot = slot.at[jnp.where(written, writer, n)].set(
      jnp.arange(slots, dtype=jnp.int32), mode="drop"
    )

    def store(old: jax.Array, new: jax.Array) -> jax.Array:
      return old.at[slot].set(new, mode="drop", unique_indices=True)

  else:
    source = jnp.maximum(writer, 0)

    def store(old: jax.Array, new: jax.Array) -> jax.Array:
      here = written.reshape(-1, *[1] * (old.ndim - 1))
      return jnp.where(here, new[source], old)

  return state._replace(
    items=jax.tree.map(store, state.items, batch.items),
    label=store(state.label, batch.label),
    task=store(state.task, batch.task),
    rank=(
      state.rank
      if state.rank is None or rank is None
      else store(state.rank, rank)
    ),
  )


def _array(value: Any) -> Any:
  """The value as an array that is still on the host if it was."""
  return value if isinstance(value, jax.Array) else np.asarray(value)


def _integers(name: str, value: Any) -> Any:
  array = _array(value)
  # An empty list has the dtype float64.
  if not array.size:
    return array.astype(np.int32)
  if not jnp.issubdtype(array.dtype, jnp.integer):
    raise ReplayError(
      f"{name} must be integers; got {array.dtype}; convert them with"
      " .astype(numpy.int32)"
    )
  # So that any limit can be compared with. What is on the host is compared as
  # it is, lest a large number wrap around.
  return array.astype(jnp.int32) if isinstance(array, jax.Array) else array


def _check_items(stored: PyTree, items: PyTree, n: int) -> None:
  """Raises unless the items are n rows of what is stored."""
  for name, leaf in zip(
    tree.leaf_names(items), jax.tree.leaves(items), strict=True
  ):
    shape = np.shape(leaf)
    if shape and shape[0] != n:
      # An item that is one array has no name.
      what = f"leaf '{name}' of items" if name else "items"
      raise ReplayError(
        f"{what} has {shape[0]} rows but labels has {n}; give one label for"
        " each item"
      )
  tree.check_match(
    jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct((n, *leaf.shape[1:]), leaf.dtype),
      stored,
    ),
    items,
    names=("the buffer", "items"),
  )


def _check_range(name: str, values: Any, mask: Any, limit: int) -> None:
  """Raises for numbers out of range, if they are known."""
  if any(isinstance(array, jax.core.Tracer) for array in (values, mask)):
    return
  known = np.asarray(values)
  if mask is not None:
    known = np.broadcast_to(known, np.shape(mask))[np.asarray(mask)]
  wrong = known[(known < 0) | (known >= limit)]
  if wrong.size:
    bound = "" if limit == _NO_LIMIT else f" and below {limit}"
    raise ReplayError(
      f"{name} must be at least 0{bound}; got {wrong[0]}; number them from 0,"
      " or make the buffer for more of them"
    )


class Batch(NamedTuple):
  """A checked batch of n items.

  Attributes:
    items: Leaves [n, ...].
    label: int32 [n].
    task: int32 [n].
    keep: bool [n], False for padding and for what is out of range.
  """

  items: PyTree
  label: jax.Array
  task: jax.Array
  keep: jax.Array
