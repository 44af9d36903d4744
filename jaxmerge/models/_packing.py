"""Several short texts in a row, so that little padding is computed.

A transformer works on rows of tokens. Texts of about half a row leave half of
the work to padding; put behind each other, with attention within each text
alone and positions counted from its beginning, they give the same hidden
states in fewer rows.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Packing(NamedTuple):
  """Where the texts of a batch lie in fewer rows of the same length.

  Attributes:
    fits: bool, a scalar: whether there is room for all texts.
    source: int32 ``[rows, n]``, the place in the batch ``[b * n]`` of each
      token; ``b * n`` where there is none.
    target: int32 ``[b, n]``, the place among the rows ``[rows * n]`` of each
      token; ``rows * n`` for padding.
    text: int32 ``[rows, n]``, the number of the text of each token; -1 where
      there is none.
    position: int32 ``[rows, n]``, the place of each token in its text.
  """

  fits: jax.Array
  source: jax.Array
  target: jax.Array
  text: jax.Array
  position: jax.Array


def pack_texts(mask: jax.Array, rows: int) -> Packing:
  """Puts the texts of a batch into fewer rows, the longest first.

  Each text goes into the row that it leaves least room in (best fit
  decreasing). The result is for `Bert`, instead of the mask. Where the texts
  do not fit, `Bert` must be given the mask::

      packing = pack_texts(mask, rows)
      output = jax.lax.cond(
        packing.fits,
        lambda: model.apply(variables, ids, packing),
        lambda: model.apply(variables, ids, mask),
      )

  Vectorised by `jax.vmap`, over several seeds say, both would be computed, and
  nothing is saved.

  Args:
    mask: bool ``[b, n]``, True for the tokens of a text, which padding follows.
    rows: How many rows there are, at most b.

  Returns:
    The packing.

  Raises:
    ValueError: If the number of rows is out of its range.

  References:
    Krell et al., `Efficient sequence packing without cross-contamination
    <https://arxiv.org/abs/2107.02027>`_, 2021

  >>> mask = jnp.arange(4) < jnp.array([[2], [4], [1]])
  >>> found = pack_texts(mask, 2)
  >>> bool(found.fits), found.text.tolist()
  (True, [[1, 1, 1, 1], [0, 0, 2, -1]])
  """
  count, length = mask.shape
  if not 1 <= rows <= count:
    raise ValueError(
      f"rows must lie in 1..{count}, the number of texts; got {rows}"
    )
  lengths = mask.sum(axis=1, dtype=jnp.int32)
  order = jnp.argsort(-lengths, stable=True).astype(jnp.int32)

  def place(
    free: jax.Array, size: jax.Array
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    room = jnp.where(free >= size, free, length + 1)
    row = room.argmin().astype(jnp.int32)
    good = room[row] <= length
    first = row * length + length - free[row]
    return free.at[row].add(jnp.where(good, -size, 0)), (first, good)

  free = jnp.full((rows,), length, jnp.int32)
  _, (firsts, good) = jax.lax.scan(place, free, lengths[order])
  first = jnp.zeros((count,), jnp.int32).at[order].set(firsts)
  within = jnp.arange(length, dtype=jnp.int32)[None]
  nowhere = rows * length
  target = jnp.where(mask, first[:, None] + within, nowhere)
  places = jnp.arange(count * length, dtype=jnp.int32)
  source = jnp.full((nowhere,), count * length, jnp.int32)
  source = source.at[target.reshape(-1)].set(places, mode="drop")
  there = source < count * length
  return Packing(
    good.all(),
    source.reshape(rows, length),
    target,
    jnp.where(there, source // length, -1).reshape(rows, length),
    jnp.where(there, source % length, 0).reshape(rows, length),
  )


def packed(tokens: jax.Array, packing: Packing, empty: int = 0) -> jax.Array:
  """Tokens in the rows of a packing.

  Args:
    tokens: ``[b, n]``.
    packing: The packing.
    empty: What stands where there is no token.

  Returns:
    ``[rows, n]``.
  """
  flat = jnp.append(tokens.reshape(-1), jnp.asarray(empty, tokens.dtype))
  return flat[packing.source]


def unpacked(x: jax.Array, packing: Packing) -> jax.Array:
  """Hidden states in the rows of the batch, 0 for padding.

  Args:
    x: ``[rows, n, dim]``.
    packing: The packing.

  Returns:
    ``[b, n, dim]``; NaN if the texts did not fit.
  """
  flat = x.reshape(-1, x.shape[-1])
  flat = jnp.concatenate([flat, jnp.zeros_like(flat[:1])])
  found = flat[packing.target]
  return jnp.where(packing.fits, found, jnp.full_like(found, jnp.nan))


def attention_mask(packing: Packing) -> jax.Array:
  """Which tokens see each other: those of one text; bool ``[rows, n, n]``.

  Where there is no token, nothing is lost by looking at its like.
  """
  return packing.text[:, :, None] == packing.text[:, None, :]
