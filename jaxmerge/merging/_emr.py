"""EMR-Merging: elect, mask and rescale."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree
from jaxmerge.merging import (
  _combine,
  _consensus,
  _leafwise,
  _leaves,
  _method,
  _multi_task,
  _task_vectors,
)

PyTree = Any
Array = jax.Array


class EMR(NamedTuple):
  """What `emr` returns.

  Attributes:
    unified: The unified task vector, a tree of the structure, shapes and
      dtypes of the base. Leaves that are not selected are zero; those that are
      not floating-point are the base's.
    masks: For each task a tree of boolean leaves of the same shapes.
    scales: Array [n] of float32 (float64 if a leaf is), one for each task.
  """

  unified: PyTree
  masks: tuple[PyTree, ...]
  scales: Array


@functools.cache
def _elected() -> _combine.Combiner:
  inner = _combine.elected("mass", "max", "positive", "leaf")

  def finalize(accumulator: dict[str, Array], summary: Array | None) -> Array:
    vector = inner.finalize(accumulator, summary)
    # sgn(0) = 0: no sign is elected, and no entry has it.
    return jnp.where(accumulator["vote"] == 0, 0, vector)

  return inner._replace(finalize=finalize)


def _unified_rule() -> _leafwise.LeafRule:
  return _task_vectors.task_vector_rule(_elected())


@jax.jit
def _mask_leaf(
  base: Array, leaf: Array, vector: Array
) -> tuple[Array, Array, Array]:
  """The mask of one task, and the two sums that its scale is made of."""
  tau = _leaves.widen(leaf) - _leaves.widen(base)
  # Not the product, which may underflow.
  mask = jnp.sign(tau) * jnp.sign(vector) > 0
  masked = jnp.where(mask, jnp.abs(vector), 0)
  return mask, jnp.abs(tau).sum(), masked.sum()


@jax.jit
def _rebuild_leaf(
  base: Array, vector: Array, mask: Array, scale: Array
) -> Array:
  wide = _leaves.widen(base)
  tau = scale.astype(wide.dtype) * vector.astype(wide.dtype)
  return (wide + jnp.where(mask, tau, 0)).astype(base.dtype)


def emr_unified_method(
  *, scale: Any = 1.0, **options: Unpack[_leaves.MergeOptions]
) -> _method.MergeMethod:
  """The elected vector of EMR as a streamed method; see `emr_unified`.

  Args:
    scale: See `emr_unified`.
    **options: See `MergeOptions`.

  Returns:
    The method.

  >>> method = emr_unified_method()
  >>> state = method.init({"w": 0.0})
  >>> for value in (1.0, 2.0, -2.5):
  ...   state = method.update(state, {"w": value})
  >>> print(method.finalize(state)["w"])
  2.0
  """
  return _leafwise.leafwise_method(
    _unified_rule(), options={"scale": scale}, **options
  )


def emr_unified(
  base: PyTree,
  models: Sequence[PyTree],
  *,
  weights: Any = None,
  scale: Any = 1.0,
  **options: Unpack[_leaves.MergeOptions],
) -> PyTree:
  r"""Adds the elected vector of EMR-Merging to the base.

  .. math::
    \theta = \theta_0 + \lambda \tau_{uni}, \quad
    \tau_{uni} = \gamma \max_{i : \mathrm{sgn}(w_i \tau_i) = \gamma}
      |w_i \tau_i|, \quad
    \gamma = \mathrm{sgn} \sum_i w_i \tau_i

  entry by entry, zero where the sum is zero. This is the one model for all
  tasks; `emr` has the masks and scales that make it one for each task.

  Args:
    base: :math:`\theta_0`, the parameters that all models were tuned from.
    models: One or more trees of the structure of the base.
    weights: :math:`w_i`, 1 by default; see `task_arithmetic`.
    scale: :math:`\lambda`; see `magmax`.
    **options: See `MergeOptions`.

  Returns:
    The merged parameters, with the structure, shapes and dtypes of the base.

  Raises:
    TreeMismatchError: If a model differs from the base.
    ValueError: If there are no models or a value is out of its range.

  References:
    Huang et al., `EMR-Merging: Tuning-Free High-Performance Model Merging
    <https://arxiv.org/abs/2405.17461>`_, 2024

  >>> models = [{"w": 1.0}, {"w": 2.0}, {"w": -2.5}]
  >>> print(emr_unified({"w": 0.0}, models)["w"])
  2.0
  """
  return _leafwise.merge(
    _unified_rule(), base, models, weights, options={"scale": scale}, **options
  )


def emr(
  base: PyTree,
  models: Sequence[PyTree],
  *,
  weights: Any = None,
  **options: Unpack[_leaves.MergeOptions],
) -> EMR:
  r"""Elects a unified task vector, and a mask and a scale for each task.

  .. math::
    \gamma &= \mathrm{sgn} \sum_i w_i \tau_i, \quad
    \tau_{uni} = \gamma \max_{i : \mathrm{sgn}(w_i \tau_i) = \gamma}
      |w_i \tau_i| \\
    m_i &= 1\{\tau_i \tau_{uni} > 0\}, \quad
    \lambda_i = \frac{\sum |\tau_i|}{\sum |m_i \tau_{uni}|}

  with the sums of :math:`\lambda_i` over all entries of all merged leaves, and
  :math:`\lambda_i = 0` for a task whose mask is empty. `emr_params` rebuilds
  :math:`\theta_0 + \lambda_i m_i \tau_{uni}`.

  The paper's code differs in two points: it gives entries whose sum is zero
  the negative sign, and adds up the means of the tensors for
  :math:`\lambda_i`, so that small tensors count as much as large ones.

  Args:
    base: :math:`\theta_0`, the parameters that all models were tuned from.
    models: One or more trees of the structure of the base, one a task.
    weights: :math:`w_i`, 1 by default; see `task_arithmetic`. They count in
      the election only.
    **options: See `MergeOptions`; ``dtype`` is that of the unified vector.

  Returns:
    The unified vector, the masks and the scales.

  Raises:
    TreeMismatchError: If a model differs from the base.
    ValueError: If there are no models or a value is out of its range.

  References:
    Huang et al., `EMR-Merging: Tuning-Free High-Performance Model Merging
    <https://arxiv.org/abs/2405.17461>`_, 2024

  >>> models = [{"w": jnp.asarray([1.0, 3.0])}, {"w": jnp.asarray([-2.0, 1.0])}]
  >>> result = emr({"w": jnp.zeros(2)}, models)
  >>> print(result.unified["w"], result.masks[0]["w"], result.scales[1])
  [-2.  3.] [False  True] 0.6
  """
  _leaves.check_shared(options, "emr")
  select, dtype = options.get("select"), options.get("dtype")
  vectors = _multi_task.multi_task_vector(
    base,
    models,
    weights,
    _multi_task.vector_rule(_elected()),
    select=select,
    allow_nonfinite=options.get("allow_nonfinite", False),
  )
  merged = _leaves.merged_leaves(base, select)
  bases = jax.tree.leaves(base)
  wide = np.result_type(np.float32, *(vector.dtype for vector in vectors))
  masks, scales = [], []
  for params in models:
    leaves = jax.tree.leaves(params)
    found = [
      _mask_leaf(bases[leaf.place], leaves[leaf.place], vector)
      for leaf, vector in zip(merged, vectors, strict=True)
    ]
    masks.append(
      _multi_task.place_leaves(base, merged, [one for one, _, _ in found], bool)
    )
    sums = [jnp.zeros((), wide), jnp.zeros((), wide)]
    for _, *terms in found:
      sums = [
        total + term.astype(wide)
        for total, term in zip(sums, terms, strict=True)
      ]
    scales.append(_combine.divide(*sums))
  zeros = jax.tree.map(
    lambda leaf: jnp.zeros_like(leaf) if tree.is_float(leaf) else leaf, base
  )
  unified = _leaves.rebuild(
    zeros,
    merged,
    [
      vector.astype(_leaves.result_dtype(bases[leaf.place], dtype))
      for leaf, vector in zip(merged, vectors, strict=True)
    ],
    dtype,
  )
  return EMR(unified, tuple(masks), jnp.stack(scales))


def emr_params(base: PyTree, result: EMR, task: int) -> PyTree:
  r"""Rebuilds one task's parameters from what `emr` returned.

  .. math::
    \hat\theta_i = \theta_0 + \lambda_i m_i \tau_{uni}

  Args:
    base: :math:`\theta_0`, the base that `emr` was given.
    result: What `emr` returned.
    task: Number of the task, :math:`i`, from 0.

  Returns:
    The parameters for the task, with the structure, shapes and dtypes of the
    base. Leaves that are not floating-point are those of the base.

  Raises:
    TreeMismatchError: If the unified vector or the mask differs from the base
      in structure or shape.
    ValueError: If there is no such task.

  >>> base, models = {"w": 1.0}, [{"w": 3.0}, {"w": 2.0}]
  >>> result = emr(base, models)
  >>> print(emr_params(base, result, 0)["w"], emr_params(base, result, 1)["w"])
  3.0 2.0
  """
  if not 0 <= operator.index(task) < len(result.masks):
    raise ValueError(
      f"task is {task} but the number of tasks is {len(result.masks)}; they"
      " count from 0"
    )
  tree.check_match(
    base, result.unified, names=["base", "unified"], check_dtype=False
  )
  _consensus.check_mask(base, result.masks[task], f"mask {task}")
  return jax.tree.map(
    lambda leaf, vector, mask: (
      _rebuild_leaf(jnp.asarray(leaf), vector, mask, result.scales[task])
      if tree.is_float(leaf)
      else leaf
    ),
    base,
    result.unified,
    result.masks[task],
  )
