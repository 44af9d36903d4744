"""Image classification sets of TensorFlow Datasets, without TensorFlow."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from jaxmerge.data._cache import cache_root, cached
from jaxmerge.data._dataset import DataError, Dataset

_NAME = re.compile(
  r"(?P<name>[a-z][a-z0-9_]*)(/(?P<config>[\w.=+-]+))?(:(?P<version>[\d.]+))?"
)
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_CHUNK = 4096


class Request(NamedTuple):
  """A set's name, taken apart: name[/config][:version]."""

  name: str
  config: str | None
  version: str | None


def parse(name: str) -> Request:
  """Takes "name[/config][:version]" apart."""
  match = _NAME.fullmatch(name)
  if match is None:
    raise DataError(
      f"{name!r} is not the name of a data set: write it as 'mnist', or as"
      " 'name/config:version'."
    )
  return Request(match["name"], match["config"], match["version"])


def tfds_root(data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
  """Returns the folder of prepared sets, as TFDS itself finds it."""
  if data_dir is None:
    data_dir = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  return pathlib.Path(data_dir).expanduser()


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
  name: str,
  split: str,
  folder: pathlib.Path,
  cache_dir: str | os.PathLike[str] | None,
) -> Dataset:
  """Reads one split of a prepared set, through the cache of decoded arrays."""
  request = parse(name)
  version = folder.name
  entry = cache_root(cache_dir).joinpath(
    "datasets",
    request.name,
    request.config or "default",
    f"{version}-{_digest(folder)}",
    split,
  )
  arrays, extra = cached(entry, lambda: _decode(name, split, folder))
  return Dataset(
    name,
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

  Raises:
    DataError: the set has not one of each.
  """
  import tensorflow_datasets as tfds

  features = info.features
  keys = (
    list(features) if isinstance(features, tfds.features.FeaturesDict) else []
  )
  images = [k for k in keys if isinstance(features[k], tfds.features.Image)]
  labels = [
    k for k in keys if isinstance(features[k], tfds.features.ClassLabel)
  ]
  supervised = info.supervised_keys
  if supervised is not None and len(supervised) == 2:
    image, label = supervised
    if image in images and label in labels:
      return image, label
  if len(images) == 1 and len(labels) == 1:
    return images[0], labels[0]
  raise DataError(
    f"{name} is not an image classification set: it has {len(images)} image"
    f" and {len(labels)} class label features among {keys}; choose a set with"
    " one of each."
  )


def _newest(folder: pathlib.Path, version: str | None) -> pathlib.Path | None:
  if not folder.is_dir():
    return None
  versions = [
    path
    for path in folder.iterdir()
    if _VERSION.fullmatch(path.name)
    and version in (None, path.name)
    and (path / "dataset_info.json").is_file()
  ]
  return max(
    versions,
    key=lambda path: tuple(int(part) for part in path.name.split(".")),
    default=None,
  )


def _digest(folder: pathlib.Path) -> str:
  """A digest of a prepared set, so that one prepared anew is not confused."""
  digest = hashlib.sha256()
  for name in ("dataset_info.json", "features.json"):
    path = folder / name
    if path.is_file():
      digest.update(path.read_bytes())
  return digest.hexdigest()[:12]


def _decode(
  name: str, split: str, folder: pathlib.Path
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Decodes a whole split at once."""
  stored_as = json.loads((folder / "dataset_info.json").read_text()).get(
    "fileFormat", "tfrecord"
  )
  if stored_as != "array_record":
    raise DataError(
      f"{name} in {folder} is stored as {stored_as}, which only TensorFlow"
      f" reads: run 'tfds build {name} --file_format=array_record'."
    )
  import tensorflow_datasets as tfds

  builder = tfds.builder_from_directory(folder)
  image_key, label_key = image_and_label(name, builder.info)
  if split not in builder.info.splits:
    raise DataError(
      f"{name} has no split {split!r}: it has {sorted(builder.info.splits)}."
    )
  feature = builder.info.features[image_key]
  if None in feature.shape:
    raise DataError(
      f"the images of {name} differ in size (shape {feature.shape}): choose a"
      " set whose images are all of one size."
    )
  if feature.np_dtype not in (np.uint8, np.float32):
    raise DataError(
      f"the images of {name} are {np.dtype(feature.np_dtype).name}: choose a"
      " set with uint8 or float32 images."
    )
  source = builder.as_data_source(split)
  images = np.empty((len(source), *feature.shape), feature.np_dtype)
  labels = np.empty(len(source), np.int32)
  for start in range(0, len(source), _CHUNK):
    stop = min(start + _CHUNK, len(source))
    for row, record in enumerate(
      source.__getitems__(range(start, stop)), start
    ):
      images[row] = record[image_key]
      labels[row] = record[label_key]
  num_classes = builder.info.features[label_key].num_classes
  return {"images": images, "labels": labels}, {"num_classes": num_classes}
