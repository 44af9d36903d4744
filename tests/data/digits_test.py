"""Tests of the embedded digits."""

from __future__ import annotations

import chex
import numpy as np
from absl.testing import absltest, parameterized
from sklearn import datasets

from jaxmerge import data


class DigitsTest(parameterized.TestCase):
  @parameterized.parameters(("train", 1437), ("test", 360))
  def test_has_the_stated_form(self, split, size):
    digits = data.load("digits", split)
    chex.assert_shape(digits.images, (size, 8, 8, 1))
    chex.assert_shape(digits.labels, (size,))
    self.assertEqual(digits.images.dtype, np.uint8)
    self.assertEqual(digits.labels.dtype, np.int32)
    self.assertEqual(digits.images.max(), 255)
    self.assertEqual(digits.input_shape, (8, 8, 1))
    self.assertEqual(
      (digits.name, digits.split, digits.num_classes), ("digits", split, 10)
    )

  def test_the_splits_are_the_whole_set_cut_in_two(self):
    bunch = datasets.load_digits()
    original = sorted(
      (label, tuple(image.ravel()))
      for label, image in zip(bunch.target, bunch.images, strict=True)
    )
    parts = [data.load("digits", split) for split in ("train", "test")]
    ours = sorted(
      (label, tuple(np.round(image.ravel() * (16 / 255))))
      for part in parts
      for label, image in zip(part.labels, part.images, strict=True)
    )
    self.assertEqual(ours, original)

  def test_every_class_has_its_share_in_the_test_split(self):
    counts = np.bincount(datasets.load_digits().target)
    test = np.bincount(data.load("digits", "test").labels)
    self.assertLess(np.max(np.abs(test - counts * (360 / 1797))), 1.0)

  def test_the_split_never_changes(self):
    labels = data.load("digits", "test").labels
    # Figures written down when the split was made.
    expected = [2, 3, 1, 3, 5, 0, 1, 5, 0, 8, 0, 3]
    np.testing.assert_array_equal(labels[:12], expected)


if __name__ == "__main__":
  absltest.main()
