"""One tensor of several models, read ahead in blocks into memory in reach."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from jaxmerge.merging import _by_block
from jaxmerge.recipes import _digests

Tensor = Any
#: Entries of a block, the most.
BLOCK = 1 << 22
_LEAST = 1 << 12
# A kernel reads arrays that lie so without a copy.
_ALIGNMENT = 64
# Blocks that are read, merged or written at a time.
_AHEAD = 3


def padded(size: int) -> int:
  """The length of arrays for a block: few lengths, since each is compiled for.

  Args:
    size: number of entries.

  Returns:
    The next power of two, at least 4096.
  """
  return max(_LEAST, 1 << (size - 1).bit_length())


def block_for(inputs: int, block: int) -> int:
  """Entries of a block, fewer where many tensors are read side by side.

  Args:
    inputs: number of tensors.
    block: entries of a block of four tensors at most.

  Returns:
    A power of two, so that a block of all has not much more than four have.
  """
  while inputs * block > 4 * BLOCK and block > _LEAST:
    block //= 2
  return block


class Pool:
  """Aligned buffers that are used again.

  Getting new memory from the system takes longer than merging.
  """

  def __init__(self) -> None:
    """Makes an empty pool."""
    self._free: dict[int, list[np.ndarray]] = collections.defaultdict(list)
    self._lock = threading.Lock()

  def take(self, length: int, dtype: np.dtype[Any]) -> np.ndarray:
    """A buffer, of any content.

    Args:
      length: number of entries.
      dtype: their dtype.

    Returns:
      The array.
    """
    size = length * dtype.itemsize
    with self._lock:
      if self._free[size]:
        return self._free[size].pop().view(dtype)
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype)

  def give(self, array: np.ndarray) -> None:
    """Takes a buffer back.

    Args:
      array: what `take` returned.
    """
    with self._lock:
      self._free[array.nbytes].append(array.view(np.uint8))


class TensorBlocks:
  """A tensor of all models; see `_by_block.Blocks`.

  Args:
    tensors: the tensors, of one shape; None for zeros.
    pool: where buffers come from.
    reader: the thread that reads ahead.
    read_dtype: what entries are rounded to; None to leave them.
    block: entries of a block, a power of two.
    digests: where the checksums of what is read are kept; None for nowhere.
    seen: told the bytes of each block that is read.
    room: bytes of blocks that are kept for the next reading, until `forget`.
  """

  def __init__(
    self,
    tensors: Sequence[Tensor | None],
    pool: Pool,
    reader: futures.Executor,
    read_dtype: np.dtype[Any] | None = None,
    block: int = BLOCK,
    digests: _digests.Digests | None = None,
    seen: Callable[[int], None] = lambda size: None,
    room: int = 0,
  ) -> None:
    """See the class."""
    self.size = next(one.size for one in tensors if one is not None)
    self._tensors = tensors
    self._pool = pool
    self._reader = reader
    self._block = block
    self._dtypes = [_reckoned(read_dtype, one) for one in tensors]
    self._digests = digests
    self._seen = seen
    self._hashers: dict[int, Any] = {}
    self._room = room
    self._kept: dict[int, _by_block.Block] = {}

  def forget(self) -> None:
    """Gives back the blocks that were kept."""
    for block in self._kept.values():
      block.release()
    self._kept = {}

  def _get(self, start: int) -> _by_block.Block:
    """A block that was kept, or is read and kept if there is room."""
    block = self._kept.get(start)
    if block is None:
      block = self._read(start)
      size = sum(array.nbytes for array in block.arrays)
      if size > self._room:
        return block
      self._room -= size
      self._kept[start] = block
    return block._replace(release=lambda: None)

  def _read(self, start: int) -> _by_block.Block:
    size = min(self._block, self.size - start)
    length = padded(size)
    arrays: list[np.ndarray] = []
    owned = []
    read = 0
    for place, (tensor, dtype) in enumerate(
      zip(self._tensors, self._dtypes, strict=True)
    ):
      twin = self._tensors.index(tensor)
      if twin < place:
        # A model that stands for the base, too, is read once.
        arrays.append(arrays[twin])
        continue
      array = self._pool.take(length, dtype)
      owned.append(array)
      if tensor is None:
        array[:size] = 0
      else:
        if tensor.dtype == dtype:
          found = tensor.read(start, start + size, array[:size])
        else:
          found = tensor.read(start, start + size)
          # What is too large shows as infinity in the result.
          with np.errstate(over="ignore"):
            array[:size] = found
        read += found.nbytes
        if place in self._hashers:
          self._hashers[place].update(_digests.raw(found))
      array[size:] = 0
      arrays.append(array)
    self._seen(read)

    def release() -> None:
      for array in owned:
        self._pool.give(array)

    return _by_block.Block(start, size, arrays, release)

  def __iter__(self) -> Iterator[_by_block.Block]:
    """Reads all of it once, some blocks ahead."""
    digests = self._digests
    if digests is not None:
      for tensor in self._tensors:
        if tensor is not None:
          digests.add_parts(tensor)
      self._hashers = {
        place: _digests.hasher()
        for place, tensor in enumerate(self._tensors)
        if tensor is not None and not digests.has(tensor)
        if self._tensors.index(tensor) == place
      }
    starts = iter(range(0, self.size, self._block))
    waiting: collections.deque[futures.Future[_by_block.Block]] = (
      collections.deque()
    )
    try:
      for start in starts:
        waiting.append(self._reader.submit(self._get, start))
        if len(waiting) >= _AHEAD:
          yield waiting.popleft().result()
      while waiting:
        yield waiting.popleft().result()
      if digests is not None:
        for place, one in self._hashers.items():
          digests.put(self._tensors[place], one.hexdigest())
      self._hashers = {}
    finally:
      for one in waiting:
        if not one.cancel():
          one.result().release()

  def sample(self, count: int) -> list[np.ndarray]:
    """Reads runs of entries, spread evenly; see `_by_block.Blocks`."""
    run = 256
    number = max(1, min(-(-count // run), self.size // run))
    if number * run >= self.size:
      spans = [(0, self.size)]
    else:
      steps = np.linspace(0, self.size - run, number).astype(int)
      spans = [(int(start), int(start) + run) for start in steps]
    found = []
    for tensor, dtype in zip(self._tensors, self._dtypes, strict=True):
      parts = [
        np.zeros(stop - start, dtype)
        if tensor is None
        else _cast(tensor.read(start, stop), dtype)
        for start, stop in spans
      ]
      found.append(np.concatenate(parts))
    return found


def _cast(array: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
  with np.errstate(over="ignore"):
    return array.astype(dtype)


def _reckoned(
  read_dtype: np.dtype[Any] | None, tensor: Tensor | None
) -> np.dtype[Any]:
  """The dtype that kernels get: double precision is rounded to single."""
  found = np.dtype(np.float32)
  if read_dtype is not None:
    found = read_dtype
  elif tensor is not None:
    found = np.dtype(tensor.dtype)
  return np.dtype(np.float32) if found == np.float64 else found
