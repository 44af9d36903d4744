"""Low-loss paths between networks: curves, Mode Path Fusion, profiles."""

from jaxmerge.curves._curve import BezierCurve
from jaxmerge.curves._curve import PolyChain
from jaxmerge.curves._curve import bernstein_weights
from jaxmerge.curves._curve import hat_weights
from jaxmerge.curves._fit_curve import CurveResult
from jaxmerge.curves._fit_curve import fit_curve
from jaxmerge.curves._mpf import MPFInfo
from jaxmerge.curves._mpf import mode_path_fusion
from jaxmerge.curves._profile import profile

__all__ = [
  "BezierCurve",
  "CurveResult",
  "MPFInfo",
  "PolyChain",
  "bernstein_weights",
  "fit_curve",
  "hat_weights",
  "mode_path_fusion",
  "profile",
]
