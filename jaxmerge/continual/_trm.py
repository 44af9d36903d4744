"""Trajectory regularised merging: a merge optimised along the training's way.

The idea, and the names of the three objectives, are those of the abstract of
Trajectory Regularized Merging; its equations are not public. What they are here
is jaxmerge's own construction.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import training
from jaxmerge import tree as tree_lib
from jaxmerge.continual import _objective, _problem, _subspace

PyTree = Any
GradFn = Callable[[PyTree], PyTree]

DERIVATIVES = ("finite_difference", "forward_over_reverse")

#: Length of the finite difference, as a part of the task vector's: what float32
#: rounds and what the third derivative adds are both small there.
REACH = 0.01


def task_alignment(
  logits: jax.Array, labels: jax.Array, mask: jax.Array
) -> jax.Array:
  """Cross-entropy of the task's labels, an example each.

  Args:
    logits: float `[b, classes]` of the merged network.
    labels: int32 `[b]`.
    mask: bool `[b, classes]`, the classes that count.

  Returns:
    float `[b]`.

  >>> mask = jnp.array([[True, True, False]])
  >>> print(task_alignment(jnp.zeros((1, 3)), jnp.array([0]), mask).round(3))
  [0.693]
  """
  return _objective.cross_entropy(logits, labels, mask)


def prediction_consistency(
  logits: jax.Array,
  targets: jax.Array,
  mask: jax.Array,
  temperature: jax.typing.ArrayLike = 1.0,
) -> jax.Array:
  """Kullback-Leibler divergence from what the network before predicts.

      T^2 * KL(softmax(targets / T) || softmax(logits / T)), of the old classes

  Args:
    logits: float `[b, classes]` of the merged network.
    targets: those of the network before the task.
    mask: bool `[b, classes]`, the old classes; without any it is 0.
    temperature: T, positive.

  Returns:
    float `[b]`, not negative but for rounding.

  >>> mask = jnp.array([[True, True]])
  >>> logits = jnp.array([[0.0, 0.0]])
  >>> print(prediction_consistency(logits, logits, mask))
  [0.]
  """
  cross = _objective.distillation(logits, targets, mask, temperature)
  own = _objective.distillation(targets, targets, mask, temperature)
  return cross - jax.lax.stop_gradient(own)


def gradient_responsiveness(
  norm: jax.Array, threshold: jax.typing.ArrayLike
) -> jax.Array:
  """Hinge on the norm of the task loss's gradient: `max(0, g - norm)`.

  A network whose gradient vanishes does not learn from where it is.

  Args:
    norm: of the gradient with respect to all parameters.
    threshold: g.

  Returns:
    A scalar, not negative.

  >>> print(gradient_responsiveness(jnp.array(0.25), 1.0))
  0.75
  """
  return jnp.maximum(0.0, jnp.asarray(threshold, norm.dtype) - norm)


def norm_gradient(
  gradient_fn: GradFn,
  params: PyTree,
  gradient: PyTree,
  *,
  method: str = "finite_difference",
  reach: jax.typing.ArrayLike = 1e-3,
) -> PyTree:
  """The gradient of the norm of a gradient: `H G / |G|`.

  Args:
    gradient_fn: `gradient_fn(params) -> G`.
    params: where.
    gradient: G there.
    method: "forward_over_reverse" differentiates the gradient along itself, at
      two to three times its cost; "finite_difference" takes one more gradient,
      `(G(params + reach * u) - G) / reach` with u = G / |G|.
    reach: length of the finite difference, positive.

  Returns:
    A tree like `params`; zero where the gradient is.

  Raises:
    ValueError: the method is unknown.

  >>> def gradient_fn(x):  # Of x^T diag(1, 2) x / 2.
  ...   return jnp.array([1.0, 2.0]) * x
  >>> x = jnp.array([0.0, 1.0])
  >>> print(norm_gradient(gradient_fn, x, gradient_fn(x), reach=0.5))
  [0. 2.]
  """
  norm = tree_lib.norm(gradient)
  safe = jnp.where(norm > 0, norm, 1.0)
  unit = jax.tree.map(lambda leaf: leaf / safe.astype(leaf.dtype), gradient)
  if method == "forward_over_reverse":
    return jax.jvp(gradient_fn, (params,), (unit,))[1]
  if method != "finite_difference":
    raise ValueError(
      f"Unknown derivative {method!r}. Choose one of {', '.join(DERIVATIVES)}."
    )
  size = jnp.asarray(reach)
  ahead = gradient_fn(
    jax.tree.map(lambda p, u: p + size.astype(p.dtype) * u, params, unit)
  )
  return jax.tree.map(
    lambda one, other: (one - other) / size.astype(one.dtype), ahead, gradient
  )


def _mean(values: jax.Array, context: training.Context) -> jax.Array:
  return _objective.batch_mean(values, context)


@functools.lru_cache(maxsize=16)
def loss_fn(
  logits_fn: _problem.LogitsFn,
  groups: tuple[int, ...],
  terms: tuple[str, ...],
  derivative: str,
) -> Callable[[jax.Array, training.Context], Any]:
  """The loss of the coefficients, as `training.train` takes it.

  `frozen` has the `space`, the `masks` and `old` masks by the task of an
  example, the `weights` of the terms by name, the `temperature`, the
  `threshold` of the norm and the `reach` of the finite difference.

  Args:
    logits_fn: the network.
    groups: number of the group of each leaf.
    terms: which of "alignment", "consistency" and "responsiveness" there are.
    derivative: see `norm_gradient`.

  Returns:
    `loss(coefficients, context)`, whose metrics are the values of `terms`, and
    of the cross-entropy always.
  """

  def loss(coefficients: jax.Array, context: training.Context) -> Any:
    frozen, batch = context.frozen, context.batch
    space, weights = frozen["space"], frozen["weights"]
    point = _subspace.moved(groups, space, jax.lax.stop_gradient(coefficients))
    masks = frozen["masks"][batch["task"]]

    def aligned(logits: jax.Array) -> jax.Array:
      return _mean(task_alignment(logits, batch["label"], masks), context)

    def gradient_fn(params: PyTree) -> PyTree:
      found = jax.grad(lambda p: aligned(logits_fn(p, batch["input"])))(params)
      # Of a sum over devices each holds its own part.
      return jax.lax.pmean(found, training.DEVICE_AXIS)

    # One forward pass, and a backward one for each gradient that is needed
    # apart.
    logits, back = jax.vjp(lambda p: logits_fn(p, batch["input"]), point)
    value, error = jax.value_and_grad(aligned)(logits)
    metrics = {"alignment": value}
    total = weights["alignment"] * value
    # Logits of half types are summed up in float32, and go back as they are.
    by_logits = weights["alignment"] * error.astype(jnp.float32)
    if "consistency" in terms:
      targets = logits_fn(space.origin, batch["input"])
      old = frozen["old"][batch["task"]]

      def consistent(logits: jax.Array) -> jax.Array:
        losses = prediction_consistency(
          logits, targets, old, frozen["temperature"]
        )
        return _mean(losses, context)

      value, more = jax.value_and_grad(consistent)(logits)
      metrics["consistency"] = value
      total += weights["consistency"] * value
      by_logits += weights["consistency"] * more.astype(jnp.float32)
    pulled = back(by_logits.astype(logits.dtype))[0]
    gradient = jax.lax.pmean(pulled, training.DEVICE_AXIS)
    if "responsiveness" in terms:
      own = jax.lax.pmean(back(error)[0], training.DEVICE_AXIS)
      norm = tree_lib.norm(own)
      value = gradient_responsiveness(norm, frozen["threshold"])
      metrics["gradient_norm"], metrics["responsiveness"] = norm, value
      total += weights["responsiveness"] * value

      def responsive(gradient: PyTree) -> PyTree:
        slope = norm_gradient(
          gradient_fn, point, own, method=derivative, reach=frozen["reach"]
        )
        return jax.tree.map(
          lambda leaf, s: leaf - weights["responsiveness"].astype(s.dtype) * s,
          gradient,
          slope,
        )

      # Where the hinge is not in touch, its gradient costs nothing.
      gradient = jax.lax.cond(
        value > 0, responsive, lambda gradient: gradient, gradient
      )
    slope = _subspace.coordinates(groups, space, gradient)
    whole = _objective.with_gradient(total, coefficients, slope)
    shape = batch["label"].shape
    spread = {
      name: jnp.broadcast_to(one, shape) for name, one in metrics.items()
    }
    return jnp.broadcast_to(whole, shape), spread

  return loss


def direction_names(snapshots: int, augmented: bool) -> tuple[str, ...]:
  """Names of the directions in the order in which they are orthogonalised.

  >>> direction_names(2, True)
  ('task vector', 'negative gradient', 'snapshot 2', 'snapshot 1')
  """
  names = ["task vector", *(["negative gradient"] if augmented else [])]
  return (*names, *(f"snapshot {n}" for n in range(snapshots, 0, -1)))


def directions(
  current: PyTree, expert: PyTree, path: PyTree, gradient: PyTree | None
) -> PyTree:
  """The directions from the network before the task, see `direction_names`.

  Args:
    current: theta_m, the network before the task, leaves `[seeds, ...]`.
    expert: theta_t, the network after it.
    path: leaves `[seeds, snapshots, ...]`.
    gradient: of the task's loss at the plain merge, or None.

  Returns:
    Leaves `[seeds, directions, ...]`. The gradient is made as long as the way
    from the last snapshot to the end.
  """
  return _directions(current, expert, path, gradient)


@jax.jit
@jax.vmap
def _directions(
  current: PyTree, expert: PyTree, path: PyTree, gradient: PyTree | None
) -> PyTree:
  vector = tree_lib.sub(expert, current)
  parts = [jax.tree.map(lambda leaf: leaf[None], vector)]
  if gradient is not None:
    norm = tree_lib.norm(gradient)
    last = jax.tree.map(lambda leaf, rows: leaf - rows[-1], expert, path)
    scale = -tree_lib.norm(last) / jnp.where(norm > 0, norm, 1.0)
    parts.append(
      jax.tree.map(lambda leaf: scale.astype(leaf.dtype) * leaf[None], gradient)
    )
  parts.append(
    jax.tree.map(lambda rows, leaf: (rows - leaf[None])[::-1], path, current)
  )
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def dropped_names(names: Sequence[str], rows: np.ndarray) -> list[list[str]]:
  """Names of the directions that degenerate, group by group.

  >>> dropped_names(("a", "b"), np.array([[True, False]]))
  [['b']]
  """
  return [
    [name for name, kept in zip(names, one, strict=True) if not kept]
    for one in rows
  ]
