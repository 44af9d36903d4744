"""A seeded order of n things that no NumPy version changes."""

from __future__ import annotations

import numpy as np


def random_order(n: int, seed: int) -> np.ndarray:
  """Returns a random permutation of 0..n-1, fixed by the seed.

  NumPy promises the raw stream of a bit generator for ever, but not what
  `Generator.permutation` makes of it, so the raw numbers are sorted here.

  Args:
    n: how many things, >= 0.
    seed: a non-negative integer.

  Returns:
    int64 [n].
  """
  return np.argsort(np.random.PCG64(seed).random_raw(n), kind="stable")
