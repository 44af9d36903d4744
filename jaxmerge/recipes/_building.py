"""What all commands that read checkpoints and write one have in common."""

from __future__ import annotations

import contextlib
import os
import pathlib
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jaxmerge import checkpoints
from jaxmerge.checkpoints import _pickled
from jaxmerge.recipes import _folder, _yaml

# Orbax's own, where folders cannot be renamed.
_COMMITTED = "commit_success.txt"
Source = str | os.PathLike[str]


def open_source(
  source: Source, *, weights_only: bool = False
) -> checkpoints.Checkpoint:
  """Opens a checkpoint of which no file is a link out of its folder.

  Args:
    source: a folder, a file, or a hub's owner/name or owner/name@revision.
    weights_only: whether pickled weights may be read.

  Returns:
    The checkpoint.

  Raises:
    CheckpointError: it is not there, is damaged, or holds no tensor.
    RecipeError: a file of it is a link out of its folder.
  """
  path = pathlib.Path(source)
  if not path.exists():
    name, _, revision = os.fspath(source).partition("@")
    path = checkpoints.hugging_face.locate(
      name, revision=revision or None, weights_only=weights_only
    )
  _check_inside(_pickled.find(path), path)
  opened = checkpoints.open(path, weights_only=weights_only)
  _folder.check_links(opened)
  if opened.layout == "orbax":
    _check_inside(path.rglob("*"), path)
  if not opened:
    raise checkpoints.CheckpointError(
      f"{path} holds no tensor. Give a whole checkpoint."
    )
  return opened


def _check_inside(files: Iterable[pathlib.Path], folder: pathlib.Path) -> None:
  """Does as `_folder.check_links` for files that hold several tensors."""
  for file in files:
    if file != folder and file.is_symlink():
      if not _folder._inside(file, folder):
        raise _yaml.RecipeError(
          f"{file} is a link to {os.readlink(file)}, out of its folder. Put the"
          " file itself there."
        )


def target_of(out: Source, overwrite: bool) -> pathlib.Path:
  """The folder of a result, before anything is read for it.

  Args:
    out: as it was given.
    overwrite: whether what is there may be replaced.

  Returns:
    Its absolute path.

  Raises:
    RecipeError: something is there.
  """
  target = pathlib.Path(os.path.abspath(out))
  _folder.check_target(target, overwrite)
  return target


def check_apart(
  target: pathlib.Path, sources: Iterable[checkpoints.Checkpoint]
) -> None:
  """Raises if a folder that may be replaced holds what is read.

  Args:
    target: the folder.
    sources: what is read.

  Raises:
    RecipeError: it does.
  """
  for source in sources:
    if source.path.resolve().is_relative_to(target.resolve()):
      raise _yaml.RecipeError(
        f"{target} holds {source.path}, which is read. Choose another folder."
      )


@contextlib.contextmanager
def building(
  out: Source,
  sources: Sequence[checkpoints.Checkpoint],
  *,
  overwrite: bool,
  size: int,
) -> Iterator[pathlib.Path]:
  """A folder beside the place of a result, which it is renamed to in the end.

  Args:
    out: where the result is to be.
    sources: what it is made of.
    overwrite: whether a folder that is there is replaced.
    size: bytes of the result.

  Yields:
    The folder. An error removes it, and leaves what is in the result's place.

  Raises:
    RecipeError: the place is taken, holds one of the sources, is too small or
      cannot be written to.
  """
  target = target_of(out, overwrite)
  check_apart(target, sources)
  _folder.check_room(target, size)
  # Nothing that was left behind is taken up.
  staging = _folder.Staging(target, uuid.uuid4().hex)
  try:
    yield staging.folder
    staging.publish()
  except OSError as error:
    staging.discard()
    raise _folder.explain(error, staging.folder) from error
  except BaseException:
    staging.discard()
    raise


def carry_others(
  donor: checkpoints.Checkpoint,
  folder: pathlib.Path,
  config: dict[str, Any] | None = None,
) -> None:
  """Copies configuration and tokenizer.

  Args:
    donor: the checkpoint that they come from. Beside a single file without a
      config.json anything may lie, and nothing is copied.
    folder: where to.
    config: what config.json is to hold, that of the donor by default.
  """
  found = donor.config() if config is None else config
  if found or donor.path.is_dir():
    _folder.copy_others(donor, folder, found)
    if donor.layout == "orbax":
      for file in list(folder.rglob(_COMMITTED)):
        file.unlink()
        # That of a step, in which nothing else was copied.
        if file.parent != folder and not any(file.parent.iterdir()):
          file.parent.rmdir()
