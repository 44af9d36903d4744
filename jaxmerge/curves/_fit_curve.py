"""Fitting a low-loss curve between two networks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmerge import training
from jaxmerge import tree as tree_lib
from jaxmerge.curves import _curve, _fit_points, _sampling

PyTree = Any


class CurveResult(NamedTuple):
  """What `fit_curve` returns.

  Attributes:
    curve: the fitted curve.
    steps: number of optimizer steps.
    history: one record an epoch, see `jaxmerge.training.TrainResult`.
  """

  curve: Any
  steps: int
  history: list[dict[str, Any]]


def _random_leaf(key: jax.Array, leaf: jax.Array) -> jax.Array:
  bound = 1 / math.sqrt(max(1, math.prod(leaf.shape[:-1])))
  noise = jax.random.uniform(key, leaf.shape, minval=-bound, maxval=bound)
  return noise.astype(leaf.dtype)


def _line(start: PyTree, end: PyTree, num_points: int) -> list[PyTree]:
  """Inner control points, evenly spaced on the straight line."""
  last = num_points - 1
  return [tree_lib.lerp(start, end, index / last) for index in range(1, last)]


def _random(
  key: jax.Array, start: PyTree, end: PyTree, num_points: int
) -> list[PyTree]:
  """Random inner control points; vectors and scalars stay on the line."""
  # Training splits the run's key in three: 0, 1, 2 are taken.
  key = jax.random.fold_in(key, 3)
  points = []
  for index, point in enumerate(_line(start, end, num_points)):
    leaves, treedef = jax.tree.flatten(point)
    keys = jax.random.split(jax.random.fold_in(key, index), len(leaves))
    drawn = [
      _random_leaf(one, leaf) if leaf.ndim >= 2 else leaf
      for one, leaf in zip(keys, leaves, strict=True)
    ]
    points.append(jax.tree.unflatten(treedef, drawn))
  return points


@functools.lru_cache(maxsize=16)
def _phi(kind: str) -> _fit_points.Phi:
  """The network at a position of a curve, leaf by leaf without stacking."""

  def phi(trained: PyTree, ends: PyTree, t: jax.Array) -> PyTree:
    start, end = trained["ends"] if ends is None else ends
    points = [start, *trained["inner"], end]
    return _curve.evaluate_curve(_curve.get(kind), points, t)

  return phi


def check_options(
  kind: str,
  num_points: int,
  t_sampling: str,
  concentration: float,
  *,
  train_ends: bool = False,
) -> None:
  """Checks options of `fit_curve` before anything is computed.

  Args:
    kind: see `fit_curve`, as the others.
    num_points: number of control points.
    t_sampling: name of the distribution of t.
    concentration: a of Beta(a, a).
    train_ends: whether the ends are trained.

  Raises:
    ValueError: an option is unknown or out of its range.

  >>> check_options("bezier", 3, "uniform", 1.0)
  """
  _curve.get(kind)
  least = 2 if train_ends else 3
  if num_points < least:
    raise ValueError(
      f"num_points must be at least {least}, got {num_points}: nothing would "
      "be trained."
    )
  _sampling.get_sampler(t_sampling, concentration)


def fit_curve(
  loss_fn: Callable[[PyTree, PyTree, jax.Array], Any],
  start: PyTree,
  end: PyTree,
  data: PyTree,
  *,
  key: jax.Array,
  kind: str = "bezier",
  num_points: int = 3,
  init: str | PyTree = "line",
  train_ends: bool = False,
  t_sampling: str = "uniform",
  concentration: float = 2.0,
  t_shared: bool = True,
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
) -> CurveResult:
  """Fits a curve of low loss between two networks.

  Minimises over the inner control points

      E_{t ~ T} [ loss(phi(t)) ] + weight_decay / 2 ||points||^2
                                 + phi_weight_decay / 2 E_t ||phi(t)||^2

  with one fresh t a step.

  Args:
    loss_fn: `loss_fn(params, batch, key)`, as in `jaxmerge.training.fit`.
    start: parameters at t = 0, any pytree.
    end: parameters at t = 1.
    data: pytree of arrays `[examples, ...]`, or a `training.Replicated`.
    key: PRNG key; an array of keys with `seed_axis`.
    kind: "bezier" or "polychain".
    num_points: number of control points, ends included, at least 3 (at least
      2 with `train_ends`).
    init: inner control points at the start: "line" (evenly on the straight
      line), "random" (kernels U(+-1/sqrt(fan in)), vectors on the line), or
      a sequence of pytrees, one a point.
    train_ends: train the two ends, too; they start at `start` and `end`.
    t_sampling: "uniform", "stratified" (every 16 steps cover [0, 1] evenly)
      or "beta".
    concentration: a of Beta(a, a) for "beta".
    t_shared: one t for all devices, so that the number of devices changes
      nothing; otherwise each device draws its own.
    optimizer: replaces SGD and the four options that follow.
    learning_rate: initial learning rate of `training.sgd`.
    final_learning_rate: its learning rate at the end.
    momentum: its momentum.
    weight_decay: its weight decay, on the trained control points.
    phi_weight_decay: weight decay on the sampled network phi(t).
    epochs: number of epochs.
    batch_size: global batch size.
    seed_axis: the leaves of `start`, `end` and `init`, and `key`, have a
      leading axis of seeds that are fitted at once.
    **options: the further options of `training.train`, but for `state`:
      fit a network with batch normalisation on its ``params`` alone, with a
      loss in training mode, and use `alignment.reset_batch_stats` afterwards.

  Returns:
    The curve (with `seed_axis`, its points have the axis of seeds behind
    that of control points), the number of steps and the history.

  Raises:
    TreeMismatchError: the ends differ in structure, shape or dtype.
    ValueError: an option is out of its range.
    training.NonFiniteLossError: a loss became NaN or infinite.

  References:
    Garipov et al., Loss Surfaces, Mode Connectivity, and Fast Ensembling of
    DNNs, 2018.

  >>> import numpy as np
  >>> data = {"x": np.ones(32, np.float32)}
  >>> def loss_fn(params, batch, key):
  ...   return (params["r"] @ params["r"] - batch["x"]) ** 2
  >>> result = fit_curve(
  ...   loss_fn,
  ...   {"r": jnp.array([1.0, 0.0])},
  ...   {"r": jnp.array([0.0, 1.0])},
  ...   data,
  ...   batch_size=8,
  ...   epochs=60,
  ...   key=jax.random.key(0),
  ...   weight_decay=0.0,
  ... )
  >>> middle = result.curve(0.5)["r"]
  >>> bool(abs(middle @ middle - 1) < 0.1)
  True
  """
  tree_lib.check_match(start, end, names=("start", "end"))
  _fit_points.check_model(start, "start", options)
  check_options(
    kind, num_points, t_sampling, concentration, train_ends=train_ends
  )
  draw = _sampling.draw_t(t_sampling, concentration, t_shared)
  as_arrays = functools.partial(jax.tree.map, jnp.asarray)
  start, rest = tree_lib.partition(as_arrays(start))
  end, _ = tree_lib.partition(as_arrays(end))
  if not jax.tree.leaves(start):
    raise ValueError(
      "start has no floating-point leaf: there is nothing to train."
    )
  inner = _inner_points(init, key, start, end, num_points, seed_axis)
  result = _fit_points.fit_points(
    loss_fn,
    _phi(kind),
    {"inner": inner, "ends": (start, end) if train_ends else None},
    None if train_ends else (start, end),
    rest,
    data,
    key=key,
    draw=draw,
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
  if train_ends:
    start, end = result.params["ends"]
  points = [
    tree_lib.combine(point, rest)
    for point in (start, *result.params["inner"], end)
  ]
  curve = _curve.get(kind).through(*points)
  return CurveResult(curve, result.steps, result.history)


def _inner_points(
  init: str | PyTree,
  key: jax.Array,
  start: PyTree,
  end: PyTree,
  num_points: int,
  seed_axis: bool,
) -> list[PyTree]:
  """The inner control points before training."""
  if isinstance(init, str):
    if init == "line":
      return _line(start, end, num_points)
    if init != "random":
      raise ValueError(
        f"Unknown init {init!r}. Choose line, random, or give a sequence of "
        "pytrees."
      )
    draw = functools.partial(_random, num_points=num_points)
    return (jax.vmap(draw) if seed_axis else draw)(key, start, end)
  points = [
    tree_lib.partition(jax.tree.map(jnp.asarray, point))[0] for point in init
  ]
  if len(points) != num_points - 2:
    raise ValueError(
      f"init holds {len(points)} points; num_points={num_points} has "
      f"{num_points - 2} inner ones."
    )
  names = ["start", *(f"init[{index}]" for index in range(len(points)))]
  tree_lib.check_match(start, *points, names=names)
  return points
