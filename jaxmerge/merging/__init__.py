"""Merging: from pytrees of parameters to one pytree."""

from __future__ import annotations

from jaxmerge.merging._adamerging import AdaMergingInfo, adamerging
from jaxmerge.merging._analysis import (
  SelectedShares,
  UpdateConsistency,
  cosine_matrix,
  selected_shares,
  update_consistency,
)
from jaxmerge.merging._arcee_fusion import (
  arcee_fusion,
  arcee_fusion_method,
)
from jaxmerge.merging._average import (
  average,
  average_method,
  ema,
  ema_method,
  weighted_average,
)
from jaxmerge.merging._breadcrumbs import breadcrumbs, breadcrumbs_method
from jaxmerge.merging._by_leaf import merge_leaves
from jaxmerge.merging._consensus import (
  consensus,
  consensus_method,
  localize,
  tall_masks,
)
from jaxmerge.merging._dare import dare, dare_method
from jaxmerge.merging._della import della, della_method
from jaxmerge.merging._emr import (
  EMR,
  emr,
  emr_params,
  emr_unified,
  emr_unified_method,
)
from jaxmerge.merging._fisher import diagonal_fisher, squared_gradients
from jaxmerge.merging._fisher_average import (
  fisher_average,
  fisher_average_method,
)
from jaxmerge.merging._grams import gram_matrices, gram_matrix
from jaxmerge.merging._iso import (
  iso_c,
  iso_c_method,
  iso_cts,
  iso_cts_method,
)
from jaxmerge.merging._karcher import (
  KarcherInfo,
  karcher_info,
  karcher_mean,
  karcher_mean_method,
)
from jaxmerge.merging._keep import keep
from jaxmerge.merging._lazy import LazyLeaf
from jaxmerge.merging._leafwise import LeafwiseState
from jaxmerge.merging._leaves import MergeOptions
from jaxmerge.merging._magmax import (
  magmax,
  magmax_method,
  max_abs,
  max_abs_method,
  random_mix,
  random_mix_method,
)
from jaxmerge.merging._method import MergeMethod, fold
from jaxmerge.merging._model_stock import (
  model_stock,
  model_stock_method,
)
from jaxmerge.merging._nearswap import (
  nearswap,
  nearswap_method,
)
from jaxmerge.merging._passthrough import (
  LayerSlice,
  passthrough,
  passthrough_method,
)
from jaxmerge.merging._preferences import task_preferences
from jaxmerge.merging._registry import (
  MethodInfo,
  RegisteredMethod,
  get,
  info,
  names,
)
from jaxmerge.merging._regmean import regmean, regmean_method
from jaxmerge.merging._sce import sce, sce_method
from jaxmerge.merging._sign_conflicts import SignConflicts, sign_conflicts
from jaxmerge.merging._slerp import (
  multislerp,
  multislerp_method,
  nuslerp,
  nuslerp_method,
  slerp,
  slerp_method,
)
from jaxmerge.merging._task_arithmetic import (
  task_arithmetic,
  task_arithmetic_method,
  task_vector,
)
from jaxmerge.merging._ties import ties, ties_method
from jaxmerge.merging._tsv import tsv_merge, tsv_merge_method
from jaxmerge.merging._tunable_magmax import (
  tunable_magmax,
  tunable_magmax_method,
)

__all__ = (
  "AdaMergingInfo",
  "EMR",
  "KarcherInfo",
  "LayerSlice",
  "LazyLeaf",
  "LeafwiseState",
  "MergeMethod",
  "MergeOptions",
  "MethodInfo",
  "RegisteredMethod",
  "SelectedShares",
  "SignConflicts",
  "UpdateConsistency",
  "adamerging",
  "arcee_fusion",
  "arcee_fusion_method",
  "average",
  "average_method",
  "breadcrumbs",
  "breadcrumbs_method",
  "consensus",
  "consensus_method",
  "cosine_matrix",
  "dare",
  "dare_method",
  "della",
  "della_method",
  "diagonal_fisher",
  "ema",
  "ema_method",
  "emr",
  "emr_params",
  "emr_unified",
  "emr_unified_method",
  "fisher_average",
  "fisher_average_method",
  "fold",
  "get",
  "info",
  "gram_matrices",
  "gram_matrix",
  "iso_c",
  "iso_c_method",
  "iso_cts",
  "iso_cts_method",
  "karcher_info",
  "karcher_mean",
  "karcher_mean_method",
  "keep",
  "localize",
  "magmax",
  "magmax_method",
  "max_abs",
  "max_abs_method",
  "merge_leaves",
  "model_stock",
  "model_stock_method",
  "multislerp",
  "multislerp_method",
  "names",
  "nearswap",
  "nearswap_method",
  "nuslerp",
  "nuslerp_method",
  "passthrough",
  "passthrough_method",
  "random_mix",
  "random_mix_method",
  "regmean",
  "regmean_method",
  "sce",
  "sce_method",
  "selected_shares",
  "sign_conflicts",
  "slerp",
  "slerp_method",
  "squared_gradients",
  "tall_masks",
  "task_arithmetic",
  "task_arithmetic_method",
  "task_preferences",
  "task_vector",
  "ties",
  "ties_method",
  "tsv_merge",
  "tsv_merge_method",
  "tunable_magmax",
  "tunable_magmax_method",
  "update_consistency",
  "weighted_average",
)
