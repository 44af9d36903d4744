"""Strategies that train on stored examples and do not merge."""

from __future__ import annotations

from jaxmerge.continual import (
  _learners,
  _rehearsal,
  _strategy,
  _training,
)

Strategy = _strategy.Strategy
Training = _training.Training
Learner = _learners.Learner

_TRAINING = _training.Training()


def buffer_only(training: Training = _TRAINING) -> Strategy:
  """Training from scratch on the buffer alone: what replay must beat."""
  learner = Learner(training, start="initial", rows="buffer")
  return _strategy.compose("buffer_only", learner)


def er(
  training: Training = _TRAINING,
  *,
  batch_size: int = 32,
  weight: float | None = 1.0,
  online: bool = False,
  augment: bool = False,
  head: str = "seen",
) -> Strategy:
  """Experience replay: a batch of stored examples beside the task's own.

  References:
    Chaudhry et al., `On tiny episodic memories in continual learning
    <https://arxiv.org/abs/1902.10486>`_, 2019
  """
  rehearsal = _rehearsal.Rehearsal(
    batch_size, weight, online=online, augment=augment
  )
  return _strategy.compose(
    "er", Learner(training, head=head, rehearsal=rehearsal)
  )


def der(
  training: Training = _TRAINING,
  *,
  batch_size: int = 32,
  alpha: float = 0.2,
  beta: float = 0.5,
  head: str = "all",
) -> Strategy:
  """DER++: stored logits (alpha) and labels (beta) of stored examples.

      loss = CE(task) + alpha * MSE(logits, stored logits) + beta * CE(stored)

  the two from batches of their own; beta 0 is DER. The buffer is filled while
  training.

  References:
    Buzzega et al., `Dark experience for general continual learning
    <https://arxiv.org/abs/2004.07211>`_, 2020
  """
  rehearsal = _rehearsal.Rehearsal(batch_size, beta, alpha, online=True)
  name = "der++" if beta else "der"
  return _strategy.compose(
    name, Learner(training, head=head, rehearsal=rehearsal)
  )


def agem(
  training: Training = _TRAINING,
  *,
  batch_size: int = 256,
  head: str = "all",
) -> Strategy:
  """A-GEM: no step against the mean gradient of stored examples.

      g <- g - (g . r) / (r . r) r   if g . r < 0

  References:
    Chaudhry et al., `Efficient lifelong learning with A-GEM
    <https://arxiv.org/abs/1812.00420>`_, 2019
  """
  rehearsal = _rehearsal.Rehearsal(batch_size, online=True, project=True)
  return _strategy.compose(
    "agem", Learner(training, head=head, rehearsal=rehearsal)
  )
