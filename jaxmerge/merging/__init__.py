"""Merging: from pytrees of parameters to one pytree, without data."""

from __future__ import annotations

from jaxmerge.merging._average import (
  AverageState,
  average,
  average_method,
  weighted_average,
)
from jaxmerge.merging._method import MergeMethod, fold

__all__ = (
  "AverageState",
  "MergeMethod",
  "average",
  "average_method",
  "fold",
  "weighted_average",
)
