"""The Karcher mean: the average of directions along arcs of the sphere."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.merging import (
  _gathered,
  _leaves,
  _method,
  _spherical,
  _values,
  _weights,
)

PyTree = Any
Array = jax.Array
Values = dict[str, Array]


# Below this 1 - cos(a) the ratio of a to sin(a) is computed from a series, to
# the rounding of float64.
_NEAR = 0.1
_SERIES = [
  2**k * math.factorial(k) ** 2 / math.factorial(2 * k + 1) for k in range(13)
]


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
  coefficients: Array
  residual: Array
  iterations: Array


_dot = functools.partial(jnp.tensordot, precision="highest")


def _arc_ratio(cosine: Array) -> Array:
  """Angle / sine of an angle with this cosine; 0 where they are opposite."""
  versine = 1 - cosine
  is_near, is_far = versine < _NEAR, 1 + cosine < _spherical.tiny(cosine)
  safe = jnp.where(is_near | is_far, jnp.zeros_like(cosine), cosine)
  ratio = jnp.arccos(safe) / jnp.sqrt(1 - safe * safe)
  # The ratio is smooth in the cosine, also at 1, where the angle is not.
  small = jnp.where(is_near, versine, jnp.zeros_like(versine))
  series = jnp.zeros_like(small)
  for coefficient in reversed(_SERIES):
    series = series * small + coefficient
  return jnp.where(
    is_near, series, jnp.where(is_far, jnp.zeros_like(ratio), ratio)
  )


def _mean_direction(
  gram: Array, weights: Array, max_iter: int, tol: Array
) -> _Solution:
  """The Riemannian mean of directions as a combination of them.

  Tangents and means are combinations of the directions, so that their inner
  products tell all: the directions themselves are read no more.

  Args:
    gram: The cosines of the directions, [n, n].
    weights: Weights [n] that sum to one.
    max_iter: Largest number of steps.
    tol: Residual at which to stop.

  Returns:
    The coefficients of the mean, and how it was found.
  """

  def length(x: Array) -> Array:
    return jnp.sqrt(jnp.maximum(_dot(x, _dot(gram, x, 1), 1), 0))

  def tangent_sum(x: Array) -> Array:
    cosines = _dot(gram, x, 1)
    parts = weights * _arc_ratio(cosines)
    return parts - jnp.sum(parts * cosines) * x

  def solve(
    fn: Callable[[Array], Array], start: Array
  ) -> tuple[Array, tuple[Array, Array]]:
    def unfinished(state: tuple[Array, Array, Array]) -> Array:
      _, tangent, step = state
      return (step < max_iter) & (length(tangent) >= tol)

    def advance(
      state: tuple[Array, Array, Array],
    ) -> tuple[Array, Array, Array]:
      x, tangent, step = state
      size = length(tangent)
      moved = jnp.cos(size) * x + jnp.sinc(size / math.pi) * tangent
      moved = moved / length(moved)
      return moved, fn(moved), step + 1

    x, tangent, step = jax.lax.while_loop(
      # Steps are counted in floats, which have tangents of their own dtype.
      unfinished,
      advance,
      (start, fn(start), jnp.zeros_like(tol)),
    )
    return x, (length(tangent), step)

  def tangent_solve(linear: Callable[[Array], Array], y: Array) -> Array:
    return jnp.linalg.solve(jax.jacobian(linear)(y), y)

  # The start is no matter to the gradient, and its length has none at 0.
  size = jax.lax.stop_gradient(length(weights))
  cancels = size < math.sqrt(jnp.finfo(gram.dtype).eps)
  mean = weights / jnp.where(cancels, jnp.ones_like(size), size)
  first = jax.nn.one_hot(
    jnp.argmax(weights > 0), len(weights), dtype=gram.dtype
  )
  # A while loop has no reverse gradient; that of a root needs no loop's.
  x, (residual, iterations) = jax.lax.custom_root(
    tangent_sum,
    jnp.where(cancels, first, mean),
    solve,
    tangent_solve,
    has_aux=True,
  )
  is_opposite = 1 + _dot(gram, x, 1) < _spherical.tiny(gram)
  opposite = jnp.sum(jnp.where(is_opposite, weights, 0))
  return _Solution(x, residual + math.pi * opposite, iterations)


@functools.cache
def _rule(max_iter: int, diagnose: bool) -> _gathered.GatherRule:
  def merge(
    base: Array, leaves: Sequence[Array], weights: Array, values: Values
  ) -> Array:
    is_complex = jnp.iscomplexobj(base)
    if is_complex:
      leaves = [jnp.stack([leaf.real, leaf.imag]) for leaf in leaves]
    stacked = jnp.stack(leaves)
    axes = tuple(range(1, stacked.ndim))
    units, lengths = _spherical.unit(stacked, axes)
    lengths = lengths.reshape(-1)
    shares = _weights.normalized(weights)
    tol = values["tol"].astype(shares.dtype)
    is_zero = lengths == 0
    found = _mean_direction(
      _dot(units, units, (axes, axes)) + jnp.diag(is_zero.astype(tol.dtype)),
      # Zero has no direction, but counts in the mean length.
      _weights.normalized(jnp.where(is_zero, 0, shares)),
      max_iter,
      tol,
    )
    if diagnose:
      converged = (found.residual < tol).astype(tol.dtype)
      return jnp.stack([found.residual, found.iterations, converged])
    mean = _dot(jnp.sum(shares * lengths) * found.coefficients, units, 1)
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
  **options: Unpack[_leaves.MergeOptions],
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
  **options: Unpack[_leaves.MergeOptions],
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
  for leaf in _leaves.merged_leaves(models[0], select):
    # A leaf without entries is left as it is.
    values = leaves[leaf.place] if leaves[leaf.place].size else jnp.zeros(3)
    done = values[2] > 0 if leaves[leaf.place].size else jnp.asarray(True)
    info.residual[leaf.name] = values[0]
    info.iterations[leaf.name] = values[1].astype(jnp.int32)
    info.converged[leaf.name] = done
  return info
