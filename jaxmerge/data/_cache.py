"""Decoded arrays on disk: written once, read in a tenth of a second.

An entry is a folder with images.npy, labels.npy and meta.json. It is written
under a temporary name and renamed, so that it is there whole or not at all,
whatever dies and however many processes write it. The checksums in meta.json
find damage that comes later.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import time
import uuid
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging

Arrays = dict[str, np.ndarray]

_FORMAT = 1
_META = "meta.json"
_TEMPORARY = ".tmp-"
_STALE_SECONDS = 24 * 3600


def cache_root(cache_dir: str | os.PathLike[str] | None) -> pathlib.Path:
  """Returns the folder of the cache.

  Args:
    cache_dir: the folder; if None, the environment variable
      JAXMERGE_CACHE_DIR, and without it the user's cache folder.

  Returns:
    The folder, which need not exist.
  """
  if cache_dir is None:
    cache_dir = os.environ.get("JAXMERGE_CACHE_DIR") or None
  if cache_dir is None:
    import platformdirs

    cache_dir = platformdirs.user_cache_dir("jaxmerge")
  return pathlib.Path(cache_dir).expanduser()


def cached(
  entry: pathlib.Path, build: Callable[[], tuple[Arrays, dict[str, Any]]]
) -> tuple[Arrays, dict[str, Any]]:
  """Returns the arrays of an entry, building and storing it where it is not.

  Args:
    entry: the folder of the entry.
    build: makes the arrays, and what else is to be remembered (JSON).

  Returns:
    The arrays, read-only, and what else was remembered.
  """
  found = _read(entry)
  if found is not None:
    return found
  if os.path.exists(entry):
    logging.warning("The cache entry %s is damaged: it is built anew.", entry)
  arrays, extra = build()
  try:
    _write(entry, arrays, extra)
  except OSError as error:
    # A full or read-only disk costs speed, not the run.
    logging.warning("The cache entry %s cannot be written: %s", entry, error)
  for array in arrays.values():
    array.flags.writeable = False
  return arrays, extra


def _checksum(array: np.ndarray) -> int:
  return zlib.crc32(np.ascontiguousarray(array).data)


def _read(entry: pathlib.Path) -> tuple[Arrays, dict[str, Any]] | None:
  """Returns the entry, or None where there is none or it is damaged."""
  try:
    meta = json.loads((entry / _META).read_text(encoding="utf-8"))
    if meta["format"] != _FORMAT:
      return None
    arrays = {}
    for name, checksum in meta["checksums"].items():
      stored = np.load(entry / f"{name}.npy", mmap_mode="r", allow_pickle=False)
      arrays[name] = np.asarray(stored)
      if _checksum(arrays[name]) != checksum:
        return None
    return arrays, meta["extra"]
  except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
    return None


def _write(entry: pathlib.Path, arrays: Arrays, extra: dict[str, Any]) -> None:
  """Writes the entry in one step; leaves a good one of another process be."""
  entry.parent.mkdir(parents=True, exist_ok=True)
  _remove_stale(entry.parent)
  temporary = entry.parent / f"{_TEMPORARY}{uuid.uuid4().hex}"
  temporary.mkdir()
  try:
    for name, array in arrays.items():
      np.save(temporary / f"{name}.npy", array, allow_pickle=False)
    meta = {
      "format": _FORMAT,
      "checksums": {name: _checksum(array) for name, array in arrays.items()},
      "extra": extra,
    }
    (temporary / _META).write_text(json.dumps(meta), encoding="utf-8")
    _move_into_place(temporary, entry)
  finally:
    _remove(temporary)


def _move_into_place(temporary: pathlib.Path, entry: pathlib.Path) -> None:
  while True:
    try:
      temporary.rename(entry)
      return
    except OSError:
      if not os.path.exists(entry):
        raise
    if _read(entry) is not None:
      return  # Another process was first.
    discarded = entry.parent / f"{_TEMPORARY}{uuid.uuid4().hex}"
    with contextlib.suppress(FileNotFoundError):
      entry.rename(discarded)
      _remove(discarded)


def _remove(path: pathlib.Path) -> None:
  if path.is_dir():
    shutil.rmtree(path, ignore_errors=True)
  else:
    path.unlink(missing_ok=True)


def _remove_stale(folder: pathlib.Path) -> None:
  """Removes what killed writers left long ago."""
  for path in folder.glob(f"{_TEMPORARY}*"):
    try:
      if time.time() - path.stat().st_mtime > _STALE_SECONDS:
        _remove(path)
    except OSError:
      continue  # Another process removed it first.
