"""One door to every data set."""

from __future__ import annotations

import os

from jaxmerge.data._dataset import SPLITS, DataError, Dataset
from jaxmerge.data._digits import load_digits
from jaxmerge.data._prepare import prepare
from jaxmerge.data._tfds import find_prepared, parse, read_prepared, tfds_root


def load(
  name: str,
  split: str,
  *,
  data_dir: str | os.PathLike[str] | None = None,
  cache_dir: str | os.PathLike[str] | None = None,
  download: bool = True,
) -> Dataset:
  """Loads one split of an image classification set into memory.

  Args:
    name: "digits" (bundled, no download), or a TFDS set by name, as in
      "mnist", "cifar10", "emnist/balanced" or "mnist:3.0.1".
    split: "train" or "test".
    data_dir: the TFDS folder; if None, the environment variable TFDS_DATA_DIR,
      and without it ~/tensorflow_datasets.
    cache_dir: where decoded arrays are kept; if None, the environment variable
      JAXMERGE_CACHE_DIR, and without it the user's cache folder.
    download: whether a set that is not there may be downloaded.

  Returns:
    The split; its arrays are to be read only.

  Raises:
    DataError: the set is unknown, cannot be had, or is not one of image
      classification; the message says what to do.

  >>> digits = load("digits", "train")
  >>> digits.images.shape, digits.num_classes
  ((1437, 8, 8, 1), 10)
  """
  if split not in SPLITS:
    raise DataError(f"there is no split {split!r}: choose 'train' or 'test'.")
  if name == "digits":
    return load_digits(split)
  request = parse(name)
  root = tfds_root(data_dir)
  try:
    folder = find_prepared(request, root)
  except OSError as error:
    raise DataError(
      f"{root} cannot be read ({error}): set data_dir to a folder that can be."
    ) from error
  if folder is None:
    folder = prepare(request, root, download=download)
  return read_prepared(request, split, folder, root=root, cache_dir=cache_dir)
