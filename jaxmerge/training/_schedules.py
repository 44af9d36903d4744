"""Learning-rate schedules."""

from __future__ import annotations

import optax


def constant_linear_flat(
  initial: float,
  final: float,
  epochs: int,
  steps_per_epoch: int,
  *,
  per_epoch: bool = False,
  start: float = 0.5,
  stop: float = 0.9,
) -> optax.Schedule:
  """Constant, then linear, then flat: the schedule of curve finding.

  With `f` the fraction of training that is done,

      lr(f) = initial                                    for f <= start
            = initial + (final - initial)
              * (f - start) / (stop - start)             in between
            = final                                      for f >= stop

  Args:
    initial: learning rate of the first part, positive.
    final: learning rate of the last part, not negative.
    epochs: number of epochs, at least 1.
    steps_per_epoch: number of optimizer steps in an epoch, at least 1.
    per_epoch: True changes the rate once an epoch (f = epoch / epochs), as
      the published code of curve finding does; False at every step.
    start: fraction of training at which the decay begins.
    stop: fraction of training at which it ends, above `start`.

  Returns:
    An Optax schedule: a function of the step number.

  Raises:
    ValueError: a value is out of its range.

  References:
    Garipov et al., Loss Surfaces, Mode Connectivity, and Fast Ensembling of
    DNNs, 2018.

  >>> schedule = constant_linear_flat(0.07, 0.0007, 10, 100, per_epoch=True)
  >>> [round(float(schedule(100 * epoch)), 6) for epoch in (0, 5, 6, 9)]
  [0.07, 0.07, 0.052675, 0.0007]
  """
  if initial <= 0 or final < 0:
    raise ValueError(
      "Learning rates must be positive (the final one may be 0), got "
      f"initial={initial}, final={final}."
    )
  if epochs < 1 or steps_per_epoch < 1:
    raise ValueError(
      "epochs and steps_per_epoch must be at least 1, got "
      f"{epochs} and {steps_per_epoch}."
    )
  if not 0 <= start < stop <= 1:
    raise ValueError(
      f"0 <= start < stop <= 1 must hold, got start={start}, stop={stop}."
    )
  total = epochs * steps_per_epoch
  decay = optax.linear_schedule(
    initial,
    final,
    transition_steps=round((stop - start) * total) or 1,
    transition_begin=round(start * total),
  )
  if not per_epoch:
    return decay
  return lambda step: decay(step // steps_per_epoch * steps_per_epoch)
