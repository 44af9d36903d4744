"""Strategies that merge."""

from __future__ import annotations

from typing import Any

from jaxmerge import models
from jaxmerge.continual import (
  _learners,
  _path,
  _projection,
  _rehearsal,
  _signs,
  _strategy,
  _training,
  merges,
  regularizers,
)

Strategy = _strategy.Strategy
Training = _training.Training
Learner = _learners.Learner

_TRAINING = _training.Training()
_FINETUNE = _strategy.Finetune()
_PATH = _path.Path()
_PROJECTION = _projection.Projection()
_SIGNS = _signs.Signs()
_LORA = models.Lora(rank=32, alpha=64.0)


def merge(
  rule: str,
  training: Training = _TRAINING,
  *,
  start: str = "initial",
  head: str = "all",
  regularizer: regularizers.Regularizer | None = None,
  finetune: _strategy.Finetune | None = None,
  samples: int | None = None,
  **options: Any,
) -> Strategy:
  """The networks of all tasks merged by a rule of `jaxmerge.merging`.

  Args:
    rule: a name of `jaxmerge.merging.names`.
    training: of the networks.
    start: where their training starts, see `Learner`.
    head: classes that the loss is over, see `Learner`.
    regularizer: of their training.
    finetune: fine-tuning on the buffer after each merge, or None.
    samples: see `by_rule`.
    **options: options of the rule.

  Returns:
    The strategy.

  References:
    Marczak et al., `MagMax <https://arxiv.org/abs/2407.06322>`_, 2024
  """
  return _strategy.compose(
    rule,
    Learner(training, start=start, head=head, regularizer=regularizer),
    merge=merges.by_rule(rule, samples=samples, **options),
    finetune=finetune,
  )


def magmax(
  training: Training = _TRAINING, *, scale: float = 0.5, **options: Any
) -> Strategy:
  """MagMax: sequential fine-tuning, one running vector.

  Meant for a pre-trained initial network: from a random one the entry of the
  largest magnitude says little.
  """
  return merge("magmax", training, start="last", scale=scale, **options)


def tunable_magmax(
  training: Training = _TRAINING,
  *,
  start: str = "last",
  head: str = "all",
  **options: Any,
) -> Strategy:
  """MagMax by preferences of tasks; see `merges.tunable_magmax`.

  Args:
    training: of the networks.
    start: where their training starts, see `Learner`.
    head: classes that the losses are over.
    **options: of `merges.tunable_magmax`.

  Returns:
    The strategy.
  """
  return _strategy.compose(
    "tunable_magmax",
    Learner(training, start=start, head=head),
    merge=merges.tunable_magmax(**options),
  )


def avg(
  training: Training = _TRAINING,
  *,
  weight: str | float = "1/t",
  align: str | None = None,
  start: str = "initial",
  head: str = "all",
  finetune: _strategy.Finetune | None = None,
) -> Strategy:
  """Running average of the tasks' networks; see `running`.

  They are trained apart, or each from the one before ("last"), or from the
  average so far ("merged").
  """
  return _strategy.compose(
    "avg",
    Learner(training, start=start, head=head),
    merge=merges.running(weight, align=align),
    finetune=finetune,
  )


def ot(training: Training = _TRAINING, **options: Any) -> Strategy:
  """Running average after alignment by optimal transport."""
  return avg(training, align="ot", **options)._replace(name="ot")


def mpf(
  training: Training = _TRAINING,
  *,
  curve: Training = _training.CURVE,
  t: str | float = 0.5,
  align: str | None = None,
  start: str = "initial",
  head: str = "all",
  finetune: _strategy.Finetune | None = None,
  **options: Any,
) -> Strategy:
  """Mode Path Fusion on the replay buffer, task after task; see `curve`."""
  return _strategy.compose(
    "mpf",
    Learner(training, start=start, head=head),
    merge=merges.curve(curve, t=t, align=align, **options),
    finetune=finetune,
  )


def regmean_replay(
  training: Training = _TRAINING,
  *,
  batch_size: int = 32,
  alpha: float = 0.9,
  damping: float = 0.01,
  samples: int | None = None,
  finetune: _strategy.Finetune | None = _FINETUNE,
) -> Strategy:
  """Rehearsed networks merged by running RegMean, then fine-tuned.

  After each task: (1) from the merged network train on the task with a batch of
  stored examples beside each of its own; (2) merge the merged network and this
  one layer by layer so that the first is kept on the inputs of the tasks before
  and the second on those of the task (`running_regmean`); (3) fine-tune on the
  buffer, which weighs all classes alike. It holds the buffer, one network, and
  a matrix a layer, however many tasks there are. Ours; BUILD_NOTES.md has what
  it is better than, by how much, and what was tried before.

  Args:
    training: of the task's network; few epochs are enough.
    batch_size: number of stored examples a step.
    alpha: see `running_regmean`.
    damping: see `running_regmean`.
    samples: see `running_regmean`.
    finetune: None for none. With few stored examples a small learning rate is
      better.

  Returns:
    The strategy.
  """
  rehearsal = _rehearsal.Rehearsal(batch_size, augment=training.augment)
  learner = Learner(training, start="merged", head="seen", rehearsal=rehearsal)
  return _strategy.compose(
    "regmean_replay",
    learner,
    merge=merges.running_regmean(alpha=alpha, damping=damping, samples=samples),
    finetune=finetune,
  )


def simplex(
  training: Training = _TRAINING,
  *,
  curve: Training = _training.CURVE,
  concentration: float = 1.0,
  head: str = "all",
  finetune: _strategy.Finetune | None = None,
) -> Strategy:
  """All networks at once, by a Bezier simplex on the buffer."""
  return _strategy.compose(
    "simplex",
    Learner(training, start="initial", head=head),
    merge=merges.simplex(curve, concentration=concentration),
    finetune=finetune,
  )


def trm(
  training: Training = _TRAINING,
  *,
  path: _path.Path = _PATH,
  coefficients: Training = merges.COEFFICIENTS,
  head: str = "seen",
  alignment_head: str | None = None,
  **options: Any,
) -> Strategy:
  """Trajectory regularised merging; see `merges.trm`.

  Each task trains from the merged network, which is all that is held between
  tasks. jaxmerge's own construction from the abstract of the paper.

  Args:
    training: of the tasks.
    path: the snapshots.
    coefficients: settings of the optimisation of the coefficients.
    head: classes that the loss of the training is over, see `Learner`.
    alignment_head: those of the merge's cross-entropy; None for the same.
    **options: of `merges.trm`.

  Returns:
    The strategy.
  """
  return _strategy.compose(
    "trm",
    Learner(training, start="merged", head=head, path=path),
    merge=merges.trm(coefficients, head=alignment_head or head, **options),
  )


def became(
  training: Training = _TRAINING,
  *,
  projection: _projection.Projection | None = _PROJECTION,
  head: str = "all",
  **options: Any,
) -> Strategy:
  """Two stages of training, merged by a Bayesian coefficient.

  Args:
    training: of the second stage, and of the first where its own is None.
    projection: the first stage; None for none, so that the merge is of the
      network before the task and the one after it.
    head: classes that the losses are over, see `Learner`.
    **options: of `merges.became`.

  Returns:
    The strategy.
  """
  return _strategy.compose(
    "became",
    Learner(training, start="merged", head=head, projection=projection),
    merge=merges.became(head=head, **options),
  )


def pam(
  training: Training = _TRAINING,
  *,
  adapter: models.Lora | None = _LORA,
  signs: _signs.Signs | None = _SIGNS,
  weight: str | float = 0.5,
  head: str = "all",
) -> Strategy:
  """PAM: a global adapter, averaged with one a task that is held at its signs.

  A copy L of the global adapter G is trained on the task; every so many steps
  the entries that are among the largest of G, but have another sign in L, are
  reset; then G becomes the mean of both. Without an adapter the same is done
  to the network, signs and resets being those of its task vector.

  Args:
    training: of the tasks.
    adapter: the adapters' settings; None for the whole network.
    signs: how signs are held; None for plain averages.
    weight: of L in the mean, a number or "1/t".
    head: classes that the losses are over, see `Learner`.

  Returns:
    The strategy.

  References:
    Sokar et al., `Continual learning in vision-language models via aligned
    model merging <https://arxiv.org/abs/2506.03189>`_, 2025
  """
  learner = Learner(
    training, start="merged", head=head, adapter=adapter, signs=signs
  )
  return _strategy.compose("pam", learner, merge=merges.running(weight))
