"""The Karcher mean: the average of directions along arcs of the sphere."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.sparse import linalg

from jaxmerge.merging import (
  _gathered,
  _leafwise,
  _method,
  _spherical,
  _values,
  _weights,
)

PyTree = Any
Array = jax.Array
Values = dict[str, Array]


class KarcherInfo(NamedTuple):
  """How well the Karcher mean of each leaf was found, by leaf name.

  Attributes:
    residual: Length of the weighted sum of the tangents from the mean to the
      models' directions, in radians; zero at the mean. A model opposite to it
      adds :math:`pi` times its weight, for no one arc leads there.
    iterations: Number of steps taken, int32.
    converged: Whether the residual is below the tolerance.
  """

  residual: dict[str, Array]
  iterations: dict[str, Array]
  converged: dict[str, Array]


class _Solution(NamedTuple):
  direction: Array
  residual: Array
  iterations: Array


def _mean_direction(
  units: Sequence[Array], weights: Array, max_iter: int, tol: Array
) -> _Solution:
  """The Riemannian mean of directions; weights sum to one."""
  axes = _spherical.vector_axes(units[0].ndim, None)

  def tangent_sum(u: Array) -> Array:
    total = jnp.zeros_like(u)
    for one, weight in zip(units, weights, strict=True):
      total = total + weight * _spherical.log_map(u, one, axes)
    return total

  def residual(tangent: Array) -> Array:
    return _spherical.norm(tangent, axes).reshape(())

  def root(x: Array) -> Array:
    # Zero at the mean only; the first term fixes the length of x, so that the
    # Jacobian there is symmetric and regular.
    u, length = _spherical.unit(x, axes)
    return (length - 1) * u - tangent_sum(u)

  def solve(fn: Callable[[Array], Array], start: Array) -> tuple[Array, Array]:
    def unfinished(state: tuple[Array, Array, Array]) -> Array:
      _, tangent, step = state
      return (step < max_iter) & (residual(tangent) >= tol)

    def advance(
      state: tuple[Array, Array, Array],
    ) -> tuple[Array, Array, Array]:
      u, tangent, step = state
      u = _spherical.exp_map(u, tangent, axes)
      return u, -fn(u), step + 1

    u, _, step = jax.lax.while_loop(
      unfinished, advance, (start, -fn(start), jnp.int32(0))
    )
    return u, step

  def tangent_solve(linear: Callable[[Array], Array], y: Array) -> Array:
    # The Jacobian is a multiple of the identity and a term of the rank of the
    # number of models, so that few steps of conjugate gradients are exact.
    return linalg.cg(linear, y, tol=1e-6, maxiter=2 * len(units) + 4)[0]

  mean = jnp.zeros_like(units[0])
  fallback = units[-1]
  for one, weight in zip(units[::-1], weights[::-1], strict=True):
    mean = mean + weight * one
    fallback = jnp.where(weight > 0, one, fallback)
  mean, length = _spherical.unit(mean, axes)
  start = jnp.where(length < tol, fallback, mean)
  # A while loop has no reverse gradient; that of a root needs no loop's.
  direction, iterations = jax.lax.custom_root(
    root, start, solve, tangent_solve, has_aux=True
  )
  opposite = sum(
    jnp.where(
      _spherical.is_opposite(direction, one, axes).reshape(()), weight, 0
    )
    for one, weight in zip(units, weights, strict=True)
  )
  return _Solution(
    direction,
    residual(tangent_sum(direction)) + math.pi * opposite,
    iterations,
  )


@functools.cache
def _rule(max_iter: int, diagnose: bool) -> _gathered.GatherRule:
  def merge(
    base: Array, leaves: Sequence[Array], weights: Array, values: Values
  ) -> Array:
    is_complex = jnp.iscomplexobj(base)
    if is_complex:
      leaves = [jnp.stack([leaf.real, leaf.imag]) for leaf in leaves]
    axes = _spherical.vector_axes(leaves[0].ndim, None)
    shares = _weights.normalized(weights)
    pairs = [_spherical.unit(leaf, axes) for leaf in leaves]
    # Zero has no direction, but counts in the mean length.
    counted = jnp.stack([(length > 0).reshape(()) for _, length in pairs])
    tol = values["tol"].astype(shares.dtype)
    found = _mean_direction(
      [one for one, _ in pairs],
      _weights.normalized(jnp.where(counted, shares, jnp.zeros_like(shares))),
      max_iter,
      tol,
    )
    if diagnose:
      return jnp.stack(
        [
          found.residual,
          found.iterations.astype(tol.dtype),
          (found.residual < tol).astype(tol.dtype),
        ]
      )
    length = sum(
      share * length.reshape(())
      for share, (_, length) in zip(shares, pairs, strict=True)
    )
    mean = length * found.direction
    return jax.lax.complex(mean[0], mean[1]) if is_complex else mean

  return _gathered.GatherRule(merge)


def _check(max_iter: Any, tol: Any) -> None:
  if type(max_iter) is not int or max_iter < 1:
    raise ValueError(f"max_iter must be an int of at least 1; got {max_iter!r}")
  _values.check_range(tol, "tol", 0, math.pi, open_low=True)


def karcher_mean_method(
  *,
  max_iter: int = 10,
  tol: Any = 1e-5,
  **options: Unpack[_leafwise.MergeOptions],
) -> _method.MergeMethod:
  """The Karcher mean as a method; see `karcher_mean`.

  Args:
    max_iter: See `karcher_mean`, as the rest.
    tol: Residual at which to stop.
    **options: See `MergeOptions`.

  Returns:
    The method. Weights that sum to zero count as equal.

  >>> import jax.numpy as jnp
  >>> method = karcher_mean_method()
  >>> state = method.init({"w": jnp.zeros(2)})
  >>> for value in ([2.0, 0.0], [0.0, 2.0]):
  ...   state = method.update(state, {"w": jnp.array(value)})
  >>> merged = method.finalize(state)["w"]
  >>> print([round(x, 3) for x in merged.tolist()])
  [1.414, 1.414]
  """
  _check(max_iter, tol)
  return _gathered.gathered_method(
    _rule(max_iter, False), "karcher_mean", options={"tol": tol}, **options
  )


def karcher_mean(
  models: Sequence[PyTree],
  weights: Any = None,
  *,
  max_iter: int = 10,
  tol: Any = 1e-5,
  **options: Unpack[_leafwise.MergeOptions],
) -> PyTree:
  r"""Averages models along arcs of the sphere, leaf by leaf.

  .. math::
    \theta = \Bigl(\sum_i w_i |\theta_i|\Bigr) u, \quad
    \sum_i w_i \log_u \frac{\theta_i}{|\theta_i|} = 0, \quad
    \sum_i w_i = 1

  where :math:`\log_u v` is the tangent at :math:`u` of the arc to :math:`v`,
  as long as the arc. Such a :math:`u` is the direction of the least weighted
  sum of squared angles to the models. It is found from the direction of the
  mean by gradient descent, :math:`u \leftarrow \exp_u \sum_i w_i \log_u u_i`,
  and is sure to be the only one where all models are within a quarter turn of
  one direction. For two models it is `slerp` with their mean length. Gradients
  are those of the solution, by the implicit function theorem, and take no
  account of the steps.

  Args:
    models: One or more trees of the same structure, shapes and dtypes.
    weights: :math:`w_i`, not negative, one for each model: a scalar, a prefix
      of the tree, or a mapping from regular expressions of leaf names to
      scalars; or an array of shape [n]; 1 by default. They are divided by
      their sum. Traced weights are not checked; where these sum to zero, they
      count as equal.
    max_iter: Largest number of steps, at least 1.
    tol: Steps end where the weighted sum of tangents is shorter, in (0, pi]: a
      scalar, a prefix or a mapping. Values below 1e-7 are below the rounding
      of float32.
    **options: See `MergeOptions`.

  Returns:
    The merged parameters, with the structure, shapes and dtypes of the models;
    leaves that are not merged are those of the first model. Leaves that are
    zero have no direction and count in the mean length only. `karcher_info`
    tells whether the mean was found.

  Raises:
    TreeMismatchError: If the models differ in structure, shape or dtype.
    ValueError: If there are no models, or a value is out of its range.

  References:
    Karcher, `Riemannian center of mass and mollifier smoothing
    <https://doi.org/10.1002/cpa.3160300502>`_, 1977; Buss and Fillmore,
    `Spherical averages and applications to spherical splines and interpolation
    <https://doi.org/10.1145/502122.502124>`_, 2001

  >>> import jax.numpy as jnp
  >>> models = [{"w": jnp.array([2.0, 0.0])}, {"w": jnp.array([0.0, 2.0])}]
  >>> merged = karcher_mean(models, [2, 1])["w"]
  >>> print([round(x, 3) for x in merged.tolist()])
  [1.732, 1.0]
  """
  _check(max_iter, tol)
  models = _method.check_models(models)
  _weights.check_sums(weights, models[0], len(models), allow_negative=False)
  return _gathered.merge(
    _rule(max_iter, False),
    "karcher_mean",
    models[0],
    models,
    weights,
    options={"tol": tol},
    names=_weights.model_names(models),
    **options,
  )


def karcher_info(
  models: Sequence[PyTree],
  weights: Any = None,
  *,
  max_iter: int = 10,
  tol: Any = 1e-5,
  select: str | Callable[[str], bool] | None = None,
  allow_nonfinite: bool = False,
) -> KarcherInfo:
  """Tells how well `karcher_mean` finds the mean; it takes as long.

  Args:
    models: See `karcher_mean`, as the rest.
    weights: One for each model.
    max_iter: Largest number of steps.
    tol: Residual at which to stop.
    select: See `MergeOptions`, as the rest.
    allow_nonfinite: Whether NaN and infinity are let through.

  Returns:
    The residual, the number of steps and whether they converged, for each
    leaf that is merged.

  Raises:
    TreeMismatchError: If the models differ in structure, shape or dtype.
    ValueError: If there are no models, or a value is out of its range.

  >>> import jax.numpy as jnp
  >>> models = [{"w": jnp.array([2.0, 0.0])}, {"w": jnp.array([0.0, 2.0])}]
  >>> print(karcher_info(models).converged["w"])
  True
  """
  _check(max_iter, tol)
  models = _method.check_models(models)
  _weights.check_sums(weights, models[0], len(models), allow_negative=False)
  found = _gathered.merge(
    _rule(max_iter, True),
    "karcher_info",
    models[0],
    models,
    weights,
    options={"tol": tol},
    names=_weights.model_names(models),
    select=select,
    dtype=np.float32,
    allow_nonfinite=allow_nonfinite,
  )
  leaves = jax.tree.leaves(found)
  info = KarcherInfo({}, {}, {})
  for leaf in _leafwise.merged_leaves(models[0], select):
    # A leaf without entries is left as it is.
    values = leaves[leaf.place] if leaves[leaf.place].size else jnp.zeros(3)
    done = values[2] > 0 if leaves[leaf.place].size else jnp.asarray(True)
    info.residual[leaf.name] = values[0]
    info.iterations[leaf.name] = values[1].astype(jnp.int32)
    info.converged[leaf.name] = done
  return info
