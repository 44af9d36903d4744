"""The product of two factors that is nearest to a matrix."""

from __future__ import annotations

import numpy as np

# Shorter sides up to this are decomposed whole: a second, and eight times as
# much for twice the side.
_MOST_WHOLE = 1024


def factors(change: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
  r"""The product of a rank that is nearest to a matrix.

  Args:
    change: float32 or float64 [out, in].
    rank: of the product.

  Returns:
    up [out, rank] and down [rank, in], the roots of the singular values in
    both; columns and rows beyond the matrix's own rank are zero.

  >>> up, down = factors(np.diag([4.0, 1.0]), 1)
  >>> print(np.round(up @ down, 6) + 0.0)
  [[4. 0.]
   [0. 0.]]
  """
  short = min(change.shape)
  found = min(rank, short)
  parts = None
  if short > _MOST_WHOLE and found < short // 8:
    parts = _first_parts(change, found)
  left, values, right = _all_parts(change) if parts is None else parts
  order = np.argsort(-values, kind="stable")[:found]
  roots = np.sqrt(values[order])
  up = np.zeros((change.shape[0], rank), change.dtype)
  down = np.zeros((rank, change.shape[1]), change.dtype)
  up[:, :found] = left[:, order] * roots
  down[:found] = roots[:, None] * right[order]
  return up, down


def _all_parts(change: np.ndarray) -> tuple[np.ndarray, ...]:
  """The singular value decomposition."""
  from scipy import linalg

  try:
    found = linalg.svd(change, full_matrices=False)
  except linalg.LinAlgError:
    # Slower, and converges where the other does not.
    found = linalg.svd(change, full_matrices=False, lapack_driver="gesvd")
  return tuple(found)


def _first_parts(
  change: np.ndarray, rank: int
) -> tuple[np.ndarray, ...] | None:
  """Its largest values alone, by Lanczos' method; None if it fails."""
  from scipy.sparse import linalg

  # The start is drawn, and always the same.
  start = np.random.default_rng(0).normal(size=min(change.shape))
  try:
    # Squares of singular values are sought, which float32 tells apart badly.
    found = linalg.svds(change.astype(np.float64), rank, v0=start)
  except linalg.ArpackError:
    return None
  return tuple(one.astype(change.dtype) for one in found)
