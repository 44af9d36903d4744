"""Snapshots along the training of a task."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxmerge.continual import _updates

PyTree = Any
_BY = ("step", "distance")


class Path(NamedTuple):
  """Which snapshots of a training are kept until its task has been merged.

  Attributes:
    snapshots: k, their number, at least 1.
    by: "step": after the steps j S / (k + 1) of S, j = 1..k; "distance": near
      the same parts of the way, the sum of the norms of all steps. How long it
      will be is not known before, so that the nearest is taken of a few more
      snapshots than these, some 3 k + 1 along the way.
  """

  snapshots: int = 4
  by: str = "step"


def check(path: Path) -> None:
  """Raises ValueError where a setting is out of its range.

  >>> check(Path())
  """
  if not isinstance(path.snapshots, int):
    raise ValueError(f"snapshots must be an int, got {path.snapshots!r}.")
  if path.snapshots < 1:
    raise ValueError(
      "A trajectory without snapshots has no length: snapshots must be at"
      f" least 1, got {path.snapshots}."
    )
  if path.by not in _BY:
    raise ValueError(f"Unknown by {path.by!r}. Choose {' or '.join(_BY)}.")


def check_steps(path: Path, steps: int) -> None:
  """Raises ValueError where there are not more steps than snapshots.

  >>> check_steps(Path(2), 3)
  """
  if path.snapshots >= steps:
    raise ValueError(
      f"{path.snapshots} snapshots need at least {path.snapshots + 1} steps,"
      f" but the training has {steps}. Take fewer snapshots, or more epochs."
    )


def transformation(
  path: Path, steps: int
) -> optax.GradientTransformationExtraArgs:
  """What keeps the snapshots of a run.

  Args:
    path: the settings.
    steps: number of steps of the run.

  Returns:
    The transformation.

  Raises:
    ValueError: see `check_steps`.
  """
  check_steps(path, steps)
  if path.by == "distance":
    return _updates.keep_distances(max(4, 3 * path.snapshots + 1))
  parts = np.arange(1, path.snapshots + 1) / (path.snapshots + 1)
  # Rounded they stay apart: there are more steps than parts.
  return _updates.keep_steps(tuple(int(round(s)) for s in parts * steps))


def taken(path: Path, state: _updates.PathState) -> PyTree:
  """The snapshots of a run.

  Args:
    path: the settings.
    state: the last state of the transformation, with an axis of seeds.

  Returns:
    Leaves `[seeds, snapshots, ...]`, in the order of time.
  """
  if path.by == "step":
    return jax.tree.map(lambda leaf: leaf[:, : path.snapshots], state.snapshots)
  marks = np.asarray(state.marks, np.float64)
  length = np.asarray(state.length, np.float64)
  parts = np.arange(1, path.snapshots + 1) / (path.snapshots + 1)
  wanted = length[:, None] * parts
  distance = np.abs(marks[:, None] - wanted[..., None])
  places = distance.argmin(axis=-1)
  seeds = np.arange(len(places))[:, None]
  return jax.tree.map(lambda leaf: leaf[seeds, places], state.snapshots)
