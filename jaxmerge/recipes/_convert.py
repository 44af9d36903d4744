"""Checkpoints of safetensors as Orbax's, and back."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from jaxmerge import checkpoints
from jaxmerge.recipes import _building, _peft, _writing, _yaml

PyTree = Any
LAYOUTS = ("orbax", "safetensors")


class ConvertReport(NamedTuple):
  """What `convert` did.

  Attributes:
    out: the folder of the result.
    layout: that of the result.
    tensors: number of its tensors.
    bytes_written: bytes of its tensors.
  """

  out: str
  layout: str
  tensors: int
  bytes_written: int


def _error(path: pathlib.Path, what: str) -> _yaml.RecipeError:
  return _yaml.RecipeError(f"{path}: {what}")


def paths(
  names: Iterable[str], path: pathlib.Path
) -> dict[str, tuple[str, ...]]:
  """The places of tensors in a nested mapping, their names split at dots.

  Args:
    names: of all tensors.
    path: of the checkpoint, for messages.

  Returns:
    Name -> keys.

  Raises:
    RecipeError: a name has a slash, or nothing before, behind or between dots;
      or is a tensor and the beginning of another one's name.

  >>> paths(["h.0.w", "b"], pathlib.Path("a"))
  {'h.0.w': ('h', '0', 'w'), 'b': ('b',)}
  """
  found = {name: tuple(name.split(".")) for name in names}
  taken = {keys: name for name, keys in found.items()}
  for name, keys in found.items():
    if "/" in name or "" in keys:
      raise _error(
        path,
        f"the name {name!r} has a slash, or a part of no letter, and would not"
        " come back as it was. Rename the tensor.",
      )
    for stop in range(1, len(keys)):
      if keys[:stop] in taken:
        raise _error(
          path,
          f"{taken[keys[:stop]]!r} is a tensor and the beginning of {name!r},"
          " which a nested mapping cannot hold both. Rename one of them.",
        )
  return found


def names(keys: Iterable[str], path: pathlib.Path) -> dict[str, str]:
  """The names of tensors of a nested mapping, with dots for slashes.

  Args:
    keys: the paths of all tensors, with slashes.
    path: of the checkpoint, for messages.

  Returns:
    Path -> name.

  Raises:
    RecipeError: a key has a dot.

  >>> names(["h/0/w", "b"], pathlib.Path("a"))
  {'h/0/w': 'h.0.w', 'b': 'b'}
  """
  found = {}
  for key in keys:
    if "." in key:
      raise _error(
        path,
        f"the path {key!r} has a dot, and would not come back as it was. Rename"
        " the key.",
      )
    found[key] = key.replace("/", ".")
  return found


def _nested(
  opened: checkpoints.Checkpoint, places: dict[str, tuple[str, ...]]
) -> PyTree:
  tree: dict[str, Any] = {}
  for name, (*keys, last) in places.items():
    node = tree
    for key in keys:
      node = node.setdefault(key, {})
    node[last] = np.asarray(opened[name])
  return tree


def _write_orbax(folder: pathlib.Path, tree: PyTree) -> None:
  import orbax.checkpoint as ocp

  # Orbax makes its folder itself.
  inner = folder / "arrays"
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(inner.absolute(), tree)
  for child in list(inner.iterdir()):
    child.rename(folder / child.name)
  inner.rmdir()


def convert(
  source: _building.Source,
  out: _building.Source,
  *,
  to: str | None = None,
  overwrite: bool = False,
  max_shard_bytes: int = _writing.SHARD_BYTES,
  weights_only: bool = False,
  seen: _writing.Seen | None = None,
) -> ConvertReport:
  """Writes a checkpoint of safetensors as Orbax's, or the other way round.

  Every dot in a name of safetensors begins a further mapping within Orbax's
  tree, and every further mapping a dot in a name: ``model.norm.weight`` is
  ``tree["model"]["norm"]["weight"]``. Names, dtypes and bits come back as they
  were; a checkpoint whose names would not is refused. Lists of Orbax's become
  mappings from "0", "1", ..., numbers become scalars. Configuration and
  tokenizer are carried along.

  Safetensors are written block by block from tensors of Orbax one at a time.
  Orbax is given all arrays at once, mapped from the file, and may hold them all
  in memory.

  Args:
    source: the checkpoint.
    out: the folder of the result. One of Orbax can be restored by
      ``orbax.checkpoint.StandardCheckpointer().restore(out)``.
    to: "orbax" or "safetensors"; the other layout than the source's by default.
    overwrite: whether a folder that is there is replaced.
    max_shard_bytes: bytes of a file of safetensors, but for larger tensors.
    weights_only: whether a pickled checkpoint may be read, by
      ``torch.load(weights_only=True)``.
    seen: told the bytes written so far, and those there are to write.

  Returns:
    What was done.

  Raises:
    RecipeError: a name or a tensor cannot be converted, the source has the
      layout already, or the result cannot be written.
    CheckpointError: the source is missing or damaged.

  >>> import tempfile
  >>> from jaxmerge import checkpoints, recipes
  >>> folder = tempfile.TemporaryDirectory()
  >>> place = f"{folder.name}/model"
  >>> checkpoints.hugging_face.save(place, {"h": {"w": np.ones((2, 3))}})
  >>> report = recipes.convert(place, f"{folder.name}/orbax")
  >>> checkpoints.open(report.out)["h/w"]
  LoadedTensor('h/w', float64, (2, 3))
  >>> folder.cleanup()
  """
  _building.target_of(out, overwrite)
  opened = _building.open_source(source, weights_only=weights_only)
  layout = to
  if layout is None:
    layout = "safetensors" if opened.layout == "orbax" else "orbax"
  if layout not in LAYOUTS:
    raise _yaml.RecipeError(
      f"There is no layout {to!r}. Choose one of {', '.join(LAYOUTS)}."
    )
  if layout == opened.layout:
    raise _error(opened.path, f"is {layout} already. Copy it.")
  size = sum(one.nbytes for one in opened.values())
  if layout == "orbax":
    places = paths(opened, opened.path)
    for name, tensor in opened.items():
      if not tensor.size:
        raise _error(
          opened.path,
          f"{name!r} of shape {tuple(tensor.shape)} is empty, which Orbax"
          " cannot hold. Leave the tensor out.",
        )
  elif opened.layout == "orbax":
    renamed = names(opened, opened.path)
  else:
    renamed = {name: name for name in opened}
  with _building.building(
    out, [opened], overwrite=overwrite, size=size
  ) as folder:
    if layout == "orbax":
      _write_orbax(folder, _nested(opened, places))
      if seen is not None:
        seen(size, size)
    else:
      _writing.write_tensors(
        folder,
        [_writing.copied(renamed[key], one) for key, one in opened.items()],
        max_shard_bytes=max_shard_bytes,
        single=_peft.FILE if opened.is_adapter else None,
        seen=seen,
      )
    _building.carry_others(opened, folder)
  return ConvertReport(str(out), layout, len(opened), size)
