"""Merging: from pytrees of parameters to one pytree, without data."""

from __future__ import annotations

from jaxmerge.merging._average import (
  average,
  average_method,
  ema,
  ema_method,
  weighted_average,
)
from jaxmerge.merging._dropped import (
  breadcrumbs,
  breadcrumbs_method,
  dare,
  dare_method,
  della,
  della_method,
)
from jaxmerge.merging._leafwise import LeafwiseState, MergeOptions
from jaxmerge.merging._magmax import (
  magmax,
  magmax_method,
  max_abs,
  max_abs_method,
  random_mix,
  random_mix_method,
)
from jaxmerge.merging._method import MergeMethod, fold
from jaxmerge.merging._task_arithmetic import (
  task_arithmetic,
  task_arithmetic_method,
  task_vector,
)
from jaxmerge.merging._ties import ties, ties_method

__all__ = (
  "LeafwiseState",
  "MergeMethod",
  "MergeOptions",
  "average",
  "average_method",
  "breadcrumbs",
  "breadcrumbs_method",
  "dare",
  "dare_method",
  "della",
  "della_method",
  "ema",
  "ema_method",
  "fold",
  "magmax",
  "magmax_method",
  "max_abs",
  "max_abs_method",
  "random_mix",
  "random_mix_method",
  "task_arithmetic",
  "task_arithmetic_method",
  "task_vector",
  "ties",
  "ties_method",
  "weighted_average",
)
