"""Model Breadcrumbs: the largest and smallest entries dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import jax

from jaxmerge.merging import (
  _leafwise,
  _leaves,
  _method,
  _sparsify,
  _task_vectors,
  _ties,
  _values,
)

PyTree = Any
Array = jax.Array


def _rule(
  density: Any,
  gamma: Any,
  variant: str,
  rescale: str | None,
  normalize: bool,
  elect: str,
  zero_sign: str,
) -> _leafwise.LeafRule:
  _values.check_range(density, "density", 0, 1, open_low=True)
  _values.check_range(gamma, "gamma", 0, 1)
  _sparsify.check_choice(rescale, "rescale", _sparsify.RESCALES)
  return _task_vectors.task_vector_rule(
    _ties.agreeing(variant, normalize, elect, zero_sign),
    _sparsify.middle(rescale),
  )


def breadcrumbs_method(
  *,
  density: Any = 0.9,
  gamma: Any = 0.01,
  scale: Any = 1.0,
  variant: str = "linear",
  rescale: str | None = None,
  normalize: bool = False,
  elect: str = "mass",
  zero_sign: str = "positive",
  **options: Unpack[_leaves.MergeOptions],
) -> _method.MergeMethod:
  """Breadcrumbs as a method; see `breadcrumbs`.

  Args:
    density: See `breadcrumbs`, as the rest.
    gamma: Fraction of outliers that are dropped.
    scale: Scale of the merged task vector.
    variant: "linear" or "ties".
    rescale: How the drop is made up for.
    normalize: Whether a mean is taken.
    elect: "mass" or "count".
    zero_sign: "majority" or "positive".
    **options: See `MergeOptions`.

  Returns:
    The method.

  >>> method = breadcrumbs_method(density=1.0)
  >>> state = method.update(method.init({"w": 0.0}), {"w": 2.0})
  >>> print(method.finalize(state)["w"])
  2.0
  """
  return _leafwise.leafwise_method(
    _rule(density, gamma, variant, rescale, normalize, elect, zero_sign),
    options={"density": density, "gamma": gamma, "scale": scale},
    **options,
  )


def breadcrumbs(
  base: PyTree,
  models: Sequence[PyTree],
  *,
  weights: Any = None,
  density: Any = 0.9,
  gamma: Any = 0.01,
  scale: Any = 1.0,
  variant: str = "linear",
  rescale: str | None = None,
  normalize: bool = False,
  elect: str = "mass",
  zero_sign: str = "positive",
  **options: Unpack[_leaves.MergeOptions],
) -> PyTree:
  r"""Drops each leaf's largest and smallest entries, and combines the rest.

  Of the n magnitudes of a leaf the ``int(gamma * n)`` largest are dropped,
  then the smallest, until ``int(density * n)`` are left (fewer outliers where
  they do not all fit). Equal magnitudes at a border are treated alike.

  Args:
    base: :math:`\theta_0`.
    models: One or more trees of the structure of the base.
    weights: One for each model, 1 by default; see `task_arithmetic`.
    density: Fraction that is kept, in (0, 1].
    gamma: Fraction of outliers that are dropped, in [0, 1].
    scale: Scale of the merged task vector; see `magmax`.
    variant: "linear" sums the task vectors; "ties" sums the entries that agree
      with the elected sign.
    rescale: See `dare`.
    normalize: Divide by the sum of the weights (of those that agree).
    elect: See `ties`.
    zero_sign: See `dare`.
    **options: See `MergeOptions`.

  Returns:
    The merged parameters, with the structure, shapes and dtypes of the base.

  Raises:
    TreeMismatchError: If a model differs from the base.
    ValueError: If there are no models, an option is unknown or a value is out
      of its range.

  References:
    Davari and Belilovsky, `Model Breadcrumbs: scaling multi-task model merging
    with sparse masks <https://arxiv.org/abs/2312.06795>`_, 2023

  >>> import jax.numpy as jnp
  >>> base = {"w": jnp.zeros(4)}
  >>> models = [{"w": jnp.array([1.0, 2.0, 3.0, 9.0])}]
  >>> merged = breadcrumbs(base, models, density=0.5, gamma=0.25)
  >>> merged["w"].tolist()
  [0.0, 2.0, 3.0, 0.0]
  """
  return _leafwise.merge(
    _rule(density, gamma, variant, rescale, normalize, elect, zero_sign),
    base,
    models,
    weights,
    options={"density": density, "gamma": gamma, "scale": scale},
    **options,
  )
