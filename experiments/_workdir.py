"""The folder of a run: its configuration, its metrics, its results."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import ml_collections
from absl import logging


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file under a temporary name and renames it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  temporary.write_text(text)
  temporary.replace(path)


# A list of numbers over several lines; no string of JSON has a line break.
_NUMBERS = re.compile(r"\[\n\s*((?:[\w.+-]+,\s+)*[\w.+-]+)\s*\]")


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON under a temporary name and renames it.

  Lists of numbers are on one line each.
  """
  text = json.dumps(value, indent=1, sort_keys=True)
  text = _NUMBERS.sub(lambda m: f"[{' '.join(m[1].split())}]", text)
  write_text(path, text + "\n")


def as_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The configuration as JSON holds it: lists for tuples."""
  return json.loads(config.to_json())


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
  if not isinstance(value, dict):
    return {prefix: value}
  flat: dict[str, Any] = {}
  for name, item in value.items():
    flat |= _flatten(item, f"{prefix}.{name}" if prefix else name)
  return flat


@contextlib.contextmanager
def open_workdir(
  directory: str | os.PathLike[str], config: ml_collections.ConfigDict
) -> Iterator[pathlib.Path]:
  """Makes the folder of a run, or finds it again, and locks it.

  Args:
    directory: the folder.
    config: the configuration, kept as config.json.

  Yields:
    The folder.

  Raises:
    ValueError: the folder holds another configuration, is in use, or can't be
      written.
  """
  path = pathlib.Path(directory).absolute()
  mine = as_json(config)
  kept = path / "config.json"
  try:
    path.mkdir(parents=True, exist_ok=True)
    lock = (path / ".lock").open("a")
  except OSError as error:
    raise ValueError(
      f"The workdir {path} is not writable ({error.strerror or error}). "
      "Choose another one with --workdir."
    ) from error
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise ValueError(
        f"The workdir {path} is in use by another process."
      ) from error
    if kept.exists():
      theirs, ours = _flatten(_read_config(kept)), _flatten(mine)
      differences = [
        f"{name} is {theirs.get(name)!r} there and {ours.get(name)!r} here"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name)
      ]
      if differences:
        raise ValueError(
          f"The workdir {path} was made with another config: "
          f"{'; '.join(differences)}. Choose another workdir."
        )
    else:
      write_json(kept, mine)
    yield path


def _read_config(path: pathlib.Path) -> dict[str, Any]:
  try:
    config = json.loads(path.read_text())
  except ValueError as error:
    config = error
  if not isinstance(config, dict):
    raise ValueError(
      f"{path} is damaged: it holds no configuration. Restore it, or choose "
      "another workdir."
    )
  return config


class MetricsLog:
  """metrics.jsonl: one line an epoch of a stage."""

  def __init__(self, directory: pathlib.Path) -> None:
    """See the class."""
    self._path = directory / "metrics.jsonl"

  def begin(self, stage: str) -> None:
    """Drops the lines of a stage that is started or resumed."""
    if not self._path.exists():
      return
    kept = []
    for line in self._path.read_text().splitlines():
      try:
        if json.loads(line)["stage"] != stage:
          kept.append(line)
      except (KeyError, TypeError, ValueError):
        # A process killed while writing leaves half a line.
        logging.warning("Dropped a damaged line of %s.", self._path)
    write_text(self._path, "".join(line + "\n" for line in kept))

  def add(self, stage: str, record: dict[str, Any]) -> None:
    """Appends an epoch's record."""
    with self._path.open("a") as file:
      file.write(json.dumps({"stage": stage, **record}) + "\n")
