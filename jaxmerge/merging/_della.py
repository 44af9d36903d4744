"""DELLA: entries dropped at random, small ones more often."""

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
    _ties.agreeing(variant, normalize, elect, zero_sign),
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
    _rule(
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
    _rule(
      density, epsilon, variant, rescale, axis, normalize, elect, zero_sign
    ),
    base,
    models,
    weights,
    options={"density": density, "epsilon": epsilon, "scale": scale},
    key=key,
    **options,
  )
