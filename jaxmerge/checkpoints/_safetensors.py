"""Folders of safetensors files, single or sharded: names, shapes, tensors."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from jaxmerge.checkpoints import _header, _lazy_tensor, _pickled, _store

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def _error(
  path: pathlib.Path, what: str, remedy: str
) -> _store.CheckpointError:
  return _store.CheckpointError(f"{path}: {what}. {remedy}")


def _shards(folder: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, str]]:
  """The files of a folder, and which tensor the index puts in which."""
  index = folder / INDEX
  if not index.exists():
    files = sorted(folder.glob("*.safetensors"))
    single = folder / SINGLE
    return ([single] if single in files else files), {}
  try:
    places = json.loads(index.read_text())["weight_map"]
    whole = {str(name): str(file) for name, file in places.items()}
  except OSError as error:
    raise _error(
      index, f"cannot be read ({error.strerror})", "Download it again."
    ) from error
  except (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
  ) as error:
    raise _error(
      index, "has no weight_map of tensors to files", "Download it again."
    ) from error
  names = sorted(set(whole.values()))
  for name in names:
    if pathlib.PurePath(name).name != name:
      raise _error(
        index,
        f"names the file {name!r}, which is not a name in its folder",
        "Do not use this checkpoint.",
      )
    if not (folder / name).exists():
      raise _error(
        index,
        f"names the file {name}, which is missing",
        "Download it into the folder.",
      )
  return [folder / name for name in names], whole


def tensors(
  folder: str | os.PathLike[str],
) -> dict[str, _lazy_tensor.LazyTensor]:
  """Lists the tensors of a folder without reading them.

  Args:
    folder: a folder with model.safetensors, or with shards and their
      model.safetensors.index.json; or one .safetensors file.

  Returns:
    Name -> the tensor, unread.

  Raises:
    CheckpointError: there is none, a file is damaged or missing, it is not
      where the index says, or the weights are pickled.

  >>> import tempfile
  >>> folder = tempfile.TemporaryDirectory()
  >>> write(folder.name, {"w": np.ones((2, 3), np.float32)})
  >>> info = tensors(folder.name)["w"]
  >>> info.shape, info.dtype
  ((2, 3), dtype('float32'))
  >>> folder.cleanup()
  """
  path = pathlib.Path(folder)
  files, places = [path], dict[str, str]()
  if path.is_file():
    _refuse_pickle(path)
  elif path.is_dir():
    files, places = _shards(path)
  else:
    raise _error(path, "does not exist", "Give a folder of a checkpoint.")
  if not files:
    for pickled in _pickled.find(path):
      _refuse_pickle(pickled)
    raise _error(path, "holds no .safetensors file", "Download the weights.")
  found: dict[str, _lazy_tensor.LazyTensor] = {}
  for file in files:
    entries, _ = _header.read_header(file)
    opened = _lazy_tensor.OpenFile(file)
    for name, entry in entries.items():
      if places and places.get(name) != file.name:
        raise _error(
          file,
          f"holds {name!r}, which the index puts in {places.get(name)}",
          "Download both again.",
        )
      if name in found:
        raise _error(
          file,
          f"holds {name!r}, as {found[name].file.name} does",
          "Remove one of them, or add the index.",
        )
      found[name] = _lazy_tensor.LazyTensor(name, opened, entry)
  lost = sorted(set(places) - set(found))
  if lost:
    raise _error(
      path / INDEX,
      f"names {len(lost)} tensors that its files lack: {some(lost)}",
      "Download the files again.",
    )
  return found


def _refuse_pickle(path: pathlib.Path) -> None:
  if _pickled.find(path):
    raise _error(
      path,
      "is pickled, which can run any code when it is read",
      "Take the .safetensors file of the same model, or ask for"
      " weights_only=True, which lets PyTorch read tensors and nothing else.",
    )


def some(names: Iterable[str], most: int = 10) -> str:
  """The first few names, and how many more there are.

  >>> some("abc", 2)
  'a, b and 1 more'
  """
  listed = list(names)
  rest = len(listed) - most
  return ", ".join(listed[:most]) + (f" and {rest} more" if rest > 0 else "")


def read(
  infos: Mapping[str, _lazy_tensor.LazyTensor], names: Iterable[str]
) -> dict[str, np.ndarray]:
  """Reads tensors.

  Args:
    infos: what `tensors` returned.
    names: which of them.

  Returns:
    Name -> array, of the dtype in the file.

  Raises:
    CheckpointError: a file is damaged or has gone.
  """
  return {name: infos[name].read().reshape(infos[name].shape) for name in names}


def write(
  folder: str | os.PathLike[str],
  arrays: Mapping[str, Any],
  *,
  max_shard_bytes: int = 5_000_000_000,
  single: str = SINGLE,
) -> None:
  """Writes a folder of safetensors: one file, or shards and their index.

  Every file is written under a temporary name and renamed, the index last.

  Args:
    folder: is made where it does not exist; files of an earlier checkpoint with
      these names are replaced.
    arrays: name -> array.
    max_shard_bytes: size from which on a further file is begun.
    single: name of the file where there is one.

  Raises:
    CheckpointError: there is no tensor.
  """
  path = pathlib.Path(folder)
  if not arrays:
    raise _error(path, "would hold no tensor", "Give at least one.")
  shards: list[dict[str, np.ndarray]] = [{}]
  size = 0
  total = 0
  for name in sorted(arrays):
    # Contiguous: the library writes the buffer as it lies.
    array = np.asarray(arrays[name], order="C")
    if shards[-1] and size + array.nbytes > max_shard_bytes:
      shards.append({})
      size = 0
    shards[-1][name] = array
    size += array.nbytes
    total += array.nbytes
  path.mkdir(parents=True, exist_ok=True)
  if len(shards) == 1:
    _write_one(path / single, shards[0])
    (path / INDEX).unlink(missing_ok=True)
    return
  places: dict[str, str] = {}
  for number, shard in enumerate(shards, 1):
    name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    _write_one(path / name, shard)
    places |= dict.fromkeys(shard, name)
  index = {"metadata": {"total_size": total}, "weight_map": places}
  text = json.dumps(index, indent=2, sort_keys=True) + "\n"
  _replace(path / INDEX, lambda file: file.write_text(text))
  (path / single).unlink(missing_ok=True)


def _write_one(path: pathlib.Path, shard: dict[str, np.ndarray]) -> None:
  from safetensors import numpy as safetensors_numpy

  # transformers refuses a file that does not say its format.
  _replace(
    path,
    lambda file: safetensors_numpy.save_file(shard, file, {"format": "pt"}),
  )


def _replace(path: pathlib.Path, make: Callable[[pathlib.Path], Any]) -> None:
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    make(temporary)
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)
