"""The answer of a transport solver."""

from __future__ import annotations

from typing import NamedTuple

import jax


def check_square(cost: jax.Array) -> None:
  """Raises unless the cost is a square matrix that is not empty."""
  if cost.ndim != 2 or cost.shape[0] != cost.shape[1] or not cost.shape[0]:
    raise ValueError(
      f"cost must be a square matrix, not empty; got shape {cost.shape}; map a"
      " leading axis with jax.vmap"
    )


class TransportPlan(NamedTuple):
  """A transport plan between n points and n points, and its diagnostics.

  Attributes:
    plan: Shape [n, n]. Rows are the target's points, columns the source's;
      every row and every column sums to 1/n.
    permutation: Shape [n], the source's point for each of the target's, or
      None where the plan is not a permutation.
    cost: The transport cost, the sum of plan times ground cost.
    converged: Whether the solver reached its tolerance.
    n_iters: Number of iterations; 0 for a solver that is not iterative.
    error: Sum of the absolute differences of all row and column sums from
      1/n.
  """

  plan: jax.Array
  permutation: jax.Array | None
  cost: jax.Array
  converged: jax.Array
  n_iters: jax.Array
  error: jax.Array
