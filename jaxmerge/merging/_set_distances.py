"""Distances between sets of feature vectors."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.spatial import distance

Array = jax.Array

# Rows of a kernel matrix that are held at a time.
_ROWS = 1024
# Examples whose pairs tell the scale of the features.
_POOL = 1024
# Error of the marginals at which Sinkhorn iterations stop.
_THRESHOLD = 1e-3


def spaced(rows: np.ndarray, most: int | None) -> np.ndarray:
  """At most so many rows, evenly spaced."""
  if most is None or len(rows) <= most:
    return rows
  return rows[np.arange(most) * len(rows) // most]


def cosine(target: np.ndarray, sources: Sequence[np.ndarray]) -> np.ndarray:
  """One minus the cosine of the mean features.

  Args:
    target: Features [n, d].
    sources: Features [n_i, d], one a task.

  Returns:
    float64 [T].

  Raises:
    ValueError: If a mean is zero.
  """
  directions = []
  for i, features in enumerate([target, *sources]):
    mean = features.mean(axis=0, dtype=np.float64)
    norm = np.linalg.norm(mean)
    if norm == 0:
      name = f"source {i - 1}" if i else "the target"
      raise ValueError(
        f"the mean feature vector of {name} is zero and has no direction; take"
        " similarity='mmd' or 'ot'"
      )
    directions.append(mean / norm)
  return np.array([max(0.0, 1 - directions[0] @ x) for x in directions[1:]])


def _scaled(sets: Sequence[np.ndarray], kind: str) -> list[np.ndarray] | None:
  """Sets around their mean, in units of their spread; None without any."""
  pool = np.concatenate(sets)
  center = pool.mean(axis=0, dtype=np.float64)
  squares = distance.pdist(spaced(pool, _POOL), "sqeuclidean")
  squares = squares[squares > 0]
  if not squares.size:
    return None
  # Of the squares: their root is the median distance.
  unit = np.sqrt(np.median(squares) if kind == "mmd" else squares.mean())
  return [((one - center) / unit).astype(np.float32) for one in sets]


def _squares(x: Array, y: Array) -> Array:
  """Squared distances [n, m], of sets around one center."""
  products = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
  norms = jnp.sum(x**2, axis=1)[:, None] + jnp.sum(y**2, axis=1)[None, :]
  return jnp.maximum(norms - 2 * products, 0)


@jax.jit
def _kernel_sums(x: Array, y: Array) -> Array:
  """Sums of the rows of the kernel matrix, without the whole of it."""

  def row(one: Array) -> Array:
    return jnp.exp(-0.5 * _squares(one[None], y)[0]).sum()

  return jax.lax.map(row, x, batch_size=_ROWS)


def mmd(target: np.ndarray, sources: Sequence[np.ndarray]) -> np.ndarray:
  """Squared maximum mean discrepancies, unbiased, but not below zero.

  Args:
    target: Features [n, d], n at least 2.
    sources: Features [n_i, d], one a task, likewise.

  Returns:
    float64 [T].
  """
  scaled = _scaled([target, *sources], "mmd")
  if scaled is None:
    return np.zeros(len(sources))

  def total(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.asarray(_kernel_sums(x, y), np.float64).sum())

  def within(x: np.ndarray) -> float:
    n = len(x)
    # A point is no pair with itself.
    return (total(x, x) - n) / (n * (n - 1))

  x = scaled[0]
  mine = within(x)
  found = [
    mine + within(y) - 2 * total(x, y) / (len(x) * len(y)) for y in scaled[1:]
  ]
  return np.maximum(np.array(found), 0)


@functools.partial(
  jax.jit, static_argnames=("epsilon", "max_iterations", "is_self")
)
def _entropic(
  x: Array, y: Array, epsilon: float, max_iterations: int, is_self: bool
) -> tuple[Array, Array]:
  """The cost of entropic transport, and whether it converged."""
  from ott.geometry import geometry
  from ott.solvers import linear
  from ott.solvers.linear import acceleration

  options: dict[str, Any] = {}
  if is_self:
    # Feydy et al., equation 25: the two potentials are one.
    momentum: Any = acceleration.Momentum
    options = {
      "parallel_dual_updates": True,
      "momentum": momentum(start=0, value=0.5),
    }
  cost = _squares(x, y)
  # ott-jax relies on the default promotion rules; TF32 products would keep the
  # iterations from converging.
  with (
    jax.default_matmul_precision("highest"),
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    output = linear.solve(
      geometry.Geometry(cost_matrix=cost, epsilon=epsilon),
      max_iterations=max_iterations,
      threshold=_THRESHOLD,
      # How often the error is looked at, a divisor of the whole.
      inner_iterations=next(
        k for k in (10, 5, 2, 1) if max_iterations % k == 0
      ),
      **options,
    )
    cost = jnp.asarray(output.reg_ot_cost)
    return cost, jnp.asarray(output.converged)


def sinkhorn(
  target: np.ndarray,
  sources: Sequence[np.ndarray],
  epsilon: float,
  max_iterations: int,
) -> np.ndarray:
  """Sinkhorn divergences for squared distances, not below zero.

  Args:
    target: Features [n, d].
    sources: Features [n_i, d], one a task.
    epsilon: Strength of the entropy relative to the mean squared distance.
    max_iterations: Largest number of iterations.

  Returns:
    float64 [T]. Warns where the iterations did not converge.
  """
  scaled = _scaled([target, *sources], "ot")
  if scaled is None:
    return np.zeros(len(sources))
  lost = []

  def cost(name: str, x: np.ndarray, y: np.ndarray) -> float:
    value, converged = _entropic(x, y, epsilon, max_iterations, x is y)
    if not converged:
      lost.append(name)
    return float(value)

  x = scaled[0]
  mine = cost("the target with itself", x, x)
  found = [
    cost(f"the target with source {i}", x, y)
    - (mine + cost(f"source {i} with itself", y, y)) / 2
    for i, y in enumerate(scaled[1:])
  ]
  if lost:
    warnings.warn(
      f"the transport of {', '.join(lost)} did not converge in"
      f" {max_iterations} iterations; take more max_iterations, or a larger"
      " epsilon",
      RuntimeWarning,
      stacklevel=3,
    )
  return np.maximum(np.array(found), 0)
