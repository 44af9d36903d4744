"""Exact transport between equally many points of equal weight."""

from __future__ import annotations

import jax
import jax.custom_batching
import jax.numpy as jnp

from jaxmerge.alignment import _plan


def exact_plan(cost: jax.Array) -> _plan.TransportPlan:
  r"""Solves :math:`\min_P \sum_{gj} P_{gj} C_{gj}` with marginals 1/n.

  With equal and uniform marginals a permutation is optimal, so that this is
  an assignment problem. It is solved on the device with the Hungarian
  algorithm, in :math:`O(n^3)`. The plan is a constant to differentiation.

  Args:
    cost: Floating-point, shape [n, n]; rows are the target's points, columns
      the source's.

  Returns:
    The plan, with its permutation. Where the cost is not finite throughout,
    ``converged`` is False and the permutation means nothing.

  Raises:
    ValueError: If the cost is not a square matrix.

  References:
    Kuhn, `The Hungarian method for the assignment problem
    <https://doi.org/10.1002/nav.3800020109>`_, 1955

  >>> print(exact_plan(jnp.array([[2.0, 1.0], [1.0, 3.0]])).permutation)
  [1 0]
  """
  _plan.check_square(cost)
  return _solve(cost)


# Compiled once for each shape; outside of jit, the loops of the algorithm
# would be compiled in every call.
@jax.jit
def _solve(cost: jax.Array) -> _plan.TransportPlan:
  n = cost.shape[0]
  is_finite = jnp.all(jnp.isfinite(cost))
  solvable = jnp.where(is_finite, cost, jnp.zeros_like(cost))
  # The algorithm is written in JAX's default dtype.
  permutation = _assign(
    jax.lax.stop_gradient(solvable).astype(jnp.result_type(float))
  )
  return _plan.TransportPlan(
    plan=jax.nn.one_hot(permutation, n, dtype=cost.dtype) / n,
    permutation=permutation,
    cost=jnp.mean(jnp.take_along_axis(cost, permutation[:, None], axis=1)),
    converged=is_finite,
    n_iters=jnp.zeros((), jnp.int32),
    error=jnp.zeros((), cost.dtype),
  )


def _hungarian(cost: jax.Array) -> jax.Array:
  from optax import assignment

  rows, columns = assignment.hungarian_algorithm(cost)
  permutation = jnp.zeros(cost.shape[0], jnp.int32)
  return permutation.at[rows].set(columns.astype(jnp.int32))


@jax.custom_batching.custom_vmap
def _assign(cost: jax.Array) -> jax.Array:
  return _hungarian(cost)


@_assign.def_vmap
def _assign_many(
  axis_size: int, in_batched: list[bool], costs: jax.Array
) -> tuple[jax.Array, bool]:
  # Batched, the loops run as long as the slowest problem's and copy their
  # whole state in every step. A CPU, which gains nothing from the batch,
  # solves the problems one after the other.
  del axis_size, in_batched
  permutations = jax.lax.platform_dependent(
    costs,
    cpu=lambda costs: jax.lax.map(_assign, costs),
    default=jax.vmap(_hungarian),
  )
  return permutations, True
