"""Tests of the normalization."""

from __future__ import annotations

import os
import unittest

import chex
import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import data


class NormalizationTest(parameterized.TestCase):
  @parameterized.parameters(
    ("mnist", [0.1307], [0.3081]),
    ("mnist:3.0.1", [0.1307], [0.3081]),
    ("fashion_mnist", [0.2860], [0.3530]),
    ("cifar10", [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]),
    ("cifar100", [0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]),
  )
  def test_known_sets_need_no_data(self, name, mean, std):
    got = data.normalization(name, data_dir="/nowhere", download=False)
    chex.assert_trees_all_equal(
      got, (np.array(mean, np.float32), np.array(std, np.float32))
    )

  def test_digits_are_normal_by_the_stated_figures(self):
    mean, std = data.normalization("digits")
    digits = data.load("digits", "train")
    pixels = (digits.images / 255 - mean) / std
    self.assertLess(abs(pixels.mean()), 2e-4)
    self.assertLess(abs(pixels.std() - 1), 3e-4)

  def test_unknown_sets_must_be_there(self):
    with self.assertRaises(data.DataError):
      data.normalization("svhn_cropped", data_dir="/nowhere", download=False)

  @unittest.skipUnless(
    os.path.isdir(os.path.join(os.environ.get("TFDS_DATA_DIR", ""), "mnist")),
    "TFDS_DATA_DIR names no folder with a prepared mnist",
  )
  def test_the_figures_of_mnist_are_those_of_its_training_split(self):
    moments = data.channel_moments(data.load("mnist", "train").images)
    chex.assert_trees_all_close(
      moments, data.normalization("mnist"), atol=6e-5, rtol=0
    )


class ChannelMomentsTest(parameterized.TestCase):
  @parameterized.parameters(np.uint8, np.float32)
  def test_agrees_with_numpy_over_several_chunks(self, dtype):
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 255, (9000, 3, 2, 3)) * [1.0, 0.5, 0.1]
    if dtype == np.float32:
      images /= 255
    images = images.astype(dtype)
    scaled = images.astype(np.float64) / (255 if dtype == np.uint8 else 1)
    mean, std = data.channel_moments(images)
    chex.assert_trees_all_close(
      (mean, std),
      (
        scaled.reshape(-1, 3).mean(0).astype(np.float32),
        scaled.reshape(-1, 3).std(0).astype(np.float32),
      ),
      rtol=1e-6,
    )

  def test_a_constant_channel_is_left_alone(self):
    images = np.full((5, 2, 2, 1), 51, np.uint8)
    mean, std = data.channel_moments(images)
    np.testing.assert_allclose(mean, [0.2], rtol=1e-6)
    np.testing.assert_array_equal(std, [1.0])


if __name__ == "__main__":
  absltest.main()
