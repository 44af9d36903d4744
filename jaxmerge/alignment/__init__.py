"""Alignment: bring one network's neurons into the order of another's."""

from __future__ import annotations

from jaxmerge.alignment._activation_matching import (
  ActivationMoments,
  activation_matching,
  activation_moments,
)
from jaxmerge.alignment._activations import (
  ActivationsFn,
  flax_activations,
)
from jaxmerge.alignment._assignment import solve_assignment
from jaxmerge.alignment._baselines import (
  keep_first,
  keep_identity,
  logit_ensemble,
  random_alignment,
)
from jaxmerge.alignment._batch_stats import reset_batch_stats
from jaxmerge.alignment._check_spec import check
from jaxmerge.alignment._cycle_consistent import cycle_consistent_matching
from jaxmerge.alignment._derive_spec import derive_spec
from jaxmerge.alignment._exact import exact_plan
from jaxmerge.alignment._ground_cost import squared_distances
from jaxmerge.alignment._group_activations import group_activations
from jaxmerge.alignment._known_specs import (
  bert_spec,
  resnet_spec,
  vgg_spec,
  vit_spec,
)
from jaxmerge.alignment._merge_many import (
  ManyMatchingInfo,
  merge_many,
  relative_permutations,
)
from jaxmerge.alignment._ot_align import (
  TransportInfo,
  activation_norms,
  ot_align,
)
from jaxmerge.alignment._ot_fusion import ot_fusion
from jaxmerge.alignment._plan import (
  ConvergenceError,
  TransportPlan,
  check_plan,
)
from jaxmerge.alignment._repair import (
  RepairInfo,
  repair,
)
from jaxmerge.alignment._similarity import MatchingInfo
from jaxmerge.alignment._sinkhorn import sinkhorn_plan
from jaxmerge.alignment._spec import (
  Axis,
  PermutationSpec,
  SpecError,
  apply_permutations,
  group_sizes,
  identity_permutations,
  random_permutations,
)
from jaxmerge.alignment._straight_through import (
  StraightThroughInfo,
  straight_through,
)
from jaxmerge.alignment._transport import apply_plans
from jaxmerge.alignment._weight_matching import weight_matching

__all__ = (
  "ActivationMoments",
  "ActivationsFn",
  "Axis",
  "ConvergenceError",
  "ManyMatchingInfo",
  "MatchingInfo",
  "PermutationSpec",
  "RepairInfo",
  "SpecError",
  "StraightThroughInfo",
  "TransportInfo",
  "TransportPlan",
  "activation_matching",
  "activation_moments",
  "activation_norms",
  "apply_permutations",
  "apply_plans",
  "bert_spec",
  "check",
  "check_plan",
  "cycle_consistent_matching",
  "derive_spec",
  "exact_plan",
  "flax_activations",
  "group_activations",
  "group_sizes",
  "identity_permutations",
  "keep_first",
  "keep_identity",
  "logit_ensemble",
  "merge_many",
  "ot_align",
  "ot_fusion",
  "random_alignment",
  "random_permutations",
  "relative_permutations",
  "repair",
  "reset_batch_stats",
  "resnet_spec",
  "sinkhorn_plan",
  "solve_assignment",
  "squared_distances",
  "straight_through",
  "vgg_spec",
  "vit_spec",
  "weight_matching",
)
