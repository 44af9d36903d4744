"""Entries of a leaf assigned to tasks, so many to each; see Tunable MagMax."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.merging import _choice, _draws, _reductions

Array = jax.Array

# Tasks by the word of `_records`.
_BITS = 32


def _records(base: Array, leaves: Sequence[Array]) -> list[Array]:
  """For each entry the tasks that are the largest of all up to them.

  Bit b of word w is task 32 w + b. So the highest bit that is set is the task
  of the largest magnitude, the next one the largest of those before it, and
  so on: one integer an entry holds what every task may have to hand on.
  """
  words: list[Array] = []
  most = jnp.abs(leaves[0] - base)
  for i, leaf in enumerate(leaves):
    magnitude = jnp.abs(leaf - base)
    # The first is one in any case, were it NaN; on ties the later task wins.
    is_record = magnitude >= most if i else jnp.ones(magnitude.shape, jnp.bool_)
    most = jnp.where(is_record, magnitude, most)
    bit = is_record.astype(jnp.uint32) << (i % _BITS)
    words[i // _BITS :] = [bit if i % _BITS == 0 else words[-1] | bit]
  return words


def _count(marks: Array) -> Array:
  return _reductions.counts([marks, ~marks])[0]


def _drop(
  step: Array,
  word: Array,
  last: int,
  is_kept: Array,
  quotas: Array,
  key: Array,
) -> Array:
  """Lets the next task hand on what exceeds its quota."""
  task = last - step
  bit = (task % _BITS).astype(jnp.uint32)
  owns = (word >> bit == 1) & ~is_kept
  count, quota = _count(owns), quotas[task]

  def drop() -> Array:
    drawn = _draws.words(jax.random.fold_in(key, task), word.shape)
    drops = _choice.largest(drawn, owns, count - quota)
    # The largest of the earlier tasks is the next bit.
    return jnp.where(drops, word ^ (np.uint32(1) << bit), word)

  return jax.lax.cond(count > quota, drop, lambda: word)


def _drop_surplus(
  words: Sequence[Array], num_tasks: int, quotas: Array, key: Array
) -> list[Array]:
  """From the last task to the second, hands on what exceeds the quotas."""
  found = list(words)
  # What a task of a higher word keeps.
  is_kept = jnp.zeros(words[0].shape, jnp.bool_)
  for number in reversed(range(len(words))):
    first = number * _BITS
    last = min(num_tasks, first + _BITS) - 1
    step = functools.partial(
      _drop, last=last, is_kept=is_kept, quotas=quotas, key=key
    )
    # The very first has nobody to hand on to.
    steps = last - max(first, 1) + 1
    found[number] = jax.lax.fori_loop(0, steps, step, words[number])
    is_kept |= found[number] != 0
  return found


def _owners(words: Sequence[Array]) -> Array:
  """The highest task of each entry, int32."""
  owner = jnp.zeros(words[0].shape, jnp.int32)
  for number, word in enumerate(words):
    highest = number * _BITS + _BITS - 1 - jax.lax.clz(word).astype(jnp.int32)
    owner = jnp.where(word != 0, highest, owner)
  return owner


def _fill(owner: Array, num_tasks: int, quotas: Array, key: Array) -> Array:
  """Shares out what the first task has too much."""

  def fill() -> Array:
    # One order of the entries serves all: each takes the next ones of it.
    drawn = _draws.words(jax.random.fold_in(key, 0), owner.shape)

    def step(task: Array, owner: Array) -> Array:
      missing = quotas[task] - _count(owner == task)

      def take() -> Array:
        return jnp.where(
          _choice.largest(drawn, owner == 0, missing), task, owner
        )

      return jax.lax.cond(missing > 0, take, lambda: owner)

    return jax.lax.fori_loop(1, num_tasks, step, owner)

  return jax.lax.cond(_count(owner == 0) > quotas[0], fill, lambda: owner)


def assign(
  base: Array, leaves: Sequence[Array], quotas: Array, key: Array
) -> Array:
  """The task that each entry of a leaf is taken from; see `tunable_magmax`.

  Args:
    base: The leaf of the base.
    leaves: Those of the models, one a task.
    quotas: uint32 [T], how many entries each task gets; their sum is the size.
    key: PRNG key of the leaf.

  Returns:
    int32 array of the shape of the leaf, from 0.
  """
  base, leaves = jax.lax.stop_gradient((base, list(leaves)))
  words = _drop_surplus(_records(base, leaves), len(leaves), quotas, key)
  return _fill(_owners(words), len(leaves), quotas, key)
