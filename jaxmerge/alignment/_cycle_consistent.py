"""Matching of many networks at once, consistent along cycles."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree
from jaxmerge.alignment import (
  _assignment,
  _merge_many,
  _similarity,
  _spec,
  _weight_matching,
)

PyTree = Any
# For each leaf the groups on it, and where.
_Layouts = tuple[tuple[tuple[str, _spec.Axis], ...], ...]


def cycle_consistent_matching(
  models: Sequence[PyTree],
  spec: _spec.PermutationSpec | None = None,
  *,
  key: jax.Array,
  max_iterations: int = 100,
  tolerance: float = 1e-6,
  refine: bool = True,
  select: _similarity.Select = None,
) -> tuple[tuple[PyTree, ...], _merge_many.ManyMatchingInfo]:
  r"""Brings n networks into one common order, all groups and models at once.

  .. math::
    \max_{\sigma_1, \ldots, \sigma_n} \sum_{i < j}
      \langle \sigma_i\theta_i, \sigma_j\theta_j \rangle

  Each model has permutations to a common order, so that those from model to
  model (`relative_permutations`) close every cycle. As in C2M3, permutations
  are relaxed to doubly stochastic matrices, which the Frank-Wolfe algorithm
  moves all together: towards the permutations that agree best with the
  gradient, which is an assignment problem for each group and model, as far as
  is best on that line. The objective is a polynomial on it, and so the step is
  exact. The end is rounded to the nearest permutations. The common order is
  that of the first model: only relative orders matter, and with none held two
  models would change places.

  Args:
    models: One or more pytrees of arrays of the same structure, shapes and
      dtypes. The matrices take ``len(models) * n * n`` numbers a group.
    spec: The specification; by default that of `derive_spec`.
    key: PRNG key of the orders in which ``refine`` goes.
    max_iterations: Largest number of Frank-Wolfe steps; at least 1.
    tolerance: The Frank-Wolfe gap, and the gain of a step, below which it ends,
      as a fraction of the objective's largest absolute value so far.
    refine: Whether each model is then aligned to the mean of the others in
      turn, as in `merge_many`. The objective grows or stays, and the first
      model may move; False gives C2M3 as it is published.
    select: As for `weight_matching`.

  Returns:
    The aligned models; their permutations, with the objective of the relaxed
    problem after each step, and as the last one that of the permutations.

  Raises:
    TreeMismatchError: If the models differ in structure, shape or dtype.
    SpecError: If the specification does not fit them.
    TypeError: If the parameters are traced.
    ValueError: If there are no models, an entry is not finite, or an option is
      out of range.

  References:
    Crisostomi et al., `C2M3: Cycle-consistent multi-model merging
    <https://arxiv.org/abs/2405.17897>`_, 2024

  >>> model = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0], [4.0]])}
  >>> other = {"a": jnp.array([[2.0, 1.0]]), "b": jnp.array([[4.0], [3.0]])}
  >>> spec = {"hidden": (_spec.Axis("a", 1), _spec.Axis("b", 0, False))}
  >>> aligned, info = cycle_consistent_matching(
  ...   [model, other], spec, key=jax.random.key(0)
  ... )
  >>> print(aligned[1]["a"], info.objectives[[0, -1]])
  [[1. 2.]] [28. 30.]
  """
  _weight_matching.check_options(
    restarts=0, max_sweeps=max_iterations, tolerance=tolerance
  )
  models, spec, counted = _merge_many.check_models(models, spec, select)
  permutations, objectives, converged = _frank_wolfe(
    models, spec, counted, max_iterations, tolerance
  )
  aligned, info = _merge_many.align_in_turn(
    models,
    spec,
    counted,
    permutations,
    key,
    max_rounds=100 if refine else 0,
    max_sweeps=100,
    tolerance=tolerance,
  )
  objectives.append(float(info.objectives[-1]))
  return tuple(aligned), info._replace(
    objectives=np.array(objectives),
    converged=converged,
    n_iters=len(objectives) - 1,
  )


def _frank_wolfe(
  models: Sequence[PyTree],
  spec: _spec.PermutationSpec,
  counted: Sequence[bool],
  max_iterations: int,
  tolerance: float,
) -> tuple[list[dict[str, np.ndarray]], list[float], bool]:
  """Permutations of each model, relaxed objectives, and whether it ended."""
  by_leaf = _spec.axes_by_leaf(spec)
  used = [
    (i, tuple((g, axis._replace(leaf="")) for g, axis in by_leaf.get(name, ())))
    for i, name in enumerate(tree.leaf_names(models[0]))
    if counted[i]
  ]
  positions = [i for i, _ in used]
  layouts = tuple(layout for _, layout in used)
  trees = [jax.tree.leaves(model) for model in models]
  leaves = tuple(
    jnp.stack([jnp.asarray(leaves[i]) for leaves in trees]) for i in positions
  )
  leaves = tuple(leaf.astype(tree.accumulation_dtype(leaf)) for leaf in leaves)
  dtype = np.result_type(*(leaf.dtype for leaf in leaves))
  dtype = np.finfo(dtype).dtype  # The real one of a complex type.
  sizes = _spec.group_sizes(spec, models[0])
  others = len(models) - 1
  plans = {
    group: jnp.broadcast_to(jnp.eye(n, dtype=dtype), (others, n, n))
    for group, n in sizes.items()
  }
  # Each factor is linear in the step, and models are multiplied in pairs.
  degree = 2 * max((len(layout) for layout in layouts), default=1)
  points = np.linspace(0.0, 1.0, max(degree, 1) + 1)
  value, gradient = _value_and_gradient(plans, leaves, layouts)
  objectives = [float(value)]
  converged = not (others and sizes)
  while not converged and len(objectives) <= max_iterations:
    target = {
      group: _one_hot(_assignment.solve_assignment(slopes), dtype)
      for group, slopes in gradient.items()
    }
    gap = sum(
      float(_dot(gradient[group], target[group], plans[group]))
      for group in sizes
    )
    scale = tolerance * max(map(abs, objectives))
    if gap <= scale:
      converged = True
      break
    values = np.asarray(
      _values(plans, target, leaves, jnp.asarray(points, dtype), layouts)
    )
    step = _best_step(points, values.astype(np.float64))
    moved = _move(plans, target, jnp.asarray(step, dtype))
    value, gradient = _value_and_gradient(moved, leaves, layouts)
    gain = float(value) - objectives[-1]
    if gain <= scale:
      # What is left is rounding; a step that does not help is not taken.
      converged = True
      break
    plans = moved
    objectives.append(float(value))
  rounded = {
    group: np.asarray(_assignment.solve_assignment(plan))
    if others
    else np.zeros((0, sizes[group]), np.int32)
    for group, plan in plans.items()
  }
  first = {group: np.arange(n) for group, n in sizes.items()}
  rest = [
    {group: orders[i] for group, orders in rounded.items()}
    for i in range(others)
  ]
  return [first, *rest], objectives, converged


def _best_step(points: np.ndarray, values: np.ndarray) -> float:
  """Where the polynomial through the values is largest, between 0 and 1."""
  polynomial = np.polynomial.Polynomial.fit(
    points, values, deg=len(points) - 1, domain=[0.0, 1.0]
  )
  roots = polynomial.deriv().roots()
  inner = roots[np.abs(roots.imag) < 1e-6].real
  candidates = np.array([1.0, *inner[(inner > 0) & (inner < 1)]])
  return float(candidates[np.argmax(polynomial(candidates))])


def _one_hot(permutation: jax.Array, dtype: Any) -> jax.Array:
  return jax.nn.one_hot(permutation, permutation.shape[-1], dtype=dtype)


@jax.jit
def _dot(slopes: jax.Array, target: jax.Array, plan: jax.Array) -> jax.Array:
  return jnp.sum(slopes * (target - plan))


@jax.jit
def _move(
  plans: dict[str, jax.Array], target: dict[str, jax.Array], step: jax.Array
) -> dict[str, jax.Array]:
  # 1 gives the permutations without a rounding.
  return jax.tree.map(lambda a, b: (1 - step) * a + step * b, plans, target)


def _objective(
  plans: dict[str, jax.Array],
  leaves: tuple[jax.Array, ...],
  layouts: _Layouts,
) -> jax.Array:
  """Inner products of all pairs; plans of all models but the first."""
  dtype = np.result_type(np.float32, *(leaf.dtype for leaf in leaves))
  total = jnp.zeros((), np.finfo(dtype).dtype)
  for leaf, layout in zip(leaves, layouts, strict=True):
    rest = jax.vmap(functools.partial(_transported, layout=layout))(
      leaf[1:], {group: plans[group] for group, _ in layout}
    )
    # What each model adds to the sum of those before it.
    before = jnp.concatenate([leaf[:1], rest[:-1]])
    before = jnp.cumsum(before, axis=0)[: len(rest)]
    total = total + jnp.sum(jnp.real(jnp.conj(before) * rest)).astype(
      total.dtype
    )
  return total


def _transported(
  leaf: jax.Array,
  plans: dict[str, jax.Array],
  layout: tuple[tuple[str, _spec.Axis], ...],
) -> jax.Array:
  for group, axis in layout:
    array, place = _spec.split_axis(leaf, axis)
    moved = jnp.tensordot(
      plans[group].astype(leaf.dtype),
      array,
      (1, place),
      precision=jax.lax.Precision.HIGHEST,
    )
    leaf = jnp.moveaxis(moved, 0, place).reshape(leaf.shape)
  return leaf


@functools.partial(jax.jit, static_argnames="layouts")
def _value_and_gradient(
  plans: dict[str, jax.Array],
  leaves: tuple[jax.Array, ...],
  layouts: _Layouts,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  return jax.value_and_grad(_objective)(plans, leaves, layouts)


@functools.partial(jax.jit, static_argnames="layouts")
def _values(
  plans: dict[str, jax.Array],
  target: dict[str, jax.Array],
  leaves: tuple[jax.Array, ...],
  points: jax.Array,
  layouts: _Layouts,
) -> jax.Array:
  # One point after the other, so that memory does not grow with their number.
  return jax.lax.map(
    lambda step: _objective(_move(plans, target, step), leaves, layouts), points
  )
