"""Tensors that are made whole when they are needed, and then forgotten."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxmerge.checkpoints import _store


class LoadedTensor:
  """A tensor that a function makes; `LazyTensor` of what is no plain file.

  It is made when the first part of it is read, and kept until the last one is.

  Args:
    name: its name.
    shape: its shape.
    dtype: its dtype.
    load: makes it.
    parts: the tensors of files that it is made of.

  Attributes:
    name: its name.
    shape: its shape.
    dtype: its dtype.
    size: its number of elements.
    nbytes: its number of bytes.
    parts: the tensors of files that it is made of.
  """

  def __init__(
    self,
    name: str,
    shape: tuple[int, ...],
    dtype: Any,
    load: Callable[[], Any],
    parts: tuple[Any, ...] = (),
  ) -> None:
    """See the class."""
    self.name = name
    self.shape = tuple(shape)
    self.dtype = np.dtype(dtype)
    self.size = math.prod(shape)
    self.nbytes = self.size * self.dtype.itemsize
    self.parts = parts
    self._load = load
    self._array: np.ndarray | None = None

  @property
  def ndim(self) -> int:
    """Number of axes."""
    return len(self.shape)

  def __repr__(self) -> str:
    """Name, dtype and shape."""
    return f"LoadedTensor({self.name!r}, {self.dtype}, {self.shape})"

  def _whole(self) -> np.ndarray:
    array = np.asarray(self._load())
    if array.shape != self.shape or array.dtype != self.dtype:
      raise _store.CheckpointError(
        f"{self.name!r} was announced as {self.dtype} {self.shape} and is"
        f" {array.dtype} {array.shape}. The checkpoint has changed: start"
        " again."
      )
    return array

  def read(
    self, start: int = 0, stop: int | None = None, out: Any = None
  ) -> np.ndarray:
    """Reads some elements, as `LazyTensor.read` does.

    Args:
      start: the first one, counted over the flattened tensor.
      stop: the one after the last; None for all that follow.
      out: contiguous array of the dtype that they fill, if one is there.

    Returns:
      The elements [stop - start].

    Raises:
      CheckpointError: the tensor is not what was announced.
    """
    stop = self.size if stop is None else stop
    if self._array is None:
      self._array = self._whole().reshape(-1)
    part = self._array[start:stop]
    if stop == self.size:
      self._array = None
    if out is None:
      return part
    out[...] = part
    return out

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
    """The tensor."""
    array = self._whole()
    return array if dtype is None else array.astype(dtype, copy=bool(copy))

  def to_device(self, sharding: jax.sharding.Sharding) -> jax.Array:
    """Puts the tensor onto devices, as `LazyTensor.to_device` does.

    Args:
      sharding: which part is whose.

    Returns:
      The array.
    """
    return jax.device_put(self._whole(), sharding)
