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


# Published figures of continual learning, final accuracy in per cent, (mean,
# std or None), by variant, row and buffer size (0 for any). Table 2 of the Mode
# Path Fusion paper; its Appendix C as the authors' notebook has it; van de Ven
# and Tolias.
_CONTINUAL: dict[str, dict[str, dict[int, tuple[float, float | None]]]] = {
  "splitmnist-mpf-paper": {
    "joint": {0: (98.56, 0.06)},
    "avg": {0: (36.34, 9.19)},
    "ot": {0: (36.48, 9.16)},
    "mpf": {0: (91.80, 0.41)},
  },
  "splitmnist-replay-sweep": {
    row: {16 * 2**i: (value, None) for i, value in enumerate(values)}
    for row, values in {
      "mpf_random": (11.2, 11.5, 33.0, 81.0, 89.1, 92.4),
      "avg_finetune": (64.1, 80.0, 85.3, 88.8, 91.5, 93.7),
      "ot_finetune": (23.7, 24.0, 26.6, 29.4, 35.2, 40.7),
    }.items()
  },
  "splitmnist-vandeven": {
    "joint": {0: (98, None)},
    "naive": {0: (20, None)},
    "er": {0: (89, None)},
    "lwf": {0: (23, None)},
    "ewc": {0: (20, None)},
  },
}


def continual(
  variant: str, row: str, size: int
) -> tuple[float, float | None] | None:
  """Returns the published mean and std, or None where there is none.

  Args:
    variant: of the configuration.
    row: its row.
    size: of the replay buffer; 0 for none.
  """
  cells = _CONTINUAL.get(variant, {}).get(row, {})
  return cells.get(size, cells.get(0))
