"""The one training loop: compiled epochs, schedules, evaluation."""

from jaxmerge.training._devices import (
  Replicated,
  first_replica,
  replicate,
  resolve_devices,
)
from jaxmerge.training._epoch import Plan, compile_epoch, plan_epoch
from jaxmerge.training._evaluate import evaluate
from jaxmerge.training._fit import (
  Checkpoints,
  NonFiniteLossError,
  TrainResult,
  default_sgd,
  fit,
  train,
)
from jaxmerge.training._host_data import HostData
from jaxmerge.training._optimizers import Optimizer, sgd
from jaxmerge.training._schedules import constant_linear_flat
from jaxmerge.training._state import DEVICE_AXIS, Context, TrainState

__all__ = [
  "DEVICE_AXIS",
  "Checkpoints",
  "Context",
  "HostData",
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
