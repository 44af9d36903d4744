"""Leaves that are read when they are needed."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxmerge import tree


@dataclasses.dataclass(frozen=True)
class LazyLeaf:
  """A leaf that is read when it is needed, and not kept.

  Attributes:
    shape: Its shape.
    dtype: Its dtype.
    read: `read() -> array`, of that shape and dtype.
  """

  shape: tuple[int, ...]
  dtype: Any
  read: Callable[[], Any]

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
    """The leaf as a NumPy array, for whatever reads one."""
    return np.array(self.read(), dtype, copy=copy)


def read_leaf(leaf: Any, name: str, owner: str) -> Any:
  """What a leaf holds: a lazy one is read, anything else returned as it is."""
  if isinstance(leaf, jax.Array) or not hasattr(leaf, "shape"):
    return leaf
  value = leaf.read() if isinstance(leaf, LazyLeaf) else leaf
  if not isinstance(value, jax.Array):
    value = np.asarray(value)
  if tuple(value.shape) != tuple(leaf.shape) or value.dtype != leaf.dtype:
    raise tree.TreeMismatchError(
      f"leaf '{name}' of {owner} was announced as"
      f" {np.dtype(leaf.dtype)} of shape"
      f" {tuple(leaf.shape)} but read as {value.dtype} of shape"
      f" {tuple(value.shape)}; is the checkpoint damaged?"
    )
  # As it is: of what is only passed on, all 64 bits are kept.
  return value


def check_names(names: Sequence[str]) -> None:
  """Raises if two leaves have one name."""
  for name, number in collections.Counter(names).items():
    if number > 1:
      raise ValueError(
        f"two leaves are named '{name}'; rename one: here they are told apart"
        " by their names"
      )
