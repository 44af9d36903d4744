"""Continual learning by merging: streams, replay, strategies, metrics.

* `streams`, `replay`, `metrics`: modules of their own.
* `Problem`, `make_problem`, `accuracies`: a stream and a network, for several
  seeds at once, and how well parameters do on it.
* `strategies`: the strategies by name, and `compose`, which makes one of a
  `Learner`, a merge (`merges`) and a `Finetune`; `regularizers` for learners.
"""

from jaxmerge.continual import (
  merges,
  metrics,
  regularizers,
  replay,
  strategies,
  streams,
)
from jaxmerge.continual._learners import Learner
from jaxmerge.continual._path import Path
from jaxmerge.continual._problem import (
  Problem,
  accuracies,
  make_problem,
)
from jaxmerge.continual._projection import Projection
from jaxmerge.continual._rehearsal import Rehearsal
from jaxmerge.continual._signs import Signs
from jaxmerge.continual._strategy import (
  Finetune,
  Strategy,
  StrategyState,
  compose,
)
from jaxmerge.continual._training import Training
from jaxmerge.continual._training import check as check_training
from jaxmerge.continual.merges import Merge
from jaxmerge.continual.regularizers import Regularizer

__all__ = (
  "Finetune",
  "Learner",
  "Merge",
  "Path",
  "Problem",
  "Projection",
  "Regularizer",
  "Rehearsal",
  "Signs",
  "Strategy",
  "StrategyState",
  "Training",
  "accuracies",
  "check_training",
  "compose",
  "make_problem",
  "merges",
  "metrics",
  "regularizers",
  "replay",
  "strategies",
  "streams",
)
