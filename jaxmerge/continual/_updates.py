"""Optax transformations of the last kind: of the step that is made.

They come last in a chain, behind the learning rate, so that what they promise
holds for the parameters whatever the optimizer before them. What they need to
know of the tasks before is in `frozen`, an argument of the compiled program.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmerge import tree as tree_lib

PyTree = Any


class PathState(NamedTuple):
  """Snapshots of the parameters along a run.

  Attributes:
    steps: number of steps made.
    length: the way made so far, the sum of the norms of the steps.
    spacing: the way between two snapshots.
    marks: `[slots]`, the way at which each snapshot was taken, infinite where
      none was.
    slot: where the parameters of the last step are.
    snapshots: leaves `[slots, ...]`.
  """

  steps: jax.Array
  length: jax.Array
  spacing: jax.Array
  marks: jax.Array
  slot: jax.Array
  snapshots: PyTree


def _start(params: PyTree, slots: int) -> PathState:
  return PathState(
    steps=jnp.zeros((), jnp.int32),
    length=jnp.zeros(()),
    spacing=jnp.zeros(()),
    marks=jnp.full(slots, jnp.inf),
    slot=jnp.zeros((), jnp.int32),
    snapshots=jax.tree.map(
      lambda leaf: jnp.zeros((slots, *leaf.shape), leaf.dtype), params
    ),
  )


def _written(state: PathState, updates: PyTree, params: PyTree) -> PathState:
  """The state after a step, the parameters written where they belong.

  A slot is written in every step, until the next one's turn comes: a write
  costs little, while a condition would copy all slots.
  """
  new = optax.apply_updates(params, updates)
  way = jnp.sqrt(jnp.asarray(tree_lib.dot(updates, updates), jnp.float32))
  return state._replace(
    steps=state.steps + 1,
    length=state.length + way,
    snapshots=jax.tree.map(
      lambda held, leaf: held.at[state.slot].set(leaf), state.snapshots, new
    ),
  )


# Cached: equal transformations share one compiled epoch.
@functools.lru_cache(maxsize=16)
def keep_steps(steps: tuple[int, ...]) -> optax.GradientTransformationExtraArgs:
  """Keeps the parameters as they are after some steps.

  Args:
    steps: the numbers of these steps, from 1 on, rising.

  Returns:
    The transformation, whose state is a `PathState` with a slot a snapshot,
    and one more.
  """

  def init(params: PyTree) -> PathState:
    return _start(params, len(steps) + 1)

  def update(
    updates: PyTree, state: PathState, params: PyTree = None, **extra: Any
  ) -> tuple[PyTree, PathState]:
    del extra
    state = _written(state, updates, params)
    due = (state.steps == jnp.asarray(steps, jnp.int32)).any()
    marks = state.marks.at[state.slot].set(state.length)
    return updates, state._replace(
      marks=jnp.where(due, marks, state.marks),
      slot=state.slot + due.astype(jnp.int32),
    )

  return optax.GradientTransformationExtraArgs(init, update)


# The spacing to begin with, as a part of the first step's norm.
_FIRST = 0.25


def _bins(marks: jax.Array, spacing: jax.Array) -> jax.Array:
  return jnp.floor(marks / jnp.where(spacing > 0, spacing, 1.0))


def _first_of_bins(marks: jax.Array, spacing: jax.Array) -> jax.Array:
  """Whether each mark is the first one in its piece of the way."""
  before = jnp.where(marks[None] < marks[:, None], marks[None], -spacing)
  return _bins(marks, spacing) > _bins(before.max(axis=1), spacing)


@functools.lru_cache(maxsize=16)
def keep_distances(slots: int) -> optax.GradientTransformationExtraArgs:
  """Keeps snapshots of the parameters, evenly spaced along the way.

  How long the way will be is not known beforehand. So it is cut into pieces of
  one length, and the first snapshot in each is kept; when the slots are full,
  the pieces are made so long that half of the slots have room for all of them.

  Args:
    slots: number of slots, at least 4.

  Returns:
    The transformation, whose state is a `PathState`.
  """

  def init(params: PyTree) -> PathState:
    return _start(params, slots)

  def update(
    updates: PyTree, state: PathState, params: PyTree = None, **extra: Any
  ) -> tuple[PyTree, PathState]:
    del extra
    before = state.length
    state = _written(state, updates, params)
    spacing = jnp.where(
      state.spacing == 0, _FIRST * (state.length - before), state.spacing
    )
    last = jnp.where(jnp.isfinite(state.marks), state.marks, 0.0).max()
    due = (spacing > 0) & (_bins(state.length, spacing) > _bins(last, spacing))
    marks = jnp.where(
      due, state.marks.at[state.slot].set(state.length), state.marks
    )
    full = jnp.isfinite(marks).all()
    spacing = jnp.where(full, 2 * state.length / slots, spacing)
    kept = _first_of_bins(marks, spacing) | ~full
    marks = jnp.where(kept, marks, jnp.inf)
    free = jnp.argmax(jnp.isinf(marks)).astype(jnp.int32)
    return updates, state._replace(
      spacing=spacing,
      marks=marks,
      slot=jnp.where(due, free, state.slot),
    )

  return optax.GradientTransformationExtraArgs(init, update)


@functools.lru_cache(maxsize=1)
def project() -> optax.GradientTransformationExtraArgs:
  """Takes out of every step what the layers of earlier tasks would notice.

      U <- U - P U

  for each kernel, laid out as `[in, out]`, with P the projector on the inputs
  of its layer that are to be spared; parameters without one keep their step
  times `free`. `frozen["projection"]` has the `projectors` by the names of the
  leaves, and `free`.

  Returns:
    The transformation.
  """

  def update(
    updates: PyTree, state: Any, params: PyTree = None, **extra: Any
  ) -> tuple[PyTree, Any]:
    del params
    given = extra["frozen"]["projection"]
    projectors = given["projectors"]

    def one(name: str, leaf: jax.Array) -> jax.Array:
      if name not in projectors:
        return leaf * given["free"].astype(leaf.dtype)
      matrix = projectors[name].astype(leaf.dtype)
      rows = leaf.reshape(len(matrix), -1)
      # Accelerators multiply in less than float32 by default.
      held = jnp.matmul(matrix, rows, precision=jax.lax.Precision.HIGHEST)
      return (rows - held).reshape(leaf.shape)

    names = tree_lib.leaf_names(updates)
    leaves, structure = jax.tree.flatten(updates)
    made = [one(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
    return jax.tree.unflatten(structure, made), state

  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update
  )


@functools.lru_cache(maxsize=16)
def align_signs(period: int) -> optax.GradientTransformationExtraArgs:
  """Resets what has gone over to the other sign, every so many steps.

  `frozen["signs"]` has, for each parameter, the `sign` that it is to have
  relative to `origin`, 0 for any, and the `value` that it is reset to.

  Args:
    period: number of steps between two alignments.

  Returns:
    The transformation.
  """

  def aligned(new: PyTree, given: dict[str, PyTree]) -> PyTree:
    def one(
      leaf: jax.Array, sign: jax.Array, origin: jax.Array, value: jax.Array
    ) -> jax.Array:
      other = (sign != 0) & (jnp.sign(leaf - origin) != sign.astype(leaf.dtype))
      return jnp.where(other, value, leaf)

    return jax.tree.map(
      one, new, given["sign"], given["origin"], given["value"]
    )

  def update(
    updates: PyTree, state: jax.Array, params: PyTree = None, **extra: Any
  ) -> tuple[PyTree, jax.Array]:
    given = extra["frozen"]["signs"]

    def reset(updates: PyTree) -> PyTree:
      new = aligned(optax.apply_updates(params, updates), given)
      return jax.tree.map(jnp.subtract, new, params)

    updates = jax.lax.cond(
      (state + 1) % period == 0, reset, lambda updates: updates, updates
    )
    return updates, state + 1

  return optax.GradientTransformationExtraArgs(
    lambda params: jnp.zeros((), jnp.int32), update
  )
