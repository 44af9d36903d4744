"""Tests of the sets of texts."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pathlib
import tempfile
import unittest
import urllib.error
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import data
from jaxmerge.data import _texts

SMALL = {
  "train": [["pay my bill", "pay"], ["hello there", "greet"], ["hi", "greet"]],
  "val": [["good day", "greet"]],
  "test": [["settle the bill", "pay"]],
  "oos_test": [["what is love", "oos"]],
}


class LoadTextsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self._folder = tempfile.TemporaryDirectory()
    self.addCleanup(self._folder.cleanup)
    self.folder = pathlib.Path(self._folder.name)

  def _write(self, content):
    (self.folder / "data_full.json").write_text(json.dumps(content))

  def test_classes_are_sorted_and_texts_of_none_left_out(self):
    self._write(SMALL)
    train = data.load_texts("clinc150", "train", data_dir=self.folder)
    self.assertEqual(train.class_names, ("greet", "pay"))
    self.assertEqual(train.texts, ("pay my bill", "hello there", "hi"))
    np.testing.assert_array_equal(train.labels, [1, 0, 0])
    self.assertEqual(train.labels.dtype, np.int32)
    self.assertEqual(train.num_classes, 2)
    test = data.load_texts("clinc150", "test", data_dir=self.folder)
    self.assertEqual(test.texts, ("settle the bill",))

  @parameterized.parameters(
    ({**SMALL, "val": [["x", "new"]]}, "'val' has the intent 'new'"),
    ({**SMALL, "test": [["x"]]}, "no list of .* under 'test'"),
    ({**SMALL, "train": []}, "no list of .* under 'train'"),
    ([1], "no list of .* under 'train'"),
  )
  def test_damaged_files(self, content, message):
    self._write(content)
    with self.assertRaisesRegex(data.DataError, message):
      data.load_texts("clinc150", "test", data_dir=self.folder)

  def test_a_file_that_is_no_json(self):
    (self.folder / "data_full.json").write_text("{")
    with self.assertRaisesRegex(data.DataError, "cannot be read as JSON"):
      data.load_texts("clinc150", "test", data_dir=self.folder)

  def test_what_to_place_where(self):
    with self.assertRaisesRegex(data.DataError, "place the file there that"):
      data.load_texts("clinc150", "test", data_dir=self.folder)
    with mock.patch.dict(os.environ, JAXMERGE_CACHE_DIR=str(self.folder)):
      with self.assertRaisesRegex(data.DataError, "download is off: place the"):
        data.load_texts("clinc150", "test", download=False)
      with (
        mock.patch.object(
          _texts.urllib.request,
          "urlopen",
          side_effect=urllib.error.URLError("no network"),
        ),
        self.assertRaisesRegex(data.DataError, "no network.*set data_dir"),
      ):
        data.load_texts("clinc150", "test")

  def test_downloads_once_what_was_published(self):
    content = json.dumps(SMALL).encode()
    calls = []

    def urlopen(url, timeout):
      calls.append((url, timeout))
      return io.BytesIO(content)

    with (
      mock.patch.dict(os.environ, JAXMERGE_CACHE_DIR=str(self.folder)),
      mock.patch.object(_texts.urllib.request, "urlopen", urlopen),
    ):
      with self.assertRaisesRegex(data.DataError, "not the file that was"):
        data.load_texts("clinc150", "test")
      self.assertFalse((self.folder / "clinc150").exists())
      digest = hashlib.sha256(content).hexdigest()
      with mock.patch.object(_texts, "_SHA256", digest):
        for _ in range(2):
          found = data.load_texts("clinc150", "validation")
    self.assertEqual(found.texts, ("good day",))
    self.assertLen(calls, 2)

  def test_unknown_names(self):
    with self.assertRaisesRegex(data.DataError, "no set of texts 'banking77'"):
      data.load_texts("banking77", "test")
    with self.assertRaisesRegex(data.DataError, "no split 'val' of clinc150"):
      data.load_texts("clinc150", "val")

  def test_the_real_set(self):
    folder = os.environ.get("CLINC150_DIR")
    if not folder:
      raise unittest.SkipTest("CLINC150_DIR names no folder with its files")
    for split, count in (("train", 100), ("validation", 20), ("test", 30)):
      found = data.load_texts("clinc150", split, data_dir=folder)
      np.testing.assert_array_equal(
        np.bincount(found.labels), np.full(150, count)
      )


if __name__ == "__main__":
  absltest.main()
