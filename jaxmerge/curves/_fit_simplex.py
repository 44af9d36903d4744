"""Fitting a simplex of low loss between networks, and merging them."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import merging, training
from jaxmerge import tree as tree_lib
from jaxmerge.curves import (
  _fit_points,
  _mpf,
  _profile,
  _sampling,
  _simplex,
)

PyTree = Any


class SimplexInfo(NamedTuple):
  """Diagnostics of `fit_simplex`.

  Attributes:
    simplex: the fitted simplex (with `seed_axis`, its points have the axis of
      seeds behind that of control points).
    grid: barycentric coordinates where the loss was measured, float64
      `[places, models]`: the models, the middles of the pairs, and the middle
      of all.
    losses: mean loss there, `[places]` (`[seeds, places]`).
    steps: number of optimizer steps.
    seconds: wall time of the fit.
    history: one record an epoch, see `jaxmerge.training.TrainResult`.
  """

  simplex: Any
  grid: np.ndarray
  losses: np.ndarray
  steps: int
  seconds: float
  history: list[dict[str, Any]]


@functools.lru_cache(maxsize=16)
def _phi(common: bool) -> _fit_points.Phi:
  """The network at barycentric coordinates, leaf by leaf without stacking."""

  def phi(trained: PyTree, models: PyTree, t: jax.Array) -> PyTree:
    weights = _simplex.simplex_weights(t, common=common)
    return tree_lib.weighted_sum([*models, *trained], weights)

  return phi


def fit_simplex(
  loss_fn: Callable[[PyTree, PyTree, jax.Array], Any],
  models: Sequence[PyTree],
  data: PyTree,
  *,
  key: jax.Array,
  common: bool = True,
  concentration: float = 1.0,
  t: Any = None,
  t_shared: bool = True,
  grid_examples: int = 10_000,
  optimizer: training.Optimizer | None = None,
  learning_rate: float = 0.07,
  final_learning_rate: float = 7e-5,
  momentum: float = 0.9,
  weight_decay: float = 5e-4,
  phi_weight_decay: float = 0.0,
  epochs: int = 10,
  batch_size: int = 128,
  seed_axis: bool = False,
  **options: Any,
) -> tuple[PyTree, SimplexInfo]:
  """Merges networks in the middle of a simplex of low loss between them.

  Minimises over the control points of the pairs and the common one

      E_{t ~ Dirichlet(a, ..., a)} [ loss(phi(t)) ]
                                 + weight_decay / 2 ||points||^2

  with one fresh t a step, phi the `BezierSimplex` through the networks, which
  stay as they are. The points start at the means of the pairs and of all
  networks: of two or three, phi is at first the plain simplex sum_i t_i W_i.
  Of two networks this is `fit_curve` with `t_sampling="beta"` and the same
  draws.

  Args:
    loss_fn: `loss_fn(params, batch, key)`, as in `jaxmerge.training.fit`.
    models: two or more pytrees of the same structure, shapes and dtypes.
    data: pytree of arrays `[examples, ...]`, or a `training.Replicated`.
    key: PRNG key; an array of keys with `seed_axis`.
    common: train a common control point, too, where there are three networks
      or more.
    concentration: a of the Dirichlet distribution, positive: 1 is uniform on
      the simplex, more is nearer to the middle.
    t: where the merged network is taken, `[models]`, not negative, sum 1; by
      default at the barycentre (1/n, ..., 1/n).
    t_shared: one t for all devices, so that the number of devices changes
      nothing; otherwise each device draws its own.
    grid_examples: the losses are measured on at most so many of the examples
      that the simplex is fitted on.
    optimizer: replaces SGD and the four options that follow.
    learning_rate: initial learning rate of `training.sgd`.
    final_learning_rate: its learning rate at the end.
    momentum: its momentum.
    weight_decay: its weight decay, on the trained control points.
    phi_weight_decay: weight decay on the sampled network phi(t).
    epochs: number of epochs.
    batch_size: global batch size.
    seed_axis: the leaves of the models, and `key`, have a leading axis of
      seeds that are fitted at once.
    **options: the further options of `training.train`, but for `state`:
      fit a network with batch normalisation on its ``params`` alone, with a
      loss in training mode, and use `alignment.reset_batch_stats` afterwards.

  Returns:
    The merged parameters and a `SimplexInfo`.

  Raises:
    TreeMismatchError: the models differ in structure, shape or dtype.
    ValueError: fewer than two models, or an option is out of its range.
    training.NonFiniteLossError: a loss became NaN or infinite.

  References:
    Garipov et al., Loss Surfaces, Mode Connectivity, and Fast Ensembling of
    DNNs, 2018 (https://arxiv.org/abs/1802.10026). Benton et al., Loss Surface
    Simplexes for Mode Connecting Volumes and Fast Ensembling, 2021
    (https://arxiv.org/abs/2102.13042).

  >>> data = {"x": np.ones(32, np.float32)}
  >>> def loss_fn(params, batch, key):
  ...   return (params["r"] @ params["r"] - batch["x"]) ** 2
  >>> merged, info = fit_simplex(
  ...   loss_fn,
  ...   [{"r": row} for row in jnp.eye(3)],
  ...   data,
  ...   key=jax.random.key(0),
  ...   batch_size=8,
  ...   epochs=60,
  ... )
  >>> bool(abs(merged["r"] @ merged["r"] - 1) < 0.15), info.grid.shape
  (True, (7, 3))
  """
  models = [jax.tree.map(jnp.asarray, model) for model in models]
  count = len(models)
  if count < 2:
    raise ValueError(f"fit_simplex needs at least 2 models, got {count}.")
  names = [f"model {index}" for index in range(count)]
  tree_lib.check_match(*models, names=names)
  if not concentration > 0:
    raise ValueError(
      f"The concentration of the Dirichlet distribution must be positive, got "
      f"{concentration}."
    )
  if grid_examples < 1:
    raise ValueError(f"grid_examples must be at least 1, got {grid_examples}.")
  place = np.full(count, 1 / count) if t is None else np.asarray(t, np.float64)
  if (
    place.shape != (count,) or (place < 0).any() or abs(place.sum() - 1) > 1e-5
  ):
    raise ValueError(
      f"t must hold {count} barycentric coordinates that are not negative and "
      f"sum to 1, got {t}."
    )
  common = common and count > 2
  _fit_points.check_model(models[0], "model 0", options)
  floats = [tree_lib.partition(model)[0] for model in models]
  rest = tree_lib.partition(models[0])[1]
  if not jax.tree.leaves(floats[0]):
    raise ValueError(
      "The models have no floating-point leaf: there is nothing to train."
    )
  trained = [
    tree_lib.lerp(floats[i], floats[j], 0.5) for i, j in _simplex.pairs(count)
  ]
  if common:
    trained.append(merging.average(floats))
  if not isinstance(data, training.Replicated):
    data = training.replicate(data, options.get("devices"))
  begin = time.perf_counter()
  result = _fit_points.fit_points(
    loss_fn,
    _phi(common),
    trained,
    floats,
    rest,
    data,
    key=key,
    draw=_sampling.draw_barycentric(concentration, count, t_shared),
    optimizer=optimizer,
    learning_rate=learning_rate,
    final_learning_rate=final_learning_rate,
    momentum=momentum,
    weight_decay=weight_decay,
    phi_weight_decay=phi_weight_decay,
    epochs=epochs,
    batch_size=batch_size,
    seed_axis=seed_axis,
    **options,
  )
  seconds = time.perf_counter() - begin
  inner = [tree_lib.combine(point, rest) for point in result.params]
  simplex = _simplex.BezierSimplex.through(
    models, inner[:-1] if common else inner, inner[-1] if common else None
  )
  corners = np.eye(count)
  grid = np.stack(
    [
      *corners,
      *((corners[i] + corners[j]) / 2 for i, j in _simplex.pairs(count)),
      *([np.full(count, 1 / count)] if count > 2 else []),
    ]
  )
  weigh = functools.partial(_simplex.simplex_weights, common=common)
  points = simplex.points
  if seed_axis:
    points = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), points)
  losses = _profile.evaluate_sums(
    _mpf.loss_metric(loss_fn),
    points,
    np.asarray(jax.vmap(weigh)(jnp.asarray(grid, jnp.float32))),
    data,
    seed_axis=seed_axis,
    indices=_mpf.spread_rows(data, options.get("indices"), grid_examples),
  )
  info = SimplexInfo(
    simplex, grid, losses, result.steps, seconds, result.history
  )
  return simplex(place), info
