"""What a data set is: arrays in memory; and the error of this package."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

SPLITS = ("train", "test")


class DataError(ValueError):
  """A data set that cannot be had, or a split of one that cannot be made."""


class Dataset(NamedTuple):
  """One split of an image classification set, whole and in memory.

  The arrays may be read-only views of a file on disk: copy before writing.

  Attributes:
    name: the set's name, as given to `load`.
    images: uint8 in 0..255, or float32 as the set stores it,
      [n, height, width, channels].
    labels: int32 [n], each in 0..num_classes-1.
    num_classes: the number of classes of the set.
    split: "train" or "test".
    version: the version of the set that was read.
  """

  name: str
  images: np.ndarray
  labels: np.ndarray
  num_classes: int
  split: str
  version: str

  @property
  def inputs(self) -> np.ndarray:
    """The images, as `jaxmerge.continual.streams` calls what it is given."""
    return self.images

  @property
  def input_shape(self) -> tuple[int, int, int]:
    """The shape of one image: (height, width, channels)."""
    height, width, channels = self.images.shape[1:]
    return height, width, channels
