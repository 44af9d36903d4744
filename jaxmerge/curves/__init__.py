"""Low-loss paths between networks: curves, Mode Path Fusion, profiles."""

from jaxmerge.curves._barrier import Barrier, barrier
from jaxmerge.curves._curve import (
  BezierCurve,
  PolyChain,
  bernstein_weights,
  get,
  hat_weights,
)
from jaxmerge.curves._fit_curve import CurveResult, check_options, fit_curve
from jaxmerge.curves._fit_simplex import SimplexInfo, fit_simplex
from jaxmerge.curves._mpf import MPFInfo, mode_path_fusion
from jaxmerge.curves._plane import Plane
from jaxmerge.curves._plane_values import PlaneValues, plane_values
from jaxmerge.curves._plots import plot_plane
from jaxmerge.curves._profile import profile, weight_norms
from jaxmerge.curves._simplex import BezierSimplex, simplex_weights

__all__ = [
  "Barrier",
  "BezierCurve",
  "BezierSimplex",
  "CurveResult",
  "MPFInfo",
  "Plane",
  "PlaneValues",
  "PolyChain",
  "SimplexInfo",
  "barrier",
  "bernstein_weights",
  "check_options",
  "fit_curve",
  "fit_simplex",
  "get",
  "hat_weights",
  "mode_path_fusion",
  "plane_values",
  "plot_plane",
  "profile",
  "simplex_weights",
  "weight_norms",
]
