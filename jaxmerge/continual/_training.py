"""How a network is trained on a task: optimizer, length, batch size."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxmerge import training

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("linear", "cosine")


class Training(NamedTuple):
  """Settings of one training run.

  Attributes:
    learning_rate: learning rate at the start, or after the warm-up.
    final_learning_rate: the rate at the end; None for a constant one, or, of
      the schedule "cosine", for 0.
    schedule: how it gets there: "linear", constant for the first half of the
      run, then falling linearly until nine tenths of it; or "cosine".
    warmup: the fraction of the run in which the rate first rises linearly from
      0; of the schedule "cosine".
    optimizer: "sgd", "adam" or "adamw".
    momentum: of SGD.
    weight_decay: of SGD (in the gradient) and of AdamW (decoupled).
    clip: largest norm of a step's gradient; None for no limit.
    epochs: passes over the examples.
    iterations: number of steps instead of epochs; None for epochs.
    batch_size: examples a step, at most as many as there are.
    augment: whether the problem's augmentation is applied.
  """

  learning_rate: float = 0.01
  final_learning_rate: float | None = None
  schedule: str = "linear"
  warmup: float = 0.0
  optimizer: str = "sgd"
  momentum: float = 0.9
  weight_decay: float = 0.0
  clip: float | None = None
  epochs: int = 10
  iterations: int | None = None
  batch_size: int = 32
  augment: bool = True


#: Settings of a curve: the paper's.
CURVE = Training(0.07, 7e-5, weight_decay=5e-4)


def check(settings: Training, name: str) -> None:
  """Raises ValueError where a setting is out of its range.

  Args:
    settings: the settings.
    name: what the message calls them.

  >>> check(Training(), "training")
  """
  if settings.optimizer not in OPTIMIZERS:
    raise ValueError(
      f"{name}: unknown optimizer {settings.optimizer!r}. Choose one of "
      f"{', '.join(OPTIMIZERS)}."
    )
  if settings.schedule not in SCHEDULES:
    raise ValueError(
      f"{name}: unknown schedule {settings.schedule!r}. Choose one of "
      f"{', '.join(SCHEDULES)}."
    )
  if not 0 <= settings.warmup < 1:
    raise ValueError(
      f"{name}: warmup is a fraction of the run, in [0, 1), got "
      f"{settings.warmup}."
    )
  if settings.warmup and settings.schedule != "cosine":
    raise ValueError(f"{name}: warmup needs schedule='cosine'.")
  final = settings.final_learning_rate
  least = 0.0 if settings.schedule == "cosine" else 1e-45
  if settings.learning_rate <= 0 or (final is not None and final < least):
    raise ValueError(f"{name}: learning rates must be positive.")
  for field in ("epochs", "batch_size", "iterations"):
    value = getattr(settings, field)
    if value is not None and value < 1:
      raise ValueError(f"{name}: {field} must be at least 1, got {value}.")
  if not 0 <= settings.momentum < 1:
    raise ValueError(
      f"{name}: momentum must lie in [0, 1), got {settings.momentum}."
    )
  if settings.weight_decay < 0:
    raise ValueError(
      f"{name}: weight_decay must not be negative, got {settings.weight_decay}."
    )
  if settings.clip is not None and settings.clip <= 0:
    raise ValueError(f"{name}: clip must be positive, got {settings.clip}.")


#: Makes what comes last in an optimizer, of the number of steps; equal ones
#: must compare equal, so that runs share one compiled epoch.
Last = Callable[[int], tuple[optax.GradientTransformationExtraArgs, ...]]


# Cached: runs with equal settings share one compiled epoch.
@functools.lru_cache(maxsize=128)
def optimizer(
  settings: Training,
  epochs: int,
  steps_per_epoch: int,
  last: Last | None = None,
) -> training.Optimizer:
  """The optimizer of a run of so many steps.

  Args:
    settings: the settings.
    epochs: number of epochs.
    steps_per_epoch: number of steps in an epoch.
    last: what comes last in it, of the number of all steps; None for nothing.

  Returns:
    The optimizer; equal arguments give the same object.

  >>> float(optimizer(Training(0.1), 1, 10).learning_rate(9))
  0.10000000149011612
  """
  schedule = _schedule(settings, epochs, steps_per_epoch)
  if settings.optimizer == "sgd":
    step = optax.sgd(schedule, momentum=settings.momentum or None)
    if settings.weight_decay:
      step = optax.chain(optax.add_decayed_weights(settings.weight_decay), step)
  elif settings.optimizer == "adam":
    step = _promoting(optax.adam(schedule))
  else:
    step = _promoting(optax.adamw(schedule, weight_decay=settings.weight_decay))
  if settings.clip is not None:
    step = optax.chain(optax.clip_by_global_norm(settings.clip), step)
  if last is not None:
    step = optax.chain(step, *last(epochs * steps_per_epoch))
  return training.Optimizer(step, schedule)


def _promoting(
  step: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Optax's Adam relies on the promotion of its counter to a float."""

  def update(*args: Any) -> Any:
    with jax.numpy_dtype_promotion("standard"):
      return step.update(*args)

  return optax.GradientTransformation(step.init, update)


def _schedule(
  settings: Training, epochs: int, steps_per_epoch: int
) -> optax.Schedule:
  """The learning rate of every step of a run."""
  rate, final = settings.learning_rate, settings.final_learning_rate
  if settings.schedule == "cosine":
    steps = epochs * steps_per_epoch
    return optax.warmup_cosine_decay_schedule(
      0.0,
      rate,
      min(round(settings.warmup * steps), steps - 1),
      steps,
      final or 0.0,
    )
  if settings.iterations is not None:
    # One long epoch: the schedule counts tenths of it.
    epochs, steps_per_epoch = 10, max(1, epochs * steps_per_epoch // 10)
  return training.constant_linear_flat(
    rate, rate if final is None else final, epochs, steps_per_epoch
  )


def tile_rows(rows: np.ndarray, count: int, seed: int) -> np.ndarray:
  """Repeats rows in random orders until there are so many.

  Args:
    rows: int32 `[seeds, n]`.
    count: how many are wanted.
    seed: of the orders.

  Returns:
    int32 `[seeds, count]`: whole passes, and a random part of a last one.

  >>> sorted(tile_rows(np.array([[1, 2]]), 4, 0)[0].tolist())
  [1, 1, 2, 2]
  """
  draws = np.random.Generator(np.random.PCG64(seed))
  passes = -(-count // rows.shape[1])
  return np.stack(
    [
      np.concatenate([draws.permutation(row) for _ in range(passes)])[:count]
      for row in rows
    ]
  ).astype(np.int32)


class Plan(NamedTuple):
  """A training run on some rows.

  Attributes:
    rows: int32 `[seeds, n]`, the examples of an epoch.
    epochs: number of epochs.
    batch_size: examples a step.
    optimizer: the optimizer, its schedule over all steps.
  """

  rows: np.ndarray
  epochs: int
  batch_size: int
  optimizer: training.Optimizer


def plan(
  settings: Training, rows: np.ndarray, last: Last | None = None
) -> Plan:
  """Plans a run: a number of iterations is one epoch of repeated rows.

  Args:
    settings: the settings.
    rows: int32 `[seeds, n]`, the examples.
    last: as in `optimizer`.

  Returns:
    The plan.

  >>> plan(Training(iterations=7, batch_size=4), np.zeros((1, 6))).rows.shape
  (1, 28)
  """
  batch_size = min(settings.batch_size, rows.shape[1])
  epochs = settings.epochs
  if settings.iterations is not None:
    rows, epochs = tile_rows(rows, settings.iterations * batch_size, 0), 1
  steps = -(-rows.shape[1] // batch_size)
  step = optimizer(settings, epochs, steps, last)
  return Plan(rows, epochs, batch_size, step)
