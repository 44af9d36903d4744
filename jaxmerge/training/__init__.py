"""The one training loop: compiled epochs, schedules, evaluation."""

from jaxmerge.training._devices import Replicated
from jaxmerge.training._devices import first_replica
from jaxmerge.training._devices import replicate
from jaxmerge.training._devices import resolve_devices
from jaxmerge.training._epoch import Plan
from jaxmerge.training._epoch import compile_epoch
from jaxmerge.training._epoch import plan_epoch
from jaxmerge.training._evaluate import evaluate
from jaxmerge.training._fit import Checkpoints
from jaxmerge.training._fit import NonFiniteLossError
from jaxmerge.training._fit import TrainResult
from jaxmerge.training._fit import default_sgd
from jaxmerge.training._fit import fit
from jaxmerge.training._fit import train
from jaxmerge.training._optimizers import Optimizer
from jaxmerge.training._optimizers import sgd
from jaxmerge.training._schedules import constant_linear_flat
from jaxmerge.training._state import DEVICE_AXIS
from jaxmerge.training._state import Context
from jaxmerge.training._state import TrainState

__all__ = [
  "DEVICE_AXIS",
  "Checkpoints",
  "Context",
  "NonFiniteLossError",
  "Optimizer",
  "Plan",
  "Replicated",
  "TrainResult",
  "TrainState",
  "compile_epoch",
  "constant_linear_flat",
  "default_sgd",
  "evaluate",
  "first_replica",
  "fit",
  "plan_epoch",
  "replicate",
  "resolve_devices",
  "sgd",
  "train",
]
