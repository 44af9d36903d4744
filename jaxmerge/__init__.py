"""Model merging for continual learning, in JAX.

Parameters are pytrees; a merge is a pure function from pytrees to a pytree;
everything that needs gradients is one compiled Optax loop.

The sub-packages load on first use, so that a program that only merges pays
for nothing else.

>>> import jaxmerge
>>> jaxmerge.average([{"w": 1.0}, {"w": 3.0}])
{'w': Array(2., dtype=float32)}
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the sub-package that defines it.
_NAMES = {
  "TreeMismatchError": "tree",
  "adamerging": "merging",
  "average": "merging",
  "dare": "merging",
  "fisher_average": "merging",
  "magmax": "merging",
  "regmean": "merging",
  "slerp": "merging",
  "task_arithmetic": "merging",
  "task_vector": "merging",
  "ties": "merging",
  "tsv_merge": "merging",
  "weighted_average": "merging",
  "ot_fusion": "alignment",
  "BezierCurve": "curves",
  "PolyChain": "curves",
  "fit_curve": "curves",
  "mode_path_fusion": "curves",
  "merge_checkpoints": "recipes",
}

_PACKAGES = (
  "alignment",
  "checkpoints",
  "continual",
  "curves",
  "data",
  "merging",
  "models",
  "recipes",
  "training",
  "tree",
)

if TYPE_CHECKING:
  from jaxmerge import alignment as alignment
  from jaxmerge import checkpoints as checkpoints
  from jaxmerge import continual as continual
  from jaxmerge import curves as curves
  from jaxmerge import data as data
  from jaxmerge import merging as merging
  from jaxmerge import models as models
  from jaxmerge import recipes as recipes
  from jaxmerge import training as training
  from jaxmerge import tree as tree
  from jaxmerge.alignment import ot_fusion as ot_fusion
  from jaxmerge.curves import BezierCurve as BezierCurve
  from jaxmerge.curves import PolyChain as PolyChain
  from jaxmerge.curves import fit_curve as fit_curve
  from jaxmerge.curves import mode_path_fusion as mode_path_fusion
  from jaxmerge.merging import adamerging as adamerging
  from jaxmerge.merging import average as average
  from jaxmerge.merging import dare as dare
  from jaxmerge.merging import fisher_average as fisher_average
  from jaxmerge.merging import magmax as magmax
  from jaxmerge.merging import regmean as regmean
  from jaxmerge.merging import slerp as slerp
  from jaxmerge.merging import task_arithmetic as task_arithmetic
  from jaxmerge.merging import task_vector as task_vector
  from jaxmerge.merging import ties as ties
  from jaxmerge.merging import tsv_merge as tsv_merge
  from jaxmerge.merging import weighted_average as weighted_average
  from jaxmerge.recipes import merge_checkpoints as merge_checkpoints
  from jaxmerge.tree import TreeMismatchError as TreeMismatchError

__all__ = sorted([*_NAMES, *_PACKAGES])


def __getattr__(name: str) -> Any:
  if name in _PACKAGES:
    return importlib.import_module(f"jaxmerge.{name}")
  if name in _NAMES:
    package = importlib.import_module(f"jaxmerge.{_NAMES[name]}")
    value = getattr(package, name)
    globals()[name] = value
    return value
  raise AttributeError(f"module 'jaxmerge' has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted([*globals(), *__all__])
