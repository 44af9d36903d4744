"""Comparisons of two results of merging, tensor by tensor."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

Json = dict[str, Any]

# Of the largest magnitude of a tensor, in float32.
RELATIVE = 1e-5
# A chance of one in a hundred that any of the deviations is larger.
SIGNIFICANCE = 0.01


def ulps(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """How many numbers of their 16-bit format lie between entries.

  Args:
    x: float16 or bfloat16.
    y: The same, of the same shape.

  Returns:
    0 for equal numbers (and for zeros of both signs), 1 for neighbours.
  """

  def place(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.uint16).astype(np.int32)
    magnitude = bits & 0x7FFF
    return np.where(bits & 0x8000, -magnitude, magnitude)

  return np.abs(place(np.ascontiguousarray(x)) - place(np.ascontiguousarray(y)))


@dataclasses.dataclass
class Difference:
  """How far two results are apart.

  Attributes:
    relative: The largest difference over its tensor's largest magnitude.
    tensor: Where that is.
    beyond: Entries that differ by more than the tolerance.
    total: Entries.
    ulps: The largest distance in units in the last place, 0 in float32.
    problems: Names, shapes and dtypes that differ.
  """

  relative: float = 0.0
  tensor: str = ""
  beyond: int = 0
  total: int = 0
  ulps: int = 0
  problems: list[str] = dataclasses.field(default_factory=list)

  def add(self, name: str, x: np.ndarray, y: np.ndarray) -> None:
    """Counts a tensor of both results."""
    if x.shape != y.shape or x.dtype != y.dtype:
      self.problems.append(
        f"{name}: {x.dtype}{list(x.shape)} and {y.dtype}{list(y.shape)}"
      )
      return
    self.total += x.size
    if not x.size:
      return
    narrow = x.dtype.itemsize == 2 and x.dtype.kind not in "iu"
    wide_x, wide_y = x.astype(np.float64), y.astype(np.float64)
    with np.errstate(invalid="ignore"):
      apart = np.abs(wide_x - wide_y)
    # One is a number and the other is not, or they are the same.
    apart = np.where(np.isnan(apart), np.inf, apart)
    apart[(wide_x == wide_y) | (np.isnan(wide_x) & np.isnan(wide_y))] = 0.0
    finite = np.abs(wide_y[np.isfinite(wide_y)])
    largest = float(finite.max(initial=0.0)) or 1.0
    relative = float(apart.max()) / largest
    if relative > self.relative or not self.tensor:
      self.relative, self.tensor = relative, name
    if narrow:
      steps = np.where(apart == 0, 0, ulps(x, y))
      self.ulps = max(self.ulps, int(steps.max()))
      self.beyond += int((steps > 1).sum())
    else:
      self.beyond += int((apart > RELATIVE * largest).sum())


Tensors = Mapping[str, np.ndarray]


def compare(ours: Tensors, theirs: Tensors) -> Json:
  """Compares results tensor by tensor.

  Args:
    ours: Arrays by name.
    theirs: What they are held against.

  Returns:
    The fields of `Difference`.
  """
  found = Difference()
  for name in sorted(set(ours) ^ set(theirs)):
    side = "ours" if name in ours else "mergekit's"
    found.problems.append(f"{name}: only in {side}")
  for name in sorted(set(ours) & set(theirs)):
    found.add(name, ours[name], theirs[name])
  return dataclasses.asdict(found)


def _errors(values: np.ndarray) -> float:
  """The mean of independent values, in its standard errors."""
  if values.size < 2:
    return 0.0
  spread = float(values.std(ddof=1))
  mean = float(values.mean())
  if spread == 0:
    return 0.0 if mean == 0 else float("inf")
  return mean / (spread / values.size**0.5)


def moments(base: Tensors, ours: Tensors, theirs: Tensors) -> Json:
  """Compares random results by the moments of what they add to the base.

  Both tools draw for each entry by itself. If they draw alike, the difference
  of an entry and that of its square have mean zero, and the spread of these
  differences gives the standard errors of their means.

  Args:
    base: Arrays by name.
    ours: Ours, merged.
    theirs: mergekit's, merged.

  Returns:
    "tensors", with the mean and the standard deviation of (merged - base) on
    both sides and the deviations in standard errors; "largest", the largest of
    these; "limit", which they all stay within 99 times of 100 by chance.
  """
  rows: list[Json] = []
  for name in sorted(set(base) & set(ours) & set(theirs)):
    origin = base[name].astype(np.float64)
    one = ours[name].astype(np.float64) - origin
    other = theirs[name].astype(np.float64) - origin
    rows.append(
      {
        "tensor": name,
        "mean": [float(one.mean()), float(other.mean())],
        "std": [float(one.std()), float(other.std())],
        "mean_errors": _errors(one - other),
        "square_errors": _errors(one**2 - other**2),
      }
    )
  found = [abs(row[key]) for row in rows for key in _ERRORS]
  tail = SIGNIFICANCE / (2 * max(len(found), 1))
  return {
    "tensors": rows,
    "largest": max(found, default=0.0),
    "limit": statistics.NormalDist().inv_cdf(1 - tail),
  }


_ERRORS = ("mean_errors", "square_errors")


def worst_moment(found: Json) -> Json | None:
  """The tensor with the largest deviation."""
  return max(
    found["tensors"],
    key=lambda row: max(abs(row[key]) for key in _ERRORS),
    default=None,
  )
