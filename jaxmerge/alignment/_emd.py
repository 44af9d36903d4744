"""Exact transport between general marginals, by POT."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.alignment import _plan

# POT's own limit, 100,000, ends problems of 4096 points before their optimum.
_MAX_ITERATIONS = 1_000_000_000


def import_pot(shape: tuple[int, ...]) -> Any:
  """POT; its import looks for other libraries, which may warn."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      import ot
  except ImportError as error:
    raise ImportError(
      f"exact transport with a cost of shape {shape} and these marginals is no"
      " assignment and needs POT: pip install 'jaxmerge[alignment]', or take"
      " Sinkhorn transport"
    ) from error
  return ot


def emd(
  cost: jax.Array, a: jax.Array, b: jax.Array
) -> tuple[jax.Array, jax.Array]:
  r"""Solves :math:`\min_P \langle P, C \rangle` by the network simplex.

  The solver runs on the host in float64; in a compiled program it is called
  back, on any device. The plan is a constant to differentiation.

  Args:
    cost: Floating-point, shape [n, m].
    a: Shape [n], the sums of the rows.
    b: Shape [m], the sums of the columns.

  Returns:
    The plan, of the dtype of the cost, and whether it is optimal; where the
    cost is not finite, it is not, and the plan is the product of the marginals.
  """
  solve = functools.partial(_solve, import_pot(cost.shape))
  cost, a, b = jax.lax.stop_gradient((cost, a, b))
  if not _plan.is_traced(cost, a, b):
    plan, converged = solve(cost, a, b)
    return jnp.asarray(plan), jnp.asarray(converged)
  shapes = (
    jax.ShapeDtypeStruct(cost.shape, cost.dtype),
    jax.ShapeDtypeStruct((), jnp.bool_),
  )
  return jax.pure_callback(solve, shapes, cost, a, b, vmap_method="sequential")


def _solve(
  ot: Any,
  cost: jax.typing.ArrayLike,
  a: jax.typing.ArrayLike,
  b: jax.typing.ArrayLike,
) -> tuple[np.ndarray, np.ndarray]:
  dtype = np.asarray(cost).dtype
  wide, rows, columns = (
    np.ascontiguousarray(np.asarray(x), np.float64) for x in (cost, a, b)
  )
  if not all(np.isfinite(x).all() for x in (wide, rows, columns)):
    return np.outer(rows, columns).astype(dtype), np.asarray(False)
  # The simplex wants equal masses to the last bit, and warns of what the
  # result code says.
  rows, columns = rows / rows.sum(), columns / columns.sum()
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    plan, log = ot.emd(
      rows, columns, wide, numItermax=_MAX_ITERATIONS, log=True
    )
  return plan.astype(dtype), np.asarray(log["warning"] is None)
