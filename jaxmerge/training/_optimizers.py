"""The optimizer of curve finding, with its schedule."""

from __future__ import annotations

import functools
from typing import NamedTuple

import optax

from jaxmerge.training import _schedules


class Optimizer(NamedTuple):
  """An Optax optimizer and the learning rate that it follows.

  Attributes:
    transformation: the Optax gradient transformation.
    learning_rate: schedule of the learning rate, for reports.
  """

  transformation: optax.GradientTransformation
  learning_rate: optax.Schedule


# Cached, so that runs with the same settings share one compiled epoch.
@functools.lru_cache(maxsize=64)
def sgd(
  learning_rate: float,
  final_learning_rate: float,
  epochs: int,
  steps_per_epoch: int,
  *,
  momentum: float = 0.9,
  weight_decay: float = 0.0,
  per_epoch: bool = False,
) -> Optimizer:
  """SGD with momentum, decayed weights and `constant_linear_flat`.

      g <- gradient + weight_decay * params
      m <- momentum * m + g
      params <- params - lr(step) * m

  Args:
    learning_rate: initial learning rate, positive.
    final_learning_rate: learning rate at the end; equal to the initial one
      it makes the rate constant.
    epochs: number of epochs.
    steps_per_epoch: number of steps in an epoch.
    momentum: in [0, 1).
    weight_decay: factor of the L2 penalty's gradient, not negative.
    per_epoch: change the learning rate once an epoch, not every step.

  Returns:
    The optimizer; equal arguments give the same object.

  Raises:
    ValueError: a value is out of its range.

  >>> float(sgd(0.1, 0.01, 10, 5).learning_rate(0))
  0.10000000149011612
  """
  if not 0 <= momentum < 1:
    raise ValueError(f"momentum must lie in [0, 1), got {momentum}.")
  if weight_decay < 0:
    raise ValueError(f"weight_decay must not be negative, got {weight_decay}.")
  schedule = _schedules.constant_linear_flat(
    learning_rate,
    final_learning_rate,
    epochs,
    steps_per_epoch,
    per_epoch=per_epoch,
  )
  step = optax.sgd(schedule, momentum=momentum or None)
  if weight_decay:
    step = optax.chain(optax.add_decayed_weights(weight_decay), step)
  return Optimizer(step, schedule)
