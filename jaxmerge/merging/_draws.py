"""Random numbers for every entry of an array, with few calls of the cipher."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

# Below this an axis is not cut unless it is the longest: too much is rounded.
_LONG = 64


def words(key: Array, shape: tuple[int, ...]) -> Array:
  """Random 32-bit integers, each of them uniform.

  On CPUs the cipher takes longer than everything else that a rule computes. A
  key that is split off another holds at least 64 random bits and takes one
  call, of which `jax.random.bits` gives out 32. Here it serves four entries,
  which lie a quarter of an axis apart: two read a word of it each, and two the
  same words with their halves exchanged. Two entries that share a word are
  independent in their upper 16 bits; all others are independent altogether.

  Args:
    key: PRNG key.
    shape: Shape of the array.

  Returns:
    uint32 array of the shape.
  """
  if math.prod(shape) == 0 or not shape:
    return jax.random.bits(key, shape, jnp.uint32)
  long = [axis for axis, size in enumerate(shape) if size >= _LONG]
  axis = long[0] if long else int(np.argmax(shape))
  quarter = list(shape)
  quarter[axis] = -(-shape[axis] // 4)
  data = jax.random.key_data(jax.random.split(key, tuple(quarter)))
  found = [data[..., 0], data[..., 1]]
  exchanged = [(word << 16) | (word >> 16) for word in found]
  together = jax.lax.concatenate([*found, *exchanged], axis)
  return jax.lax.slice_in_dim(together, 0, shape[axis], axis=axis)


def uniform(key: Array, shape: tuple[int, ...]) -> Array:
  """Random float32 numbers in [0, 1), multiples of 2**-24; see `words`."""
  return (words(key, shape) >> 8).astype(jnp.float32) * np.float32(2**-24)


def bernoulli(key: Array, shape: tuple[int, ...], probability: Array) -> Array:
  """Booleans that are true with a probability, exact to 2**-32; see `words`.

  Args:
    key: PRNG key.
    shape: Shape of the array.
    probability: A scalar in (0, 1].

  Returns:
    Array of booleans of the shape.
  """
  number = probability.astype(jnp.result_type(float)) * 2.0**32
  # 2**32 itself is no 32-bit integer, but no word exceeds the largest.
  is_sure = number >= 2.0**32
  last = jnp.where(is_sure, 1, jnp.maximum(number, 1)).astype(jnp.uint32) - 1
  last = jnp.where(is_sure, np.uint32(2**32 - 1), last)
  return words(key, shape) <= last
