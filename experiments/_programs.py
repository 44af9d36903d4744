"""Keeps the number of compiled programs of a long process within bounds."""

from __future__ import annotations

import gc
import pathlib

import jax

# Linux ends a process with more than 65,530 mappings. Every compiled program
# holds several, and JAX keeps the programs.
MAX_MAPPINGS = 25_000
_MAPPINGS = pathlib.Path("/proc/self/maps")


def num_mappings() -> int:
  """The number of mappings of this process; 0 where it cannot be known."""
  if not _MAPPINGS.exists():
    return 0
  with _MAPPINGS.open("rb") as lines:
    return sum(1 for _ in lines)


def bound(limit: int = MAX_MAPPINGS) -> bool:
  """Forgets all compiled programs where there are too many of them.

  What is needed again is compiled again.

  Args:
    limit: the number of mappings above which they are forgotten.

  Returns:
    Whether they were.
  """
  if num_mappings() <= limit:
    return False
  jax.clear_caches()
  gc.collect()
  return True
