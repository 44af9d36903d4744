"""Metrics along a curve."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import training

PyTree = Any


@functools.lru_cache(maxsize=16)
def _along(
  metric_fn: Callable[[PyTree, PyTree], PyTree], grid: tuple[float, ...]
) -> Callable[[Any, PyTree], PyTree]:
  """The metric of a batch at every t of the grid, `[examples, grid]`."""

  def metrics(curve: Any, batch: PyTree) -> PyTree:
    values = jax.lax.map(
      lambda t: metric_fn(curve(t), batch), jnp.array(grid, jnp.float32)
    )
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), values)

  return metrics


def profile(
  metric_fn: Callable[[PyTree, PyTree], PyTree],
  curve: Any,
  data: PyTree,
  grid: Sequence[float] | int = 21,
  *,
  seed_axis: bool = False,
  **options: Any,
) -> tuple[np.ndarray, PyTree]:
  """Means of per-example metrics at points along a curve.

  Args:
    metric_fn: as in `jaxmerge.training.evaluate`.
    curve: a `BezierCurve` or `PolyChain`.
    data: pytree of arrays `[examples, ...]`, or a `training.Replicated`.
    grid: the t to look at, or how many, evenly from 0 to 1.
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
  ts = np.linspace(0, 1, grid) if isinstance(grid, int) else np.asarray(grid)
  if ts.ndim != 1 or len(ts) < 2:
    raise ValueError(f"A grid of at least 2 points is needed, got {grid}.")
  if seed_axis:
    curve = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), curve)
  means = training.evaluate(
    _along(metric_fn, tuple(ts.tolist())),
    curve,
    data,
    seed_axis=seed_axis,
    **options,
  )
  return ts, means
