"""Tests of `load`, on small sets that TFDS writes here."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
from unittest import mock

import numpy as np
import tensorflow_datasets as tfds
from absl.testing import absltest, parameterized
from PIL import Image
from tensorflow_datasets.core import registered

from jaxmerge import data
from jaxmerge.data import _tfds

_IMAGE = tfds.features.Image(shape=(4, 6, 3))
_LABEL = tfds.features.ClassLabel(num_classes=5)
_COUNT = 300

with registered.skip_registration():

  class Tiny(tfds.core.GeneratorBasedBuilder):
    """A set with the features, splits and configurations that a test sets."""

    VERSION = tfds.core.Version("1.2.0")
    features = {"image": _IMAGE, "label": _LABEL}
    supervised_keys = None
    records = {"train": [], "test": []}

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self,
        features=tfds.features.FeaturesDict(self.features),
        supervised_keys=self.supervised_keys,
      )

    def _split_generators(self, dl_manager):
      return {split: self._generate_examples(split) for split in self.records}

    def _generate_examples(self, split):
      yield from enumerate(self.records[split])


def _record(index: int, *, label: int | None = None, **more):
  """A record whose pixels tell its index."""
  image = np.full((4, 6, 3), index % 256, np.uint8)
  image[0, 0] = index // 256
  return {
    "image": Image.fromarray(image),
    "label": index % 5 if label is None else label,
    **more,
  }


def _prepare(root, **attributes):
  attributes.setdefault(
    "records",
    {
      "train": [_record(i) for i in range(10)],
      "test": [_record(i) for i in range(4)],
    },
  )
  with registered.skip_registration():
    builder_class = type("Tiny", (Tiny,), attributes)
  builder = builder_class(data_dir=root)
  builder.download_and_prepare(file_format="array_record")
  return pathlib.Path(builder.data_dir)


class _Test(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
    self.root, self.cache = folder / "tfds", folder / "cache"
    self.load = functools.partial(
      data.load, data_dir=self.root, cache_dir=self.cache
    )

  def assert_refused(self, message, *args, **kwargs):
    """Asserts a `DataError` of one line that matches the message."""
    with self.assertRaisesRegex(data.DataError, message) as caught:
      self.load(*args, **kwargs)
    self.assertNotIn("\n", str(caught.exception))


class ReadTest(_Test):
  def test_reads_every_record_of_several_chunks_in_order(self):
    records = {"train": [_record(i) for i in range(_COUNT)], "test": []}
    records["test"] = records["train"][:3]
    _prepare(self.root, records=records)
    with mock.patch.object(_tfds, "_CHUNK", 64):
      dataset = self.load("tiny", "train")
    self.assertEqual(dataset.images.shape, (_COUNT, 4, 6, 3))
    self.assertEqual(
      (dataset.images.dtype, dataset.labels.dtype), (np.uint8, np.int32)
    )
    pixels = dataset.images.astype(int)
    indices = pixels[:, 0, 0, 0] * 256 + pixels[:, 1, 1, 1]
    np.testing.assert_array_equal(np.sort(indices), np.arange(_COUNT))
    np.testing.assert_array_equal(dataset.labels, indices % 5)
    source = tfds.data_source("tiny", data_dir=self.root, download=False)
    for row in (0, 63, 64, _COUNT - 1):
      np.testing.assert_array_equal(
        dataset.images[row], source["train"][row]["image"]
      )
    self.assertEqual(
      (dataset.num_classes, dataset.version, dataset.split, dataset.name),
      (5, "1.2.0", "train", "tiny"),
    )
    self.assertNotIn("tensorflow", sys.modules)

  def test_decodes_once(self):
    _prepare(self.root)
    first = self.load("tiny", "train")
    with mock.patch.object(
      tfds, "builder_from_directory", side_effect=AssertionError
    ):
      again = self.load("tiny", "train")
    np.testing.assert_array_equal(first.images, again.images)
    np.testing.assert_array_equal(first.labels, again.labels)
    self.assertEqual(first.num_classes, again.num_classes)

  def test_the_cached_read_imports_no_tfds(self):
    _prepare(self.root)
    self.load("tiny", "train")
    script = (
      "import sys\n"
      "from jaxmerge import data\n"
      "root, cache = sys.argv[1:]\n"
      "data.load('tiny', 'train', data_dir=root, cache_dir=cache)\n"
      "heavy = {'tensorflow_datasets', 'sklearn', 'PIL', 'tensorflow'}\n"
      "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    environment = dict(
      os.environ, PYTHONPATH=str(pathlib.Path(data.__file__).parents[2])
    )
    subprocess.run(
      [sys.executable, "-c", script, self.root, self.cache],
      env=environment,
      check=True,
      timeout=120,
    )

  def test_a_set_that_was_prepared_anew_is_read_anew(self):
    folder = _prepare(self.root)
    self.assertLen(self.load("tiny", "train").labels, 10)
    shutil.rmtree(folder)
    records = {"train": [_record(i) for i in range(7)], "test": [_record(0)]}
    _prepare(self.root, records=records)
    self.assertLen(self.load("tiny", "train").labels, 7)

  def test_takes_the_newest_version_or_the_one_that_is_named(self):
    for version in ("1.9.0", "1.10.0"):
      _prepare(self.root, VERSION=tfds.core.Version(version))
    self.assertEqual(self.load("tiny", "test").version, "1.10.0")
    old = self.load("tiny:1.9.0", "test")
    self.assertEqual((old.version, old.name), ("1.9.0", "tiny:1.9.0"))
    self.assert_refused("no data set 'tiny'", "tiny:1.8.0", "test")

  def test_takes_the_only_configuration_or_the_one_that_is_named(self):
    one, two = (tfds.core.BuilderConfig(name=name) for name in ("one", "two"))
    _prepare(self.root, BUILDER_CONFIGS=[one])
    self.assertLen(self.load("tiny", "test").labels, 4)
    records = {"train": [_record(1)], "test": [_record(2)]}
    _prepare(self.root, BUILDER_CONFIGS=[two], records=records)
    self.assertLen(self.load("tiny/two", "test").labels, 1)
    self.assertLen(self.load("tiny/one", "test").labels, 4)
    self.assert_refused("tiny/one, tiny/two", "tiny", "test")

  def test_the_label_is_the_supervised_one(self):
    records = [_record(i, coarse=0) for i in range(3)]
    _prepare(
      self.root,
      features={
        "coarse": tfds.features.ClassLabel(num_classes=2),
        "image": _IMAGE,
        "label": _LABEL,
      },
      supervised_keys=("image", "label"),
      records={"train": records, "test": records},
    )
    dataset = self.load("tiny", "train")
    self.assertEqual(dataset.num_classes, 5)
    self.assertEqual(sorted(dataset.labels), [0, 1, 2])

  def test_the_environment_names_the_folders(self):
    _prepare(self.root)
    variables = {
      "TFDS_DATA_DIR": str(self.root),
      "JAXMERGE_CACHE_DIR": str(self.cache),
    }
    with mock.patch.dict(os.environ, variables):
      self.assertLen(data.load("tiny", "test").labels, 4)
    self.assertTrue(any(self.cache.rglob("images.npy")))

  def test_unknown_sets_are_normalized_by_their_training_split(self):
    _prepare(self.root)
    mean, std = data.normalization(
      "tiny", data_dir=self.root, cache_dir=self.cache
    )
    pixels = self.load("tiny", "train").images.reshape(-1, 3) / 255
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-6)
    np.testing.assert_allclose(std, pixels.std(0), rtol=1e-6)


class RefusalTest(_Test):
  def test_a_set_of_another_kind(self):
    records = [{"text": "a", "label": 0}]
    _prepare(
      self.root,
      features={"text": tfds.features.Text(), "label": _LABEL},
      records={"train": records, "test": records},
    )
    self.assert_refused(
      r"tiny is not an image classification .*'label', 'text'|'text', 'label'",
      "tiny",
      "train",
    )

  def test_images_of_several_sizes(self):
    _prepare(
      self.root,
      features={
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": _LABEL,
      },
    )
    self.assert_refused(r"shape \(None, None, 3\)", "tiny", "train")

  def test_a_split_without_classes(self):
    records = {"train": [_record(1)], "test": [_record(1, label=-1)]}
    _prepare(self.root, records=records)
    self.assertLen(self.load("tiny", "train").labels, 1)
    self.assert_refused("'test' of tiny has samples without", "tiny", "test")

  def test_a_split_that_the_set_lacks(self):
    _prepare(self.root, records={"train": [_record(0)]})
    self.assert_refused(r"no split 'test', only \['train'\]", "tiny", "test")

  def test_a_format_that_needs_tensorflow(self):
    path = _prepare(self.root) / "dataset_info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    self.assert_refused(
      "stored as tfrecord.*tfds build tiny --overwrite.*array_record",
      "tiny",
      "train",
    )

  def test_damaged_information(self):
    (_prepare(self.root) / "dataset_info.json").write_text("{")
    self.assert_refused("unreadable dataset_info.json", "tiny", "train")

  @parameterized.parameters(True, False)
  def test_damaged_records(self, gone):
    folder = _prepare(self.root)
    (path,) = folder.glob("*train.array_record*")
    if gone:
      path.unlink()
    else:
      content = bytearray(path.read_bytes())
      content[len(content) // 2 :] = b"\0" * (len(content) // 2 + 1)
      path.write_bytes(content)
    self.assert_refused("cannot be read", "tiny", "train")

  @parameterized.parameters("valid", "", "train[:10]")
  def test_an_unknown_split(self, split):
    self.assert_refused("choose 'train' or 'test'", "digits", split)

  @parameterized.parameters(
    ("mnsit", "did you mean 'mnist'"),
    ("cifar_10", "'cifar10'"),
    ("digit", "'digits'"),
    ("qqqqqq", "choose 'digits', 'mnist' or another"),
    ("MNIST", "did you mean 'mnist'"),
    ("cifar-10", "did you mean 'cifar10'"),
    ("../mnist", "is not a data set's name"),
    ("", "is not a data set's name"),
  )
  def test_an_unknown_name(self, name, message):
    self.assert_refused(message, name, "train")

  @parameterized.parameters(
    (
      "svhn_cropped",
      "jaxmerge.tfds-prepare.*tfds build svhn_cropped --data_dir",
    ),
    ("emnist/balanced", "tfds build emnist/balanced"),
    ("imdb_reviews", "is not an image classification set"),
    ("food101", "images of one size"),
    ("mnist:2.0.0", "ask for 'mnist'"),
    ("mnist/large", "ask for 'mnist'"),
  )
  def test_a_set_that_is_not_prepared(self, name, message):
    self.assert_refused(message, name, "train")
    self.assertFalse(self.root.exists())

  @parameterized.parameters("mnist", "fashion_mnist", "cifar10", "cifar100")
  def test_no_network(self, name):
    # The fixture of these tests lets no connection out.
    start = time.monotonic()
    self.assert_refused(
      f"{name} is not prepared in {self.root} and cannot be downloaded.*"
      "run once with a network",
      name,
      "train",
    )
    self.assertLess(time.monotonic() - start, 30)
    self.assertFalse(self.root.exists())

  def test_a_folder_that_cannot_be_read(self):
    denied = PermissionError("permission denied")
    with mock.patch.object(pathlib.Path, "is_dir", side_effect=denied):
      self.assert_refused(f"{self.root} cannot be read", "mnist", "train")

  def test_no_download_wanted(self):
    self.assert_refused(
      f"not prepared in {self.root}, and download is off",
      "mnist",
      "train",
      download=False,
    )

  @parameterized.parameters(
    ("digits", "sklearn", "scikit-learn"),
    ("tiny", "PIL", "pillow"),
    ("svhn_cropped", "tensorflow_datasets", "tensorflow-datasets"),
  )
  def test_a_missing_package(self, name, module, distribution):
    _prepare(self.root)
    hidden = {module: None, f"{module}.Image": None}
    with mock.patch.dict(sys.modules, hidden):
      self.assert_refused(f"pip install {distribution}", name, "train")


@unittest.skipUnless(
  os.path.isdir(os.path.join(os.environ.get("TFDS_DATA_DIR", ""), "cifar10")),
  "TFDS_DATA_DIR names no folder with a prepared cifar10",
)
class RealCifarTest(absltest.TestCase):
  def test_the_test_split_is_cifar10s(self):
    dataset = data.load("cifar10", "test")
    self.assertEqual(dataset.images.shape, (10000, 32, 32, 3))
    np.testing.assert_array_equal(np.bincount(dataset.labels), [1000] * 10)
    # The figures in common use are the training split's: near, not equal.
    mean, _ = data.channel_moments(dataset.images)
    np.testing.assert_allclose(
      mean, data.normalization("cifar10")[0], atol=0.005
    )


if __name__ == "__main__":
  absltest.main()
