"""Tests of the builders that need no TensorFlow, against a local server.

The archives are made here in the published formats, small. They are downloaded
from 127.0.0.1, prepared by TFDS and read through `tfds.data_source`.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import io
import os
import pathlib
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import unittest
from unittest import mock

import numpy as np
import tensorflow_datasets as tfds
from absl.testing import absltest, parameterized
from tensorflow_datasets.core import hashing
from tensorflow_datasets.core.download import checksums

from jaxmerge import data
from jaxmerge.data import _builders

_SIZES = {"train": 23, "test": 11}


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
  def log_message(self, *args):
    pass


def _idx(array: np.ndarray) -> bytes:
  header = bytes([0, 0, 8, array.ndim])
  sizes = struct.pack(f">{array.ndim}I", *array.shape)
  return gzip.compress(header + sizes + array.tobytes())


def _write_mnist(folder: pathlib.Path, sets) -> None:
  for split, prefix in (("train", "train"), ("test", "t10k")):
    images, labels = sets[split]
    (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(_idx(images))
    (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(_idx(labels))


def _write_tar(path: pathlib.Path, files: dict[str, bytes]) -> None:
  with tarfile.open(path, "w:gz") as archive:
    for name, content in files.items():
      member = tarfile.TarInfo(name)
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))


def _cifar_file(images: np.ndarray, *labels: np.ndarray) -> bytes:
  """Writes records as the format says: labels, then red, green, blue planes."""
  content = b""
  for row, image in enumerate(images):
    content += bytes(int(label[row]) for label in labels)
    for channel in range(3):
      content += image[:, :, channel].tobytes()
  return content


def _random_sets(shape, num_classes):
  rng = np.random.default_rng(0)
  return {
    split: (
      rng.integers(0, 256, (size, *shape), dtype=np.uint8),
      rng.integers(0, num_classes, size, dtype=np.uint8),
    )
    for split, size in _SIZES.items()
  }


def _stored_order(size: int, split: str) -> np.ndarray:
  """The order in which TFDS stores the records with the keys 0..size-1."""
  hasher = hashing.Hasher(split)
  return np.argsort([hasher.hash_key(key) for key in range(size)])


class _ServedTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
    self.served, self.root = folder / "served", folder / "tfds"
    self.served.mkdir()
    # TFDS adds each builder's checksums to one table of the process.
    table = checksums.get_all_url_infos()
    self.enter_context(
      mock.patch.object(checksums, "get_all_url_infos", lambda: dict(table))
    )
    handler = functools.partial(_QuietHandler, directory=str(self.served))
    # A handler whose client hangs up early is no failure of the server.
    self.enter_context(
      mock.patch.object(http.server.HTTPServer, "handle_error")
    )
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    self.addCleanup(server.server_close)
    self.addCleanup(server.shutdown)
    self.url = f"http://127.0.0.1:{server.server_port}/"
    self.load = functools.partial(
      data.load, data_dir=self.root, cache_dir=folder / "cache"
    )
    self.redirect()

  def redirect(self):
    """Has the builders download from the local server."""
    for builder_class in (_builders.MNIST, _builders.FashionMNIST):
      self.enter_context(mock.patch.object(builder_class, "URL", self.url))
    for builder_class in (_builders.Cifar10, _builders.Cifar100):
      stock = builder_class._cifar_info.fget
      here = property(lambda builder, stock=stock: self._local(stock(builder)))
      self.enter_context(mock.patch.object(builder_class, "_cifar_info", here))

  def _local(self, cifar_info):
    name = cifar_info.url.rpartition("/")[2]
    return cifar_info._replace(url=self.url + name)

  def assert_loads(self, name, sets, num_classes):
    for split, (images, labels) in sets.items():
      dataset = self.load(name, split)
      order = _stored_order(len(labels), split)
      expected = images[order].reshape(dataset.images.shape)
      np.testing.assert_array_equal(dataset.images, expected)
      np.testing.assert_array_equal(dataset.labels, labels[order])
      self.assertEqual(dataset.num_classes, num_classes)


class MnistTest(_ServedTest):
  @parameterized.parameters("mnist", "fashion_mnist")
  def test_is_downloaded_prepared_and_read(self, name):
    sets = _random_sets((28, 28), 10)
    _write_mnist(self.served, sets)
    self.assert_loads(name, sets, 10)
    self.assertNotIn("tensorflow", sys.modules)

  def test_the_prepared_set_states_what_the_stock_builder_states(self):
    _write_mnist(self.served, _random_sets((28, 28), 10))
    self.load("fashion_mnist", "test")
    stock = tfds.builder_cls("fashion_mnist")(data_dir=self.root / "other").info
    sources = tfds.data_source(
      "fashion_mnist", data_dir=self.root, download=False
    )
    info = sources["train"].dataset_info
    self.assertEqual(info.module_name, stock.module_name)
    self.assertEqual(info.full_name, stock.full_name)
    self.assertEqual(info.supervised_keys, stock.supervised_keys)
    self.assertEqual(repr(info.features), repr(stock.features))
    self.assertEqual(info.features["label"].names[9], "Ankle boot")
    self.assertEqual(
      {split: len(source) for split, source in sources.items()}, _SIZES
    )
    self.assertEqual(sources["test"][0]["image"].shape, (28, 28, 1))

  @parameterized.named_parameters(
    ("cut_gzip", lambda content: content[:-20], "not a whole gzip file"),
    ("no_gzip", lambda content: b"<html>", "not a whole gzip file"),
    (
      "cut_images",
      lambda content: gzip.compress(gzip.decompress(content)[:-1]),
      "holds .* bytes",
    ),
    (
      "other_type",
      lambda content: gzip.compress(b"\0\0\x0d\3" + b"\0" * 12),
      "not an IDX file",
    ),
    ("fewer", lambda c: _idx(np.zeros((2, 28, 28), np.uint8)), "2 images and"),
  )
  def test_a_damaged_archive_is_refused(self, damage, message):
    _write_mnist(self.served, _random_sets((28, 28), 10))
    path = self.served / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with self.assertRaisesRegex(data.DataError, message):
      self.load("mnist", "train")
    self.assertFalse((self.root / "mnist" / "3.0.1").exists())

  def test_a_file_with_another_checksum_is_refused(self):
    sets = _random_sets((28, 28), 10)
    _write_mnist(self.served, sets)
    url = self.url + "train-labels-idx1-ubyte.gz"
    right = checksums.UrlInfo(
      size=123, checksum=hashlib.sha256(b"").hexdigest(), filename="labels"
    )
    with (
      mock.patch.object(_builders.MNIST, "url_infos", {url: right}),
      self.assertRaisesRegex(data.DataError, "did not arrive as it was"),
    ):
      self.load("mnist", "train")
    self.assert_loads("mnist", sets, 10)

  def test_a_missing_file_is_named(self):
    with self.assertRaisesRegex(
      data.DataError, "HTTP status 404 from .*train-images"
    ):
      self.load("mnist", "train")
    self.assertFalse(self.root.exists())

  def test_what_is_downloaded_needs_no_network(self):
    sets = _random_sets((28, 28), 10)
    _write_mnist(self.served, sets)
    self.load("mnist", "train")
    for path in (self.root / "mnist" / "3.0.1").iterdir():
      path.unlink()
    (self.root / "mnist" / "3.0.1").rmdir()
    for path in self.served.iterdir():
      path.unlink()
    self.assert_loads("mnist", sets, 10)

  def test_published_files_may_be_put_there_by_hand(self):
    sets = _random_sets((28, 28), 10)
    manual = self.root / "downloads" / "manual"
    manual.mkdir(parents=True)
    _write_mnist(manual, sets)
    url_infos = {
      self.url + path.name: checksums.compute_url_info(path)
      for path in manual.iterdir()
    }
    with mock.patch.object(_builders.MNIST, "url_infos", url_infos):
      self.assert_loads("mnist", sets, 10)

  def test_a_folder_that_cannot_be_written_is_named(self):
    _write_mnist(self.served, _random_sets((28, 28), 10))
    self.root.write_text("not a folder")
    with self.assertRaisesRegex(
      data.DataError, f"cannot be prepared in {self.root}"
    ):
      self.load("mnist", "train")

  def test_two_processes_may_prepare_at_once(self):
    sets = _random_sets((28, 28), 10)
    _write_mnist(self.served, sets)
    script = (
      "import sys\n"
      "from jaxmerge import data\n"
      "from jaxmerge.data import _builders\n"
      "_builders.MNIST.URL = sys.argv[1]\n"
      "data.load('mnist', 'train', data_dir=sys.argv[2], cache_dir=sys.argv[3])"
    )
    environment = dict(
      os.environ, PYTHONPATH=str(pathlib.Path(data.__file__).parents[2])
    )
    cache = self.root.with_name("cache")
    command = [sys.executable, "-c", script, self.url, self.root, cache]
    processes = [
      subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
      )
      for _ in range(2)
    ]
    for process in processes:
      _, errors = process.communicate(timeout=120)
      self.assertEqual(process.returncode, 0, errors.decode())
    self.assert_loads("mnist", sets, 10)


class CifarTest(_ServedTest):
  def test_cifar10_is_downloaded_prepared_and_read(self):
    sets = _random_sets((32, 32, 3), 10)
    names = [f"class {i}" for i in range(10)]
    prefix = "cifar-10-batches-bin/"
    images, labels = sets["train"]
    # Five files, as published, which are read in the order of their numbers.
    cuts = np.array_split(np.arange(len(labels)), 5)
    files = {
      f"{prefix}data_batch_{i}.bin": _cifar_file(images[cut], labels[cut])
      for i, cut in enumerate(cuts, 1)
    }
    files = dict(reversed(files.items()))
    files[f"{prefix}readme.html"] = b"<html>"
    files[f"{prefix}test_batch.bin"] = _cifar_file(*sets["test"])
    files[f"{prefix}batches.meta.txt"] = "\n".join([*names, "", ""]).encode()
    _write_tar(self.served / "cifar-10-binary.tar.gz", files)

    self.assert_loads("cifar10", sets, 10)
    source = tfds.data_source("cifar10", data_dir=self.root, download=False)
    self.assertEqual(
      source["train"].dataset_info.features["label"].names, names
    )
    ids = [record["id"].decode() for record in source["train"]]
    order = _stored_order(len(labels), "train")
    self.assertEqual(ids, [f"train_{index:05d}" for index in order])

  def test_cifar100_has_fine_labels(self):
    sets = _random_sets((32, 32, 3), 100)
    coarse = {
      split: (labels // 5).astype(np.uint8)
      for split, (_, labels) in sets.items()
    }
    prefix = "cifar-100-binary/"
    files = {
      f"{prefix}{split}.bin": _cifar_file(images, coarse[split], labels)
      for split, (images, labels) in sets.items()
    }
    for kind, count in (("coarse", 20), ("fine", 100)):
      names = "\n".join(f"{kind} {i}" for i in range(count))
      files[f"{prefix}{kind}_label_names.txt"] = names.encode()
    _write_tar(self.served / "cifar-100-binary.tar.gz", files)

    self.assert_loads("cifar100", sets, 100)
    source = tfds.data_source(
      "cifar100", split="test", data_dir=self.root, download=False
    )
    order = _stored_order(_SIZES["test"], "test")
    self.assertEqual(
      [record["coarse_label"] for record in source],
      coarse["test"][order].tolist(),
    )
    features = source.dataset_info.features
    self.assertEqual(features["label"].int2str(99), "fine 99")
    self.assertEqual(features["coarse_label"].int2str(19), "coarse 19")

  @parameterized.named_parameters(
    ("no_archive", None, "not a whole tar archive"),
    (
      "no_file",
      {"readme.html": b""},
      "lacks cifar-10-batches-bin/data",
    ),
    (
      "cut_file",
      {
        **{f"data_batch_{i}.bin": b"x" * 3072 for i in range(1, 6)},
        "test_batch.bin": b"x" * 3073,
        "batches.meta.txt": b"\n".join(b"%d" % i for i in range(10)),
      },
      "3072 bytes, which is not a whole number of records",
    ),
  )
  def test_a_damaged_archive_is_refused(self, files, message):
    path = self.served / "cifar-10-binary.tar.gz"
    if files is None:
      path.write_bytes(b"<html>")
    else:
      prefix = "cifar-10-batches-bin/"
      _write_tar(path, {prefix + name: files[name] for name in files})
    with self.assertRaisesRegex(data.DataError, message):
      self.load("cifar10", "train")
    self.assertFalse((self.root / "cifar10" / "3.0.2").exists())


@unittest.skipUnless(
  os.path.isdir(os.path.join(os.environ.get("TFDS_DATA_DIR", ""), "mnist")),
  "TFDS_DATA_DIR names no folder with a prepared mnist",
)
class RealMnistTest(_ServedTest):
  def test_the_real_test_split_is_written_as_it_is_stored(self):
    stored = data.load("mnist", "test")
    order = _stored_order(len(stored.labels), "test")
    images = np.empty_like(stored.images[..., 0])
    labels = np.empty(len(order), np.uint8)
    images[order], labels[order] = stored.images[..., 0], stored.labels
    # The published file begins like this.
    self.assertEqual(labels[:8].tolist(), [7, 2, 1, 0, 4, 1, 4, 9])
    # The first 2,000 keep their order among themselves: enough, and quicker.
    first = (images[:2000], labels[:2000])
    _write_mnist(self.served, {"train": first, "test": first})
    again = self.load("mnist", "test")
    np.testing.assert_array_equal(again.images, stored.images[order < 2000])
    np.testing.assert_array_equal(again.labels, stored.labels[order < 2000])


if __name__ == "__main__":
  absltest.main()
