"""Tests of opening a checkpoint of any layout."""

from __future__ import annotations

import json
import pickle

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from absl.testing import absltest, parameterized

from jaxmerge import checkpoints
from jaxmerge.checkpoints import CheckpointError
from tests.recipes import _on_disk

_TREE = {
  "layers": [
    {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4)},
    {"kernel": np.arange(12, 24).reshape(3, 4).astype(ml_dtypes.bfloat16)},
  ],
  "step": np.array(3, np.int32),
  "none": None,
}


class OpenTest(_on_disk.OnDiskTest):
  def _assert_holds(self, opened, tensors):
    self.assertCountEqual(opened, tensors)
    self.assertLen(opened, len(tensors))
    for name, array in tensors.items():
      np.testing.assert_array_equal(
        np.asarray(opened[name]), array, strict=True
      )

  def test_a_folder_and_its_file(self):
    tensors = _on_disk.llama()
    folder = self.write("model", tensors, _on_disk.CONFIG)
    for path in (folder, str(folder), folder / "model.safetensors"):
      opened = checkpoints.open(path)
      self._assert_holds(opened, tensors)
      self.assertEqual(opened.layout, "safetensors")
      self.assertEqual(opened.folder, folder)
      self.assertEqual(opened.config(), _on_disk.CONFIG)
      self.assertFalse(opened.is_adapter)
    with self.assertRaises(KeyError):
      opened["other"]

  def test_a_single_file_goes_before_others(self):
    self.write("model", {"a": np.ones(2)})
    self.write("model", {"a": np.ones(3)}, file="other.safetensors")
    opened = checkpoints.open(self.root / "model")
    self._assert_holds(opened, {"a": np.ones(2)})

  def test_shards(self):
    tensors = _on_disk.llama()
    folder = self.root / "model"
    checkpoints.hugging_face.save(
      folder, {k: v for k, v in tensors.items()}, max_shard_bytes=500
    )
    self.assertGreater(len(list(folder.glob("*.safetensors"))), 3)
    opened = checkpoints.open(folder)
    files = {tensor.file.name for tensor in opened.values()}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    self.assertEqual(
      {name: tensor.file.name for name, tensor in opened.items()},
      index["weight_map"],
    )
    self.assertGreater(len(files), 3)

  @parameterized.parameters(
    (lambda places: places.update(a="../x.safetensors"), "not a name in its"),
    (lambda places: places.update(a="/etc/passwd"), "not a name in its"),
    (lambda places: places.update(a=".."), "cannot be read"),
    (lambda places: places.update(a="c.safetensors"), "which is missing"),
    (lambda places: places.update(c="a.safetensors"), "files lack: c"),
    (lambda places: places.update(b="a.safetensors"), "files lack: b"),
    (lambda places: places.pop("a"), "files lack|puts in None|in which"),
  )
  def test_bad_index(self, change, message):
    self.write("model", {"a": np.ones(2)}, file="a.safetensors")
    self.write("model", {"b": np.ones(2)}, file="b.safetensors")
    places = {"a": "a.safetensors", "b": "b.safetensors"}
    file = self.root / "model" / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": places}))
    self._assert_holds(
      checkpoints.open(file.parent), {"a": np.ones(2), "b": np.ones(2)}
    )
    change(places)
    file.write_text(json.dumps({"weight_map": places}))
    if "a" in places or "b" not in places:
      with self.assertRaisesRegex(CheckpointError, message):
        checkpoints.open(file.parent)
    else:
      # A file that the index does not name is none of the checkpoint.
      self._assert_holds(checkpoints.open(file.parent), {"b": np.ones(2)})

  @parameterized.parameters("{", "[]", "{}", '{"weight_map": [1]}')
  def test_damaged_index(self, text):
    self.write("model", {"a": np.ones(2)}, file="a.safetensors")
    (self.root / "model/model.safetensors.index.json").write_text(text)
    with self.assertRaisesRegex(CheckpointError, "weight_map"):
      checkpoints.open(self.root / "model")

  def test_damaged_index_in_bytes(self):
    self.write("model", {"a": np.ones(2)}, file="a.safetensors")
    index = self.root / "model/model.safetensors.index.json"
    index.write_bytes(b"\xff\xfe\x00")
    with self.assertRaisesRegex(CheckpointError, "weight_map"):
      checkpoints.open(self.root / "model")

  def test_an_index_that_is_nested_deep(self):
    self.write("model", {"a": np.ones(2)}, file="a.safetensors")
    index = self.root / "model/model.safetensors.index.json"
    index.write_text('{"weight_map": ' + "[" * 99_999)
    with self.assertRaisesRegex(CheckpointError, "weight_map"):
      checkpoints.open(self.root / "model")

  def test_an_index_that_cannot_be_read(self):
    self.write("model", {"a": np.ones(2)}, file="a.safetensors")
    (self.root / "model/model.safetensors.index.json").mkdir()
    with self.assertRaises(CheckpointError):
      checkpoints.open(self.root / "model")

  def test_an_adapter(self):
    folder = self.write(
      "lora",
      {"base_model.model.x.lora_A.weight": np.ones((2, 3))},
      file="adapter_model.safetensors",
      adapter_config={"r": 2},
    )
    opened = checkpoints.open(folder)
    self.assertTrue(opened.is_adapter)
    self.assertEqual(opened.config("adapter_config.json"), {"r": 2})
    self.assertEqual(opened.config(), {})

  @parameterized.parameters("{", "[1]", "[" * 9999, "\ufeff")
  def test_damaged_config(self, text):
    opened = checkpoints.open(self.write("model", {"a": np.ones(2)}))
    self.assertEqual(opened.config(), {})
    (opened.folder / "config.json").write_text(text)
    with self.assertRaisesRegex(CheckpointError, "config.json .*Download"):
      opened.config()

  def test_nothing_there(self):
    with self.assertRaisesRegex(CheckpointError, "does not exist"):
      checkpoints.open(self.root / "model")
    (self.root / "model").mkdir()
    with self.assertRaisesRegex(CheckpointError, "no .safetensors file"):
      checkpoints.open(self.root / "model")
    (self.root / "file").write_text("text")
    with self.assertRaisesRegex(CheckpointError, "no whole safetensors file"):
      checkpoints.open(self.root / "file")

  def test_a_damaged_file_is_named(self):
    folder = self.write("model", {"a": np.ones(2)})
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with self.assertRaisesRegex(CheckpointError, f"{file} .*cut off"):
      checkpoints.open(folder)

  def test_pickles_are_refused(self):
    (self.root / "model").mkdir()
    path = self.root / "model/pytorch_model.bin"
    path.write_bytes(pickle.dumps({"a": 1}))
    for place in (path, path.parent):
      with self.assertRaisesRegex(CheckpointError, "pickled.*any code"):
        checkpoints.open(place)

  def test_pickles_of_weights_alone_where_asked_for(self):
    try:
      import torch
    except ImportError:
      self.skipTest("PyTorch is not installed")
    (self.root / "model").mkdir()
    torch.save({"a": torch.arange(6.0).reshape(2, 3)}, self.root / "model/x.pt")
    opened = checkpoints.open(self.root / "model", weights_only=True)
    self.assertEqual(opened.layout, "pickled")
    self._assert_holds(
      opened, {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
    )
    (self.root / "model/x.pt").write_bytes(pickle.dumps(print))
    with self.assertRaisesRegex(CheckpointError, "more than weights"):
      checkpoints.open(self.root / "model", weights_only=True)

  def test_safetensors_go_before_pickles(self):
    folder = self.write("model", {"a": np.ones(2)})
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(print))
    for weights_only in (False, True):
      opened = checkpoints.open(folder, weights_only=weights_only)
      self._assert_holds(opened, {"a": np.ones(2)})

  # Orbax.

  def _save(self, path, tree=None):
    with ocp.PyTreeCheckpointer() as checkpointer:
      checkpointer.save(path, _TREE if tree is None else tree)

  def _assert_is_the_tree(self, opened):
    self.assertEqual(opened.layout, "orbax")
    self._assert_holds(
      opened,
      {
        "layers/0/kernel": _TREE["layers"][0]["kernel"],
        "layers/1/kernel": _TREE["layers"][1]["kernel"],
        "step": _TREE["step"],
      },
    )

  def test_a_folder_of_orbax(self):
    self._save(self.root / "model")
    opened = checkpoints.open(self.root / "model")
    self._assert_is_the_tree(opened)
    tensor = opened["layers/1/kernel"]
    self.assertEqual(tensor.shape, (3, 4))
    self.assertEqual(tensor.dtype, ml_dtypes.bfloat16)
    np.testing.assert_array_equal(
      tensor.read(5, 9), _TREE["layers"][1]["kernel"].reshape(-1)[5:9]
    )
    mesh = jax.make_mesh((4,), ("x",))
    sharding = jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec(None, "x")
    )
    found = opened["layers/0/kernel"].to_device(sharding)
    self.assertEqual(found.sharding, sharding)
    np.testing.assert_array_equal(found, _TREE["layers"][0]["kernel"])

  def test_the_last_step_of_a_run(self):
    with checkpoints.Store(self.root / "run") as store:
      store.save(9, {"w": np.ones(2)})
      store.save(10, _TREE)
    self._assert_is_the_tree(checkpoints.open(self.root / "run"))
    opened = checkpoints.open(self.root / "run" / "9")
    self._assert_holds(opened, {"w": np.ones(2)})

  @parameterized.parameters("default", "params", "state")
  def test_items(self, item):
    self._save(self.root / "model" / item)
    self._assert_is_the_tree(checkpoints.open(self.root / "model"))

  def test_arrays_of_orbax_that_are_gone(self):
    self._save(self.root / "model")
    opened = checkpoints.open(self.root / "model")
    for path in (self.root / "model").rglob("*"):
      if path.is_file() and path.name != "_METADATA":
        path.unlink()
    with self.assertRaisesRegex(CheckpointError, "is damaged.*kernel"):
      opened["layers/0/kernel"].read()


if __name__ == "__main__":
  absltest.main()
