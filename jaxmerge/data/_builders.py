"""TFDS builders of MNIST and CIFAR that need no TensorFlow to prepare a set.

The stock builders decode their archives, and encode their images, with
TensorFlow. These subclasses have the stock names, versions, features, splits,
keys and checksums, and differ only in how they decode: with NumPy; and in
handing TFDS images of PIL, which it then encodes without TensorFlow. What they
write is read by `tfds.data_source` as the stock builder's own.

This module imports tensorflow_datasets: import it inside a function.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any
from urllib import parse

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import registered
from tensorflow_datasets.image_classification import cifar, mnist

from jaxmerge.data._dataset import DataError

Examples = Iterator[tuple[int, dict[str, Any]]]

_UINT8 = 8  # The type code of an IDX file's magic number.
_CIFAR_SHAPE = (3, 32, 32)


def builder_classes() -> Mapping[str, type[Any]]:
  """Returns the builder class of each set that can be prepared here."""
  return {
    "mnist": MNIST,
    "fashion_mnist": FashionMNIST,
    "cifar10": Cifar10,
    "cifar100": Cifar100,
  }


def read_idx(path: str, *, ndim: int) -> np.ndarray:
  """Reads a gzipped IDX file of bytes.

  The format: two zero bytes, the type code, the number of axes, the size of
  each axis as a big-endian 32-bit integer, the elements.

  Args:
    path: the file.
    ndim: how many axes it must have.

  Returns:
    uint8, of the shape that the file states.

  Raises:
    DataError: the file is not such a file, or is cut short.
  """
  try:
    with gzip.open(path, "rb") as file:
      content = file.read()
  except (OSError, EOFError, zlib.error) as error:
    raise DataError(f"{path} is not a whole gzip file: {error}.") from error
  start = 4 + 4 * ndim
  if content[:4] != bytes([0, 0, _UINT8, ndim]) or len(content) < start:
    raise DataError(f"{path} is not an IDX file of bytes with {ndim} axes.")
  shape = np.frombuffer(content[4:start], ">u4").tolist()
  values = np.frombuffer(content, np.uint8, offset=start)
  if values.size != np.prod(shape, dtype=np.int64):
    raise DataError(
      f"{path} states the shape {shape} and holds {values.size} bytes."
    )
  return values.reshape(shape)


def read_cifar(
  content: bytes, label_count: int
) -> tuple[np.ndarray, np.ndarray]:
  """Reads one file of the binary version of CIFAR.

  Each record is `label_count` bytes of labels, then the red, the green and the
  blue plane of an image, row by row.

  Args:
    content: the file's content.
    label_count: 1 for CIFAR-10, 2 for CIFAR-100 (coarse, fine).

  Returns:
    The labels, uint8 [n, label_count]; the images, uint8 [n, 32, 32, 3].

  Raises:
    DataError: the content is not a whole number of records.
  """
  record = label_count + int(np.prod(_CIFAR_SHAPE))
  if not content or len(content) % record:
    raise DataError(
      f"a CIFAR file has {len(content)} bytes, which is not a whole number of"
      f" records of {record}."
    )
  rows = np.frombuffer(content, np.uint8).reshape(-1, record)
  images = rows[:, label_count:].reshape(-1, *_CIFAR_SHAPE)
  return rows[:, :label_count], images.transpose(0, 2, 3, 1)


class _IdxExamples:
  """The part of an MNIST builder that decodes."""

  URL: str

  def urls(self) -> list[str]:
    """Returns the addresses of the set's files."""
    return [
      parse.urljoin(self.URL, f"{prefix}-{kind}-ubyte.gz")
      for prefix in ("train", "t10k")
      for kind in ("images-idx3", "labels-idx1")
    ]

  def _split_generators(self, dl_manager: Any) -> dict[Any, Examples]:
    paths = dl_manager.download(self.urls())
    return {
      tfds.Split.TRAIN: self._generate_examples(*paths[:2]),
      tfds.Split.TEST: self._generate_examples(*paths[2:]),
    }

  def _generate_examples(self, images_path: str, labels_path: str) -> Examples:
    images = read_idx(images_path, ndim=3)
    labels = read_idx(labels_path, ndim=1)
    if len(images) != len(labels):
      raise DataError(
        f"{images_path} has {len(images)} images and {labels_path}"
        f" {len(labels)} labels."
      )
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
      yield index, {"image": Image.fromarray(image), "label": int(label)}


class _CifarExamples:
  """The part of a CIFAR builder that decodes."""

  info: Any
  _cifar_info: Any

  def urls(self) -> list[str]:
    """Returns the addresses of the set's files."""
    return [self._cifar_info.url]

  def _split_generators(self, dl_manager: Any) -> dict[Any, Examples]:
    source = self._cifar_info
    (archive,) = dl_manager.download(self.urls())
    wanted = [*source.train_files, *source.test_files, *source.label_files]
    contents = _archive_files(archive, source.prefix, wanted)
    for key, file in zip(source.label_keys, source.label_files, strict=True):
      names = contents[file].decode().split("\n")
      self.info.features[key].names = [name for name in names if name]
    return {
      split: self._generate_examples(prefix, [contents[name] for name in names])
      for split, prefix, names in (
        (tfds.Split.TRAIN, "train_", source.train_files),
        (tfds.Split.TEST, "test_", source.test_files),
      )
    }

  def _generate_examples(self, prefix: str, contents: list[bytes]) -> Examples:
    keys = self._cifar_info.label_keys
    index = 0
    for content in contents:
      for labels, image in zip(*read_cifar(content, len(keys)), strict=True):
        record = dict(zip(keys, labels.tolist(), strict=True))
        record["id"] = f"{prefix}{index:05d}"
        record["image"] = Image.fromarray(image)
        yield index, record
        index += 1


def _archive_files(
  path: str, prefix: str, names: list[str]
) -> dict[str, bytes]:
  """Reads the named files out of a tar archive, which is not extracted."""
  contents = {}
  try:
    with tarfile.open(path, "r:*") as archive:
      for member in archive:
        name = member.name.removeprefix(prefix)
        if member.isfile() and name in names:
          file = archive.extractfile(member)
          contents[name] = file.read() if file is not None else b""
  except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
    raise DataError(f"{path} is not a whole tar archive: {error}.") from error
  missing = [name for name in names if name not in contents]
  if missing:
    raise DataError(f"{path} lacks {', '.join(prefix + m for m in missing)}.")
  return contents


# Each stands in for the stock class of its name, so it states the stock module:
# TFDS writes that into the set's information, and finds the checksums by it.
with registered.skip_registration():

  class MNIST(_IdxExamples, mnist.MNIST):
    """MNIST."""

    __module__ = mnist.__name__

  class FashionMNIST(_IdxExamples, mnist.FashionMNIST):
    """Fashion-MNIST."""

    __module__ = mnist.__name__

  class Cifar10(_CifarExamples, cifar.Cifar10):
    """CIFAR-10."""

    __module__ = cifar.__name__

  class Cifar100(_CifarExamples, cifar.Cifar100):
    """CIFAR-100."""

    __module__ = cifar.__name__
