"""Files of safetensors that are written in pieces, and begun anew where due."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmerge.checkpoints import _header, _safetensors

#: What transformers wants to read in a file.
METADATA = {"format": "pt"}


class Shard(NamedTuple):
  """One file of the result.

  Attributes:
    name: its name.
    tensors: places of its tensors among all of the plan.
  """

  name: str
  tensors: tuple[int, ...]


def divide(
  sizes: Sequence[int], most: int, single: str | None = None
) -> list[Shard]:
  """Divides tensors among files, in their order.

  Args:
    sizes: bytes of each tensor.
    most: bytes of a file, but for one tensor that is larger.
    single: name of the one file of a result that may not be divided.

  Returns:
    The files.
  """
  if single is not None:
    return [Shard(single, tuple(range(len(sizes))))]
  groups: list[list[int]] = [[]]
  room = most
  for place, size in enumerate(sizes):
    if groups[-1] and size > room:
      groups.append([])
      room = most
    groups[-1].append(place)
    room -= size
  if len(groups) == 1:
    return [Shard(_safetensors.SINGLE, tuple(groups[0]))]
  return [
    Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
    for number, group in enumerate(groups, 1)
  ]


class ShardWriter:
  """Writes one file under a temporary name, which it loses at the end.

  Args:
    path: of the file.
    tensors: name -> dtype and shape.
  """

  def __init__(
    self,
    path: pathlib.Path,
    tensors: dict[str, tuple[Any, tuple[int, ...]]],
  ) -> None:
    """See the class."""
    self._path = path
    self._temporary = path.with_name(f".{path.name}.part")
    header, self._entries = _header.make_header(tensors, METADATA)
    self._file = self._temporary.open("wb")
    try:
      end = max((one.stop for one in self._entries.values()), default=0)
      self._file.write(header)
      self._file.truncate(max(end, len(header)))
      self._file.flush()
    except BaseException:
      self.discard()
      raise

  def write(self, name: str, start: int, values: np.ndarray) -> None:
    """Writes some entries of a tensor.

    Args:
      name: of the tensor.
      start: place of the first of them in the flattened tensor.
      values: contiguous, of its dtype.
    """
    entry = self._entries[name]
    view = values.reshape(-1).view(np.uint8).data
    place = entry.start + start * entry.dtype.itemsize
    done = 0
    while done < len(view):
      done += os.pwrite(self._file.fileno(), view[done:], place + done)

  def finish(self) -> None:
    """Gives the file its name."""
    self._file.close()
    self._temporary.replace(self._path)

  def discard(self) -> None:
    """Removes what was written."""
    self._file.close()
    self._temporary.unlink(missing_ok=True)


def write_index(
  folder: pathlib.Path,
  shards: Sequence[Shard],
  names: Sequence[str],
  total: int,
) -> None:
  """Writes which tensor is in which file, if there are several files.

  Args:
    folder: of the files.
    shards: the files.
    names: of all tensors.
    total: bytes of all tensors.
  """
  if len(shards) == 1:
    return
  places = {
    names[place]: shard.name for shard in shards for place in shard.tensors
  }
  index = {"metadata": {"total_size": total}, "weight_map": places}
  text = json.dumps(index, indent=2, sort_keys=True) + "\n"
  (folder / _safetensors.INDEX).write_text(text)
