"""The answer of a transport solver, and what is asked of plans and costs."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree


def is_traced(*arrays: jax.typing.ArrayLike | None) -> bool:
  """Whether any of the arrays has no values yet."""
  return any(isinstance(array, jax.core.Tracer) for array in arrays)


def check_cost(cost: jax.Array) -> jax.Array:
  """Raises unless the cost is a matrix, not empty; widens half types."""
  if cost.ndim != 2 or not cost.size or not tree.is_float(cost):
    raise ValueError(
      "cost must be a floating-point matrix, not empty; got shape"
      f" {cost.shape} of {cost.dtype}; map a leading axis with jax.vmap"
    )
  return cost.astype(tree.accumulation_dtype(cost))


def check_marginals(
  cost: jax.Array,
  a: jax.typing.ArrayLike | None,
  b: jax.typing.ArrayLike | None,
) -> tuple[jax.Array, jax.Array]:
  """The marginals of a cost's rows and columns, uniform where None."""
  found = []
  for name, marginal, n in (("a", a, cost.shape[0]), ("b", b, cost.shape[1])):
    if marginal is None:
      found.append(jnp.full(n, 1 / n, cost.dtype))
      continue
    if jnp.shape(marginal) != (n,):
      raise ValueError(
        f"{name} must have shape ({n},) for a cost of shape {cost.shape}; got"
        f" {jnp.shape(marginal)}"
      )
    if not is_traced(marginal):
      values = np.asarray(marginal, np.float64)
      if not np.isfinite(values).all() or values.min() < 0:
        raise ValueError(f"{name} must be finite and not negative")
      if abs(values.sum() - 1) > 1e-3:
        raise ValueError(
          f"{name} must sum to 1; it sums to {values.sum():.6g}: divide it by"
          " its sum"
        )
    found.append(jnp.asarray(marginal).astype(cost.dtype))
  return found[0], found[1]


def deviation(plan: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
  """Sum of the absolute differences of all row and column sums from a and b."""
  return jnp.sum(jnp.abs(plan.sum(1) - a)) + jnp.sum(jnp.abs(plan.sum(0) - b))


def check_plan(
  plan: jax.typing.ArrayLike,
  a: jax.typing.ArrayLike | None = None,
  b: jax.typing.ArrayLike | None = None,
  *,
  tolerance: float = 1e-3,
) -> None:
  r"""Raises unless a transport plan sums to its marginals.

  .. math::
    P \ge 0, \quad
    \sum_g |\textstyle\sum_j P_{gj} - a_g|
      + \sum_j |\textstyle\sum_g P_{gj} - b_j| \le \mathrm{tolerance}

  Args:
    plan: Shape [n, m]; rows are the target's points, columns the source's.
    a: Shape [n], the sums of the rows; 1/n by default.
    b: Shape [m], the sums of the columns; 1/m by default.
    tolerance: The largest deviation of all sums together; positive.

  Raises:
    ValueError: If the plan is no such matrix. The message names the row or
      column that is furthest off, its sum and its marginal.

  >>> check_plan(jnp.eye(2) / 2)
  >>> check_plan(jnp.eye(2))
  Traceback (most recent call last):
    ...
  ValueError: row 0 of the plan sums to 1, but its marginal is 0.5 ...
  """
  values = np.asarray(plan, np.float64)
  if values.ndim != 2 or not values.size:
    raise ValueError(
      f"a plan must be a matrix, not empty; got shape {values.shape}"
    )
  if not np.isfinite(values).all() or values.min() < 0:
    raise ValueError("a plan must be finite and not negative")
  worst = (-1.0, "", 0, 0.0, 0.0)
  total = 0.0
  for kind, sums, name, marginal in (
    ("row", values.sum(1), "a", a),
    ("column", values.sum(0), "b", b),
  ):
    n = len(sums)
    wanted = np.full(n, 1 / n) if marginal is None else np.asarray(marginal)
    if wanted.shape != (n,):
      raise ValueError(
        f"{name} must have shape ({n},) for a plan of shape {values.shape}; got"
        f" {wanted.shape}"
      )
    off = np.abs(sums - wanted)
    total += off.sum()
    i = int(off.argmax())
    worst = max(worst, (off[i], kind, i, sums[i], wanted[i]), key=_first)
  if not total <= tolerance:
    _, kind, i, got, marginal = worst
    raise ValueError(
      f"{kind} {i} of the plan sums to {got:.6g}, but its marginal is"
      f" {marginal:.6g} (all sums together are off by {total:.3g}, the"
      f" tolerance is {tolerance:g}); divide the plan by its sum, give its"
      " marginals as a and b, or solve it to a smaller threshold"
    )


def _first(items: tuple[float, str, int, float, float]) -> float:
  return items[0]


def report(plan: TransportPlan, what: str, strict: bool) -> None:
  """Warns where a solver did not converge, or raises; silent while traced.

  Args:
    plan: The solver's answer.
    what: Where it was, for the message: "group 'Dense_0': ", or nothing.
    strict: Whether to raise.

  Raises:
    ConvergenceError: If it did not converge, and ``strict``.
  """
  if is_traced(plan.converged) or bool(np.all(plan.converged)):
    return
  if not np.isfinite(plan.cost).all():
    message = f"{what}the transport cost is not finite; look at the leaves"
  else:
    message = (
      f"{what}the transport did not converge in"
      f" {int(np.max(plan.n_iters))} iterations: the marginals are off by"
      f" {float(np.max(plan.error)):.3g}; take more max_iterations, or a larger"
      " epsilon or threshold"
    )
  if strict:
    raise ConvergenceError(message)
  warnings.warn(message, RuntimeWarning, stacklevel=3)


class ConvergenceError(RuntimeError):
  """A transport solver did not reach its tolerance."""


class TransportPlan(NamedTuple):
  """A transport plan between n points and m points, and its diagnostics.

  Attributes:
    plan: Shape [n, m]. Rows are the target's points, columns the source's;
      they sum to the marginals, 1/n and 1/m by default.
    permutation: Shape [n], the source's point for each of the target's, or
      None where the plan is not a permutation.
    cost: The transport cost, the sum of plan times ground cost.
    converged: Whether the solver reached its tolerance.
    n_iters: Number of iterations; 0 for a solver that is not iterative.
    error: Sum of the absolute differences of all row and column sums from
      the marginals; with unbalanced transport a property of the answer.
  """

  plan: jax.Array
  permutation: jax.Array | None
  cost: jax.Array
  converged: jax.Array
  n_iters: jax.Array
  error: jax.Array
