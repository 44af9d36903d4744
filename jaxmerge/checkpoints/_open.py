"""Any checkpoint as a mapping of tensors that are read when needed."""

from __future__ import annotations

import functools
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxmerge.checkpoints import (
  _lazy_tensor,
  _loaded_tensor,
  _orbax_tensors,
  _pickled,
  _safetensors,
  _store,
)

Tensor = _lazy_tensor.LazyTensor | _loaded_tensor.LoadedTensor
#: The file that says what an adapter in PEFT's layout is.
ADAPTER = "adapter_config.json"


class Checkpoint(Mapping[str, Tensor]):
  """The tensors of a checkpoint by name, none of them read.

  Attributes:
    path: its folder, or its one file.
    layout: "safetensors", "orbax" or "pickled".
  """

  def __init__(
    self, path: pathlib.Path, layout: str, tensors: Mapping[str, Tensor]
  ) -> None:
    """See `open`."""
    self.path = path
    self.layout = layout
    self._tensors = dict(tensors)

  def __getitem__(self, name: str) -> Tensor:
    """The tensor of a name."""
    return self._tensors[name]

  def __iter__(self) -> Iterator[str]:
    """The names."""
    return iter(self._tensors)

  def __len__(self) -> int:
    """Number of tensors."""
    return len(self._tensors)

  @property
  def folder(self) -> pathlib.Path:
    """Where the files beside the weights are."""
    return self.path if self.path.is_dir() else self.path.parent

  def config(self, name: str = "config.json") -> dict[str, Any]:
    """What a JSON file beside the weights holds.

    Args:
      name: of the file.

    Returns:
      Its mapping; an empty one if there is no such file.

    Raises:
      CheckpointError: it is damaged.
    """
    file = self.folder / name
    if not file.exists():
      return {}
    try:
      found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
      raise _store.CheckpointError(
        f"{file} is damaged ({error}). Download it again."
      ) from error
    if not isinstance(found, dict):
      raise _store.CheckpointError(
        f"{file} holds no mapping. Download it again."
      )
    return found

  @property
  def is_adapter(self) -> bool:
    """Whether it is an adapter in PEFT's layout."""
    return (self.folder / ADAPTER).exists()


def open(  # noqa: A001  # as the built-in, for checkpoints
  path: str | os.PathLike[str], *, weights_only: bool = False
) -> Checkpoint:
  """Opens a checkpoint without reading its tensors.

  Args:
    path: a folder of safetensors (single, sharded with an index, an adapter),
      one such file, or a folder of Orbax: of the arrays, or of a run's steps,
      of which the last is taken.
    weights_only: whether a folder without safetensors may have its pickled
      files read by ``torch.load(weights_only=True)``, at once.

  Returns:
    The tensors by name; a mapping that is a pytree of lazy leaves for
    `jaxmerge.merging.merge_leaves` once it is a ``dict``.

  Raises:
    CheckpointError: there is nothing there, it is damaged, or it is pickled.

  >>> import tempfile
  >>> import numpy as np
  >>> from jaxmerge import checkpoints
  >>> folder = tempfile.TemporaryDirectory()
  >>> checkpoints.hugging_face.save(folder.name, {"w": np.ones((2, 3))})
  >>> opened = checkpoints.open(folder.name)
  >>> opened["w"]
  LazyTensor('w', float64, (2, 3))
  >>> np.asarray(opened["w"]).sum()
  np.float64(6.0)
  >>> folder.cleanup()
  """
  place = pathlib.Path(path)
  if not place.exists():
    raise _store.CheckpointError(
      f"{place} does not exist. Give a folder of a checkpoint."
    )
  safe = place.suffix == ".safetensors" or any(place.glob("*.safetensors"))
  if not safe and place.is_dir():
    item = _orbax_tensors.find(place)
    if item is not None:
      return Checkpoint(place, "orbax", _orbax_tensors.tensors(item))
  if not safe and weights_only:
    arrays = _pickled.read(place)
    return Checkpoint(
      place,
      "pickled",
      {
        name: _loaded_tensor.LoadedTensor(
          name, array.shape, array.dtype, functools.partial(np.asarray, array)
        )
        for name, array in arrays.items()
      },
    )
  return Checkpoint(place, "safetensors", _safetensors.tensors(place))
