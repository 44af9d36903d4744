"""What a training run carries from step to step, and what a loss sees."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

PyTree = Any

#: Name of the mapped device axis; `jax.lax.psum(x, DEVICE_AXIS)` works in a
#: loss.
DEVICE_AXIS = "devices"


class TrainState(NamedTuple):
  """State of one training run, a pytree.

  Attributes:
    params: the trained leaves.
    opt_state: state of the Optax optimizer for `params`.
    step: int32 scalar, the number of steps done.
    state: what the loss carries from step to step untrained, such as the
      running statistics of batch normalisation; None for nothing.
  """

  params: PyTree
  opt_state: PyTree
  step: jax.Array
  state: PyTree = None


class Context(NamedTuple):
  """What a loss sees besides the trained parameters.

  Attributes:
    frozen: leaves that are not trained (the ends of a curve, say).
    batch: this device's share of the batch; leaves `[examples, ...]`.
    key: PRNG key of this step, the same on every device.
    drawn: what the run's `draw` function drew for this step.
    state: what the loss returned in the last step, see `TrainState`.
    weights: bool `[examples]`, False for the padding of an epoch's last batch
      where it does not divide over the devices; None where nothing is padded.
      The losses' means leave the padding out by themselves; whatever else is
      computed from the whole batch, such as the statistics of batch
      normalisation, needs it as a mask.
  """

  frozen: PyTree
  batch: PyTree
  key: jax.Array
  drawn: PyTree
  state: PyTree = None
  weights: jax.Array | None = None
