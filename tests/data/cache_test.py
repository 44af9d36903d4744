"""Tests of the cache of decoded arrays."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge.data import _cache

# A process that stores an entry only when the other has built its own too.
_RACER = """
import pathlib, sys, time
import numpy as np
from jaxmerge.data import _cache

entry, mine, other = map(pathlib.Path, sys.argv[1:])

def build():
  mine.touch()
  deadline = time.monotonic() + 60
  while not other.exists() and time.monotonic() < deadline:
    time.sleep(0.001)
  assert other.exists()
  return {"images": np.arange(300_000, dtype=np.uint8)}, {"answer": 42}

arrays, extra = _cache.cached(entry, build)
assert arrays["images"].sum() == np.arange(300_000, dtype=np.uint8).sum()
assert extra == {"answer": 42}
"""

_KILLED = """
import os, pathlib, signal, sys
import numpy as np
from jaxmerge.data import _cache

save = np.save
def save_and_die(path, array, **kwargs):
  save(path, array, **kwargs)
  os.kill(os.getpid(), signal.SIGKILL)
np.save = save_and_die
arrays = {"images": np.ones(9), "labels": np.ones(3)}
_cache.cached(pathlib.Path(sys.argv[1]), lambda: (arrays, {}))
"""


def _build():
  return (
    {
      "images": np.arange(24, dtype=np.uint8).reshape(4, 3, 2, 1),
      "labels": np.arange(4, dtype=np.int32),
    },
    {"num_classes": 4},
  )


def _never():
  raise AssertionError("the entry was built though it was there")


def _start(script: str, *arguments: object) -> subprocess.Popen:
  root = pathlib.Path(_cache.__file__).parents[2]
  environment = dict(os.environ, PYTHONPATH=str(root))
  return subprocess.Popen(
    [sys.executable, "-c", script, *map(str, arguments)], env=environment
  )


class CacheTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(folder)
    self.entry = self.folder / "mnist" / "1.0.0-abc" / "train"

  def _assert_good(self, found):
    arrays, extra = found
    expected, expected_extra = _build()
    self.assertEqual(extra, expected_extra)
    self.assertEqual(list(arrays), list(expected))
    for name, array in expected.items():
      np.testing.assert_array_equal(arrays[name], array, strict=True)
      self.assertFalse(arrays[name].flags.writeable)
      self.assertIs(type(arrays[name]), np.ndarray)

  def test_builds_once(self):
    self._assert_good(_cache.cached(self.entry, _build))
    self._assert_good(_cache.cached(self.entry, _never))
    self.assertEqual(os.listdir(self.entry.parent), ["train"])

  @parameterized.named_parameters(
    ("cut_short", "images.npy", lambda content: content[:-1]),
    ("one_bit", "images.npy", lambda c: c[:-3] + bytes([c[-3] ^ 1]) + c[-2:]),
    ("header", "labels.npy", lambda content: b"\0" * 20 + content[20:]),
    ("empty", "labels.npy", lambda content: b""),
    ("no_meta", "meta.json", lambda content: b""),
    ("foreign_meta", "meta.json", lambda content: b"[1, 2]"),
    ("other_format", "meta.json", lambda c: c.replace(b"1", b"0", 1)),
    ("gone", "images.npy", None),
  )
  def test_damage_is_found_and_mended(self, name, damage):
    _cache.cached(self.entry, _build)
    path = self.entry / name
    if damage is None:
      path.unlink()
    else:
      path.write_bytes(damage(path.read_bytes()))
    with self.assertLogs("absl", "WARNING") as logs:
      self._assert_good(_cache.cached(self.entry, _build))
    self.assertIn("damaged", logs.output[0])
    self._assert_good(_cache.cached(self.entry, _never))
    self.assertEqual(os.listdir(self.entry.parent), ["train"])

  def test_pickled_arrays_are_not_loaded(self):
    _cache.cached(self.entry, _build)
    np.save(self.entry / "images.npy", np.array([{}]), allow_pickle=True)
    with self.assertLogs("absl", "WARNING"):
      self._assert_good(_cache.cached(self.entry, _build))

  def test_a_file_in_the_place_of_an_entry_is_replaced(self):
    self.entry.parent.mkdir(parents=True)
    self.entry.write_text("in the way")
    with self.assertLogs("absl", "WARNING"):
      self._assert_good(_cache.cached(self.entry, _build))
    self._assert_good(_cache.cached(self.entry, _never))

  @parameterized.parameters(False, True)
  def test_two_processes_may_write_at_once(self, damaged):
    if damaged:
      _cache.cached(self.entry, _build)
      (self.entry / "images.npy").write_bytes(b"damage")
    flags = [self.folder / "one", self.folder / "two"]
    racers = [
      _start(_RACER, self.entry, *flags),
      _start(_RACER, self.entry, *reversed(flags)),
    ]
    self.assertEqual([racer.wait(120) for racer in racers], [0, 0])
    arrays, extra = _cache.cached(self.entry, _never)
    self.assertEqual(extra, {"answer": 42})
    self.assertLen(arrays["images"], 300_000)
    self.assertEqual(os.listdir(self.entry.parent), ["train"])

  def test_a_killed_writer_leaves_no_entry(self):
    self.assertEqual(_start(_KILLED, self.entry).wait(120), -signal.SIGKILL)
    self.assertFalse(self.entry.exists())
    self._assert_good(_cache.cached(self.entry, _build))
    # What it left is removed once it can be nobody's.
    (left,) = self.entry.parent.glob(".tmp-*")
    long_ago = time.time() - 1e6
    os.utime(left, (long_ago, long_ago))
    _cache.cached(self.entry.with_name("test"), _build)
    self.assertFalse(left.exists())

  def test_a_folder_that_cannot_be_written_costs_speed_only(self):
    (self.folder / "mnist").write_text("not a folder")
    with self.assertLogs("absl", "WARNING") as logs:
      self._assert_good(_cache.cached(self.entry, _build))
    self.assertIn("cannot be written", logs.output[-1])

  def test_what_the_build_raises_comes_through(self):
    with self.assertRaisesRegex(AssertionError, "built though"):
      _cache.cached(self.entry, _never)
    self.assertFalse(self.entry.exists())

  def test_meta_is_plain_json(self):
    _cache.cached(self.entry, _build)
    meta = json.loads((self.entry / "meta.json").read_text())
    self.assertEqual(meta["extra"], {"num_classes": 4})
    self.assertEqual(set(meta["checksums"]), {"images", "labels"})


class CacheRootTest(absltest.TestCase):
  def test_the_argument_comes_before_the_environment(self):
    with mock.patch.dict(os.environ, {"JAXMERGE_CACHE_DIR": "/from/env"}):
      self.assertEqual(_cache.cache_root("/given"), pathlib.Path("/given"))
      self.assertEqual(_cache.cache_root(None), pathlib.Path("/from/env"))
    with mock.patch.dict(os.environ, {"JAXMERGE_CACHE_DIR": ""}):
      self.assertIn("jaxmerge", str(_cache.cache_root(None)))


if __name__ == "__main__":
  absltest.main()
