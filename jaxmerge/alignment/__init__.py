"""Alignment: bring one network's neurons into the order of another's."""

from __future__ import annotations

from jaxmerge.alignment._exact import exact_plan
from jaxmerge.alignment._ground_cost import squared_distances
from jaxmerge.alignment._ot_fusion import AlignmentInfo, align_mlp, ot_fusion
from jaxmerge.alignment._permute import permute_mlp
from jaxmerge.alignment._plan import TransportPlan
from jaxmerge.alignment._sinkhorn import sinkhorn_plan

__all__ = (
  "AlignmentInfo",
  "TransportPlan",
  "align_mlp",
  "exact_plan",
  "ot_fusion",
  "permute_mlp",
  "sinkhorn_plan",
  "squared_distances",
)
