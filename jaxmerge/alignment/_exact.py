"""Exact transport: an assignment, or the network simplex."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.alignment import _assignment, _emd, _plan


def exact_plan(
  cost: jax.Array,
  a: jax.typing.ArrayLike | None = None,
  b: jax.typing.ArrayLike | None = None,
) -> _plan.TransportPlan:
  r"""Solves :math:`\min_P \langle P, C \rangle` for given marginals.

  .. math::
    P \ge 0, \quad \textstyle\sum_j P_{gj} = a_g, \quad \sum_g P_{gj} = b_j

  Between equally many points of equal weight a permutation is optimal: it is
  found as an assignment, by SciPy where the host can be asked, else by the
  Hungarian algorithm on the accelerator. All else is POT's network simplex on
  the host, which needs ``pip install 'jaxmerge[alignment]'``. Both work under
  ``jax.jit`` and ``jax.vmap``. The plan is a constant to differentiation.

  Args:
    cost: Floating-point, shape [n, m]; rows are the target's points, columns
      the source's.
    a: Shape [n], not negative, sum 1; 1/n by default.
    b: Shape [m], not negative, sum 1; 1/m by default.

  Returns:
    The plan, with its permutation if it is an assignment; float32 for half
    types. Where the cost is not finite throughout, ``converged`` is False and
    the plan means nothing.

  Raises:
    ValueError: If the cost is not a matrix, or a marginal does not fit it.
    ImportError: If POT is needed and not there.

  References:
    Crouse, `On implementing 2D rectangular assignment algorithms
    <https://doi.org/10.1109/TAES.2016.140952>`_, 2016

    Bonneel et al., `Displacement interpolation using Lagrangian mass transport
    <https://doi.org/10.1145/2070781.2024192>`_, 2011

  >>> print(exact_plan(jnp.array([[2.0, 1.0], [1.0, 3.0]])).permutation)
  [1 0]
  """
  cost = _plan.check_cost(cost)
  n, m = cost.shape
  if n == m and _is_uniform(a, n) and _is_uniform(b, n):
    is_finite = jnp.isfinite(cost).all()
    solvable = jnp.where(is_finite, cost, jnp.zeros_like(cost))
    return _of_permutation(cost, _assignment.solve_assignment(-solvable))
  a, b = _plan.check_marginals(cost, a, b)
  plan, converged = _emd.emd(cost, a, b)
  return _of_plan(cost, a, b, plan, converged)


def _is_uniform(marginal: jax.typing.ArrayLike | None, n: int) -> bool:
  if marginal is None:
    return True
  if _plan.is_traced(marginal):
    return False
  values = np.asarray(marginal, np.float64)
  return values.shape == (n,) and np.allclose(values, 1 / n, rtol=1e-6, atol=0)


# Compiled once for each shape.
@jax.jit
def _of_permutation(
  cost: jax.Array, permutation: jax.Array
) -> _plan.TransportPlan:
  n = cost.shape[0]
  return _plan.TransportPlan(
    plan=jax.nn.one_hot(permutation, n, dtype=cost.dtype) / n,
    permutation=permutation,
    cost=jnp.mean(jnp.take_along_axis(cost, permutation[:, None], axis=1)),
    converged=jnp.all(jnp.isfinite(cost)),
    n_iters=jnp.zeros((), jnp.int32),
    error=jnp.zeros((), cost.dtype),
  )


@jax.jit
def _of_plan(
  cost: jax.Array,
  a: jax.Array,
  b: jax.Array,
  plan: jax.Array,
  converged: jax.Array,
) -> _plan.TransportPlan:
  return _plan.TransportPlan(
    plan=plan,
    permutation=None,
    cost=jnp.sum(plan * cost),
    converged=converged,
    n_iters=jnp.zeros((), jnp.int32),
    error=_plan.deviation(plan, a, b),
  )
