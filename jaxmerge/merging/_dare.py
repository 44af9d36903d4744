"""DARE: entries of task vectors dropped at random."""

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
  variant: str,
  rescale: str | None,
  normalize: bool,
  elect: str,
  zero_sign: str,
) -> _leafwise.LeafRule:
  _values.check_range(density, "density", 0, 1, open_low=True)
  _sparsify.check_choice(rescale, "rescale", _sparsify.RESCALES)
  return _task_vectors.task_vector_rule(
    _ties.agreeing(variant, normalize, elect, zero_sign),
    _sparsify.random(rescale),
  )


def dare_method(
  key: Array,
  *,
  density: Any = 0.5,
  scale: Any = 1.0,
  variant: str = "linear",
  rescale: str | None = "density",
  normalize: bool = False,
  elect: str = "mass",
  zero_sign: str = "positive",
  **options: Unpack[_leaves.MergeOptions],
) -> _method.MergeMethod:
  """DARE as a method; see `dare`.

  Args:
    key: See `dare`, as the rest.
    density: Fraction that is kept.
    scale: Scale of the merged task vector.
    variant: "linear" or "ties".
    rescale: How the drop is made up for.
    normalize: Whether a mean is taken.
    elect: "mass" or "count".
    zero_sign: "majority" or "positive".
    **options: See `MergeOptions`.

  Returns:
    The method.

  >>> method = dare_method(jax.random.key(0), density=1.0)
  >>> state = method.update(method.init({"w": 0.0}), {"w": 2.0})
  >>> print(method.finalize(state)["w"])
  2.0
  """
  return _leafwise.leafwise_method(
    _rule(density, variant, rescale, normalize, elect, zero_sign),
    options={"density": density, "scale": scale},
    key=key,
    **options,
  )


def dare(
  base: PyTree,
  models: Sequence[PyTree],
  key: Array,
  *,
  weights: Any = None,
  density: Any = 0.5,
  scale: Any = 1.0,
  variant: str = "linear",
  rescale: str | None = "density",
  normalize: bool = False,
  elect: str = "mass",
  zero_sign: str = "positive",
  **options: Unpack[_leaves.MergeOptions],
) -> PyTree:
  r"""Drops entries of the task vectors at random, rescales, and combines.

  .. math::
    \hat\tau_i = m_i \odot \tau_i / d, \quad m_i \sim \mathrm{Bernoulli}(d),
    \quad \theta = \theta_0 + \lambda \sum_i w_i \hat\tau_i

  The expectation of :math:`\hat\tau_i` is :math:`\tau_i`.

  Args:
    base: :math:`\theta_0`.
    models: One or more trees of the structure of the base.
    key: PRNG key. What is drawn for a leaf depends on the key, its name and
      the place of the model, not on the other leaves.
    weights: :math:`w_i`, 1 by default; see `task_arithmetic`.
    density: :math:`d`, the fraction that is kept, in (0, 1] (the paper's drop
      rate is :math:`1 - d`); a sequence gives each model its own.
    scale: :math:`\lambda`; see `magmax`.
    variant: "linear" sums the task vectors; "ties" sums the entries that agree
      with the elected sign.
    rescale: Divide by the "density", match the "l1", "l2" or "linf" norm of
      each leaf before the drop, or None.
    normalize: Divide by the sum of the weights (of those that agree).
    elect: For "ties", see `ties`: "mass" or "count".
    zero_sign: For "ties": "majority" (of the leaf) or "positive".
    **options: See `MergeOptions`.

  Returns:
    The merged parameters, with the structure, shapes and dtypes of the base.

  Raises:
    TreeMismatchError: If a model differs from the base.
    ValueError: If there are no models, an option is unknown or a value is out
      of its range.

  References:
    Yu et al., `Language models are super Mario: absorbing abilities from
    homologous models as a free lunch <https://arxiv.org/abs/2311.03099>`_,
    2024

  >>> merged = dare({"w": 0.0}, [{"w": 2.0}], jax.random.key(0), density=0.5)
  >>> float(merged["w"]) in (0.0, 4.0)
  True
  """
  return _leafwise.merge(
    _rule(density, variant, rescale, normalize, elect, zero_sign),
    base,
    models,
    weights,
    options={"density": density, "scale": scale},
    key=key,
    **options,
  )
