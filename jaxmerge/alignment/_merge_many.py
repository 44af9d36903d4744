"""Bringing many networks into one order, each to the mean of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree
from jaxmerge.alignment import (
  _derive_spec,
  _similarity,
  _spec,
  _weight_matching,
)

PyTree = Any


class ManyMatchingInfo(NamedTuple):
  """How a matching of many networks went.

  Attributes:
    permutations: For each model, for each group, int32 of shape ``[n]``: the
      neurons that take the places of the common order, as `apply_permutations`
      takes them.
    objectives: float64 of shape ``[n_iters + 1]``: the objective of the start
      and after each iteration.
    converged: Whether the last iteration changed nothing.
    n_iters: Number of iterations.
  """

  permutations: tuple[dict[str, jax.Array], ...]
  objectives: np.ndarray
  converged: bool
  n_iters: int


def check_models(
  models: Sequence[PyTree],
  spec: _spec.PermutationSpec | None,
  select: _similarity.Select,
) -> tuple[list[PyTree], _spec.PermutationSpec, list[bool]]:
  """The models, their specification, and which leaves count, all checked."""
  models = list(models)
  if not models:
    raise ValueError("there are no models to match; give at least one")
  names = [f"model {i}" for i in range(len(models))]
  tree.check_match(*models, names=names)
  if spec is None:
    spec = _derive_spec.derive_spec(models[0])
  _spec.group_sizes(spec, models[0])
  counted = _similarity.counted_leaves(models[0], select)
  _similarity.check_finite(**dict(zip(names, models, strict=True)))
  return models, spec, counted


def merge_many(
  models: Sequence[PyTree],
  spec: _spec.PermutationSpec | None = None,
  *,
  key: jax.Array,
  max_rounds: int = 100,
  max_sweeps: int = 100,
  tolerance: float = 1e-6,
  select: _similarity.Select = None,
) -> tuple[PyTree, tuple[PyTree, ...], ManyMatchingInfo]:
  r"""Aligns n networks with each other, and averages them: MergeMany.

  .. math::
    \max_{\sigma_1, \ldots, \sigma_n} \sum_{i < j}
      \langle \sigma_i\theta_i, \sigma_j\theta_j \rangle

  Round after round, in random order, each model is aligned by `weight_matching`
  to the mean of the others as they are then, from the order that it has; until
  a round changes nothing. A model is left alone as long as the others are as
  they were.

  Args:
    models: One or more pytrees of arrays of the same structure, shapes and
      dtypes.
    spec: The specification; by default that of `derive_spec`.
    key: PRNG key of the orders of the models and the groups.
    max_rounds: Largest number of rounds; at least 1.
    max_sweeps: As for `weight_matching`, for each alignment.
    tolerance: As for `weight_matching`.
    select: As for `weight_matching`.

  Returns:
    The mean of the aligned models; the aligned models; their permutations, with
    the objective after each round, which never falls.

  Raises:
    TreeMismatchError: If the models differ in structure, shape or dtype.
    SpecError: If the specification does not fit them.
    TypeError: If the parameters are traced.
    ValueError: If there are no models, an entry is not finite, or an option is
      out of range.

  References:
    Ainsworth et al., `Git Re-Basin: Merging models modulo permutation
    symmetries <https://arxiv.org/abs/2209.04836>`_, 2022

  >>> model = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0], [4.0]])}
  >>> other = {"a": jnp.array([[2.0, 1.0]]), "b": jnp.array([[4.0], [3.0]])}
  >>> spec = {"hidden": (_spec.Axis("a", 1), _spec.Axis("b", 0, False))}
  >>> merged, aligned, info = merge_many(
  ...   [model, other], spec, key=jax.random.key(0)
  ... )
  >>> print(sorted(merged["a"].ravel().tolist()), info.objectives)
  [1.0, 2.0] [28. 30. 30.]
  """
  _weight_matching.check_options(
    restarts=0, max_sweeps=max_sweeps, tolerance=tolerance
  )
  if max_rounds < 1:
    raise ValueError(f"max_rounds must be at least 1; got {max_rounds}")
  models, spec, counted = check_models(models, spec, select)
  start = _spec.identity_permutations(spec, models[0])
  aligned, info = align_in_turn(
    models,
    spec,
    counted,
    [start] * len(models),
    key,
    max_rounds=max_rounds,
    max_sweeps=max_sweeps,
    tolerance=tolerance,
  )
  weights = [1 / len(models)] * len(models)
  return tree.weighted_sum(aligned, weights), tuple(aligned), info


def align_in_turn(
  models: Sequence[PyTree],
  spec: _spec.PermutationSpec,
  counted: Sequence[bool],
  start: Sequence[Mapping[str, Any]],
  key: jax.Array,
  *,
  max_rounds: int,
  max_sweeps: int,
  tolerance: float,
) -> tuple[list[PyTree], ManyMatchingInfo]:
  """Aligns each model to the mean of the others, from given permutations.

  Args:
    models: The models.
    spec: Their specification.
    counted: For each leaf whether it counts.
    start: Permutations of each model.
    key: PRNG key of the orders.
    max_rounds: As for `merge_many`.
    max_sweeps: As for `merge_many`.
    tolerance: As for `merge_many`.

  Returns:
    The aligned models, and their permutations with the objectives.
  """
  permutations = [
    {group: np.asarray(order) for group, order in one.items()} for one in start
  ]
  # Means of half types are not rounded.
  wide = [
    _spec.apply_permutations(spec, _similarity.widened(model), one)
    for model, one in zip(models, permutations, strict=True)
  ]
  objectives = [pairwise_objective(spec, wide, counted)]
  versions = [0] * len(models)
  solved: list[Any] = [None] * len(models)
  converged = False
  for one in jax.random.split(key, max_rounds):
    order_key, *keys = jax.random.split(one, len(models) + 1)
    converged = True
    total = objectives[-1]
    for i in jax.random.permutation(order_key, len(models)).tolist():
      others = [j for j in range(len(models)) if j != i]
      stamp = [versions[j] for j in others]
      if not others or solved[i] == stamp:
        continue
      mean = tree.weighted_sum(
        [wide[j] for j in others], [1 / len(others)] * len(others)
      )
      problem = _weight_matching.Problem(spec, mean, wide[i], counted)
      info = _weight_matching.ascend(
        problem,
        {group: np.arange(len(v)) for group, v in permutations[i].items()},
        keys[i],
        max_sweeps=max_sweeps,
        tolerance=tolerance,
      )
      if info.converged:
        solved[i] = stamp
      else:
        converged = False
      if info.objectives[-1] > info.objectives[0]:
        converged = False
        versions[i] += 1
        total += len(others) * (info.objectives[-1] - info.objectives[0])
        wide[i] = _spec.apply_permutations(spec, wide[i], info.permutations)
        permutations[i] = {
          group: order[np.asarray(info.permutations[group])]
          for group, order in permutations[i].items()
        }
    objectives.append(total)
    if converged:
      break
  aligned = [
    _spec.apply_permutations(spec, model, one)
    for model, one in zip(models, permutations, strict=True)
  ]
  return aligned, ManyMatchingInfo(
    permutations=tuple(
      {group: jnp.asarray(v, jnp.int32) for group, v in one.items()}
      for one in permutations
    ),
    objectives=np.array(objectives),
    converged=converged,
    n_iters=len(objectives) - 1,
  )


def pairwise_objective(
  spec: _spec.PermutationSpec,
  models: Sequence[PyTree],
  counted: Sequence[bool],
) -> float:
  """The sum of the inner products of all pairs of models.

  Args:
    spec: The specification.
    models: The models, of at least float32.
    counted: For each leaf whether it counts.

  Returns:
    The sum.
  """
  total = 0.0
  before = models[0]
  for model in models[1:]:
    total += _similarity.objective(spec, before, model, counted, None)
    before = tree.add(before, model)
  return total


def relative_permutations(
  reference: Mapping[str, Any], model: Mapping[str, Any]
) -> dict[str, jax.Array]:
  r"""Permutations from one model's order to another's, through a common one.

  .. math::
    \sigma_{\mathrm{rel}} = \sigma_{\mathrm{model}} \circ
      \sigma_{\mathrm{ref}}^{-1}

  Those of three models close the cycle: from a to b and from b to c is from a
  to c.

  Args:
    reference: For each group int of shape ``[n]``, the permutation that brings
      the reference into the common order.
    model: The same for the model.

  Returns:
    For each group int32 of shape ``[n]``: the permutation that brings the model
    into the order of the reference.

  Raises:
    ValueError: If the groups differ.

  >>> relative = relative_permutations({"g": [1, 2, 0]}, {"g": [0, 2, 1]})
  >>> print(relative["g"])
  [1 0 2]
  """
  if set(reference) != set(model):
    other = set(reference) ^ set(model)
    raise ValueError(
      "give permutations of the same groups; only one has"
      f" {', '.join(sorted(other))}"
    )
  return {
    group: jnp.asarray(model[group], jnp.int32)[
      jnp.argsort(jnp.asarray(reference[group]))
    ]
    for group in reference
  }
