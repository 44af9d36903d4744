"""Git Re-Basin's weight matching, written plainly with NumPy and SciPy.

From the pseudo-code of the paper (https://arxiv.org/abs/2209.04836, algorithm
1): every group in every sweep, every leaf permuted anew and compared as a
whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import optimize

from jaxmerge import alignment


def _rows(leaf: np.ndarray, axis: alignment.Axis) -> np.ndarray:
  """One row a neuron."""
  place = axis.axis % leaf.ndim
  shape = leaf.shape
  split = (axis.outer, -1, axis.inner)
  leaf = leaf.reshape(*shape[:place], *split, *shape[place + 1 :])
  leaf = np.moveaxis(leaf, place + 1, 0)
  return leaf.reshape(len(leaf), -1)


def _take(
  leaf: np.ndarray, axis: alignment.Axis, order: np.ndarray
) -> np.ndarray:
  place = axis.axis % leaf.ndim
  shape = leaf.shape
  split = (axis.outer, -1, axis.inner)
  moved = np.take(
    leaf.reshape(*shape[:place], *split, *shape[place + 1 :]),
    order,
    axis=place + 1,
  )
  return moved.reshape(shape)


def weight_matching(
  reference: Mapping[str, np.ndarray],
  model: Mapping[str, np.ndarray],
  spec: alignment.PermutationSpec,
  sizes: Mapping[str, int],
  orders: Sequence[Sequence[str]],
  tolerance: float,
) -> tuple[dict[str, np.ndarray], int]:
  """Coordinate ascent from the identity.

  Args:
    reference: Leaves by name, float32.
    model: Leaves by name, float32.
    spec: The specification.
    sizes: Number of neurons of each group.
    orders: The order of the groups in each sweep; as many sweeps at most.
    tolerance: As `jaxmerge.alignment.weight_matching` has it.

  Returns:
    The permutations, and the number of sweeps.
  """
  permutations = {group: np.arange(n) for group, n in sizes.items()}
  on_leaf: dict[str, list[tuple[str, Any]]] = {}
  for group, axes in spec.items():
    for axis in axes:
      on_leaf.setdefault(axis.leaf, []).append((group, axis))
  for sweeps, order in enumerate(orders, start=1):  # noqa: B007
    progress = False
    for group in order:
      n = sizes[group]
      similarity = np.zeros((n, n), np.float32)
      for axis in spec[group]:
        leaf = model[axis.leaf]
        for other, place in on_leaf[axis.leaf]:
          if other != group:
            leaf = _take(leaf, place, permutations[other])
        similarity += _rows(reference[axis.leaf], axis) @ _rows(leaf, axis).T
      rows, found = optimize.linear_sum_assignment(similarity, maximize=True)
      before = similarity[rows, permutations[group]].sum(dtype=np.float64)
      after = similarity[rows, found].sum(dtype=np.float64)
      if after - before > tolerance * abs(after):
        permutations[group] = found
        progress = True
    if not progress:
      break
  return permutations, sweeps
