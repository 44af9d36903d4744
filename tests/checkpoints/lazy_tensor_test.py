"""Tests of tensors that are read when they are needed."""

from __future__ import annotations

import gc
import os
import pathlib
import tempfile

import chex
import jax
import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized
from safetensors import numpy as safetensors_numpy

from jaxmerge import checkpoints, merging
from jaxmerge.checkpoints import CheckpointError

_ARRAYS = {
  "matrix": np.arange(32, dtype=np.float32).reshape(8, 4),
  "half": np.arange(12).reshape(4, 3).astype(ml_dtypes.bfloat16),
  "double": np.array([1 / 3, 2.0, -5.0, 1e300]),
  "scalar": np.array(7, np.int16),
  "empty": np.zeros((0, 4), np.float16),
  "flags": np.array([True, False, True, True]),
}


class LazyTensorTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.path = pathlib.Path(folder.name) / "model.safetensors"
    safetensors_numpy.save_file(_ARRAYS, self.path)
    self.opened = checkpoints.open(self.path)

  @parameterized.parameters(*_ARRAYS)
  def test_attributes_and_whole_array(self, name):
    tensor, array = self.opened[name], _ARRAYS[name]
    self.assertIsInstance(tensor, checkpoints.LazyTensor)
    self.assertEqual(tensor.name, name)
    self.assertEqual(tensor.file, self.path)
    for attribute in ("shape", "dtype", "size", "nbytes", "ndim"):
      self.assertEqual(getattr(tensor, attribute), getattr(array, attribute))
    np.testing.assert_array_equal(np.asarray(tensor), array, strict=True)
    np.testing.assert_array_equal(tensor.read(), array.reshape(-1), strict=True)
    self.assertIn(name, repr(tensor))

  def test_parts(self):
    tensor, flat = self.opened["half"], _ARRAYS["half"].reshape(-1)
    for start in range(flat.size + 1):
      for stop in range(start, flat.size + 1):
        found = tensor.read(start, stop)
        np.testing.assert_array_equal(found, flat[start:stop], strict=True)
    np.testing.assert_array_equal(tensor.read(5), flat[5:], strict=True)

  def test_into_memory_that_is_there(self):
    out = np.full(10, -1, np.float32)
    found = self.opened["matrix"].read(3, 7, out[2:6])
    self.assertTrue(np.shares_memory(found, out))
    np.testing.assert_array_equal(out, [-1, -1, 3, 4, 5, 6, -1, -1, -1, -1])

  def test_mapped_copied_converted(self):
    tensor = self.opened["matrix"]
    mapped = np.asarray(tensor)
    self.assertFalse(mapped.flags.writeable)
    copied = np.array(tensor)
    copied[0, 0] = 9
    self.assertEqual(mapped[0, 0], 0)
    wide = np.asarray(tensor, np.float64)
    np.testing.assert_array_equal(
      wide, _ARRAYS["matrix"].astype(np.float64), strict=True
    )

  def test_a_leaf_of_merging(self):
    models = [{"w": self.opened["matrix"]}, {"w": self.opened["matrix"]}]
    merged = merging.merge_leaves(merging.get("average"), None, models)
    chex.assert_trees_all_close(dict(merged), {"w": _ARRAYS["matrix"]})

  def test_a_file_that_is_cut_off_meanwhile(self):
    for name in ("matrix", "double"):
      self.opened[name].read(0, 1)
    os.truncate(self.path, self.path.stat().st_size - 40)
    with self.assertRaisesRegex(CheckpointError, "cut off at byte"):
      for tensor in self.opened.values():
        tensor.read()
    os.truncate(self.path, 10)
    for name in ("matrix", "double", "half", "flags"):
      with self.assertRaisesRegex(CheckpointError, "cut off at byte"):
        self.opened[name].read()
      with self.assertRaisesRegex(CheckpointError, "cannot be mapped"):
        np.asarray(self.opened[name])

  def test_a_file_that_goes_meanwhile(self):
    self.path.unlink()
    for name in ("matrix", "half", "scalar"):
      with self.assertRaisesRegex(CheckpointError, "cannot be read.*leave"):
        self.opened[name].read()
    with self.assertRaisesRegex(CheckpointError, "cannot be mapped"):
      np.asarray(self.opened["matrix"])

  def test_an_open_file_stays_when_it_is_removed(self):
    tensor = self.opened["matrix"]
    tensor.read(0, 1)
    self.path.unlink()
    np.testing.assert_array_equal(
      tensor.read(), _ARRAYS["matrix"].reshape(-1), strict=True
    )

  def test_files_are_closed(self):
    def descriptors():
      return len(os.listdir("/proc/self/fd"))

    if not os.path.isdir("/proc/self/fd"):
      self.skipTest("needs /proc")
    gc.collect()
    before = descriptors()
    opened = checkpoints.open(self.path)
    self.assertEqual(descriptors(), before)
    for tensor in opened.values():
      tensor.read()
    # One a file.
    self.assertEqual(descriptors(), before + 1)
    del opened, tensor
    gc.collect()
    self.assertEqual(descriptors(), before)

  @parameterized.parameters("matrix", "half", "flags")
  def test_onto_a_mesh(self, name):
    mesh = jax.make_mesh((4,), ("x",))
    for spec in (jax.sharding.PartitionSpec("x"), jax.sharding.PartitionSpec()):
      sharding = jax.sharding.NamedSharding(mesh, spec)
      found = self.opened[name].to_device(sharding)
      self.assertEqual(found.sharding, sharding)
      np.testing.assert_array_equal(
        np.asarray(found), _ARRAYS[name], strict=True
      )
      for shard in found.addressable_shards:
        np.testing.assert_array_equal(
          np.asarray(shard.data), _ARRAYS[name][shard.index]
        )

  def test_onto_two_axes(self):
    mesh = jax.make_mesh((2, 2), ("x", "y"))
    sharding = jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec("y", "x")
    )
    found = self.opened["matrix"].to_device(sharding)
    self.assertEqual(found.addressable_shards[0].data.shape, (4, 2))
    np.testing.assert_array_equal(np.asarray(found), _ARRAYS["matrix"])

  def test_an_empty_one_onto_a_mesh(self):
    mesh = jax.make_mesh((4,), ("x",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    found = self.opened["empty"].to_device(whole)
    np.testing.assert_array_equal(
      np.asarray(found), _ARRAYS["empty"], strict=True
    )

  def test_a_scalar_onto_a_mesh(self):
    mesh = jax.make_mesh((4,), ("x",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    found = self.opened["scalar"].to_device(whole)
    np.testing.assert_array_equal(
      np.asarray(found), _ARRAYS["scalar"], strict=True
    )

  def test_a_sharding_that_does_not_fit(self):
    mesh = jax.make_mesh((4,), ("x",))
    sharding = jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec(None, "x")
    )
    with self.assertRaises(ValueError):
      self.opened["half"].to_device(sharding)


class LoadedTensorTest(parameterized.TestCase):
  def _tensor(self, made=None, shape=(3, 2), dtype=np.float32):
    self.calls = 0
    array = np.arange(6, dtype=np.float32).reshape(3, 2)

    def load():
      self.calls += 1
      return array if made is None else made

    return checkpoints.LoadedTensor("w", shape, dtype, load), array

  def test_it_is_an_array(self):
    tensor, array = self._tensor()
    self.assertEqual(
      (tensor.shape, tensor.dtype, tensor.size, tensor.nbytes, tensor.ndim),
      ((3, 2), np.float32, 6, 24, 2),
    )
    self.assertIn("'w'", repr(tensor))
    self.assertEqual(self.calls, 0)
    np.testing.assert_array_equal(np.asarray(tensor), array, strict=True)
    np.testing.assert_array_equal(
      np.asarray(tensor, np.float16), array.astype(np.float16), strict=True
    )

  def test_made_once_for_all_its_parts(self):
    tensor, array = self._tensor()
    for _ in range(2):
      parts = [tensor.read(start, start + 2) for start in (0, 2, 4)]
      np.testing.assert_array_equal(np.concatenate(parts), array.reshape(-1))
    self.assertEqual(self.calls, 2)
    out = np.zeros(2, np.float32)
    self.assertIs(tensor.read(1, 3, out), out)
    np.testing.assert_array_equal(out, [1, 2])

  @parameterized.parameters(
    (np.zeros((3, 2)),), (np.zeros((2, 3), np.float32),), (1.0,)
  )
  def test_not_what_was_announced(self, made):
    tensor, _ = self._tensor(made)
    for use in (tensor.read, lambda: np.asarray(tensor)):
      with self.assertRaisesRegex(
        CheckpointError, r"announced as float32 \(3,"
      ):
        use()

  def test_onto_a_mesh(self):
    array = np.arange(8, dtype=np.float32)
    tensor = checkpoints.LoadedTensor("w", (8,), "float32", lambda: array)
    mesh = jax.make_mesh((4,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    found = tensor.to_device(sharding)
    self.assertEqual(found.sharding, sharding)
    np.testing.assert_array_equal(np.asarray(found), array)


if __name__ == "__main__":
  absltest.main()
