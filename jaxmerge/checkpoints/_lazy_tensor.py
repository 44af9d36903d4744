"""Tensors of a file that are read when they are needed."""

from __future__ import annotations

import functools
import math
import os
import pathlib
from typing import Any

import jax
import numpy as np

from jaxmerge.checkpoints import _header, _store


class OpenFile:
  """A file that is opened when it is first read, and closed in the end.

  Args:
    path: of the file.
  """

  def __init__(self, path: pathlib.Path) -> None:
    """See the class."""
    self.path = path

  def _error(self, error: OSError) -> _store.CheckpointError:
    return _store.CheckpointError(
      f"{self.path} cannot be read ({error.strerror}). It was there a moment"
      " ago: leave the files of a checkpoint alone while they are read."
    )

  @functools.cached_property
  def descriptor(self) -> int:
    """The file, opened for reading."""
    try:
      return os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError as error:
      raise self._error(error) from error

  def __del__(self) -> None:
    """Closes the file."""
    if "descriptor" in self.__dict__:
      os.close(self.descriptor)

  def read_into(self, start: int, out: np.ndarray) -> None:
    """Reads bytes.

    Args:
      start: the first one's place in the file.
      out: contiguous array that they fill.

    Raises:
      CheckpointError: the file ends before, or cannot be read.
    """
    view = out.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(view):
      try:
        read = os.preadv(self.descriptor, [view[done:]], start + done)
      except OSError as error:
        raise self._error(error) from error
      if not read:
        raise _store.CheckpointError(
          f"{self.path} is cut off at byte {start + done}. It was longer when"
          " it was opened: leave the files of a checkpoint alone while they are"
          " read."
        )
      done += read


class LazyTensor:
  """A tensor of a file on disk, of which nothing has been read yet.

  It has a shape and a dtype and becomes an array by ``np.asarray``, which maps
  the file into memory: nothing is read but what is looked at. So it is a leaf
  for `jaxmerge.merging.merge_leaves`.

  Args:
    name: its name in the file.
    opened: the file.
    entry: where it is in the file.

  Attributes:
    name: its name in the file.
    file: path of the file.
    shape: its shape.
    dtype: its dtype.
    size: its number of elements.
    nbytes: its number of bytes.
  """

  def __init__(self, name: str, opened: OpenFile, entry: _header.Entry) -> None:
    """See the class."""
    self.name = name
    self._opened = opened
    self._start = entry.start
    self.file = opened.path
    self.shape = entry.shape
    self.dtype = entry.dtype
    self.size = math.prod(entry.shape)
    self.nbytes = entry.stop - entry.start

  @property
  def ndim(self) -> int:
    """Number of axes."""
    return len(self.shape)

  def __repr__(self) -> str:
    """Name, dtype and shape."""
    return f"LazyTensor({self.name!r}, {self.dtype}, {self.shape})"

  def read(
    self, start: int = 0, stop: int | None = None, out: Any = None
  ) -> np.ndarray:
    """Reads some elements into memory.

    Args:
      start: the first one, counted over the flattened tensor.
      stop: the one after the last; None for all that follow.
      out: contiguous array of the dtype that they fill, if one is there.

    Returns:
      The elements [stop - start].

    Raises:
      CheckpointError: the file has changed, or cannot be read.
    """
    stop = self.size if stop is None else stop
    if out is None:
      out = np.empty(stop - start, self.dtype)
    self._opened.read_into(self._start + start * self.dtype.itemsize, out)
    return out

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
    """The tensor, mapped into memory; read-only unless it is copied."""
    kind = self.dtype if dtype is None else np.dtype(dtype)
    if copy or kind != self.dtype or not self.size:
      return self.read().reshape(self.shape).astype(kind, copy=False)
    try:
      whole = np.memmap(self.file, np.uint8, "r", self._start, (self.nbytes,))
    except (OSError, ValueError) as error:
      raise _store.CheckpointError(
        f"{self.file} cannot be mapped into memory ({error}). Leave the files"
        " of a checkpoint alone while they are read."
      ) from error
    return whole.view(self.dtype).reshape(self.shape)

  def to_device(self, sharding: jax.sharding.Sharding) -> jax.Array:
    """Reads the tensor onto devices, each device its part alone.

    Args:
      sharding: which part is whose; one that fits the shape.

    Returns:
      The array.

    Raises:
      CheckpointError: as `read`.
      ValueError: the sharding does not fit the shape.
    """
    mapped = np.asarray(self)
    return jax.make_array_from_callback(
      self.shape, sharding, lambda index: np.array(mapped[index])
    )
