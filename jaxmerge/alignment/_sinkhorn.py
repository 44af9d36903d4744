"""Entropic transport between equally many points of equal weight."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxmerge.alignment import _plan


def sinkhorn_plan(
  cost: jax.Array,
  *,
  epsilon: float = 1e-2,
  max_iterations: int = 2000,
  threshold: float = 1e-3,
) -> _plan.TransportPlan:
  r"""Solves :math:`\min_P \langle P, C \rangle - \epsilon \bar C H(P)`.

  The marginals are 1/n, :math:`H` is the entropy and :math:`\bar C` the mean
  cost, so that ``epsilon`` has the same effect whatever the scale of the
  weights. Solved by ott-jax with Sinkhorn iterations in the log domain.

  The plan is not a permutation: it spreads each neuron over several, the
  less so the smaller ``epsilon`` is, which in turn needs more iterations.

  Args:
    cost: Floating-point, shape [n, n], not negative; rows are the target's
      points, columns the source's.
    epsilon: Strength of the entropy relative to the mean cost; positive.
    max_iterations: Largest number of iterations; positive.
    threshold: Error of the marginals (sum of the absolute differences) at
      which to stop; positive.

  Returns:
    The plan. Look at ``converged``: where it is False, the columns do not sum
    to 1/n.

  Raises:
    ValueError: If the cost is not a square matrix or an option is not
      positive.

  References:
    Cuturi, `Sinkhorn distances: lightspeed computation of optimal transport
    <https://arxiv.org/abs/1306.0895>`_, 2013

  >>> plan = sinkhorn_plan(jnp.array([[2.0, 1.0], [1.0, 3.0]])).plan
  >>> print(plan.round(3))
  [[0.  0.5]
   [0.5 0. ]]
  """
  _plan.check_square(cost)
  for name, value in (
    ("epsilon", epsilon),
    ("max_iterations", max_iterations),
    ("threshold", threshold),
  ):
    if not value > 0:
      raise ValueError(f"{name} must be positive; got {value}")
  return _solve(cost, epsilon, max_iterations, threshold)


# Compiled once for each shape and each set of options.
@functools.partial(
  jax.jit, static_argnames=("epsilon", "max_iterations", "threshold")
)
def _solve(
  cost: jax.Array, epsilon: float, max_iterations: int, threshold: float
) -> _plan.TransportPlan:
  from ott.geometry import geometry
  from ott.solvers import linear

  n = cost.shape[0]
  mean = jnp.mean(cost)
  scale = jnp.where(mean > 0, mean, jnp.ones_like(mean))
  # TF32 products would keep the iterations from converging; ott-jax itself
  # relies on the default promotion rules.
  with (
    jax.default_matmul_precision("highest"),
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    output = linear.solve(
      geometry.Geometry(cost_matrix=cost / scale, epsilon=epsilon),
      max_iterations=max_iterations,
      threshold=threshold,
      # How often the error is looked at, a divisor of the whole.
      inner_iterations=next(
        k for k in (10, 5, 2, 1) if max_iterations % k == 0
      ),
    )
    plan = output.matrix
    n_iters = jnp.asarray(output.n_iters, jnp.int32)
  uniform = 1 / n
  return _plan.TransportPlan(
    plan=plan,
    permutation=None,
    cost=jnp.sum(plan * cost),
    converged=jnp.asarray(output.converged),
    n_iters=n_iters,
    error=jnp.sum(jnp.abs(plan.sum(0) - uniform))
    + jnp.sum(jnp.abs(plan.sum(1) - uniform)),
  )
