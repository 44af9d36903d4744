"""Tests of images that are decoded when they are needed."""

from __future__ import annotations

import io
import os
import pathlib
import tempfile
import unittest

import numpy as np
import tensorflow_datasets as tfds
from absl.testing import absltest, parameterized
from PIL import Image

from jaxmerge import data
from tests.data import load_test


def _ramp(height, width):
  """Red grows downwards, green to the right."""
  image = np.zeros((height, width, 3), np.uint8)
  image[..., 0] = np.linspace(0, 250, height)[:, None].round()
  image[..., 1] = np.linspace(0, 250, width)[None].round()
  return image


class PreprocessTest(parameterized.TestCase):
  @parameterized.parameters((40, 60), (60, 40), (30, 30), (20, 90))
  def test_the_centre_of_the_resized_image(self, height, width):
    found = data.clip_preprocess(_ramp(height, width), 20)
    self.assertEqual(found.shape, (20, 20, 3))
    self.assertEqual(found.dtype, np.uint8)
    # A ramp stays one; the longer side loses as much at either end.
    shown = [min(1, min(height, width) / side) for side in (height, width)]
    for channel, axis in ((0, 0), (1, 1)):
      line = found[..., channel].mean(axis=1 - axis)
      half = 125 * shown[axis]
      wanted = 125 + half * (2 * (np.arange(20) + 0.5) / 20 - 1)
      np.testing.assert_allclose(line[1:-1], wanted[1:-1], atol=6)

  def test_an_image_of_the_size_is_left_alone(self):
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    np.testing.assert_array_equal(data.clip_preprocess(image, 8), image)
    np.testing.assert_array_equal(
      data.clip_preprocess(Image.fromarray(image), 8), image
    )

  def test_kinds_of_images(self):
    gray = np.full((8, 8, 1), 9, np.uint8)
    np.testing.assert_array_equal(
      data.clip_preprocess(gray, 8), np.full((8, 8, 3), 9)
    )
    file = io.BytesIO()
    Image.fromarray(_ramp(8, 8)).save(file, "png")
    np.testing.assert_array_equal(
      data.clip_preprocess(file.getvalue(), 8), _ramp(8, 8)
    )


class AugmentTest(parameterized.TestCase):
  def test_parts_have_the_area_and_place_that_are_drawn(self):
    draws = np.random.default_rng(0)
    shares, corners = [], []
    image = _ramp(100, 140)
    for _ in range(200):
      found = data.clip_augment(image, 50, draws, area=(0.3, 0.5)).astype(float)
      # The values at the borders say which part it is.
      tall = (found[-1, :, 0].mean() - found[0, :, 0].mean()) / 250 * 50 / 49
      wide = (found[:, -1, 1].mean() - found[:, 0, 1].mean()) / 250 * 50 / 49
      shares.append(tall * wide)
      corners.append((found[0, 0, 0], found[0, 0, 1]))
    self.assertBetween(min(shares), 0.26, 0.36)
    self.assertBetween(max(shares), 0.44, 0.55)
    self.assertGreater(np.std(corners, axis=0).min(), 15)

  @parameterized.parameters((30, 300), (300, 30))
  def test_where_no_part_fits_it_is_the_centre(self, height, width):
    # Ten times as long as wide: no ratio of at most 4/3 has this area.
    found = data.clip_augment(
      _ramp(height, width), 30, np.random.default_rng(0), area=(0.9, 1.0)
    ).astype(float)
    along = int(width > height)
    line = found[..., along].mean(axis=1 - along)
    # 40 of 300 pixels around the middle.
    half = 125 * 40 / 300
    wanted = 125 + half * (2 * (np.arange(30) + 0.5) / 30 - 1)
    np.testing.assert_allclose(line[2:-2], wanted[2:-2], atol=2)


class LazyImagesTest(absltest.TestCase):
  def _images(self, threads):
    def fetch(rows):
      return [_ramp(20 + int(row) % 7, 30) for row in rows]

    return data.LazyImages(fetch, 300, 10, threads)

  def test_threads_change_nothing(self):
    rows = np.random.default_rng(0).integers(0, 300, 150)
    one, many = self._images(1), self._images(7)
    np.testing.assert_array_equal(one[rows], many[rows])
    found = [
      images.augmented(rows, np.random.default_rng(1)) for images in (one, many)
    ]
    np.testing.assert_array_equal(*found)
    other = one.augmented(rows, np.random.default_rng(2))
    self.assertTrue((other != found[0]).any())
    # The same image twice in an epoch is not augmented alike.
    twice = one.augmented(np.array([3, 3]), np.random.default_rng(1))
    self.assertTrue((twice[0] != twice[1]).any())

  def test_looks_like_an_array(self):
    images = self._images(2)
    self.assertEqual(images.shape, (300, 10, 10, 3))
    self.assertLen(images, 300)
    self.assertEqual(images.dtype, np.uint8)
    self.assertEqual(
      images[np.array([[1, 2], [3, 4]])].shape, (2, 2, 10, 10, 3)
    )
    np.testing.assert_array_equal(
      images[np.array([5])][0], data.clip_preprocess(_ramp(25, 30), 10)
    )

  def test_is_indexed_as_a_vector_is(self):
    images = self._images(2)
    every = images[np.arange(300)]
    mask = np.arange(300) % 50 == 3
    np.testing.assert_array_equal(images[mask], every[mask])
    np.testing.assert_array_equal(images[5:9], every[5:9])
    np.testing.assert_array_equal(images[np.array([-1])], every[-1:])
    for rows in (300, np.array([3, 300])):
      with self.assertRaises(IndexError):
        images[rows]

  def test_errors_of_a_thread_are_raised(self):
    def broken(rows):
      raise OSError("a damaged image")

    with self.assertRaisesRegex(OSError, "a damaged image"):
      data.LazyImages(broken, 3, 10)[np.arange(3)]


class OpenImagesTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.root = pathlib.Path(folder.name)

  def test_images_of_several_sizes(self):
    records = [
      {"image": Image.fromarray(_ramp(8 + i, 12)), "label": i % 3}
      for i in range(9)
    ]
    load_test._prepare(
      self.root,
      features={
        "image": tfds.features.Image(
          shape=(None, None, 3), encoding_format="png"
        ),
        "label": tfds.features.ClassLabel(names=["a", "b", "c"]),
      },
      records={"train": records, "test": records},
    )
    found = data.open_images("tiny", "train", side=6, data_dir=self.root)
    self.assertEqual(found.class_names, ("a", "b", "c"))
    self.assertEqual(found.num_classes, 3)
    images = found.inputs[np.arange(9)]
    # TFDS shuffles: each record is found by its picture.
    wanted = [
      data.clip_preprocess(np.asarray(one["image"]), 6) for one in records
    ]
    for image, label in zip(images, found.labels, strict=True):
      places = [i for i, one in enumerate(wanted) if (one == image).all()]
      self.assertIn(label, [i % 3 for i in places])
    part = data.open_images("tiny", "train[:4]", side=6, data_dir=self.root)
    np.testing.assert_array_equal(part.labels, found.labels[:4])
    np.testing.assert_array_equal(part.inputs[np.arange(4)], images[:4])

  def test_sets_that_are_not_there(self):
    with self.assertRaisesRegex(data.DataError, "tfds build imagenet_r"):
      data.open_images("imagenet_r", "test", side=6, data_dir=self.root)

  def test_a_set_of_another_kind(self):
    records = [{"text": "a", "label": 0}]
    load_test._prepare(
      self.root,
      features={
        "text": tfds.features.Text(),
        "label": tfds.features.ClassLabel(num_classes=2),
      },
      records={"train": records, "test": records},
    )
    with self.assertRaisesRegex(data.DataError, "not one image and one class"):
      data.open_images("tiny", "train", side=6, data_dir=self.root)

  def test_the_real_cifar10(self):
    folder = pathlib.Path(os.environ.get("TFDS_DATA_DIR", ""))
    if not (folder / "cifar10").is_dir():
      raise unittest.SkipTest("TFDS_DATA_DIR names no folder with cifar10")
    found = data.open_images("cifar10", "test", side=32, data_dir=folder)
    whole = data.load("cifar10", "test", data_dir=folder)
    np.testing.assert_array_equal(found.labels, whole.labels)
    np.testing.assert_array_equal(
      found.inputs[np.arange(50)], whole.images[:50]
    )


class TemplatesTest(absltest.TestCase):
  def test_every_template_has_one_place(self):
    for name, count in (
      ("cifar100", 18),
      ("imagenet", 80),
      ("cars", 8),
      ("birds", 1),
    ):
      found = data.clip_templates(name)
      self.assertLen(set(found), count)
      for template in found:
        self.assertEqual(template.count("{}"), 1)
    with self.assertRaisesRegex(data.DataError, "no templates 'cub'"):
      data.clip_templates("cub")


if __name__ == "__main__":
  absltest.main()
