"""Task arithmetic: sums of task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

from jaxmerge import tree
from jaxmerge.merging import (
  _combine,
  _leafwise,
  _leaves,
  _method,
  _task_vectors,
)

PyTree = Any


def _rule(normalize: bool) -> _leafwise.LeafRule:
  return _task_vectors.task_vector_rule(_combine.total(normalize))


def task_arithmetic_method(
  *,
  scale: Any = 1.0,
  normalize: bool = False,
  **options: Unpack[_leaves.MergeOptions],
) -> _method.MergeMethod:
  """Task arithmetic as a method; see `task_arithmetic`.

  Args:
    scale: See `task_arithmetic`, as the rest.
    normalize: Whether the mean is taken.
    **options: See `MergeOptions`.

  Returns:
    The method.

  >>> method = task_arithmetic_method(scale=0.5)
  >>> state = method.update(method.init({"w": 1.0}), {"w": 3.0})
  >>> print(method.finalize(state)["w"])
  2.0
  """
  return _leafwise.leafwise_method(
    _rule(normalize), options={"scale": scale}, **options
  )


def task_arithmetic(
  base: PyTree,
  models: Sequence[PyTree],
  *,
  weights: Any = None,
  scale: Any = 1.0,
  normalize: bool = False,
  **options: Unpack[_leaves.MergeOptions],
) -> PyTree:
  r"""Adds task vectors to the base.

  .. math::
    \theta = \theta_0 + \lambda \sum_i w_i \tau_i, \quad
    \tau_i = \theta_i - \theta_0

  A negative weight forgets a task ("negation"); weights 1, -1, 1 make the
  analogy "C is to D as A is to B": :math:`\tau_D = \tau_C + \tau_B - \tau_A`.

  Args:
    base: :math:`\theta_0`, the parameters that all models were tuned from.
    models: One or more trees of the structure of the base.
    weights: :math:`w_i`, one for each model: a scalar, a prefix of the tree,
      or a mapping from regular expressions of leaf names to scalars; or an
      array of shape [n]; 1 by default.
    scale: :math:`\lambda`: a scalar, a prefix or a mapping.
    normalize: Divide the sum by the sum of the weights (model soup of task
      vectors).
    **options: See `MergeOptions`.

  Returns:
    The merged parameters, with the structure, shapes and dtypes of the base.

  Raises:
    TreeMismatchError: If a model differs from the base.
    ValueError: If there are no models or a value is out of its range.

  References:
    Ilharco et al., `Editing models with task arithmetic
    <https://arxiv.org/abs/2212.04089>`_, 2023

  >>> base = {"w": 1.0}
  >>> print(task_arithmetic(base, [{"w": 2.0}, {"w": 4.0}], scale=0.5)["w"])
  3.0
  >>> print(task_arithmetic(base, [{"w": 2.0}], weights=[-1])["w"])
  0.0
  """
  return _leafwise.merge(
    _rule(normalize),
    base,
    models,
    weights,
    options={"scale": scale},
    **options,
  )


def task_vector(base: PyTree, params: PyTree) -> PyTree:
  r"""The task vector :math:`\tau = \theta - \theta_0`.

  Args:
    base: :math:`\theta_0`.
    params: :math:`\theta`.

  Returns:
    The difference of the floating-point leaves, in their dtypes; the other
    leaves are those of ``params``.

  Raises:
    TreeMismatchError: If the trees differ in structure, shape or dtype.

  >>> print(task_vector({"w": 1.0}, {"w": 3.0})["w"])
  2.0
  """
  return tree.sub(params, base)
