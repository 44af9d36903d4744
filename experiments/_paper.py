"""Figures printed in the Mode Path Fusion paper."""

from __future__ import annotations

_NETWORKS = ("mlpnet", "mlplarge", "mlphuge")

# Table 1: test accuracy in per cent, (mean, std) over five seeds.
_TABLE1 = {
  "mnist": {
    "joint": ((96.97, 0.20), (97.44, 0.18), (97.22, 0.21)),
    "model_a": ((91.68, 0.65), (92.11, 0.36), (91.92, 0.66)),
    "model_b": ((87.56, 0.21), (87.67, 0.27), (87.81, 0.15)),
    "avg": ((81.30, 1.87), (85.75, 0.41), (86.19, 0.27)),
    "ot": ((80.27, 2.06), (85.42, 0.56), (85.96, 0.36)),
    "mpf": ((97.32, 0.07), (97.52, 0.11), (97.76, 0.07)),
  },
  "cifar10": {
    "joint": ((34.12, 1.29), (33.94, 1.37), (35.22, 0.66)),
    "model_a": ((34.52, 2.45), (35.27, 2.04), (34.32, 1.98)),
    "model_b": ((33.42, 0.40), (35.95, 0.88), (35.02, 1.45)),
    "avg": ((23.93, 0.60), (27.06, 2.32), (27.96, 1.89)),
    "ot": ((25.29, 1.04), (27.78, 1.78), (27.87, 0.90)),
    "mpf": ((48.02, 0.25), (48.93, 0.43), (49.62, 0.39)),
  },
}


def table1(dataset: str, network: str, row: str) -> tuple[float, float] | None:
  """Returns the paper's mean and std, or None where it has no such cell."""
  if dataset not in _TABLE1 or network not in _NETWORKS:
    return None
  cells = _TABLE1[dataset].get(row)
  return cells[_NETWORKS.index(network)] if cells else None
