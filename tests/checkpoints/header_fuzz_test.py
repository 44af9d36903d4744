"""Random files for the reader of headers: nothing but our own errors."""

from __future__ import annotations

import json
import pathlib
import struct
import tempfile

import hypothesis
import numpy as np
from absl.testing import absltest
from hypothesis import strategies as st
from safetensors import numpy as safetensors_numpy

from jaxmerge import checkpoints
from jaxmerge.checkpoints import _header

_SETTINGS = hypothesis.settings(
  max_examples=150,
  deadline=None,
  derandomize=True,
  database=None,
  suppress_health_check=list(hypothesis.HealthCheck),
)
_NUMBERS = st.one_of(
  st.integers(0, 12),
  st.integers(-(2**70), 2**70),
  st.sampled_from([2**31, 2**32, 2**61, 2**63, 2**64]),
  st.floats(),
  st.booleans(),
)
_JSON = st.recursive(
  st.one_of(st.none(), _NUMBERS, st.text(max_size=8)),
  lambda inner: st.one_of(
    st.lists(inner, max_size=4),
    st.dictionaries(
      st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "x"]),
      inner,
      max_size=4,
    ),
  ),
  max_leaves=12,
)
_WORDS = st.one_of(
  st.sampled_from([*_header.DTYPES, "F4", "f32", ""]), st.text(max_size=4)
)
_ENTRIES = st.one_of(
  st.fixed_dictionaries(
    {
      "dtype": _WORDS,
      "shape": st.lists(st.integers(0, 3), max_size=3),
      "data_offsets": st.lists(st.integers(0, 16), min_size=2, max_size=2),
    }
  ),
  st.fixed_dictionaries(
    {
      "dtype": _WORDS,
      "shape": st.lists(_NUMBERS, max_size=4),
      "data_offsets": st.lists(_NUMBERS, max_size=3),
    }
  ),
  _JSON,
)
_HEADERS = st.dictionaries(
  st.one_of(st.sampled_from(["a", "b", "__metadata__"]), st.text(max_size=4)),
  _ENTRIES,
  max_size=4,
)


class HeaderFuzzTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.path = pathlib.Path(folder.name) / "model.safetensors"

  def _read(self, data):
    """Opens a file; what is accepted can be read, all of it."""
    self.path.write_bytes(data)
    try:
      opened = checkpoints.open(self.path)
    except checkpoints.CheckpointError as error:
      self.assertIn(str(self.path), str(error))
      return None
    for name, tensor in opened.items():
      self.assertEqual(tensor.read().size, tensor.size, name)
      # Shapes beyond NumPy's are told of in header_test.
      if np.prod([max(1, one) for one in tensor.shape], dtype=object) < 2**58:
        self.assertEqual(np.asarray(tensor).shape, tensor.shape)
    return opened

  @_SETTINGS
  @hypothesis.given(st.binary(max_size=200))
  def test_bytes(self, data):
    self._read(data)

  @_SETTINGS
  @hypothesis.given(st.binary(max_size=120), st.binary(max_size=20))
  def test_headers_of_bytes(self, header, data):
    self._read(struct.pack("<Q", len(header)) + header + data)

  @_SETTINGS
  @hypothesis.given(_HEADERS, st.integers(-1, 1), st.binary(max_size=24))
  def test_headers_of_json(self, header, more, data):
    text = json.dumps(header).encode()
    length = max(0, len(text) + more)
    self._read(struct.pack("<Q", length) + text + data)

  @_SETTINGS
  @hypothesis.given(
    st.lists(
      st.tuples(st.integers(0, 400), st.integers(0, 255)),
      min_size=1,
      max_size=4,
    ),
    st.integers(0, 30),
  )
  def test_files_that_are_damaged(self, changes, cut):
    arrays = {
      "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
      "b": np.array(1, np.int64),
      "empty": np.zeros((0, 2), np.float16),
    }
    data = bytearray(safetensors_numpy.save(arrays, {"format": "pt"}))
    for place, value in changes:
      data[place % len(data)] = value
    found = self._read(bytes(data[: len(data) - cut]))
    if cut:
      self.assertIsNone(found)

  @_SETTINGS
  @hypothesis.given(
    st.dictionaries(
      st.text(st.characters(exclude_categories=["Cs"]), max_size=6).filter(
        lambda name: name != "__metadata__"
      ),
      st.tuples(
        st.sampled_from(list(_header.DTYPES.values())),
        st.lists(st.integers(0, 3), max_size=3).map(tuple),
      ),
      max_size=5,
    ),
    st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
  )
  def test_what_is_made_is_read(self, tensors, metadata):
    header, entries = _header.make_header(tensors, metadata)
    end = max((one.stop for one in entries.values()), default=len(header))
    self.path.write_bytes(header + bytes(end - len(header)))
    found, kept = _header.read_header(self.path)
    self.assertEqual(found, entries)
    self.assertEqual(kept, metadata)


if __name__ == "__main__":
  absltest.main()
