"""Tests of the headers of safetensors files."""

from __future__ import annotations

import json
import pathlib
import struct
import tempfile
from unittest import mock

import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized
from safetensors import numpy as safetensors_numpy

from jaxmerge.checkpoints import CheckpointError, _header


def _entry(shape, offsets, dtype="F32"):
  return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


class HeaderTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.path = pathlib.Path(folder.name) / "model.safetensors"

  def _write(self, header, data=b""):
    """Writes a file by hand: length, header, data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    self.path.write_bytes(struct.pack("<Q", len(text)) + text + data)

  def _assert_damaged(self, message):
    with self.assertRaisesRegex(CheckpointError, message) as caught:
      _header.read_header(self.path)
    self.assertIn(str(self.path), str(caught.exception))
    self.assertIn("no whole safetensors file", str(caught.exception))

  def test_reads_what_the_library_writes(self):
    draws = np.random.default_rng(0)
    arrays = {
      str(dtype): draws.integers(0, 2, (3, 2)).astype(dtype)
      for dtype in _header.DTYPES.values()
      # The library's NumPy writer lacks these.
      if "float8" not in str(dtype)
    }
    arrays |= {"scalar": np.array(3.0), "empty": np.zeros((0, 4), np.int8)}
    safetensors_numpy.save_file(arrays, self.path, {"format": "pt", "a": "b"})
    entries, metadata = _header.read_header(self.path)
    self.assertEqual(metadata, {"format": "pt", "a": "b"})
    self.assertCountEqual(entries, arrays)
    data = self.path.read_bytes()
    for name, array in arrays.items():
      entry = entries[name]
      self.assertEqual(entry.dtype, array.dtype)
      self.assertEqual(entry.shape, array.shape)
      self.assertEqual(data[entry.start : entry.stop], array.tobytes())

  def test_the_library_reads_what_is_made(self):
    arrays = {
      "z": np.arange(6, dtype=np.int32).reshape(2, 3),
      "a": np.float16(2.5) * np.ones((), np.float16),
      "empty": np.zeros((3, 0), np.float32),
      "half": np.arange(5).astype(ml_dtypes.bfloat16),
    }
    header, entries = _header.make_header(
      {name: (one.dtype, one.shape) for name, one in arrays.items()},
      {"format": "pt"},
    )
    data = bytearray(max(one.stop for one in entries.values()))
    data[: len(header)] = header
    for name, one in entries.items():
      data[one.start : one.stop] = arrays[name].tobytes()
    self.path.write_bytes(data)
    found = safetensors_numpy.load_file(self.path)
    self.assertCountEqual(found, arrays)
    for name, array in arrays.items():
      np.testing.assert_array_equal(found[name], array, strict=True)
    again, metadata = _header.read_header(self.path)
    self.assertEqual(again, entries)
    self.assertEqual(metadata, {"format": "pt"})
    # The order is that of the caller; the first tensor is aligned.
    self.assertEqual(list(entries), list(arrays))
    self.assertEqual(entries["z"].start % 64, 0)

  def test_words(self):
    self.assertEqual(_header.word(ml_dtypes.bfloat16), "BF16")
    self.assertEqual(_header.word("float64"), "F64")
    for dtype in (np.complex128, "U3", ml_dtypes.int4):
      with self.assertRaisesRegex(CheckpointError, "has no dtype .*float32"):
        _header.word(dtype)
    with self.assertRaisesRegex(CheckpointError, "has no dtype complex128"):
      _header.make_header({"a": (np.complex128, (2,))}, {})

  def test_no_tensors(self):
    self._write({"__metadata__": {"a": "b"}})
    self.assertEqual(_header.read_header(self.path), ({}, {"a": "b"}))
    header, entries = _header.make_header({}, {})
    self.path.write_bytes(header)
    self.assertEqual(entries, {})
    self.assertEqual(_header.read_header(self.path), ({}, {}))

  def test_every_truncation(self):
    safetensors_numpy.save_file({"a": np.ones(3), "b": np.ones(2)}, self.path)
    whole = self.path.read_bytes()
    for size in range(len(whole)):
      self.path.write_bytes(whole[:size])
      self._assert_damaged("it has|announces|cut off")
    self.path.write_bytes(whole + b"\0")
    self._assert_damaged("too long")

  @parameterized.parameters(101, 2**32, 2**63, 2**64 - 1)
  def test_announced_size(self, size):
    self.path.write_bytes(struct.pack("<Q", size) + b" " * 100)
    self._assert_damaged(f"announces a header of {size} bytes, and has 108")

  def test_the_largest_header(self):
    text = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    with mock.patch.object(_header, "MOST_BYTES", len(text)):
      self._write(text, b"x")
      self.assertCountEqual(_header.read_header(self.path)[0], "a")
      self._write(text + b" ", b"x")
      self._assert_damaged("at most 53 of a header are read")
      with self.assertRaisesRegex(CheckpointError, "more and smaller files"):
        _header.make_header({"a" * 99: (np.uint8, (1,))}, {})

  @parameterized.parameters(
    (b"{", "no JSON"),
    (b"\xff\xfe{}", "no JSON"),
    (b'{"a":' + b"[" * 100_000, "no JSON"),
    (b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b"]}}", "no JSON"),
    (b"[]", "header is no mapping"),
    (b"null", "header is no mapping"),
    (b'{"a":{}, "a":{}}', "a name stands twice"),
    (
      b'{"a":{"dtype":"U8","shape":[0],"shape":[0],"data_offsets":[0,0]}}',
      "a name stands twice",
    ),
    ({"__metadata__": {"a": 1}}, "metadata is no mapping of texts"),
    ({"__metadata__": [1]}, "metadata is no mapping of texts"),
    ({"a": None}, "'a' is no mapping"),
    ({"a": {}}, "'a' has the unknown dtype None"),
    ({"a": _entry([4], [0, 2], "F4")}, "'a' has the unknown dtype 'F4'"),
    ({"a": _entry([4], [0, 2], ["F32"])}, "'a' has the unknown dtype"),
    ({"a": _entry(None, [0, 4])}, "'a' has the shape None"),
    ({"a": _entry([-1], [4, 0])}, r"'a' has the shape \[-1\]"),
    ({"a": _entry([1.0], [0, 4])}, r"'a' has the shape \[1.0\]"),
    ({"a": _entry([True], [0, 4])}, r"'a' has the shape \[True\]"),
    ({"a": _entry([2**63], [0, 4])}, "'a' has the shape"),
    ({"a": _entry([1] * 33, [0, 4])}, "'a' has the shape"),
    ({"a": _entry([1], [0])}, "'a' has the offsets"),
    ({"a": _entry([1], [-4, 0])}, "'a' has the offsets"),
    ({"a": _entry([1], [0.0, 4.0])}, "'a' has the offsets"),
    ({"a": _entry([1], "04")}, "'a' has the offsets"),
    ({"a": _entry([2], [0, 4])}, r"needs 8 bytes and has offsets of 4"),
    ({"a": _entry([1], [4, 0])}, "needs 4 bytes and has offsets of -4"),
    ({"a": _entry([2**40, 2**40], [0, 4])}, "'a' has the shape"),
  )
  def test_damaged_header(self, header, message):
    self._write(header, b"0123")
    self._assert_damaged(message)

  @parameterized.parameters(
    ([0, 8], [4, 12], 12, "'b' overlaps 'a'"),
    ([4, 12], [0, 8], 12, "'a' overlaps 'b'"),
    ([0, 8], [0, 8], 8, "'b' overlaps 'a'"),
    ([0, 8], [9, 17], 17, "1 bytes before 'b' belong to no tensor"),
    ([4, 12], [12, 20], 20, "4 bytes before 'a' belong to no tensor"),
    ([0, 8], [8, 16], 17, "too long"),
    ([0, 8], [8, 16], 15, "cut off"),
    ([0, 8], [2**60, 2**60 + 8], 16, "belong to no tensor"),
  )
  def test_places(self, first, second, size, message):
    self._write(
      {"a": _entry([2], first), "b": _entry([2], second)}, b"." * size
    )
    self._assert_damaged(message)

  def test_empty_tensors_share_a_place(self):
    header = {
      "b": _entry([1], [0, 4]),
      "z": _entry([0], [4, 4]),
      "a": _entry([2, 0], [0, 0]),
      "c": _entry([0, 3], [0, 0]),
    }
    self._write(header, b"1234")
    found, _ = _header.read_header(self.path)
    self.assertEqual(found["a"].shape, (2, 0))
    self.assertEqual(found["b"].stop - found["b"].start, 4)
    # But not within another one.
    header["c"] = _entry([0, 3], [2, 2])
    self._write(header, b"1234")
    self._assert_damaged("'c' overlaps 'b'")

  def test_names_that_no_text_can_hold(self):
    # Half of a surrogate pair; whoever prints or encodes it fails.
    self._write(b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}')
    with self.path.open("ab") as file:
      file.write(b"x")
    self._assert_damaged("name|JSON")

  def test_shapes_that_no_array_can_have(self):
    # Without entries, and yet NumPy refuses to count them.
    self._write({"a": _entry([0, 2**61], [0, 0])})
    self._assert_damaged("'a' has the shape")

  def test_files_that_cannot_be_read(self):
    with self.assertRaisesRegex(CheckpointError, "cannot be read .*No such"):
      _header.read_header(self.path)
    with self.assertRaisesRegex(CheckpointError, "cannot be read .*directory"):
      _header.read_header(self.path.parent)


if __name__ == "__main__":
  absltest.main()
