"""The embedded set: scikit-learn's 8x8 digits, no download."""

from __future__ import annotations

import numpy as np

from jaxmerge.data._dataset import Dataset
from jaxmerge.data._order import random_order
from jaxmerge.data._tfds import require

_TEST_SIZE = 360
_ORDER_SEED = 0  # Part of the set's definition: changing it is a new version.
_VERSION = "1.0.0"


def load_digits(split: str) -> Dataset:
  """Loads one split of the UCI optical digits that scikit-learn bundles.

  The 1,797 samples have no official split, so one is fixed here, the same for
  every seed of every experiment: 1,437 to train and 360 to test, each class
  with the share of the test set that it has of the whole (largest remainders),
  its samples taken in a fixed random order.

  The grey levels 0..16 are stored as round(255 / 16 * level), so that these
  images divide by 255 as any others do.

  Args:
    split: "train" or "test".

  Returns:
    The split, images uint8 [n, 8, 8, 1], in the order of the original.
  """
  with require("digits"):
    from sklearn import datasets

  bunch = datasets.load_digits()
  labels = np.asarray(bunch.target, np.int32)
  levels = np.asarray(bunch.images, np.float64)
  images = np.round(levels * (255 / 16)).astype(np.uint8)[..., None]

  quota = np.bincount(labels) * (_TEST_SIZE / len(labels))
  counts = np.floor(quota).astype(int)
  short = _TEST_SIZE - counts.sum()
  counts[np.argsort(counts - quota, kind="stable")[:short]] += 1

  order = random_order(len(labels), _ORDER_SEED)
  in_test = np.zeros(len(labels), bool)
  for label, count in enumerate(counts):
    in_test[order[labels[order] == label][:count]] = True
  chosen = in_test if split == "test" else ~in_test
  return Dataset("digits", images[chosen], labels[chosen], 10, split, _VERSION)
