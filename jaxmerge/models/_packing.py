"""Texts of different lengths without their padding.

Most layers of a transformer work on one token at a time, so that padding is
work for nothing: they are given the real tokens of a batch alone, one after
the other, and attention puts them back into rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Packing(NamedTuple):
  """Where the real tokens of a batch are.

  Attributes:
    mask: bool ``[b, n]``, the real tokens.
    order: int32 ``[tokens]``, places of tokens in the batch ``[b * n]``: the
      real ones in order, then, as many as are wanted, of padding.
    inverse: int32 ``[b * n]``, the place of each real token in `order`;
      `tokens` for padding.
  """

  mask: jax.Array
  order: jax.Array
  inverse: jax.Array


def packing(mask: jax.Array, tokens: int) -> Packing:
  """Finds the real tokens of a batch.

  Args:
    mask: bool ``[b, n]``, the real tokens.
    tokens: how many places there are for them; more are not among them.

  Returns:
    The packing.

  >>> packing(jnp.array([[True, False], [True, True]]), 3).order.tolist()
  [0, 2, 3]
  """
  flat = mask.reshape(-1)
  order = jnp.argsort(~flat, stable=True)[:tokens].astype(jnp.int32)
  places = jnp.cumsum(flat, dtype=jnp.int32) - 1
  inverse = jnp.where(flat, jnp.minimum(places, tokens), tokens)
  return Packing(mask, order, inverse.astype(jnp.int32))


def _rows(flat: jax.Array, inverse: jax.Array) -> jax.Array:
  zero = jnp.zeros((1, *flat.shape[1:]), flat.dtype)
  return jnp.concatenate([flat, zero])[inverse]


# The transpose of a gather is a slow scatter, where the compiler does not know
# that the other order's gather is the same.
@jax.custom_vjp
def pack(x: jax.Array, where: Packing) -> jax.Array:
  """The real tokens of a batch.

  Args:
    x: ``[b, n, dim]``.
    where: the packing.

  Returns:
    ``[tokens, dim]``.
  """
  return x.reshape(-1, x.shape[-1])[where.order]


def _pack_forward(x: jax.Array, where: Packing) -> tuple[jax.Array, Packing]:
  return pack(x, where), where


def _pack_backward(where: Packing, g: jax.Array) -> tuple[jax.Array, Any]:
  whole = _rows(g, where.inverse)
  return whole.reshape(*where.mask.shape, g.shape[-1]), None


pack.defvjp(_pack_forward, _pack_backward)


@jax.custom_vjp
def unpack(flat: jax.Array, where: Packing) -> jax.Array:
  """The batch of the real tokens, zero where there is padding.

  Args:
    flat: ``[tokens, dim]``.
    where: the packing.

  Returns:
    ``[b, n, dim]``.
  """
  whole = _rows(flat, where.inverse)
  return whole.reshape(*where.mask.shape, flat.shape[-1])


def _unpack_forward(
  flat: jax.Array, where: Packing
) -> tuple[jax.Array, Packing]:
  return unpack(flat, where), where


def _unpack_backward(where: Packing, g: jax.Array) -> tuple[jax.Array, Any]:
  real = where.mask.reshape(-1)[where.order]
  rows = g.reshape(-1, g.shape[-1])[where.order]
  return jnp.where(real[:, None], rows, jnp.zeros_like(rows)), None


unpack.defvjp(_unpack_forward, _unpack_backward)
