"""Tests of the checkpoint store."""

from __future__ import annotations

import pathlib
import tempfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from jaxmerge import checkpoints, training


def _state(seed):
  key = jax.random.key(seed)
  params = {"w": jax.random.normal(key, (300, 7)), "h": jnp.ones(2, "bfloat16")}
  return {
    "train": training.TrainState(
      params, optax.sgd(0.1, momentum=0.9).init(params), jnp.int32(seed)
    ),
    "key": key,
    "none": None,
  }


def _largest_file(folder):
  files = [path for path in pathlib.Path(folder).rglob("*") if path.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


class StoreTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name) / "deep" / "store"

  def _filled(self, steps=(1, 2, 3)):
    store = checkpoints.Store(self.folder)
    self.addCleanup(store.close)
    for step in steps:
      store.save(step, _state(step), {"step": step, "history": [{"a": 0.1}]})
    store.wait()
    return store

  def test_round_trip(self):
    self._filled()
    with checkpoints.Store(self.folder) as store:
      step, tree, metadata = store.restore(_state(0))
    self.assertEqual(step, 3)
    self.assertEqual(metadata, {"step": 3, "history": [{"a": 0.1}]})
    want = _state(3)
    np.testing.assert_array_equal(
      jax.random.key_data(tree.pop("key")),
      jax.random.key_data(want.pop("key")),
    )
    chex.assert_trees_all_equal(tree, want)
    chex.assert_trees_all_equal_dtypes(tree, want)

  def test_keeps_the_last(self):
    self.assertEqual(self._filled((1, 5, 7, 9)).steps(), [7, 9])

  def test_empty(self):
    with checkpoints.Store(self.folder) as store:
      self.assertEqual(store.steps(), [])
      self.assertIsNone(store.restore(_state(0)))
    self.assertFalse(self.folder.exists())

  def test_replaces(self):
    store = self._filled()
    store.save(3, _state(8), {"new": True})
    store.wait()
    step, tree, metadata = store.restore(_state(0))
    self.assertEqual((step, metadata), (3, {"new": True}))
    self.assertEqual(int(tree["train"].step), 8)

  @parameterized.parameters("flip", "truncate", "empty", "remove")
  def test_damage_falls_back(self, damage):
    store = self._filled()
    path = _largest_file(self.folder / "3")
    content = bytearray(path.read_bytes())
    if damage == "flip":
      content[len(content) // 2] ^= 1
    elif damage == "truncate":
      content = content[: len(content) // 2]
    elif damage == "empty":
      content = bytearray()
    if damage == "remove":
      path.unlink()
    else:
      path.write_bytes(content)
    with self.assertLogs(level="WARNING") as logs:
      step, tree, _ = store.restore(_state(0))
    self.assertEqual(step, 2)
    self.assertEqual(int(tree["train"].step), 2)
    self.assertIn("is damaged", " ".join(logs.output))
    # Set aside, not deleted; training goes on and saves that step again.
    self.assertTrue((self.folder / "damaged-3").is_dir())
    store.save(3, _state(3))
    store.wait()
    self.assertEqual(store.restore(_state(0))[0], 3)

  def test_all_damaged(self):
    store = self._filled((1,))
    _largest_file(self.folder / "1").unlink()
    self.assertIsNone(store.restore(_state(0)))

  def test_half_written(self):
    """What a killed process leaves under a temporary name is no checkpoint."""
    self._filled((1,)).close()
    half = self.folder / "2.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "state").write_text("half")
    with checkpoints.Store(self.folder) as store:
      self.assertEqual(store.restore(_state(0))[0], 1)
      store.save(2, _state(2))
      store.wait()
      self.assertEqual(store.steps(), [1, 2])

  def test_another_shape_is_not_lost(self):
    store = self._filled((1,))
    other = _state(0)
    other["train"].params["w"] = jnp.zeros((300, 8))
    self.assertIsNone(store.restore(other))
    self.assertTrue((self.folder / "damaged-1").is_dir())

  def test_max_to_keep(self):
    with self.assertRaisesRegex(ValueError, "max_to_keep must be at least 1"):
      checkpoints.Store(self.folder, max_to_keep=0)


if __name__ == "__main__":
  absltest.main()
