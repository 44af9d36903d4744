"""Spherical interpolation of models."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp

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


@functools.cache
def _slerp_rule() -> _gathered.GatherRule:
  def merge(
    base: Array, leaves: Sequence[Array], weights: Array, values: Values
  ) -> Array:
    del weights
    real = _spherical.real_dtype(base)
    return _spherical.interpolate(
      leaves[0],
      leaves[1],
      values["t"].astype(real),
      _spherical.vector_axes(base.ndim, None),
      values["threshold"].astype(real),
    )

  return _gathered.GatherRule(merge, min_models=2, max_models=2)


def slerp_method(
  *,
  t: Any = 0.5,
  threshold: Any = 0.9995,
  **options: Unpack[_leaves.MergeOptions],
) -> _method.MergeMethod:
  """Spherical interpolation as a method of two models; see `slerp`.

  Args:
    t: See `slerp`, as the rest.
    threshold: Cosine above which the interpolation is linear.
    **options: See `MergeOptions`.

  Returns:
    The method. Its ``update`` takes no weights: ``t`` is in their place.

  >>> import jax.numpy as jnp
  >>> method = slerp_method()
  >>> state = method.init({"w": jnp.zeros(2)})
  >>> for value in ([1.0, 0.0], [0.0, 1.0]):
  ...   state = method.update(state, {"w": jnp.array(value)})
  >>> merged = method.finalize(state)["w"]
  >>> print([round(x, 3) for x in merged.tolist()])
  [0.707, 0.707]
  """
  _values.check_range(threshold, "threshold", 0, 1)
  return _weights.unweighted(
    _gathered.gathered_method(
      _slerp_rule(),
      "slerp",
      options={"t": t, "threshold": threshold},
      **options,
    ),
    "slerp",
    "give the share of the second model as t",
  )


def slerp(
  models: Sequence[PyTree],
  t: Any = 0.5,
  *,
  threshold: Any = 0.9995,
  **options: Unpack[_leaves.MergeOptions],
) -> PyTree:
  r"""Interpolates two models along the great circle, leaf by leaf.

  .. math::
    \theta = \frac{\sin((1 - t) \Omega)}{\sin \Omega} \theta_1
      + \frac{\sin(t \Omega)}{\sin \Omega} \theta_2, \quad
    \cos \Omega =
      \frac{\langle \theta_1, \theta_2 \rangle}{|\theta_1| |\theta_2|}

  Each leaf is one vector. The angle is computed without the arc cosine, which
  is inexact for models as close as those tuned from one base.

  Args:
    models: Two trees of the same structure, shapes and dtypes.
    t: The place between the first model, at 0, and the second, at 1: a scalar,
      a prefix of the tree, or a mapping from regular expressions of leaf names
      to scalars. Beyond [0, 1] the arc is extended.
    threshold: Where :math:`|\cos \Omega|` is above it, in [0, 1], the
      interpolation is linear; in the same forms. Zero and opposite vectors are
      always interpolated linearly. mergekit's value is the default; 1 follows
      the formula as far as it is defined.
    **options: See `MergeOptions`.

  Returns:
    The merged parameters, with the structure, shapes and dtypes of the models;
    leaves that are not merged are those of the first model.

  Raises:
    TreeMismatchError: If the models differ in structure, shape or dtype.
    ValueError: If there are not two models or a value is out of its range.

  References:
    Shoemake, `Animating rotation with quaternion curves
    <https://doi.org/10.1145/325334.325242>`_, 1985

  >>> import jax.numpy as jnp
  >>> models = [{"w": jnp.array([2.0, 0.0])}, {"w": jnp.array([0.0, 2.0])}]
  >>> merged = slerp(models, 1 / 3)["w"]
  >>> print([round(x, 3) for x in merged.tolist()])
  [1.732, 1.0]
  """
  _values.check_range(threshold, "threshold", 0, 1)
  models = _method.check_models(models)
  return _gathered.merge(
    _slerp_rule(),
    "slerp",
    models[0],
    models,
    options={"t": t, "threshold": threshold},
    names=_weights.model_names(models),
    **options,
  )


@functools.cache
def _nuslerp_rule(
  task_vectors: bool, axis: _spherical.Axes | None
) -> _gathered.GatherRule:
  def merge(
    base: Array, leaves: Sequence[Array], weights: Array, values: Values
  ) -> Array:
    del values
    origin = base if task_vectors else jnp.zeros_like(base)
    return origin + _spherical.interpolate(
      leaves[0] - origin,
      leaves[1] - origin,
      _weights.normalized(weights)[1],
      _spherical.vector_axes(base.ndim, axis),
      1.0,
    )

  return _gathered.GatherRule(merge, min_models=2, max_models=2)


def nuslerp_method(
  *,
  task_vectors: bool = False,
  flatten: bool = True,
  axis: int | tuple[int, ...] = -1,
  **options: Unpack[_leaves.MergeOptions],
) -> _method.MergeMethod:
  """Weighted spherical interpolation as a method; see `nuslerp`.

  Args:
    task_vectors: Whether the differences to the base are interpolated, rather
      than the models.
    flatten: See `nuslerp`, as the rest.
    axis: The axes that a vector runs along.
    **options: See `MergeOptions`.

  Returns:
    The method. Weights that sum to zero count as equal.

  >>> import jax.numpy as jnp
  >>> method = nuslerp_method(task_vectors=True)
  >>> state = method.init({"w": jnp.ones(2)})
  >>> for value in ([2.0, 1.0], [1.0, 2.0]):
  ...   state = method.update(state, {"w": jnp.array(value)})
  >>> merged = method.finalize(state)["w"]
  >>> print([round(x, 3) for x in merged.tolist()])
  [1.707, 1.707]
  """
  axes = _spherical.check_axis(axis)
  return _gathered.gathered_method(
    _nuslerp_rule(task_vectors, None if flatten else axes),
    "nuslerp",
    **options,
  )


def nuslerp(
  models: Sequence[PyTree],
  weights: Any = None,
  base: PyTree | None = None,
  *,
  flatten: bool = True,
  axis: int | tuple[int, ...] = -1,
  **options: Unpack[_leaves.MergeOptions],
) -> PyTree:
  r"""Interpolates two models, or their task vectors, by their weights.

  .. math::
    \theta = \theta_0
      + \frac{\sin((1 - t) \Omega)}{\sin \Omega} \tau_1
      + \frac{\sin(t \Omega)}{\sin \Omega} \tau_2, \quad
    t = \frac{w_2}{w_1 + w_2}, \quad \tau_i = \theta_i - \theta_0

  with :math:`\theta_0 = 0` without a base. It is `slerp` with weights, and
  linear only where a vector is zero or two are parallel to rounding.

  Args:
    models: Two trees of the same structure, shapes and dtypes.
    weights: :math:`w_i`, one for each model: a scalar, a prefix of the tree,
      or a mapping from regular expressions of leaf names to scalars; or an
      array of shape [2]; equal by default. Traced weights are not checked;
      where these sum to zero, they count as equal.
    base: :math:`\theta_0`; None interpolates the models themselves.
    flatten: Whether a leaf is one vector. Otherwise it holds one along
      ``axis`` for each place on its other axes.
    axis: Axis or axes that a vector runs along. A leaf that has none of them
      is one vector. mergekit's rows are the last axis of PyTorch's kernels
      [out, in]; for kernels [in, out] they are axis -2, and with
      convolutions (-4, -3, -2).
    **options: See `MergeOptions`.

  Returns:
    The merged parameters, with the structure, shapes and dtypes of the models;
    leaves that are not merged are those of the base, or of the first model.

  Raises:
    TreeMismatchError: If the trees differ in structure, shape or dtype.
    ValueError: If there are not two models, or a value is out of its range.

  References:
    Goddard et al., `Arcee's MergeKit: a toolkit for merging large language
    models <https://arxiv.org/abs/2403.13257>`_, 2024

  >>> import jax.numpy as jnp
  >>> models = [{"w": jnp.array([2.0, 0.0])}, {"w": jnp.array([0.0, 2.0])}]
  >>> merged = nuslerp(models, [2, 1])["w"]
  >>> print([round(x, 3) for x in merged.tolist()])
  [1.732, 1.0]
  """
  axes = _spherical.check_axis(axis)
  models = _method.check_models(models)
  _weights.check_sums(weights, models[0], len(models))
  return _gathered.merge(
    _nuslerp_rule(base is not None, None if flatten else axes),
    "nuslerp",
    models[0] if base is None else base,
    models,
    weights,
    names=_weights.model_names(models) if base is None else None,
    **options,
  )


@functools.cache
def _multislerp_rule(
  task_vectors: bool, normalize_weights: bool
) -> _gathered.GatherRule:
  def merge(
    base: Array, leaves: Sequence[Array], weights: Array, values: Values
  ) -> Array:
    scales = (
      _weights.normalized(weights) if normalize_weights else jnp.real(weights)
    )
    origin = base if task_vectors else jnp.zeros_like(base)
    axes = _spherical.vector_axes(base.ndim, None)
    direction = linear = jnp.zeros_like(base)
    length = jnp.zeros((1,) * base.ndim, scales.dtype)
    for leaf, scale in zip(leaves, scales, strict=True):
      vector = leaf - origin
      one, size = _spherical.unit(vector, axes)
      direction = direction + scale.astype(base.dtype) * one
      linear = linear + scale.astype(base.dtype) * vector
      length = length + scale * size
    direction, size = _spherical.unit(direction, axes)
    limit = values["eps"].astype(scales.dtype) * jnp.abs(scales).sum()
    return origin + jnp.where(
      size <= limit, linear, length.astype(base.dtype) * direction
    )

  return _gathered.GatherRule(merge)


def multislerp_method(
  *,
  task_vectors: bool = False,
  normalize_weights: bool = True,
  eps: Any = 1e-6,
  **options: Unpack[_leaves.MergeOptions],
) -> _method.MergeMethod:
  """Barycentric interpolation on a sphere as a method; see `multislerp`.

  Args:
    task_vectors: Whether the differences to the base are interpolated, rather
      than the models.
    normalize_weights: See `multislerp`, as the rest.
    eps: When directions count as cancelling.
    **options: See `MergeOptions`.

  Returns:
    The method. Weights that sum to zero count as equal, if normalised.

  >>> import jax.numpy as jnp
  >>> method = multislerp_method()
  >>> state = method.init({"w": jnp.zeros(2)})
  >>> for value in ([2.0, 0.0], [0.0, 2.0]):
  ...   state = method.update(state, {"w": jnp.array(value)})
  >>> merged = method.finalize(state)["w"]
  >>> print([round(x, 3) for x in merged.tolist()])
  [1.414, 1.414]
  """
  _values.check_range(eps, "eps", 0, 1)
  return _gathered.gathered_method(
    _multislerp_rule(task_vectors, normalize_weights),
    "multislerp",
    options={"eps": eps},
    **options,
  )


def multislerp(
  models: Sequence[PyTree],
  weights: Any = None,
  base: PyTree | None = None,
  *,
  normalize_weights: bool = True,
  eps: Any = 1e-6,
  **options: Unpack[_leaves.MergeOptions],
) -> PyTree:
  r"""Interpolates any number of models on the sphere, leaf by leaf.

  .. math::
    \theta = \theta_0 + \Bigl(\sum_i w_i |\tau_i|\Bigr) \frac{m}{|m|}, \quad
    m = \sum_i w_i \frac{\tau_i}{|\tau_i|}, \quad
    \tau_i = \theta_i - \theta_0

  with :math:`\theta_0 = 0` without a base. mergekit goes on to project the
  directions to the tangent space at :math:`m` and to move along their weighted
  sum. That sum is zero, because :math:`m` is the weighted mean, and is left
  out here. The mean along arcs is `karcher_mean`.

  Args:
    models: One or more trees of the same structure, shapes and dtypes.
    weights: :math:`w_i`, one for each model: a scalar, a prefix of the tree,
      or a mapping from regular expressions of leaf names to scalars; or an
      array of shape [n]; 1 by default. Traced weights are not checked; where
      these sum to zero, they count as equal.
    base: :math:`\theta_0`; None interpolates the models themselves.
    normalize_weights: Whether the weights are divided by their sum.
    eps: Directions cancel where :math:`|m| \le \epsilon \sum_i |w_i|`, and
      :math:`\sum_i w_i \tau_i` is taken in place of the formula, in [0, 1].
      mergekit, with 1e-8, which is below the rounding of float32, does so with
      two models and raises with more.
    **options: See `MergeOptions`.

  Returns:
    The merged parameters, with the structure, shapes and dtypes of the models;
    leaves that are not merged are those of the base, or of the first model.

  Raises:
    TreeMismatchError: If the trees differ in structure, shape or dtype.
    ValueError: If there are no models, or a value is out of its range.

  References:
    Goddard, `Multi-SLERP
    <https://goddard.blog/posts/multislerp-wow-what-a-cool-idea>`_, 2025

  >>> import jax.numpy as jnp
  >>> models = [{"w": jnp.array([2.0, 0.0])}, {"w": jnp.array([0.0, 4.0])}]
  >>> merged = multislerp(models, [1, 1])["w"]
  >>> print([round(x, 3) for x in merged.tolist()])
  [2.121, 2.121]
  """
  _values.check_range(eps, "eps", 0, 1)
  models = _method.check_models(models)
  if normalize_weights:
    _weights.check_sums(weights, models[0], len(models))
  return _gathered.merge(
    _multislerp_rule(base is not None, normalize_weights),
    "multislerp",
    models[0] if base is None else base,
    models,
    weights,
    options={"eps": eps},
    names=_weights.model_names(models) if base is None else None,
    **options,
  )
