"""Random subsets of an exact size."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.merging import _reductions, _threshold

Array = jax.Array

#: The largest array that entries are chosen from.
MOST = 2**31 - 1


def largest(words: Array, among: Array, count: Array) -> Array:
  """Marks exactly so many entries, those of the largest words.

  With random words all subsets are alike. Subsets that are chosen one after
  the other by the same words, each of what the ones before left, are a random
  partition.

  Args:
    words: Random uint32 numbers; of equal ones, the first count as larger.
    among: Booleans of the same shape: the entries to choose from.
    count: How many, uint32; at most as many as there are.

  Returns:
    Booleans of the shape.
  """
  # 0 stands for what is not to be chosen; the sign's bit is never set.
  scores = jnp.where(among, (words >> 1) | 1, 0)
  least = _threshold.kth_largest([scores], count)
  above, equal = scores > least, scores == least
  num_above, num_equal = _reductions.counts([above, equal])
  spare = count - num_above

  def first() -> Array:
    """Some of several equals; rare, and as dear as all the rest."""
    size = np.uint32(words.size)
    places = jax.lax.iota(jnp.uint32, words.size).reshape(words.shape)
    order = jnp.where(equal, size - places, 0)
    return above | (order >= _threshold.kth_largest([order], spare))

  return jax.lax.cond(spare == num_equal, lambda: above | equal, first)
