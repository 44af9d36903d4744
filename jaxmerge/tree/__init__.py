"""Arithmetic and structure of parameter pytrees."""

from __future__ import annotations

from jaxmerge.tree._arithmetic import (
  accumulation_dtype,
  add,
  dot,
  lerp,
  norm,
  scale,
  sub,
  weighted_sum,
)
from jaxmerge.tree._check import TreeMismatchError, check_match
from jaxmerge.tree._names import leaf_names, map_with_name, select
from jaxmerge.tree._partition import combine, is_float, partition

__all__ = (
  "TreeMismatchError",
  "accumulation_dtype",
  "add",
  "check_match",
  "combine",
  "dot",
  "is_float",
  "leaf_names",
  "lerp",
  "map_with_name",
  "norm",
  "partition",
  "scale",
  "select",
  "sub",
  "weighted_sum",
)
