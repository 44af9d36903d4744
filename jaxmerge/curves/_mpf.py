"""Mode Path Fusion: merge two networks through the curve between them."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmerge import training
from jaxmerge.curves import _fit_curve, _profile

PyTree = Any


class MPFInfo(NamedTuple):
  """Diagnostics of `mode_path_fusion`.

  Attributes:
    curve: the fitted curve.
    grid: float64 `[points]`, where the loss was measured.
    losses: mean loss at those t, `[points]` (`[seeds, points]`).
    best_t: t of the smallest of them, a scalar (`[seeds]`).
    steps: number of optimizer steps.
    seconds: wall time of the fit.
    history: one record an epoch, see `jaxmerge.training.TrainResult`.
  """

  curve: Any
  grid: np.ndarray
  losses: np.ndarray
  best_t: np.ndarray
  steps: int
  seconds: float
  history: list[dict[str, Any]]


def _losses(
  loss_fn: Callable[..., Any], params: PyTree, batch: PyTree
) -> jax.Array:
  output = loss_fn(params, batch, jax.random.key(0))
  return output[0] if isinstance(output, tuple) else output


@functools.lru_cache(maxsize=16)
def loss_metric(
  loss_fn: Callable[..., Any],
) -> Callable[[PyTree, PyTree], jax.Array]:
  """The loss as a per-example metric."""

  def metric(params: PyTree, batch: PyTree) -> jax.Array:
    losses = _losses(loss_fn, params, batch)
    if losses.ndim:
      return losses
    # A mean over a batch that is padded would count the padding.
    return jax.vmap(
      lambda example: _losses(
        loss_fn, params, jax.tree.map(lambda leaf: leaf[None], example)
      )
    )(batch)

  return metric


def spread_rows(
  data: training.Replicated, indices: Any, most: int
) -> np.ndarray:
  """At most so many of the rows that were trained on, evenly spaced."""
  known = indices
  if known is None:
    known = np.arange(jax.tree.leaves(data.value)[0].shape[1])
  # Seeds that train on different rows are judged on the first one's.
  known = np.atleast_2d(np.asarray(known))[0]
  places = np.linspace(0, len(known) - 1, min(len(known), most))
  return known[np.unique(places.astype(np.int32))]


def mode_path_fusion(
  loss_fn: Callable[[PyTree, PyTree, jax.Array], Any],
  start: PyTree,
  end: PyTree,
  data: PyTree,
  *,
  key: jax.Array,
  t: float = 0.5,
  grid: int = 21,
  grid_examples: int = 10_000,
  seed_axis: bool = False,
  **options: Any,
) -> tuple[PyTree, MPFInfo]:
  """Merges two networks at the middle of a low-loss curve between them.

      phi(t) = (1-t)^2 W1 + 2t(1-t) theta + t^2 W2
      theta* = argmin_theta E_{t ~ U(0,1)} [ loss(phi(t)) ]
      merged = phi(0.5) = 0.25 W1 + 0.5 theta* + 0.25 W2

  Args:
    loss_fn: `loss_fn(params, batch, key)`, as in `jaxmerge.training.fit`.
    start: W1, any pytree of parameters.
    end: W2, of the same structure, shapes and dtypes.
    data: pytree of arrays `[examples, ...]`, or a `training.Replicated`.
    key: PRNG key; an array of keys with `seed_axis`.
    t: where on the curve the merged network is taken, in [0, 1].
    grid: number of points at which the loss along the curve is measured.
    grid_examples: it is measured on at most so many of the examples that
      the curve is fitted on (the first seed's), evenly spaced over them.
    seed_axis: everything has a leading axis of seeds, see `fit_curve`.
    **options: the options of `fit_curve`: number and initialisation of the
      control points, sampling of t, optimizer, epochs, batch size, devices.

  Returns:
    The merged parameters and an `MPFInfo`.

  Raises:
    TreeMismatchError: the ends differ in structure, shape or dtype.
    ValueError: an option is out of its range.
    training.NonFiniteLossError: a loss became NaN or infinite.

  References:
    Model Merging for Continual Learning (Mode Path Fusion), ETH Zurich.

  >>> import jax.numpy as jnp
  >>> data = {"x": np.ones(32, np.float32)}
  >>> def loss_fn(params, batch, key):
  ...   return (params["r"] @ params["r"] - batch["x"]) ** 2
  >>> merged, info = mode_path_fusion(
  ...   loss_fn,
  ...   {"r": jnp.array([1.0, 0.0])},
  ...   {"r": jnp.array([0.0, 1.0])},
  ...   data,
  ...   key=jax.random.key(0),
  ...   batch_size=8,
  ...   epochs=60,
  ... )
  >>> bool(abs(merged["r"] @ merged["r"] - 1) < 0.1), info.steps
  (True, 240)
  """
  if not 0 <= t <= 1:
    raise ValueError(f"t must lie in [0, 1], got {t}.")
  if grid < 2 or grid_examples < 1:
    raise ValueError(
      "grid must be at least 2 and grid_examples at least 1, got "
      f"{grid} and {grid_examples}."
    )
  if not isinstance(data, training.Replicated):
    data = training.replicate(data, options.get("devices"))
  begin = time.perf_counter()
  result = _fit_curve.fit_curve(
    loss_fn, start, end, data, key=key, seed_axis=seed_axis, **options
  )
  seconds = time.perf_counter() - begin
  rows = spread_rows(data, options.get("indices"), grid_examples)
  ts, losses = _profile.profile(
    loss_metric(loss_fn),
    result.curve,
    data,
    grid,
    seed_axis=seed_axis,
    indices=rows,
  )
  merged = result.curve(t)
  info = MPFInfo(
    curve=result.curve,
    grid=ts,
    losses=losses,
    best_t=ts[np.argmin(losses, axis=-1)],
    steps=result.steps,
    seconds=seconds,
    history=result.history,
  )
  return merged, info
