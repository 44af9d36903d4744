"""Maximum-magnitude selection and random mixing of task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import jax

from jaxmerge.merging import (
  _combine,
  _leafwise,
  _leaves,
  _method,
  _task_vectors,
)

PyTree = Any


def _rule() -> _leafwise.LeafRule:
  return _task_vectors.task_vector_rule(_combine.largest())


def magmax_method(
  *, scale: Any = 0.5, **options: Unpack[_leaves.MergeOptions]
) -> _method.MergeMethod:
  """MagMax as a method that keeps one running vector; see `magmax`.

  Args:
    scale: See `magmax`.
    **options: See `MergeOptions`.

  Returns:
    The method.

  >>> method = magmax_method(scale=1.0)
  >>> state = method.init({"w": 0.0})
  >>> for value in (1.0, -3.0, 2.0):
  ...   state = method.update(state, {"w": value})
  >>> print(method.finalize(state)["w"])
  -3.0
  """
  return _leafwise.leafwise_method(_rule(), options={"scale": scale}, **options)


def magmax(
  base: PyTree,
  models: Sequence[PyTree],
  *,
  weights: Any = None,
  scale: Any = 0.5,
  **options: Unpack[_leaves.MergeOptions],
) -> PyTree:
  r"""Takes, per parameter, the task vector of the largest magnitude.

  .. math::
    \theta = \theta_0 + \lambda \tau_{i^*}, \quad
    i^* = \arg\max_i |w_i \tau_i|, \quad \tau_i = \theta_i - \theta_0

  parameter by parameter; on ties the later model wins. The models are those
  of sequential fine-tuning, each started from the one before; `max_abs` is
  the same rule on independent fine-tunings.

  Args:
    base: :math:`\theta_0`, the parameters before the first task.
    models: One or more trees of the structure of the base, in the order of
      the tasks.
    weights: :math:`w_i`, 1 by default; see `task_arithmetic`.
    scale: :math:`\lambda`: a scalar, a prefix of the tree, or a mapping from
      regular expressions of leaf names to scalars.
    **options: See `MergeOptions`.

  Returns:
    The merged parameters, with the structure, shapes and dtypes of the base.

  Raises:
    TreeMismatchError: If a model differs from the base.
    ValueError: If there are no models or a value is out of its range.

  References:
    Marczak et al., `MagMax: Leveraging Model Merging for Seamless Continual
    Learning <https://arxiv.org/abs/2407.06322>`_, 2024

  >>> models = [{"w": 1.0}, {"w": -3.0}, {"w": 2.0}]
  >>> print(magmax({"w": 0.0}, models, scale=1.0)["w"])
  -3.0
  """
  return _leafwise.merge(
    _rule(), base, models, weights, options={"scale": scale}, **options
  )


def max_abs_method(
  *, scale: Any = 0.5, **options: Unpack[_leaves.MergeOptions]
) -> _method.MergeMethod:
  """`magmax_method` by the name it has for independent fine-tunings.

  Args:
    scale: See `magmax`.
    **options: See `MergeOptions`.

  Returns:
    The method.

  >>> method = max_abs_method(scale=1.0)
  >>> state = method.update(method.init({"w": 0.0}), {"w": 2.0})
  >>> print(method.finalize(state)["w"])
  2.0
  """
  return magmax_method(scale=scale, **options)


def max_abs(
  base: PyTree,
  models: Sequence[PyTree],
  *,
  weights: Any = None,
  scale: Any = 0.5,
  **options: Unpack[_leaves.MergeOptions],
) -> PyTree:
  """The rule of `magmax`, by the name it has for independent fine-tunings.

  Args:
    base: See `magmax`, as the rest.
    models: Models that were all tuned from the base.
    weights: One for each model.
    scale: Scale of the merged task vector.
    **options: See `MergeOptions`.

  Returns:
    The merged parameters.

  Raises:
    TreeMismatchError: If a model differs from the base.
    ValueError: If there are no models or a value is out of its range.

  >>> print(max_abs({"w": 0.0}, [{"w": 1.0}, {"w": -3.0}], scale=1.0)["w"])
  -3.0
  """
  return magmax(base, models, weights=weights, scale=scale, **options)


def _random_rule() -> _leafwise.LeafRule:
  return _task_vectors.task_vector_rule(_combine.chosen())


def random_mix_method(
  key: jax.Array,
  *,
  scale: Any = 1.0,
  **options: Unpack[_leaves.MergeOptions],
) -> _method.MergeMethod:
  """Random mixing as a method; see `random_mix`.

  Args:
    key: See `random_mix`, as the rest.
    scale: Scale of the merged task vector.
    **options: See `MergeOptions`.

  Returns:
    The method.

  >>> method = random_mix_method(jax.random.key(0))
  >>> state = method.update(method.init({"w": 0.0}), {"w": 2.0})
  >>> print(method.finalize(state)["w"])
  2.0
  """
  return _leafwise.leafwise_method(
    _random_rule(), options={"scale": scale}, key=key, **options
  )


def random_mix(
  base: PyTree,
  models: Sequence[PyTree],
  key: jax.Array,
  *,
  weights: Any = None,
  scale: Any = 1.0,
  **options: Unpack[_leaves.MergeOptions],
) -> PyTree:
  r"""Takes, per parameter, the task vector of one model drawn at random.

  .. math::
    \theta = \theta_0 + \lambda \tau_I, \quad
    P(I = i) = w_i / \sum_j w_j

  "RandMix", a baseline of MagMax. Drawn by reservoir sampling, so that one
  vector is kept.

  Args:
    base: :math:`\theta_0`.
    models: One or more trees of the structure of the base.
    key: PRNG key. What is drawn for a leaf depends on the key, its name and
      the place of the model, not on the other leaves.
    weights: :math:`w_i`, not negative, 1 by default; see `task_arithmetic`.
    scale: :math:`\lambda`; see `magmax`.
    **options: See `MergeOptions`.

  Returns:
    The merged parameters, with the structure, shapes and dtypes of the base.

  Raises:
    TreeMismatchError: If a model differs from the base.
    ValueError: If there are no models or a value is out of its range.

  References:
    Marczak et al., `MagMax: Leveraging Model Merging for Seamless Continual
    Learning <https://arxiv.org/abs/2407.06322>`_, 2024

  >>> merged = random_mix(
  ...   {"w": 0.0}, [{"w": 1.0}, {"w": 2.0}], jax.random.key(0)
  ... )
  >>> float(merged["w"]) in (1.0, 2.0)
  True
  """
  return _leafwise.merge(
    _random_rule(),
    base,
    models,
    weights,
    options={"scale": scale},
    key=key,
    **options,
  )
