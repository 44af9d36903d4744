"""Low-loss paths between networks: curves, Mode Path Fusion, profiles."""

from jaxmerge.curves._curve import (
  BezierCurve,
  PolyChain,
  bernstein_weights,
  get,
  hat_weights,
)
from jaxmerge.curves._fit_curve import CurveResult, check_options, fit_curve
from jaxmerge.curves._mpf import MPFInfo, mode_path_fusion
from jaxmerge.curves._profile import profile

__all__ = [
  "BezierCurve",
  "CurveResult",
  "MPFInfo",
  "PolyChain",
  "bernstein_weights",
  "check_options",
  "fit_curve",
  "get",
  "hat_weights",
  "mode_path_fusion",
  "profile",
]
