"""Training control points: what curves and simplices share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxmerge import training
from jaxmerge import tree as tree_lib

PyTree = Any

#: `phi(trained, frozen, drawn)`, the network at a position that was drawn.
Phi = Callable[[PyTree, PyTree, jax.Array], PyTree]


@functools.lru_cache(maxsize=16)
def _loss_at(
  loss_fn: Callable[..., Any], phi: Phi, phi_weight_decay: float
) -> Callable[..., Any]:
  """The task loss at a random position."""

  def loss(trained: PyTree, context: training.Context) -> Any:
    frozen, rest = context.frozen
    params = phi(trained, frozen, context.drawn)
    output = loss_fn(tree_lib.combine(params, rest), context.batch, context.key)
    if not phi_weight_decay:
      return output
    losses, metrics = output if isinstance(output, tuple) else (output, {})
    square = tree_lib.dot(params, params).astype(losses.dtype)
    return losses + phi_weight_decay / 2 * square, metrics

  return loss


def check_model(params: PyTree, name: str, options: dict[str, Any]) -> None:
  """Raises unless a network's leaves are all weights, and the loss keeps none.

  Args:
    params: the network.
    name: what the message calls it.
    options: the further options of the training loop.

  Raises:
    ValueError: a leaf is a running statistic, or a state is given.
  """
  remedy = (
    'Fit the curve through variables["params"], with a loss in training mode '
    "that throws the updates away, and estimate the statistics of the result "
    "with jaxmerge.alignment.reset_batch_stats."
  )
  for leaf in tree_lib.leaf_names(params):
    if "batch_stats" in leaf.split("/"):
      raise ValueError(
        f"Leaf '{leaf}' of {name} is a running statistic, which is not to be "
        f"trained. {remedy}"
      )
  if options.get("state") is not None:
    raise ValueError(f"The networks of a curve carry no state. {remedy}")


def fit_points(
  loss_fn: Callable[[PyTree, PyTree, jax.Array], Any],
  phi: Phi,
  trained: PyTree,
  frozen: PyTree,
  rest: PyTree,
  data: PyTree,
  *,
  key: jax.Array,
  draw: Callable[[jax.Array, jax.Array], jax.Array],
  optimizer: training.Optimizer | None,
  learning_rate: float,
  final_learning_rate: float,
  momentum: float,
  weight_decay: float,
  phi_weight_decay: float,
  epochs: int,
  batch_size: int,
  seed_axis: bool,
  **options: Any,
) -> training.TrainResult:
  """Trains control points on the loss at positions drawn anew every step.

  Args:
    loss_fn: `loss_fn(params, batch, key)`, as in `jaxmerge.training.fit`.
    phi: the network at a position. Keep one function object: each one
      compiles anew.
    trained: floating-point leaves that are trained.
    frozen: floating-point leaves that are not, for `phi`.
    rest: the other leaves of the network.
    data: pytree of arrays `[examples, ...]`, or a `training.Replicated`.
    key: PRNG key; an array of keys with `seed_axis`.
    draw: `draw(key, step)`, the position of a step.
    optimizer: replaces SGD and the four options that follow.
    learning_rate: initial learning rate of `training.sgd`.
    final_learning_rate: its learning rate at the end.
    momentum: its momentum.
    weight_decay: its weight decay, on the trained control points.
    phi_weight_decay: weight decay on the network at the position.
    epochs: number of epochs.
    batch_size: global batch size.
    seed_axis: all leaves, and `key`, have a leading axis of seeds.
    **options: the further options of `training.train`.

  Returns:
    The trained leaves in the form of `trained`, steps and history.
  """
  if not seed_axis:
    add_axis = functools.partial(jax.tree.map, lambda leaf: leaf[None])
    trained, frozen, rest = map(add_axis, (trained, frozen, rest))
    key = key[None]
  if not isinstance(data, training.Replicated):
    data = training.replicate(data, options.get("devices"))
  if optimizer is None:
    optimizer = training.default_sgd(
      data,
      options.get("indices"),
      batch_size,
      epochs,
      learning_rate,
      final_learning_rate,
      momentum,
      weight_decay,
    )
  result = training.train(
    _loss_at(loss_fn, phi, phi_weight_decay),
    trained,
    data,
    optimizer=optimizer,
    epochs=epochs,
    batch_size=batch_size,
    keys=key,
    frozen=(frozen, rest),
    draw=draw,
    **options,
  )
  if seed_axis:
    return result
  return result._replace(
    params=jax.tree.map(lambda leaf: leaf[0], result.params)
  )
