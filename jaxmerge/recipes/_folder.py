"""The folder of a result: beside its place, then in it; its other files."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from jaxmerge import checkpoints
from jaxmerge.recipes import _yaml

RECORD = "jaxmerge.json"
_PROGRESS = "progress.json"
# What a network has beside its weights.
_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm")
_NOT_COPIED = (
  "config.json",
  "model.safetensors.index.json",
  "pytorch_model.bin.index.json",
  RECORD,
)


def staging_of(out: pathlib.Path) -> pathlib.Path:
  """Where a result is built until it is whole."""
  return out.with_name(f".{out.name}.merging")


def check_target(out: pathlib.Path, overwrite: bool) -> None:
  """Raises unless a result can be put somewhere.

  Args:
    out: its folder.
    overwrite: whether what is there may be replaced.

  Raises:
    RecipeError: something is there, or its parent cannot be written to.
  """
  if out.exists() and not overwrite:
    raise _yaml.RecipeError(
      f"{out} exists. Choose another folder, or give --overwrite (overwrite="
      "True)."
    )
  if overwrite and out.exists() and not out.is_dir():
    raise _yaml.RecipeError(f"{out} is no folder. Choose another place.")


def check_room(out: pathlib.Path, wanted: int) -> None:
  """Raises unless there is room for a result.

  Args:
    out: its folder.
    wanted: its bytes.

  Raises:
    RecipeError: there is too little.
  """
  parent = out.parent
  while not parent.exists():
    parent = parent.parent
  free = shutil.disk_usage(parent).free
  if free < wanted:
    raise _yaml.RecipeError(
      f"{parent} has {free / 1e9:.2f} GB free, the result needs"
      f" {wanted / 1e9:.2f} GB. Make room, or choose another disk."
    )


class Staging:
  """The folder that a result is built in, which may be half done already.

  Args:
    out: where the result is to be.
    fingerprint: what the result depends on; another one begins anew.

  Attributes:
    folder: the folder.
    done: names of the finished files, with what was kept of each.
  """

  def __init__(self, out: pathlib.Path, fingerprint: str) -> None:
    """Makes the folder, or takes up what is there.

    Raises:
      RecipeError: it cannot be made.
    """
    self.out = out
    self.folder = staging_of(out)
    self._fingerprint = fingerprint
    self.done: dict[str, Any] = {}
    try:
      if self.folder.exists() and not self._take_up():
        shutil.rmtree(self.folder)
      self.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise explain(error, self.folder) from error

  def _take_up(self) -> bool:
    try:
      found = json.loads((self.folder / _PROGRESS).read_text())
      if found["fingerprint"] != self._fingerprint:
        return False
      self.done = {
        name: kept
        for name, kept in found["files"].items()
        if (self.folder / name).stat().st_size == kept["size"]
      }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
      return False
    return True

  def finished(self, name: str, kept: dict[str, Any]) -> None:
    """Notes that a file is whole.

    Args:
      name: of the file.
      kept: what is to be known of it.
    """
    size = (self.folder / name).stat().st_size
    self.done[name] = {**kept, "size": size}
    write_json(
      self.folder / _PROGRESS,
      {"fingerprint": self._fingerprint, "files": self.done},
    )

  def publish(self) -> None:
    """Puts the folder in its place, instead of what is there."""
    (self.folder / _PROGRESS).unlink(missing_ok=True)
    old = self.out.with_name(f".{self.out.name}.old")
    with contextlib.suppress(FileNotFoundError):
      shutil.rmtree(old)
    if self.out.exists():
      self.out.rename(old)
    try:
      self.folder.rename(self.out)
    except BaseException:
      if old.exists():
        old.rename(self.out)
      raise
    shutil.rmtree(old, ignore_errors=True)

  def discard(self) -> None:
    """Removes all of it."""
    shutil.rmtree(self.folder, ignore_errors=True)


def explain(error: OSError, path: pathlib.Path) -> _yaml.RecipeError:
  """An error of the system in words.

  Args:
    error: the error.
    path: what was to be written.

  Returns:
    The error to raise.
  """
  if error.errno == errno.ENOSPC:
    return _yaml.RecipeError(
      f"No space is left for {path}: make room, or choose another disk."
    )
  return _yaml.RecipeError(
    f"{path} cannot be written ({error.strerror}). Choose a folder that can."
  )


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a file under a temporary name, and renames it.

  Args:
    path: of the file.
    value: what it holds.
  """
  temporary = path.with_name(f".{path.name}.part")
  temporary.write_text(json.dumps(value, indent=2) + "\n")
  temporary.replace(path)


def _inside(file: pathlib.Path, folder: pathlib.Path) -> bool:
  """Whether a file is in a folder, or where a hub's cache keeps its own."""
  real, home = file.resolve(), folder.resolve()
  cache = (home.parent.parent / "blobs").resolve()
  return real.is_relative_to(home) or real.is_relative_to(cache)


def check_links(checkpoint: checkpoints.Checkpoint) -> None:
  """Raises for files of a checkpoint that are links out of its folder.

  Args:
    checkpoint: the opened checkpoint.

  Raises:
    RecipeError: one is.
  """
  folder = checkpoint.folder
  for file in [folder / "config.json", *_others(folder), *_weights(checkpoint)]:
    if file.is_symlink() and not _inside(file, folder):
      raise _yaml.RecipeError(
        f"{file} is a link to {os.readlink(file)}, out of its folder. Put the"
        " file itself there."
      )


def _weights(checkpoint: checkpoints.Checkpoint) -> list[pathlib.Path]:
  return sorted(
    {
      tensor.file
      for tensor in checkpoint.values()
      if isinstance(tensor, checkpoints.LazyTensor)
    }
  )


def _others(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """The files beside the weights, those in folders below too."""
  for pattern in ("*", "*/*"):
    for file in sorted(folder.glob(pattern)):
      if (
        file.is_file()
        and file.suffix in _SUFFIXES
        and file.name not in _NOT_COPIED
        and not file.name.startswith(".")
      ) or (pattern == "*/*" and file.name == "config.json"):
        yield file


def copy_others(
  donor: checkpoints.Checkpoint,
  folder: pathlib.Path,
  config: dict[str, Any],
) -> None:
  """Copies the files beside the weights, and writes config.json.

  Args:
    donor: the checkpoint that they come from.
    folder: where to.
    config: what config.json is to hold; nothing is written of an empty one.
  """
  for file in _others(donor.folder):
    place = folder / file.relative_to(donor.folder)
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, place)
  if config:
    write_json(folder / "config.json", config)
