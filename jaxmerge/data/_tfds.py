"""Image classification sets of TensorFlow Datasets, without TensorFlow."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmerge.data._cache import cache_root, cached
from jaxmerge.data._dataset import DataError, Dataset

PREPARABLE = ("mnist", "fashion_mnist", "cifar10", "cifar100")

_NAME = re.compile(
  r"(?P<name>[a-z][a-z0-9_]*)(/(?P<config>[\w.=+-]+))?(:(?P<version>[\d.]+))?"
)
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_FORMAT = "array_record"
_INFO = "dataset_info.json"
_DISTRIBUTIONS = {
  "PIL": "pillow",
  "sklearn": "scikit-learn",
  "tensorflow_datasets": "tensorflow-datasets",
}
_CHUNK = 4096  # Records decoded at a time.


class Request(NamedTuple):
  """A set's name, taken apart: name[/config][:version]."""

  name: str
  config: str | None
  version: str | None

  def __str__(self) -> str:
    config = f"/{self.config}" if self.config is not None else ""
    version = f":{self.version}" if self.version is not None else ""
    return f"{self.name}{config}{version}"


def parse(name: str) -> Request:
  """Takes "name[/config][:version]" apart."""
  match = _NAME.fullmatch(name)
  if match is None:
    near = difflib.get_close_matches(name.lower(), ("digits", *PREPARABLE))
    hint = f"did you mean {near[0]!r}?" if near else "write it as 'mnist'."
    raise DataError(
      f"{name!r} is not a data set's name, 'name', 'name/config' or"
      f" 'name:version': {hint}"
    )
  return Request(match["name"], match["config"], match["version"])


def tfds_root(data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
  """Returns the folder of prepared sets, as TFDS itself finds it."""
  if data_dir is None:
    data_dir = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  return pathlib.Path(data_dir).expanduser()


def build_command(
  request: Request, root: pathlib.Path, *, overwrite: bool = False
) -> str:
  """Returns the command that prepares a set with TensorFlow."""
  flag = " --overwrite" if overwrite else ""
  return f"tfds build {request}{flag} --data_dir={root} --file_format={_FORMAT}"


def first_line(error: Exception) -> str:
  """Returns the gist of an error, to be put into another."""
  return str(error).partition("\n")[0].rstrip(".: ") or type(error).__name__


@contextlib.contextmanager
def require(name: str) -> Iterator[None]:
  """Says which package a set needs, where an import inside fails."""
  try:
    yield
  except ModuleNotFoundError as error:
    package = str(error.name).partition(".")[0]
    raise DataError(
      f"{name} needs the package {package!r}, which is not installed: run"
      f" pip install {_DISTRIBUTIONS.get(package, package)}"
    ) from error


def find_prepared(request: Request, root: pathlib.Path) -> pathlib.Path | None:
  """Returns the folder of the newest prepared version, or None.

  Args:
    request: the set.
    root: the folder of prepared sets.

  Raises:
    DataError: several configurations are prepared and the name has none.
  """
  base = root / request.name
  if request.config is not None:
    return _newest(base / request.config, request.version)
  found = _newest(base, request.version)
  if found is not None or not base.is_dir():
    return found
  configs = {}
  for folder in sorted(base.iterdir()):
    newest = _newest(folder, request.version)
    if newest is not None:
      configs[folder.name] = newest
  if len(configs) > 1:
    raise DataError(
      f"{request.name} is prepared in several configurations: name one of"
      f" {', '.join(f'{request.name}/{config}' for config in configs)}."
    )
  return next(iter(configs.values()), None)


def read_prepared(
  request: Request,
  split: str,
  folder: pathlib.Path,
  *,
  root: pathlib.Path,
  cache_dir: str | os.PathLike[str] | None,
) -> Dataset:
  """Reads one split of a prepared set, through the cache of decoded arrays.

  Args:
    request: the set.
    split: its split.
    folder: where it is prepared.
    root: the folder of prepared sets, for messages.
    cache_dir: as for `load`.

  Returns:
    The split.

  Raises:
    DataError: the set is not one of image classification, or its images
      differ in size, or its records cannot be read.
  """
  version = folder.name
  entry = cache_root(cache_dir).joinpath(
    "datasets",
    request.name,
    request.config or "default",
    f"{version}-{_digest(folder)}",
    split,
  )
  arrays, extra = cached(entry, lambda: _decode(request, split, folder, root))
  return Dataset(
    str(request),
    arrays["images"],
    arrays["labels"],
    extra["num_classes"],
    split,
    version,
  )


def image_and_label(name: str, info: Any) -> tuple[str, str]:
  """Returns the keys of the image and of the class label.

  Args:
    name: the set's name, for messages.
    info: its `tfds.core.DatasetInfo`.

  Returns:
    The two keys of a record.

  Raises:
    DataError: the set has not one of each, or its images cannot make one array.
  """
  from tensorflow_datasets import features as kinds

  features = info.features
  keys = list(features) if isinstance(features, kinds.FeaturesDict) else []
  images = [k for k in keys if isinstance(features[k], kinds.Image)]
  labels = [k for k in keys if isinstance(features[k], kinds.ClassLabel)]
  supervised: Sequence[str] = info.supervised_keys or ()
  if len(supervised) == 2:
    images = [k for k in images if k == supervised[0]]
    labels = [k for k in labels if k == supervised[1]]
  if len(images) != 1 or len(labels) != 1:
    raise DataError(
      f"{name} is not an image classification set: it has not one image and one"
      f" class label among its features {keys}; choose another set."
    )
  image = features[images[0]]
  if None in image.shape or image.np_dtype not in (np.uint8, np.float32):
    raise DataError(
      f"the images of {name} have shape {image.shape} and type"
      f" {np.dtype(image.np_dtype).name}: choose a set with uint8 or float32"
      " images of one size."
    )
  return images[0], labels[0]


def _newest(folder: pathlib.Path, version: str | None) -> pathlib.Path | None:
  if not folder.is_dir():
    return None
  versions = [
    path
    for path in folder.iterdir()
    if _VERSION.fullmatch(path.name)
    and version in (None, path.name)
    and (path / _INFO).is_file()
  ]
  return max(
    versions,
    key=lambda path: tuple(int(part) for part in path.name.split(".")),
    default=None,
  )


def _digest(folder: pathlib.Path) -> str:
  """A digest of a prepared set, so that one prepared anew is not confused."""
  digest = hashlib.sha256()
  for name in (_INFO, "features.json"):
    path = folder / name
    if path.is_file():
      digest.update(path.read_bytes())
  return digest.hexdigest()[:12]


def _decode(
  request: Request, split: str, folder: pathlib.Path, root: pathlib.Path
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Decodes a whole split at once."""
  with require(request.name):
    # TFDS takes a missing PIL for a missing TensorFlow.
    import PIL.Image  # noqa: F401
    import tensorflow_datasets as tfds

  stored_as = _file_format(request, folder)
  if stored_as != _FORMAT:
    command = build_command(request, root, overwrite=True)
    raise DataError(
      f"{request} in {folder} is stored as {stored_as}, which needs TensorFlow"
      f" to read: once, run {command}"
    )
  builder = tfds.builder_from_directory(folder)
  image_key, label_key = image_and_label(str(request), builder.info)
  if split not in builder.info.splits:
    raise DataError(
      f"{request} has no split {split!r}, only {sorted(builder.info.splits)}:"
      " choose another set."
    )
  image = builder.info.features[image_key]
  label = builder.info.features[label_key]
  try:
    source = builder.as_data_source(split)
    images = np.empty((len(source), *image.shape), image.np_dtype)
    labels = np.empty(len(source), np.int32)
    for start in range(0, len(source), _CHUNK):
      rows = range(start, min(start + _CHUNK, len(source)))
      for row, record in zip(rows, source.__getitems__(rows), strict=True):
        images[row] = record[image_key]
        labels[row] = record[label_key]
  except Exception as error:  # Of whatever kind the readers below raise.
    raise DataError(
      f"the records of {request} in {folder} cannot be read"
      f" ({first_line(error)}): remove that folder, and prepare the set anew."
    ) from error
  classes = label.num_classes or 0
  if np.any((labels < 0) | (labels >= classes)):
    raise DataError(
      f"the split {split!r} of {request} has samples without a class: choose"
      " another set."
    )
  return {"images": images, "labels": labels}, {"num_classes": classes}


def _file_format(request: Request, folder: pathlib.Path) -> str:
  try:
    info = json.loads((folder / _INFO).read_text(encoding="utf-8"))
    return str(info.get("fileFormat", "tfrecord"))
  except (OSError, ValueError, AttributeError) as error:
    raise DataError(
      f"{request} in {folder} has an unreadable {_INFO} ({error}): remove that"
      " folder, and prepare the set anew."
    ) from error
