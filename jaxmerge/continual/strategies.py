"""The strategies by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from jaxmerge import merging, models
from jaxmerge.continual import (
  _learners,
  _path,
  _projection,
  _signs,
  _strategy,
  _training,
  merges,
  regularizers,
)

Strategy = _strategy.Strategy
Training = _training.Training
Learner = _learners.Learner

_TRAINING = Training()
_FINETUNE = _strategy.Finetune()
_PATH = _path.Path()
_PROJECTION = _projection.Projection()
_SIGNS = _signs.Signs()
_LORA = models.Lora(rank=32, alpha=64.0)


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


def buffer_only(training: Training = _TRAINING) -> Strategy:
  """Training from scratch on the buffer alone: what replay must beat."""
  learner = Learner(training, start="initial", rows="buffer")
  return _strategy.compose("buffer_only", learner)


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
  rehearsal = _learners.Rehearsal(batch_size, augment=training.augment)
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
  rehearsal = _learners.Rehearsal(
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
  rehearsal = _learners.Rehearsal(batch_size, beta, alpha, online=True)
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
  rehearsal = _learners.Rehearsal(batch_size, online=True, project=True)
  return _strategy.compose(
    "agem", Learner(training, head=head, rehearsal=rehearsal)
  )


_NAMED: dict[str, Callable[..., Strategy]] = {
  "agem": agem,
  "avg": avg,
  "became": became,
  "buffer_only": buffer_only,
  "cumulative": cumulative,
  "der": der,
  "er": er,
  "ewc": ewc,
  "gpm": gpm,
  "independent": independent,
  "joint": joint,
  "lwf": lwf,
  "magmax": magmax,
  "mpf": mpf,
  "naive": naive,
  "ot": ot,
  "pam": pam,
  "regmean_replay": regmean_replay,
  "si": si,
  "simplex": simplex,
  "trm": trm,
  "tunable_magmax": tunable_magmax,
}


def names() -> tuple[str, ...]:
  """Names of strategies, and "merge:<rule>" of the rules that need no option.

  >>> "mpf" in names(), "merge:ties" in names()
  (True, True)
  """
  rules = [
    f"merge:{rule}"
    for rule in merging.names()
    if merging.info(rule).max_models is None
    and not merging.info(rule).needs_weights
    and inspect.Parameter.empty not in merging.info(rule).options.values()
  ]
  return tuple(sorted([*_NAMED, *rules]))


def get(name: str, **options: Any) -> Strategy:
  """A strategy by its name.

  Args:
    name: one of `names`, or "merge:" and any rule that `merges.by_rule` takes.
    **options: its options.

  Returns:
    The strategy.

  Raises:
    ValueError: the name or an option is unknown, or out of its range.

  >>> get("mpf", t="1/t").needs_replay
  True
  """
  if name.startswith("merge:"):
    return merge(name.removeprefix("merge:"), **options)
  if name not in _NAMED:
    close = difflib.get_close_matches(name, names(), 1)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    raise ValueError(
      f"Unknown strategy {name!r}{hint} choose from {', '.join(names())}."
    )
  make = _NAMED[name]
  known = inspect.signature(make).parameters
  takes_all = any(one.kind is one.VAR_KEYWORD for one in known.values())
  unknown = sorted(set(options) - set(known))
  if unknown and not takes_all:
    raise ValueError(
      f"Unknown option {unknown[0]!r} of {name}; choose from "
      f"{', '.join(known)}."
    )
  try:
    return make(**options)
  except TypeError as error:
    raise ValueError(f"Strategy {name}: {error}") from error
