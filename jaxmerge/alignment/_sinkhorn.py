"""Entropic transport, balanced and unbalanced."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxmerge.alignment import _plan


def sinkhorn_plan(
  cost: jax.Array,
  a: jax.typing.ArrayLike | None = None,
  b: jax.typing.ArrayLike | None = None,
  *,
  epsilon: float = 1e-2,
  tau_a: float = 1.0,
  tau_b: float = 1.0,
  max_iterations: int = 2000,
  threshold: float = 1e-3,
  strict: bool = False,
) -> _plan.TransportPlan:
  r"""Solves :math:`\min_P \langle P, C \rangle - \epsilon \bar C H(P)`.

  :math:`H` is the entropy and :math:`\bar C` the mean cost, so that ``epsilon``
  has the same effect whatever the scale of the weights. The marginals are a and
  b, exactly with :math:`\tau = 1`; below, they bend for a price, and mass that
  finds no near partner is left behind (unbalanced transport):

  .. math::
    \min_P \langle P, C \rangle - \epsilon \bar C H(P)
      + \rho_a \mathrm{KL}(P 1 \| a) + \rho_b \mathrm{KL}(P^T 1 \| b), \quad
    \tau = \frac{\rho}{\rho + \epsilon \bar C}

  Solved by ott-jax with Sinkhorn iterations in the log domain, with matrix
  products of full precision.

  The plan is not a permutation: it spreads each neuron over several, the
  less so the smaller ``epsilon`` is, which in turn needs more iterations.

  Args:
    cost: Floating-point, shape [n, m], not negative; rows are the target's
      points, columns the source's.
    a: Shape [n], not negative, sum 1; 1/n by default.
    b: Shape [m], not negative, sum 1; 1/m by default.
    epsilon: Strength of the entropy relative to the mean cost; positive.
    tau_a: How firmly the rows sum to ``a``, in (0, 1].
    tau_b: How firmly the columns sum to ``b``, in (0, 1].
    max_iterations: Largest number of iterations; positive.
    threshold: Error of the marginals (sum of the absolute differences) at
      which to stop; positive. Unbalanced, the change of the potentials.
    strict: Whether not to converge is an error; it is a warning otherwise.
      Under ``jax.jit`` and ``jax.vmap`` it is neither: look at ``converged``.

  Returns:
    The plan, float32 for half types. Where ``converged`` is False, the columns
    do not sum to b.

  Raises:
    ValueError: If the cost is not a matrix, a marginal does not fit it, or an
      option is out of its range.
    ConvergenceError: With ``strict``, if the threshold was not reached.

  References:
    Cuturi, `Sinkhorn distances: lightspeed computation of optimal transport
    <https://arxiv.org/abs/1306.0895>`_, 2013

    Chizat et al., `Scaling algorithms for unbalanced transport problems
    <https://arxiv.org/abs/1607.05816>`_, 2016

  >>> plan = sinkhorn_plan(jnp.array([[2.0, 1.0], [1.0, 3.0]])).plan
  >>> print(plan.round(3))
  [[0.  0.5]
   [0.5 0. ]]
  """
  cost = _plan.check_cost(cost)
  check_options(epsilon, tau_a, tau_b, max_iterations, threshold)
  a, b = _plan.check_marginals(cost, a, b)
  plan = solve(cost, a, b, epsilon, tau_a, tau_b, max_iterations, threshold)
  _plan.report(plan, "", strict)
  return plan


def check_options(
  epsilon: float,
  tau_a: float,
  tau_b: float,
  max_iterations: int,
  threshold: float,
) -> None:
  """Raises ValueError where an option is out of its range."""
  for name, value in (
    ("epsilon", epsilon),
    ("max_iterations", max_iterations),
    ("threshold", threshold),
  ):
    if not value > 0:
      raise ValueError(f"{name} must be positive; got {value}")
  for name, value in (("tau_a", tau_a), ("tau_b", tau_b)):
    if not 0 < value <= 1:
      raise ValueError(
        f"{name} must lie in (0, 1], where 1 keeps the marginal; got {value}"
      )


# Compiled once for each shape and each set of options.
@functools.partial(
  jax.jit,
  static_argnames=(
    "epsilon",
    "tau_a",
    "tau_b",
    "max_iterations",
    "threshold",
  ),
)
def solve(
  cost: jax.Array,
  a: jax.Array,
  b: jax.Array,
  epsilon: float,
  tau_a: float,
  tau_b: float,
  max_iterations: int,
  threshold: float,
) -> _plan.TransportPlan:
  """Solves; nothing is checked or reported."""
  from ott.geometry import geometry
  from ott.solvers import linear

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
      a=a,
      b=b,
      tau_a=tau_a,
      tau_b=tau_b,
      max_iterations=max_iterations,
      threshold=threshold,
      # How often the error is looked at, a divisor of the whole.
      inner_iterations=next(
        k for k in (10, 5, 2, 1) if max_iterations % k == 0
      ),
    )
    plan = output.matrix
    n_iters = jnp.asarray(output.n_iters, jnp.int32)
  return _plan.TransportPlan(
    plan=plan,
    permutation=None,
    cost=jnp.sum(plan * cost),
    converged=jnp.asarray(output.converged),
    n_iters=n_iters,
    error=_plan.deviation(plan, a, b),
  )
