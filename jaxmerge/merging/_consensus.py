"""TALL masks: what of a multi-task vector each task uses."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from jaxmerge import tree
from jaxmerge.merging import (
  _combine,
  _gathered,
  _leafwise,
  _leaves,
  _method,
  _multi_task,
  _sparsify,
  _values,
)

PyTree = Any
Array = jax.Array

_MULTI_TASK = ("task_arithmetic", "ties")


def _is_used(base: Array, leaf: Array, vector: Array, factor: Array) -> Array:
  tau = _leaves.widen(leaf) - _leaves.widen(base)
  return jnp.abs(tau) >= factor.astype(tau.dtype) * jnp.abs(vector - tau)


_mask_leaf = jax.jit(_is_used)


@jax.jit
def _count_leaf(
  count: Array, base: Array, leaf: Array, vector: Array, factor: Array
) -> Array:
  return count + _is_used(base, leaf, vector, factor).astype(count.dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _keep_used(
  base: Array,
  vector: Array,
  count: Array,
  min_tasks: Array,
  scale: Array,
  dtype: Any,
) -> Array:
  wide = _leaves.widen(base)
  kept = jnp.where(count >= min_tasks, vector, 0)
  return (wide + scale.astype(wide.dtype) * kept).astype(dtype)


@jax.jit
def _choose(mask: Array, leaf: Array, base: Array) -> Array:
  return jnp.where(mask, leaf, base)


def _factors(
  tall_lambda: Any, base: PyTree, num_models: int, merged: Sequence[Any]
) -> list[Array]:
  """The threshold of each merged leaf, one value a model."""
  entries = _values.per_model(tall_lambda, num_models, "values of tall_lambda")
  _values.check_range(entries, "tall_lambda", 0, float("inf"))
  values = _leaves.resolve({"tall_lambda": entries}, base, merged)
  return [one["tall_lambda"] for one in values]


def tall_masks(
  base: PyTree,
  models: Sequence[PyTree],
  *,
  merged: PyTree | None = None,
  tall_lambda: Any = 0.4,
  select: str | Callable[[str], bool] | None = None,
  allow_nonfinite: bool = False,
) -> list[PyTree]:
  r"""Marks, for each task, the entries of the multi-task vector that it uses.

  .. math::
    m_i = 1\{|\tau_i| \ge \lambda_i |\tau_{MTL} - \tau_i|\}, \quad
    \tau_i = \theta_i - \theta_0, \quad \tau_{MTL} = \theta_{MTL} - \theta_0

  Args:
    base: :math:`\theta_0`, the parameters that all models were tuned from.
    models: One or more trees of the structure of the base, one a task.
    merged: :math:`\theta_{MTL}`, merged parameters of the models; by default
      task arithmetic, :math:`\tau_{MTL} = \sum_i \tau_i`.
    tall_lambda: :math:`\lambda_i`, not negative; the larger, the fewer entries
      are marked. A scalar, a prefix of the tree or a mapping from regular
      expressions; a sequence of these gives each task its own, as the paper
      does, which chooses it on validation data from 0.2 to 0.6.
    select: Regular expression or predicate of the names of the leaves that are
      marked; see `MergeOptions`.
    allow_nonfinite: Whether NaN and infinity are let through.

  Returns:
    One tree of the structure of the base for each model, with boolean leaves
    of the shapes of the base. Leaves that are not floating-point or not
    selected are False throughout.

  Raises:
    TreeMismatchError: If a model differs from the base.
    ValueError: If there are no models or a value is out of its range.

  References:
    Wang et al., `Localizing Task Information for Improved Model Merging and
    Compression <https://arxiv.org/abs/2405.07813>`_, 2024

  >>> base, models = {"w": 0.0}, [{"w": 1.0}, {"w": 5.0}]
  >>> [bool(mask["w"]) for mask in tall_masks(base, models)]
  [False, True]
  """
  models = _method.check_models(models)
  names = ["base", *(f"model {i}" for i in range(len(models)))]
  trees = [base, *models]
  if merged is not None:
    names, trees = [*names, "merged"], [*trees, merged]
  tree.check_match(*trees, names=names)
  chosen = _leaves.merged_leaves(base, select)
  factors = _factors(tall_lambda, base, len(models), chosen)
  if not allow_nonfinite:
    _leaves.check_finite(trees, names, chosen)
  bases = [jax.tree.leaves(base)[leaf.place] for leaf in chosen]
  if merged is None:
    vectors = _multi_task.multi_task_vector(
      base,
      models,
      None,
      _multi_task.vector_rule(_combine.total()),
      select=select,
      # They have been looked at.
      allow_nonfinite=True,
    )
  else:
    leaves = jax.tree.leaves(merged)
    vectors = [
      _leaves.difference(one, leaves[leaf.place])
      for one, leaf in zip(bases, chosen, strict=True)
    ]
  masks = []
  for i, params in enumerate(models):
    leaves = jax.tree.leaves(params)
    results = [
      _mask_leaf(one, leaves[leaf.place], vector, factor[i])
      for one, leaf, vector, factor in zip(
        bases, chosen, vectors, factors, strict=True
      )
    ]
    masks.append(_multi_task.place_leaves(base, chosen, results, bool))
  return masks


def check_mask(base: PyTree, mask: PyTree, name: str = "mask") -> None:
  """Raises unless a tree has a boolean leaf for each leaf of the base."""
  tree.check_match(base, mask, names=["base", name], check_dtype=False)
  for leaf_name, leaf in zip(
    tree.leaf_names(mask), jax.tree.leaves(mask), strict=True
  ):
    dtype = getattr(leaf, "dtype", type(leaf))
    if not jnp.issubdtype(dtype, jnp.bool_):
      raise ValueError(
        f"leaf '{leaf_name}' of {name} has dtype {dtype}; a mask is boolean,"
        " as tall_masks makes it"
      )


def localize(base: PyTree, merged: PyTree, mask: PyTree) -> PyTree:
  r"""Rebuilds one task's parameters from the merged ones and its mask.

  .. math::
    \hat\theta_i = \theta_0 + m_i \tau_{MTL}

  that is, the entry of the merged parameters where the mask is set, and that
  of the base where it is not.

  Args:
    base: :math:`\theta_0`.
    merged: :math:`\theta_0 + \tau_{MTL}`, a tree of the structure of the base.
    mask: :math:`m_i`, one of those that `tall_masks` returns.

  Returns:
    The parameters for the task, with the structure, shapes and dtypes of the
    base. Leaves that are not floating-point are those of the base.

  Raises:
    TreeMismatchError: If ``merged`` or the mask differs from the base.
    ValueError: If the mask is not boolean.

  References:
    Wang et al., `Localizing Task Information for Improved Model Merging and
    Compression <https://arxiv.org/abs/2405.07813>`_, 2024

  >>> base, merged = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}
  >>> print(localize(base, merged, {"w": jnp.asarray([True, False])})["w"])
  [1. 0.]
  """
  tree.check_match(base, merged, names=["base", "merged"])
  check_mask(base, mask)
  return jax.tree.map(
    lambda one, two, chosen: (
      _choose(chosen, two, one) if tree.is_float(one) else one
    ),
    base,
    merged,
    mask,
  )


def consensus_method(
  *,
  scale: Any = 1.0,
  tall_lambda: Any = 0.4,
  min_tasks: int = 2,
  multi_task: str = "task_arithmetic",
  density: Any = 0.2,
  merge: str = "sum",
  **options: Unpack[_leaves.MergeOptions],
) -> _method.MergeMethod:
  """Consensus merging as a method, which keeps all models; see `consensus`.

  Args:
    scale: See `consensus`, as the rest.
    tall_lambda: Threshold of the masks.
    min_tasks: Number of tasks that must use an entry.
    multi_task: "task_arithmetic" or "ties".
    density: Of TIES.
    merge: Of TIES.
    **options: See `MergeOptions`.

  Returns:
    The method.

  >>> method = consensus_method(scale=0.5)
  >>> state = method.init({"w": 0.0})
  >>> for value in (1.0, 2.0):
  ...   state = method.update(state, {"w": value})
  >>> print(method.finalize(state)["w"])
  1.5
  """
  check_options(min_tasks, None, multi_task, density, merge)
  function = functools.partial(
    consensus,
    scale=scale,
    tall_lambda=tall_lambda,
    min_tasks=min_tasks,
    multi_task=multi_task,
    density=density,
    merge=merge,
    **options,
  )
  return _gathered.gathering_method(function, **options)


def check_options(
  min_tasks: int,
  num_models: int | None,
  multi_task: str,
  density: Any,
  merge: str,
) -> None:
  """Raises for options that are unknown or out of their range."""
  if operator.index(min_tasks) < 0:
    raise ValueError(f"min_tasks must not be negative; got {min_tasks}")
  if num_models is not None and min_tasks > num_models:
    raise ValueError(
      f"min_tasks is {min_tasks} but the number of models is {num_models}:"
      " nothing would be kept; give more models or a smaller min_tasks"
    )
  _sparsify.check_choice(multi_task, "multi_task", _MULTI_TASK)
  _sparsify.check_choice(merge, "merge", ("mean", "sum", "max"))
  _values.check_range(density, "density", 0, 1, open_low=True)


def consensus(
  base: PyTree,
  models: Sequence[PyTree],
  *,
  weights: Any = None,
  scale: Any = 1.0,
  tall_lambda: Any = 0.4,
  min_tasks: int = 2,
  multi_task: str = "task_arithmetic",
  density: Any = 0.2,
  merge: str = "sum",
  **options: Unpack[_leaves.MergeOptions],
) -> PyTree:
  r"""Keeps the entries of the multi-task vector that several tasks use.

  .. math::
    \theta = \theta_0 + \alpha\, 1\Big\{\sum_i m_i \ge k\Big\} \tau_{MTL},
    \quad m_i = 1\{|\tau_i| \ge \lambda_i |\tau_{MTL} - \tau_i|\}

  The masks are those of `tall_masks`, taken before :math:`\alpha`. With
  :math:`k = 2` "catastrophic" entries, which no task uses, and "selfish" ones,
  which one task uses, are dropped.

  Args:
    base: :math:`\theta_0`, the parameters that all models were tuned from.
    models: Trees of the structure of the base, one a task; at least
      ``min_tasks``.
    weights: Weights of the models in :math:`\tau_{MTL}`, 1 by default; see
      `task_arithmetic`. The masks are of the models as they are.
    scale: :math:`\alpha`: a scalar, a prefix of the tree or a mapping.
    tall_lambda: :math:`\lambda_i`; see `tall_masks`.
    min_tasks: :math:`k`; with 0 everything is kept.
    multi_task: What :math:`\tau_{MTL}` is: the sum of "task_arithmetic", or
      the merged vector of "ties" (see `ties`).
    density: Fraction of each task vector that TIES keeps, in (0, 1], of the
      whole vector; without effect on task arithmetic.
    merge: How TIES merges: "sum", as the paper's code does here, "mean" or
      "max"; likewise.
    **options: See `MergeOptions`.

  Returns:
    The merged parameters, with the structure, shapes and dtypes of the base.

  Raises:
    TreeMismatchError: If a model differs from the base.
    ValueError: If there are fewer models than ``min_tasks``, an option is
      unknown or a value is out of its range.

  References:
    Wang et al., `Localizing Task Information for Improved Model Merging and
    Compression <https://arxiv.org/abs/2405.07813>`_, 2024

  >>> base = {"w": jnp.zeros(2)}
  >>> models = [{"w": jnp.asarray([1.0, 5.0])}, {"w": jnp.asarray([2.0, 0.0])}]
  >>> print(consensus(base, models)["w"])
  [3. 0.]
  """
  models = _method.check_models(models)
  check_options(min_tasks, len(models), multi_task, density, merge)
  rule, values = _multi_task.vector_rule(_combine.total()), {}
  if multi_task == "ties":
    rule = _multi_task.vector_rule(
      _combine.elected("mass", merge, "majority", "vector"),
      _sparsify.magnitude("vector"),
    )
    values = {"density": density}
  return keep_used(
    base,
    models,
    weights,
    rule,
    values,
    scale=scale,
    tall_lambda=tall_lambda,
    min_tasks=min_tasks,
    **options,
  )


def keep_used(
  base: PyTree,
  models: Sequence[PyTree],
  weights: Any,
  rule: _leafwise.LeafRule,
  values: dict[str, Any],
  *,
  scale: Any,
  tall_lambda: Any,
  min_tasks: int,
  select: str | Callable[[str], bool] | None = None,
  dtype: Any = None,
  allow_nonfinite: bool = False,
) -> PyTree:
  """Keeps of a multi-task vector what several tasks use.

  Args:
    base: See `consensus`.
    models: Likewise.
    weights: Likewise.
    rule: What merges the task vectors; see `_multi_task.vector_rule`.
    values: Its options.
    scale: See `consensus`, as the rest.
    tall_lambda: Threshold of the masks.
    min_tasks: Number of tasks that must use an entry.
    select: See `MergeOptions`, as the others.
    dtype: Dtype of the result.
    allow_nonfinite: Whether NaN and infinity are let through.

  Returns:
    The merged parameters.
  """
  names = ["base", *(f"model {i}" for i in range(len(models)))]
  tree.check_match(base, *models, names=names)
  merged = _leaves.merged_leaves(base, select)
  factors = _factors(tall_lambda, base, len(models), merged)
  scales = _leaves.resolve({"scale": scale}, base, merged)
  vectors = _multi_task.multi_task_vector(
    base,
    models,
    weights,
    rule,
    options=values,
    select=select,
    allow_nonfinite=allow_nonfinite,
  )
  bases = jax.tree.leaves(base)
  all_leaves = [jax.tree.leaves(params) for params in models]
  results = []
  for leaf, vector, factor, found in zip(
    merged, vectors, factors, scales, strict=True
  ):
    count = jnp.zeros_like(vector, jnp.int32)
    for i, leaves in enumerate(all_leaves):
      count = _count_leaf(
        count, bases[leaf.place], leaves[leaf.place], vector, factor[i]
      )
    results.append(
      _keep_used(
        bases[leaf.place],
        vector,
        count,
        jnp.int32(min_tasks),
        found["scale"],
        _leaves.result_dtype(bases[leaf.place], dtype),
      )
    )
  return _leaves.rebuild(base, merged, results, dtype)
