"""Splits of a data set as sorted index arrays, fixed by a seed."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from jaxmerge.data._dataset import DataError
from jaxmerge.data._order import random_order


def heterogeneous_split(
  labels: np.ndarray, *, special_class: int, fraction: float = 0.1, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Splits a set so that one class is seen by one of two models only.

  A = all samples of the special class, and floor(fraction * m) of the m other
  samples; B = the rest, without the special class.

  Args:
    labels: integers [n], the class of each sample.
    special_class: the class that only A sees; it must be among the labels.
    fraction: A's share of the other samples, in (0, 1).
    seed: a non-negative integer; the sizes do not depend on it.

  Returns:
    The indices of A and of B: int32, sorted, disjoint, together all samples.

  Raises:
    DataError: the special class is not there or is all there is, or the
      fraction is outside (0, 1).

  References:
    Mode Path Fusion, "Model Merging for Continual Learning": on MNIST with
    class 4 the sizes are 11,257 and 48,743.

  >>> labels = np.array([0, 1, 2, 1, 2, 0])
  >>> a, b = heterogeneous_split(labels, special_class=1, fraction=0.5, seed=0)
  >>> len(a), len(b), bool(np.any(labels[b] == 1))
  (4, 2, False)
  """
  labels = np.asarray(labels)
  if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
    raise DataError(
      "labels must be a vector of integers, one class for each sample: got"
      f" {labels.dtype} of shape {labels.shape}."
    )
  special = labels == special_class
  if not special.any():
    present = f"{labels.min()}..{labels.max()}" if labels.size else "none"
    raise DataError(
      f"special_class {special_class} is the class of no sample: choose one of"
      f" the classes that occur ({present})."
    )
  others = np.flatnonzero(~special)
  if others.size == 0:
    raise DataError(
      f"special_class {special_class} is the class of every sample, so nothing"
      " is left for B: choose a set with several classes."
    )
  size = _share(fraction, others.size)
  in_a = special.copy()
  in_a[others[random_order(others.size, _seed(seed))[:size]]] = True
  return _indices(in_a), _indices(~in_a)


def plain_split(
  n: int, *, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Splits n samples at random, as for a validation set or a replay buffer.

  A = floor(fraction * n) samples, B = the rest.

  Args:
    n: how many samples.
    fraction: A's share, in (0, 1).
    seed: a non-negative integer; the sizes do not depend on it.

  Returns:
    The indices of A and of B: int32, sorted, disjoint, together 0..n-1.

  Raises:
    DataError: the fraction is outside (0, 1) or leaves A empty.

  >>> validation, train = plain_split(50, fraction=0.1, seed=0)
  >>> len(validation), len(train)
  (5, 45)
  """
  size = _share(fraction, n)
  if size == 0:
    raise DataError(
      f"fraction {fraction} of {n} samples is none: take a larger fraction."
    )
  in_a = np.zeros(n, bool)
  in_a[random_order(n, _seed(seed))[:size]] = True
  return _indices(in_a), _indices(~in_a)


def _share(fraction: float, n: int) -> int:
  """Returns floor(fraction * n), of the decimal fraction that was written."""
  if not 0 < fraction < 1:
    raise DataError(f"fraction {fraction} must lie between 0 and 1, both out.")
  # In floats 0.29 * 100 is 28.999...: as decimals it is 29.
  return int(Fraction(str(float(fraction))) * n)


def _seed(seed: int) -> int:
  if seed < 0:
    raise DataError(f"seed {seed} must not be negative.")
  return int(seed)


def _indices(chosen: np.ndarray) -> np.ndarray:
  return np.flatnonzero(chosen).astype(np.int32)
