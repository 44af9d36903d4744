"""Tensors that are made in blocks, into files of safetensors."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmerge.recipes import _blocks, _shards, _yaml

Tensor = Any
Blocks = Iterator[tuple[int, np.ndarray]]
Seen = Callable[[int, int], None]
#: Bytes of a file of the result.
SHARD_BYTES = 5_000_000_000


class Made(NamedTuple):
  """A tensor that is to be written.

  Attributes:
    name: its name.
    shape: its shape.
    dtype: its dtype.
    blocks: makes it: the place of a block's first entry in the flattened
      tensor, and its entries.
  """

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype[Any]
  blocks: Callable[[], Blocks]

  @property
  def nbytes(self) -> int:
    """Its number of bytes."""
    return math.prod(self.shape) * self.dtype.itemsize


def spans(size: int) -> Iterator[tuple[int, int]]:
  """The blocks of a tensor: first entry, and the one after the last.

  Args:
    size: its number of entries.

  Yields:
    The blocks.
  """
  for start in range(0, size, _blocks.BLOCK):
    yield start, min(start + _blocks.BLOCK, size)


def copied(name: str, tensor: Tensor) -> Made:
  """A tensor as it is.

  Args:
    name: its name in the result.
    tensor: any opened tensor.

  Returns:
    What is to be written.
  """

  def blocks() -> Blocks:
    for start, stop in spans(tensor.size):
      yield start, tensor.read(start, stop)

  return Made(name, tuple(tensor.shape), np.dtype(tensor.dtype), blocks)


def wide(*tensors: Tensor) -> np.dtype[Any]:
  """The dtype that tensors are reckoned in.

  Args:
    tensors: opened tensors of floating-point numbers.

  Returns:
    float32, or float64 if one of them is.
  """
  double = any(np.dtype(one.dtype) == np.float64 for one in tensors)
  return np.dtype(np.float64 if double else np.float32)


def narrowed(values: np.ndarray, dtype: np.dtype[Any], what: str) -> np.ndarray:
  """Rounds values to their dtype.

  Args:
    values: float32 or float64.
    dtype: of the result.
    what: names the tensor and its file in messages.

  Returns:
    The values.

  Raises:
    RecipeError: one is not finite, or too large for the dtype.
  """
  # NumPy warns of what is looked for here.
  with np.errstate(all="ignore"):
    rounded = values.astype(dtype, copy=False)
  if np.isfinite(rounded).all():
    return rounded
  if np.isfinite(values).all():
    raise _yaml.RecipeError(
      f"{what} is as large as {float(np.abs(values).max()):.3g}, which {dtype}"
      " cannot hold. Choose a dtype that can, or a smaller scale."
    )
  raise _yaml.RecipeError(
    f"{what} is not finite: NaN or infinity is in what it is made of. Repair"
    " that checkpoint."
  )


def write_tensors(
  folder: pathlib.Path,
  tensors: Sequence[Made],
  *,
  max_shard_bytes: int = SHARD_BYTES,
  single: str | None = None,
  seen: Seen | None = None,
) -> int:
  """Writes tensors, one block of one of them in memory at a time.

  Args:
    folder: where to.
    tensors: the tensors.
    max_shard_bytes: size from which on a further file is begun.
    single: the name of the one file; None for as many as are due.
    seen: told the bytes written so far, and those of all tensors.

  Returns:
    The bytes of the tensors.

  Raises:
    RecipeError: there is no tensor, or it cannot be made.
    CheckpointError: what it is made of is damaged.
  """
  sizes = [one.nbytes for one in tensors]
  total = sum(sizes)
  if not tensors:
    raise _yaml.RecipeError(
      f"{folder} would hold no tensor. Select at least one."
    )
  if max_shard_bytes < 1:
    raise _yaml.RecipeError(
      f"max_shard_bytes is {max_shard_bytes}: give at least 1."
    )
  if single is None:
    shards = _shards.divide(sizes, max_shard_bytes)
  else:
    shards = [_shards.Shard(single, tuple(range(len(tensors))))]
  done = 0
  for shard in shards:
    inside = [tensors[place] for place in shard.tensors]
    writer = _shards.ShardWriter(
      folder / shard.name,
      {one.name: (one.dtype, one.shape) for one in inside},
    )
    try:
      for one in inside:
        for start, values in one.blocks():
          values = np.ascontiguousarray(values)
          writer.write(one.name, start, values)
          done += values.nbytes
          if seen is not None:
            seen(done, total)
    except BaseException:
      writer.discard()
      raise
    writer.finish()
  _shards.write_index(folder, shards, [one.name for one in tensors], total)
  return total
