"""Strategies without a merge and without a buffer: training alone."""

from __future__ import annotations

from jaxmerge.continual import (
  _learners,
  _projection,
  _strategy,
  _training,
  regularizers,
)

Strategy = _strategy.Strategy
Training = _training.Training
Learner = _learners.Learner

_TRAINING = _training.Training()
_PROJECTION = _projection.Projection()


def naive(training: Training = _TRAINING, head: str = "all") -> Strategy:
  """Sequential fine-tuning, nothing against forgetting."""
  return _strategy.compose("naive", Learner(training, head=head))


def joint(training: Training = _TRAINING) -> Strategy:
  """One training on the data of all tasks: the ceiling."""
  learner = Learner(training, start="initial", rows="stream")
  return _strategy.compose("joint", learner)


def cumulative(training: Training = _TRAINING) -> Strategy:
  """After each task a training from scratch on all data so far."""
  learner = Learner(training, start="initial", rows="seen")
  return _strategy.compose("cumulative", learner)


def independent(training: Training = _TRAINING, head: str = "all") -> Strategy:
  """A network a task, each evaluated on its own task: needs the task's id."""
  learner = Learner(training, start="initial", head=head)
  return _strategy.compose("independent", learner, keep_experts=True)


def ewc(
  training: Training = _TRAINING,
  *,
  weight: float = 1e3,
  online: bool = False,
  decay: float = 1.0,
  samples: int | None = None,
  labels: str = "exact",
  head: str = "all",
  chunk_size: int | None = None,
) -> Strategy:
  """Elastic weight consolidation; see `regularizers.ewc`."""
  regularizer = regularizers.ewc(
    weight,
    online=online,
    decay=decay,
    samples=samples,
    labels=labels,
    head=head,
    chunk_size=chunk_size,
  )
  learner = Learner(training, head=head, regularizer=regularizer)
  return _strategy.compose("ewc", learner)


def si(
  training: Training = _TRAINING,
  *,
  weight: float = 0.1,
  damping: float = 0.1,
  head: str = "all",
) -> Strategy:
  """Synaptic intelligence; see `regularizers.si`."""
  regularizer = regularizers.si(weight, damping=damping)
  learner = Learner(training, head=head, regularizer=regularizer)
  return _strategy.compose("si", learner)


def lwf(
  training: Training = _TRAINING,
  *,
  weight: float | None = None,
  temperature: float = 2.0,
  over: str = "old",
  head: str = "seen",
) -> Strategy:
  """Learning without forgetting; see `regularizers.lwf`."""
  regularizer = regularizers.lwf(weight, temperature=temperature, over=over)
  learner = Learner(training, head=head, regularizer=regularizer)
  return _strategy.compose("lwf", learner)


def gpm(
  training: Training = _TRAINING,
  *,
  projection: _projection.Projection = _PROJECTION,
  head: str = "all",
) -> Strategy:
  """Gradient projection memory; see `Projection`."""
  projection = projection._replace(release=False)
  learner = Learner(training, start="last", head=head, projection=projection)
  return _strategy.compose("gpm", learner)
