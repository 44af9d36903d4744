"""The linear assignment problem, solved where it is fastest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.custom_batching
import jax.numpy as jnp
import numpy as np

# From this size on, prices save more time than they cost.
_PRICED_FROM = 256
# Sinkhorn's iterations for the prices, and its entropy in standard deviations
# of the similarities. They change the time and not the answer.
_PRICE_ITERATIONS = 3
_PRICE_EPSILON = 0.1


def solve_assignment(similarity: jax.typing.ArrayLike) -> jax.Array:
  r"""Finds the permutation of largest total similarity.

  .. math::
    \sigma = \arg\max_\sigma \sum_g S_{g\,\sigma(g)}

  Outside of ``jax.jit`` SciPy solves it on the host, in float64: a search for
  shortest paths does little arithmetic between branches, for which a CPU is
  made. Larger problems get prices for their columns first, from a few
  iterations of Sinkhorn's algorithm on the device; they leave the answer as it
  is and shorten the paths. In a program for a CPU SciPy is called back; in one
  for an accelerator, which must not wait for the host, Optax's Hungarian
  algorithm is a loop of the program. All are exact and differ in ties at most.

  Args:
    similarity: Floating-point, shape ``[..., n, n]``; n is at least 1.

  Returns:
    int32 of shape ``[..., n]``: the column of each row. A constant to
    differentiation.

  Raises:
    ValueError: If the shape is wrong, or an entry is not finite. Traced entries
      are not checked; where they are not finite the answer is the identity.

  References:
    Crouse, `On implementing 2D rectangular assignment algorithms
    <https://doi.org/10.1109/TAES.2016.140952>`_, 2016

  >>> print(solve_assignment(jnp.array([[2.0, 3.0], [1.0, 1.5]])))
  [1 0]
  """
  if not isinstance(similarity, (jax.Array, np.ndarray)):
    similarity = jnp.asarray(similarity)
  shape = similarity.shape
  if len(shape) < 2 or shape[-1] != shape[-2] or not shape[-1]:
    raise ValueError(
      "similarity must have shape [..., n, n] with n at least 1; got shape"
      f" {shape}"
    )
  if not jnp.issubdtype(similarity.dtype, jnp.floating):
    raise ValueError(
      f"similarity must be floating-point; got {similarity.dtype}"
    )
  if isinstance(similarity, jax.core.Tracer):
    return _traced(similarity)
  matrices = similarity.reshape(-1, *shape[-2:])
  found = [start(matrix)() for matrix in matrices]
  return jnp.asarray(
    np.reshape(np.array(found, np.int32), shape[:-1]), jnp.int32
  )


def start(similarity: Any) -> Callable[[], np.ndarray]:
  """Begins on the device; the rest may run in another thread.

  Args:
    similarity: An array of shape ``[n, n]`` that is not traced.

  Returns:
    A function that solves the problem on the host and returns int32 of shape
    ``[n]``. SciPy frees the interpreter while it works.
  """
  is_large = len(similarity) >= _PRICED_FROM
  prices = _prices(jnp.asarray(similarity)) if is_large else None

  def finish() -> np.ndarray:
    from scipy import optimize

    # Negated by SciPy; a copy of our own in float64 is what it would make.
    costs = -np.asarray(similarity).astype(np.float64)
    if not np.isfinite(costs).all():
      raise ValueError(
        "similarity must be finite; got NaN or infinity, as parameters or"
        " activations with such entries give"
      )
    if prices is not None:
      offsets = np.asarray(prices).astype(np.float64)
      if np.isfinite(offsets).all():
        costs -= offsets
    return optimize.linear_sum_assignment(costs)[1].astype(np.int32)

  return finish


@jax.jit
def _prices(similarity: jax.Array) -> jax.Array:
  """Near the dual optimum, so that most rows find their column at once."""
  costs = -similarity.astype(jnp.float32)
  spread = jnp.std(costs)
  costs = costs / (_PRICE_EPSILON * jnp.where(spread > 0, spread, 1.0))

  def iterate(_: jax.Array, prices: jax.Array) -> jax.Array:
    rows = -jax.nn.logsumexp(prices[None] - costs, axis=1)
    return -jax.nn.logsumexp(rows[:, None] - costs, axis=0)

  start = jnp.zeros(costs.shape[0], costs.dtype)
  prices = jax.lax.fori_loop(0, _PRICE_ITERATIONS, iterate, start)
  return prices * (_PRICE_EPSILON * jnp.where(spread > 0, spread, 1.0))


def _on_host(similarities: jax.typing.ArrayLike) -> np.ndarray:
  """Solves a problem for each index of the leading axes, without prices."""
  from scipy import optimize

  array = np.asarray(similarities).astype(np.float64)
  n = array.shape[-1]
  found = np.empty((array.size // n**2, n), np.int32)
  for i, one in enumerate(array.reshape(-1, n, n)):
    is_finite = np.isfinite(one).all()
    found[i] = (
      optimize.linear_sum_assignment(one, maximize=True)[1]
      if is_finite
      else np.arange(n)
    )
  return found.reshape(array.shape[:-1])


def _callback(similarities: jax.Array) -> jax.Array:
  return jax.pure_callback(
    _on_host,
    jax.ShapeDtypeStruct(similarities.shape[:-1], jnp.int32),
    similarities,
    vmap_method="broadcast_all",
  )


def _hungarian(similarity: jax.Array) -> jax.Array:
  from optax import assignment

  n = similarity.shape[0]
  is_finite = jnp.isfinite(similarity).all()
  # Optax writes it in JAX's default dtype; on entries that are not finite its
  # loops may not end.
  rows, columns = assignment.hungarian_algorithm(
    jnp.where(is_finite, -similarity, jnp.zeros_like(similarity)).astype(
      jnp.result_type(float)
    )
  )
  permutation = jnp.zeros(n, jnp.int32)
  permutation = permutation.at[rows].set(columns.astype(jnp.int32))
  return jnp.where(is_finite, permutation, jnp.arange(n, dtype=jnp.int32))


@jax.custom_batching.custom_vmap
def _assign(similarity: jax.Array) -> jax.Array:
  return jax.lax.platform_dependent(
    similarity, cpu=_callback, default=_hungarian
  )


@_assign.def_vmap
def _assign_many(
  axis_size: int, in_batched: list[bool], similarities: jax.Array
) -> tuple[jax.Array, bool]:
  # One call to the host for the whole batch.
  del axis_size, in_batched
  permutations = jax.lax.platform_dependent(
    similarities, cpu=_callback, default=jax.vmap(_hungarian)
  )
  return permutations, True


@jax.jit
def _traced(similarity: jax.Array) -> jax.Array:
  shape = similarity.shape
  flat = jax.lax.stop_gradient(similarity).reshape(-1, *shape[-2:])
  return jax.vmap(_assign)(flat).reshape(shape[:-1])
