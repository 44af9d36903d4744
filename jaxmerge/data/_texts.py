"""Sets of short texts with a class each."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import urllib.error
import urllib.request
from typing import Any, NamedTuple

import numpy as np

from jaxmerge.data._cache import cache_root
from jaxmerge.data._dataset import DataError

#: Name of a set -> its splits.
TEXT_SETS = {"clinc150": ("train", "validation", "test")}

_FILE = "data_full.json"
_KEYS = {"train": "train", "validation": "val", "test": "test"}
# The authors' own file (Larson et al., 2019, CC BY 3.0), as it has been since
# 2019.
_URL = f"https://raw.githubusercontent.com/clinc/oos-eval/master/data/{_FILE}"
_SHA256 = "36923c3705a59e08fe9c3883d8bc2dd966ef93e22cb78ac41171782a698d56e0"
_SECONDS = 10.0


class TextDataset(NamedTuple):
  """One split of a set of texts, whole and in memory.

  Attributes:
    name: the set's name, as given to `load_texts`.
    texts: the texts.
    labels: int32 `[n]`, each in 0..num_classes-1.
    class_names: the names of the classes, as the set writes them.
    split: the split's name.
  """

  name: str
  texts: tuple[str, ...]
  labels: np.ndarray
  class_names: tuple[str, ...]
  split: str

  @property
  def num_classes(self) -> int:
    """The number of classes of the set."""
    return len(self.class_names)


def load_texts(
  name: str,
  split: str,
  *,
  data_dir: str | os.PathLike[str] | None = None,
  download: bool = True,
) -> TextDataset:
  """Loads one split of a set of texts.

  "clinc150" (Larson et al., 2019) has 150 intents, each with 100 texts to train
  on, 20 to validate and 30 to test; texts of no intent are left out. The
  classes are in alphabetical order.

  Args:
    name: "clinc150".
    split: "train", "validation" or "test".
    data_dir: a folder with data_full.json, as the authors publish it; None for
      the one in the user's cache, downloaded where it is not there.
    download: whether it may be downloaded.

  Returns:
    The split.

  Raises:
    DataError: the set is unknown, cannot be had, or is damaged; the message
      says what to do.

  References:
    Larson et al., `An evaluation dataset for intent classification and
    out-of-scope prediction <https://arxiv.org/abs/1909.02027>`_, 2019
  """
  if name not in TEXT_SETS:
    raise DataError(
      f"there is no set of texts {name!r}: choose one of"
      f" {', '.join(TEXT_SETS)}."
    )
  if split not in TEXT_SETS[name]:
    raise DataError(
      f"there is no split {split!r} of {name}: choose one of"
      f" {', '.join(TEXT_SETS[name])}."
    )
  if data_dir is not None:
    path = pathlib.Path(data_dir).expanduser() / _FILE
    if not path.is_file():
      raise DataError(
        f"there is no {path}: place the file there that {_URL} gives, or leave"
        " data_dir out to have it downloaded."
      )
  else:
    path = _cached(download)
  return _read(name, split, path)


def _cached(download: bool) -> pathlib.Path:
  """The file in the user's cache, downloaded where it is not there."""
  path = cache_root(None) / "clinc150" / _FILE
  if path.is_file():
    return path
  remedy = f"place the file in a folder and set data_dir to it: {_URL}"
  if not download:
    raise DataError(
      f"clinc150 is not in {path.parent}, and download is off: {remedy}"
    )
  try:
    with urllib.request.urlopen(_URL, timeout=_SECONDS) as response:  # noqa: S310
      content = response.read()
  except (urllib.error.URLError, OSError) as error:
    raise DataError(
      f"clinc150 is not in {path.parent} and cannot be downloaded ({error}):"
      f" {remedy}"
    ) from error
  if hashlib.sha256(content).hexdigest() != _SHA256:
    raise DataError(
      f"{_URL} is not the file that was published in 2019: try again, or"
      " set data_dir to a folder with it."
    )
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  temporary.write_bytes(content)
  temporary.replace(path)
  return path


def _read(name: str, split: str, path: pathlib.Path) -> TextDataset:
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise DataError(
      f"{path} cannot be read as JSON ({error}): place it anew."
    ) from error
  rows = {key: _rows(content, key, path) for key in _KEYS.values()}
  names = sorted({label for _, label in rows["train"]})
  places = {label: place for place, label in enumerate(names)}
  for key, found in rows.items():
    unknown = sorted({label for _, label in found} - set(places))
    if unknown:
      raise DataError(
        f"{path}: {key!r} has the intent {unknown[0]!r}, which has no texts in"
        " 'train': place the file anew."
      )
  chosen = rows[_KEYS[split]]
  labels = np.array([places[label] for _, label in chosen], np.int32)
  texts = tuple(text for text, _ in chosen)
  return TextDataset(name, texts, labels, tuple(names), split)


def _rows(content: Any, key: str, path: pathlib.Path) -> list[tuple[str, str]]:
  """The rows [text, intent] of a split."""
  rows = content.get(key) if isinstance(content, dict) else None
  good = (
    isinstance(rows, list)
    and bool(rows)
    and all(
      isinstance(row, list)
      and len(row) == 2
      and all(isinstance(part, str) for part in row)
      for row in rows
    )
  )
  if not good or rows is None:
    raise DataError(
      f"{path} has no list of [text, intent] under {key!r}: it is not the file"
      f" of {_URL}."
    )
  return [(text, label) for text, label in rows]
