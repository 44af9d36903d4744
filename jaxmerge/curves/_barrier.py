"""The barrier between two networks, along a path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Barrier(NamedTuple):
  """What `barrier` returns; arrays have the leading axes of the values.

  Attributes:
    barrier: largest excess over the linear interpolation of the ends, not
      negative.
    t: where it is reached, the first place if there are several.
    maximum: largest value along the path.
    minimum: smallest value along the path.
    mean: mean over t in [0, 1], by the trapezoidal rule.
    midpoint: value at t = 0.5, interpolated if that is not on the grid.
  """

  barrier: np.ndarray
  t: np.ndarray
  maximum: np.ndarray
  minimum: np.ndarray
  mean: np.ndarray
  midpoint: np.ndarray


def barrier(
  values: Any,
  grid: Sequence[float] | np.ndarray,
  *,
  higher_is_better: bool = False,
) -> Barrier:
  """The barrier along a path, from the values that `profile` returns.

      barrier = max_t [ L(t) - ((1 - t) L(0) + t L(1)) ]

  of a loss L; of an accuracy the sign is turned. It is not negative, since
  the ends are on the grid and have no excess.

  Args:
    values: losses or accuracies `[..., points]`; leading axes (seeds) are
      kept.
    grid: the t of the points `[points]`, ascending from 0 to 1.
    higher_is_better: whether they are accuracies.

  Returns:
    A `Barrier`, float64. Where a value is NaN, all of its entries are; an
    infinite loss between finite ends gives an infinite barrier.

  Raises:
    ValueError: the grid does not ascend from 0 to 1, or has another number of
      points than the values.

  References:
    Entezari et al., The Role of Permutation Invariance in Linear Mode
    Connectivity of Neural Networks, 2021 (https://arxiv.org/abs/2110.06296).

  >>> found = barrier([1.0, 5.0, 3.0], [0.0, 0.5, 1.0])
  >>> float(found.barrier), float(found.t), float(found.mean)
  (3.0, 0.5, 3.5)
  """
  values = np.asarray(values, np.float64)
  ts = np.asarray(grid, np.float64)
  if ts.ndim != 1 or len(ts) < 2 or ts[0] != 0 or ts[-1] != 1:
    raise ValueError(
      "The grid must be a list of t from 0 to 1, both ends included, got "
      f"{grid}. The excess is over the interpolation of the ends."
    )
  if not (np.diff(ts) > 0).all():
    raise ValueError(f"The grid must ascend, got {grid}.")
  if values.shape[-1:] != ts.shape:
    raise ValueError(
      f"values have shape {values.shape}, but the grid has {len(ts)} points. "
      "The last axis is that of the grid."
    )
  with np.errstate(invalid="ignore"):
    line = (1 - ts) * values[..., :1] + ts * values[..., -1:]
    excess = line - values if higher_is_better else values - line
    steps = np.diff(ts) / 2
    mean = ((values[..., 1:] + values[..., :-1]) * steps).sum(axis=-1)
  # argmax finds a NaN first, as max does.
  place = excess.argmax(axis=-1)
  largest = np.take_along_axis(excess, place[..., None], axis=-1)[..., 0]
  right = int(np.searchsorted(ts, 0.5))
  share = (0.5 - ts[right - 1]) / (ts[right] - ts[right - 1])
  with np.errstate(invalid="ignore"):
    midpoint = (
      values[..., right]
      if share == 1
      else (1 - share) * values[..., right - 1] + share * values[..., right]
    )
  nan = np.isnan(values).any(axis=-1)
  found = (
    largest,
    ts[place],
    values.max(axis=-1),
    values.min(axis=-1),
    mean,
    midpoint,
  )
  return Barrier(*(np.where(nan, np.nan, value) for value in found))
