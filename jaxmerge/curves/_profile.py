"""Metrics along a curve."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import training
from jaxmerge import tree as tree_lib
from jaxmerge.curves import _combinations

PyTree = Any

# How many networks are evaluated at a time: a core gains nothing from a batch
# of small ones.
_AT_ONCE = {"cpu": 1}
_AT_ONCE_ELSEWHERE = 16


def _weighted_sum(points: PyTree, weights: jax.Array) -> PyTree:
  def tree(index: int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[index], points)

  trees = [tree(index) for index in range(weights.shape[0])]
  return tree_lib.weighted_sum(trees, weights)


@functools.lru_cache(maxsize=16)
def _at_sums(
  metric_fn: Callable[[PyTree, PyTree], PyTree], at_once: int
) -> Callable[[tuple[PyTree, jax.Array], PyTree], PyTree]:
  """The metrics of a batch at every weighted sum, `[examples, sums]`."""

  def metrics(params: tuple[PyTree, jax.Array], batch: PyTree) -> PyTree:
    points, weights = params
    values = _combinations.map_sums(metric_fn, points, weights, batch, at_once)
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), values)

  return metrics


@functools.lru_cache(maxsize=16)
def _prepared(
  prepare: Callable[[PyTree], PyTree],
) -> Callable[[PyTree, jax.Array], PyTree]:
  return lambda points, weights: prepare(_weighted_sum(points, weights))


def evaluate_sums(
  metric_fn: Callable[[PyTree, PyTree], PyTree],
  points: PyTree,
  weights: np.ndarray,
  data: PyTree,
  *,
  prepare: Callable[[PyTree], PyTree] | None = None,
  seed_axis: bool = False,
  **options: Any,
) -> PyTree:
  """Means of per-example metrics at weighted sums of networks, in one call.

      result_k = 1/n sum_j metric(prepare(sum_i w_ki point_i), example_j)

  Args:
    metric_fn: as in `jaxmerge.training.evaluate`.
    points: a pytree whose leaves have a leading axis of networks, behind that
      of seeds.
    weights: `[sums, networks]`.
    data: pytree of arrays `[examples, ...]`, or a `training.Replicated`.
    prepare: `prepare(params) -> what metric_fn gets`, once a sum.
    seed_axis: the leaves of `points` have a leading axis of seeds.
    **options: the further options of `training.evaluate`.

  Returns:
    The pytree of means, leaves `[sums]` (`[seeds, sums]` with `seed_axis`).
  """
  if not isinstance(data, training.Replicated):
    data = training.replicate(data, options.pop("devices", None))
  weights = np.asarray(weights, np.float32)
  if prepare is not None:
    # Sum by sum, so that what is prepared of one is held, not of all.
    return training.evaluate(
      metric_fn,
      points,
      data,
      prepare=_prepared(prepare),
      variants=weights,
      seed_axis=seed_axis,
      **options,
    )
  platform = data.devices[0].platform
  if seed_axis:
    seeds = len(jax.tree.leaves(points)[0])
    weights = np.broadcast_to(weights, (seeds, *weights.shape))
  return training.evaluate(
    _at_sums(metric_fn, _AT_ONCE.get(platform, _AT_ONCE_ELSEWHERE)),
    (points, weights),
    data,
    seed_axis=seed_axis,
    **options,
  )


def as_grid(grid: Sequence[float] | np.ndarray | int) -> np.ndarray:
  """The t of a grid, float64; a number means so many, evenly from 0 to 1."""
  ts = (
    np.linspace(0, 1, grid)
    if isinstance(grid, int)
    else np.asarray(grid, np.float64)
  )
  if ts.ndim != 1 or len(ts) < 2:
    raise ValueError(f"A grid of at least 2 points is needed, got {grid}.")
  return ts


def _rows(curve: Any, ts: np.ndarray) -> np.ndarray:
  """The weights of a curve's control points at every t, `[t, points]`."""
  weigh = functools.partial(curve.weights, num_points=curve.num_points)
  return np.asarray(jax.vmap(weigh)(jnp.asarray(ts, jnp.float32)))


def profile(
  metric_fn: Callable[[PyTree, PyTree], PyTree],
  curve: Any,
  data: PyTree,
  grid: Sequence[float] | int = 21,
  *,
  prepare: Callable[[PyTree], PyTree] | None = None,
  seed_axis: bool = False,
  **options: Any,
) -> tuple[np.ndarray, PyTree]:
  """Means of per-example metrics at points along a curve, in one call.

  The straight line between two networks is `BezierCurve.through(a, b)`.

  Layers of the networks' inputs are linear in the control points, and so are
  computed once for every control point instead of every t (where that is
  fewer): of a fully connected network's arithmetic that is most.

  Args:
    metric_fn: as in `jaxmerge.training.evaluate`.
    curve: a `BezierCurve` or `PolyChain`.
    data: pytree of arrays `[examples, ...]`, or a `training.Replicated`.
    grid: the t to look at, or how many, evenly from 0 to 1.
    prepare: `prepare(params) -> what metric_fn gets`, called once at each t
      within the same program: BatchNorm statistics estimated anew there, say,
      since those of the ends fit no network between them. Keep one function
      object: each one compiles anew.
    seed_axis: the control points have an axis of seeds behind the first.
    **options: the further options of `training.evaluate`.

  Returns:
    The grid, float64 `[points]`, and the pytree of means, leaves `[points]`
    (`[seeds, points]` with `seed_axis`).

  Raises:
    ValueError: fewer than two points.

  >>> from jaxmerge.curves import BezierCurve
  >>> line = BezierCurve.through({"w": 0.0}, {"w": 1.0})
  >>> data = {"x": np.ones(4, np.float32)}
  >>> ts, values = profile(lambda p, batch: p["w"] * batch["x"], line, data, 3)
  >>> values.tolist()
  [0.0, 0.5, 1.0]
  """
  ts = as_grid(grid)
  rows = _rows(curve, ts)
  points = curve.points
  if seed_axis:
    points = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), points)
  means = evaluate_sums(
    metric_fn,
    points,
    rows,
    data,
    prepare=prepare,
    seed_axis=seed_axis,
    **options,
  )
  return ts, means


@jax.jit
def _norms(curve: Any, ts: jax.Array) -> jax.Array:
  def norm(t: jax.Array) -> jax.Array:
    params = curve(t)
    # Running statistics are no weights.
    return tree_lib.norm(
      [
        leaf
        for name, leaf in zip(
          tree_lib.leaf_names(params), jax.tree.leaves(params), strict=True
        )
        if "batch_stats" not in name.split("/")
      ]
    )

  return jax.lax.map(norm, ts)


def weight_norms(
  curve: Any,
  grid: Sequence[float] | int = 21,
  *,
  seed_axis: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
  """Euclidean norms of the networks along a curve, ||phi(t)||, in one call.

  Leaves in a collection ``batch_stats`` do not count.

  Args:
    curve: a `BezierCurve` or `PolyChain`.
    grid: the t to look at, or how many, evenly from 0 to 1.
    seed_axis: the control points have an axis of seeds behind the first.

  Returns:
    The grid, float64 `[points]`, and the norms, `[points]` (`[seeds, points]`
    with `seed_axis`).

  Raises:
    ValueError: fewer than two points.

  >>> from jaxmerge.curves import BezierCurve
  >>> line = BezierCurve.through({"w": -1.0}, {"w": 3.0})
  >>> weight_norms(line, 3)[1].tolist()
  [1.0, 1.0, 3.0]
  """
  ts = as_grid(grid)
  norms = jax.vmap(_norms, (1, None)) if seed_axis else _norms
  return ts, np.asarray(norms(curve, jnp.asarray(ts, jnp.float32)))
