"""A training run on rows of a problem's pool."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from jaxmerge import training
from jaxmerge.continual import (
  _examples,
  _objective,
  _path,
  _problem,
  _signs,
  _training,
  _updates,
)

PyTree = Any


@functools.lru_cache(maxsize=16)
def _draw(batch_size: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """Places of stored examples, two batches a step."""

  def draw(key: jax.Array, step: jax.Array) -> jax.Array:
    return jax.random.uniform(jax.random.fold_in(key, step), (2, batch_size))

  return draw


@dataclasses.dataclass(frozen=True)
class Last:
  """What comes last in the optimizer; hashable, see `_training.Last`."""

  signs: _signs.Signs | None
  path: _path.Path | None

  def __call__(
    self, steps: int
  ) -> tuple[optax.GradientTransformationExtraArgs, ...]:
    """The transformations, the one that keeps the path last."""
    found = []
    if self.signs is not None:
      found.append(_updates.align_signs(self.signs.period))
    if self.path is not None:
      found.append(_path.transformation(self.path, steps))
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Projected:
  """The last transformation of a projected training."""

  def __call__(
    self, steps: int
  ) -> tuple[optax.GradientTransformationExtraArgs, ...]:
    """The projection."""
    del steps
    return (_updates.project(),)


def run(
  problem: _problem.Problem,
  settings: _training.Training,
  terms: _objective.Terms,
  params: PyTree,
  rows: np.ndarray,
  frozen: dict[str, Any],
  keys: jax.Array,
  state: PyTree = None,
  last: _training.Last | None = None,
) -> training.TrainResult:
  """Trains on some rows of the problem's training pool.

  Args:
    problem: the problem.
    settings: optimizer, length and batch size.
    terms: what the loss is made of.
    params: where to start.
    rows: int32 `[seeds, n]`.
    frozen: data of the terms.
    keys: PRNG keys, one a seed.
    state: state of the run, where the terms need one.
    last: the last of the optimizer's transformations, None for none.

  Returns:
    The result, with the axis of seeds.
  """
  plan = _training.plan(settings, rows, last)
  data, indices = _examples.of_run(problem, plan.rows, keys, settings.augment)
  return training.train(
    _objective.loss_fn(problem.logits_fn, terms),
    params,
    data,
    optimizer=plan.optimizer,
    epochs=plan.epochs,
    batch_size=plan.batch_size,
    keys=keys,
    frozen=frozen,
    state=state,
    indices=indices,
    transform=problem.transform if settings.augment else None,
    draw=_draw(terms.replay_batch) if terms.replay_batch else None,
    devices=problem.train.devices,
  )
