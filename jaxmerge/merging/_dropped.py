"""DARE, DELLA and Breadcrumbs: task vectors with entries dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import jax

from jaxmerge.merging import (
  _combine,
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

_VARIANTS = ("linear", "ties")


def _combiner(
  variant: str, normalize: bool, elect: str, zero_sign: str
) -> _combine.Combiner:
  """A sum, or the sum or mean of the entries that agree in sign."""
  _sparsify.check_choice(variant, "variant", _VARIANTS)
  merge = "mean" if normalize else "sum"
  _ties.check_elect(elect, merge, zero_sign)
  if variant == "linear":
    return _combine.total(normalize)
  return _combine.elected(elect, merge, zero_sign, "leaf")


def _dare_rule(
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
    _combiner(variant, normalize, elect, zero_sign), _sparsify.random(rescale)
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
    _dare_rule(density, variant, rescale, normalize, elect, zero_sign),
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
    _dare_rule(density, variant, rescale, normalize, elect, zero_sign),
    base,
    models,
    weights,
    options={"density": density, "scale": scale},
    key=key,
    **options,
  )


def _della_rule(
  density: Any,
  epsilon: Any,
  variant: str,
  rescale: str | None,
  axis: int,
  normalize: bool,
  elect: str,
  zero_sign: str,
) -> _leafwise.LeafRule:
  _values.check_range(density, "density", 0, 1, open_low=True)
  _values.check_range(epsilon, "epsilon", 0, 1)
  _sparsify.check_choice(rescale, "rescale", _sparsify.RESCALES)
  if all(isinstance(one, (int, float)) for one in (density, epsilon)) and not (
    0 < density - epsilon / 2 and density + epsilon / 2 <= 1
  ):
    raise ValueError(
      f"density={density} and epsilon={epsilon} give probabilities from"
      f" {density - epsilon / 2:g} to {density + epsilon / 2:g}; choose an"
      " epsilon that keeps them in (0, 1]"
    )
  return _task_vectors.task_vector_rule(
    _combiner(variant, normalize, elect, zero_sign),
    _sparsify.by_rank(rescale, axis),
  )


def della_method(
  key: Array,
  *,
  density: Any = 0.5,
  epsilon: Any = 0.2,
  scale: Any = 1.0,
  variant: str = "ties",
  rescale: str | None = "density",
  axis: int = -2,
  normalize: bool = True,
  elect: str = "mass",
  zero_sign: str = "positive",
  **options: Unpack[_leaves.MergeOptions],
) -> _method.MergeMethod:
  """DELLA as a method; see `della`.

  Args:
    key: See `della`, as the rest.
    density: Mean probability of being kept.
    epsilon: Width of the range of probabilities.
    scale: Scale of the merged task vector.
    variant: "linear" or "ties".
    rescale: How the drop is made up for.
    axis: The axis along which magnitudes are ranked.
    normalize: Whether a mean is taken.
    elect: "mass" or "count".
    zero_sign: "majority" or "positive".
    **options: See `MergeOptions`.

  Returns:
    The method.

  >>> method = della_method(jax.random.key(0), density=1.0, epsilon=0.0)
  >>> state = method.update(method.init({"w": 0.0}), {"w": 2.0})
  >>> print(method.finalize(state)["w"])
  2.0
  """
  return _leafwise.leafwise_method(
    _della_rule(
      density, epsilon, variant, rescale, axis, normalize, elect, zero_sign
    ),
    options={"density": density, "epsilon": epsilon, "scale": scale},
    key=key,
    **options,
  )


def della(
  base: PyTree,
  models: Sequence[PyTree],
  key: Array,
  *,
  weights: Any = None,
  density: Any = 0.5,
  epsilon: Any = 0.2,
  scale: Any = 1.0,
  variant: str = "ties",
  rescale: str | None = "density",
  axis: int = -2,
  normalize: bool = True,
  elect: str = "mass",
  zero_sign: str = "positive",
  **options: Unpack[_leaves.MergeOptions],
) -> PyTree:
  r"""Drops small entries more often than large ones, rescales, and combines.

  .. math::
    q = d + \epsilon (r - 1/2), \quad
    \hat\tau = m \odot \tau / q, \quad m \sim \mathrm{Bernoulli}(q)

  where :math:`r` in [0, 1] is the rank of an entry's magnitude among the
  entries of the same neuron, 1 for the largest. Each entry is divided by its
  own probability, so that the expectation of :math:`\hat\tau` is
  :math:`\tau`. ("MagPrune", then sign election and fusion.)

  Args:
    base: :math:`\theta_0`.
    models: One or more trees of the structure of the base.
    key: PRNG key, see `dare`.
    weights: :math:`w_i`, 1 by default; see `task_arithmetic`.
    density: :math:`d`, the mean probability of being kept, in (0, 1].
    epsilon: :math:`\epsilon`, the width of the range of probabilities.
    scale: :math:`\lambda`; see `magmax`.
    variant: "ties" merges the entries that agree with the elected sign, as the
      paper does; "linear" all.
    rescale: "density" divides by the probability; see `dare` for the others.
    axis: The axis of a neuron's incoming weights, -2 for Flax kernels
      [..., in, out]. Leaves with one axis are ranked whole.
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
    Deep et al., `DELLA-Merging: reducing interference in model merging through
    magnitude-based sampling <https://arxiv.org/abs/2406.11617>`_, 2024

  >>> merged = della({"w": 0.0}, [{"w": 2.0}], jax.random.key(0), density=0.5)
  >>> float(merged["w"]) in (0.0, 4.0)
  True
  """
  return _leafwise.merge(
    _della_rule(
      density, epsilon, variant, rescale, axis, normalize, elect, zero_sign
    ),
    base,
    models,
    weights,
    options={"density": density, "epsilon": epsilon, "scale": scale},
    key=key,
    **options,
  )


def _breadcrumbs_rule(
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
    _combiner(variant, normalize, elect, zero_sign), _sparsify.middle(rescale)
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
    _breadcrumbs_rule(
      density, gamma, variant, rescale, normalize, elect, zero_sign
    ),
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
    _breadcrumbs_rule(
      density, gamma, variant, rescale, normalize, elect, zero_sign
    ),
    base,
    models,
    weights,
    options={"density": density, "gamma": gamma, "scale": scale},
    **options,
  )
