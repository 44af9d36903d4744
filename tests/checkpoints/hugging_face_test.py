"""Tests of reading and writing checkpoints in Hugging Face's layout."""

from __future__ import annotations

import json
import pathlib
import pickle
import struct
import tempfile
import unittest

import chex
import huggingface_hub
import jax
import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized
from safetensors import numpy as safetensors_numpy

from jaxmerge.checkpoints import CheckpointError, _safetensors, hugging_face


def _params(seed=0):
  draws = np.random.default_rng(seed)

  def leaf(*shape):
    return draws.normal(size=shape).astype(np.float32)

  return {
    "embeddings": {"words": {"embedding": leaf(5, 4)}},
    "layer": {
      "0": {"dense": {"kernel": leaf(4, 3), "bias": leaf(3)}},
      "norm": {"scale": leaf(3), "bias": leaf(3)},
    },
    "patch": {"kernel": leaf(2, 2, 3, 4)},
    "logit_scale": leaf(),
  }


class HuggingFaceTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.root = pathlib.Path(folder.name)
    self.folder = self.root / "model"

  @property
  def file(self):
    return self.folder / "model.safetensors"

  def test_layout(self):
    params = _params()
    hugging_face.save(self.folder, params)
    found = safetensors_numpy.load_file(self.file)
    dense = params["layer"]["0"]["dense"]["kernel"]
    np.testing.assert_array_equal(found["layer.0.dense.weight"], dense.T)
    patch = params["patch"]["kernel"]
    for o, i, y, x in np.ndindex(4, 3, 2, 2):
      self.assertEqual(found["patch.weight"][o, i, y, x], patch[y, x, i, o])
    np.testing.assert_array_equal(
      found["layer.norm.weight"], params["layer"]["norm"]["scale"]
    )
    self.assertEqual(found["logit_scale"].shape, ())
    self.assertLen(found, 7)

  @parameterized.parameters(5_000_000_000, 100, 1)
  def test_round_trip(self, max_shard_bytes):
    params = _params()
    hugging_face.save(self.folder, params, max_shard_bytes=max_shard_bytes)
    found = hugging_face.load(self.folder, params)
    chex.assert_trees_all_equal(found, params)
    chex.assert_trees_all_equal_shapes(found, params)
    whole = max_shard_bytes > 1000
    self.assertEqual(self.file.exists(), whole)
    self.assertEqual((self.folder / _safetensors.INDEX).exists(), not whole)
    self.assertEmpty(list(self.folder.glob(".*")))

  def test_a_smaller_checkpoint_replaces_a_sharded_one(self):
    hugging_face.save(self.folder, _params(0), max_shard_bytes=100)
    hugging_face.save(self.folder, _params(1))
    chex.assert_trees_all_equal(
      hugging_face.load(self.folder, _params()), _params(1)
    )

  @parameterized.parameters(np.float16, ml_dtypes.bfloat16)
  def test_half_types(self, dtype):
    params = _params()
    hugging_face.save(self.folder, params, dtype=dtype)
    half = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), params)
    kept = hugging_face.load(self.folder, params, dtype=None)
    chex.assert_trees_all_equal(kept, half)
    chex.assert_trees_all_equal_dtypes(kept, half)
    wide = hugging_face.load(self.folder, params)
    chex.assert_trees_all_equal_dtypes(wide, params)

  def test_prefix_buffers_and_what_the_network_has_not(self):
    params = _params()
    hugging_face.save(self.folder, {"bert": params, "head": {"bias": 1.0}})
    (self.folder / "config.json").write_text("{}")
    arrays = safetensors_numpy.load_file(self.file)
    arrays["bert.embeddings.position_ids"] = np.arange(4)
    safetensors_numpy.save_file(arrays, self.file)
    with self.assertRaisesRegex(
      CheckpointError, "1 tensors that the network has not: head.bias"
    ):
      hugging_face.load(self.folder, params)
    found = hugging_face.load(self.folder, params, ignore=("head.*",))
    chex.assert_trees_all_equal(found, params)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
    hugging_face.save(self.root / "new", doubled, source=self.folder)
    again = safetensors_numpy.load_file(self.root / "new/model.safetensors")
    self.assertEqual(set(again), set(arrays))
    np.testing.assert_array_equal(again["head.bias"], 1.0)
    np.testing.assert_array_equal(
      again["bert.layer.norm.bias"], 2 * arrays["bert.layer.norm.bias"]
    )
    self.assertTrue((self.root / "new/config.json").exists())
    with self.assertRaisesRegex(CheckpointError, "choose another one"):
      hugging_face.save(self.folder, doubled, source=self.folder)

  def test_what_does_not_fit_is_listed(self):
    params = _params()
    hugging_face.save(self.folder, params)
    like = _params()
    like["layer"]["0"]["dense"]["kernel"] = np.zeros((4, 9), np.float32)
    like["layer"]["1"] = {"bias": np.zeros(3, np.float32)}
    del like["logit_scale"]
    with self.assertRaises(CheckpointError) as caught:
      hugging_face.load(self.folder, like)
    message = str(caught.exception)
    for part in (
      "1 missing tensors: layer.1.bias",
      "1 tensors that the network has not: logit_scale",
      "layer.0.dense.weight has (3, 4), the leaf 'layer/0/dense/kernel' needs"
      " (9, 4)",
    ):
      self.assertIn(part, message)

  def test_truncated(self):
    hugging_face.save(self.folder, _params())
    whole = self.file.read_bytes()
    for size in (0, 4, 40, len(whole) - 1):
      self.file.write_bytes(whole[:size])
      with self.assertRaisesRegex(CheckpointError, "no whole safetensors file"):
        hugging_face.load(self.folder, _params())

  @parameterized.parameters(2**62, 200_000_000)
  def test_oversized_header(self, size):
    self.folder.mkdir()
    self.file.write_bytes(struct.pack("<Q", size) + b"{}" + b" " * 100)
    with self.assertRaisesRegex(CheckpointError, "no whole safetensors file"):
      hugging_face.load(self.folder, _params())

  def test_pickles_are_refused(self):
    self.folder.mkdir()
    path = self.folder / "pytorch_model.bin"
    path.write_bytes(pickle.dumps(_Trap(str(self.root / "trapped"))))
    for source in (self.folder, path):
      with self.assertRaisesRegex(CheckpointError, "pickled.*weights_only"):
        hugging_face.load(source, _params())
    self.assertFalse((self.root / "trapped").exists())

  def test_pickles_of_weights_alone_where_asked_for(self):
    try:
      import torch
    except ImportError:
      raise unittest.SkipTest("PyTorch is not installed") from None
    params = _params()
    hugging_face.save(self.root / "safe", params)
    tensors = {
      name: torch.tensor(value)
      for name, value in safetensors_numpy.load_file(
        self.root / "safe" / "model.safetensors"
      ).items()
    }
    self.folder.mkdir()
    path = self.folder / "pytorch_model.bin"
    for content in (tensors, {"state_dict": tensors, "epoch": 3}):
      torch.save(content, path)
      for source in (self.folder, path):
        found = hugging_face.load(source, _params(1), weights_only=True)
        chex.assert_trees_all_equal(found, params)
    torch.save(
      {name: value.bfloat16() for name, value in tensors.items()}, path
    )
    found = hugging_face.load(self.folder, params, weights_only=True)
    chex.assert_trees_all_close(found, params, rtol=1e-2)
    # Other pickles of a trainer's folder are left alone.
    torch.save(tensors, path)
    other = self.folder / "training_args.bin"
    other.write_bytes(pickle.dumps(_Trap(str(self.root / "trapped"))))
    found = hugging_face.load(self.folder, params, weights_only=True)
    chex.assert_trees_all_equal(found, params)
    # What was read that way can be written as safetensors.
    back = self.root / "back"
    with self.assertRaisesRegex(CheckpointError, "pickled"):
      hugging_face.save(back, params, source=self.folder)
    hugging_face.save(back, params, source=self.folder, weights_only=True)
    chex.assert_trees_all_equal(hugging_face.load(back, params), params)
    torch.save([1, 2], path)
    with self.assertRaisesRegex(CheckpointError, "no mapping.* a list"):
      hugging_face.load(self.folder, params, weights_only=True)
    path.write_bytes(pickle.dumps(_Trap(str(self.root / "trapped"))))
    with self.assertRaisesRegex(CheckpointError, "more than weights"):
      hugging_face.load(self.folder, params, weights_only=True)
    self.assertFalse((self.root / "trapped").exists())

  def test_no_pickles_where_asked_for(self):
    self.folder.mkdir()
    with self.assertRaisesRegex(CheckpointError, "no pickled weights"):
      hugging_face.load(self.folder, _params(), weights_only=True)

  def _index(self, change):
    hugging_face.save(self.folder, _params(), max_shard_bytes=100)
    path = self.folder / _safetensors.INDEX
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))

  @parameterized.parameters(
    (lambda places: places.update(x="../x.safetensors"), "not a name in its"),
    (lambda places: places.update(x="x.safetensors"), "which is missing"),
    (
      lambda places: places.update(x=places["logit_scale"]),
      "1 tensors that its files lack: x",
    ),
    (
      lambda places: places.pop("logit_scale"),
      "holds 'logit_scale', which the index puts in None",
    ),
  )
  def test_bad_index(self, change, message):
    self._index(change)
    with self.assertRaisesRegex(CheckpointError, message):
      hugging_face.load(self.folder, _params())

  def test_damaged_index(self):
    hugging_face.save(self.folder, _params(), max_shard_bytes=100)
    (self.folder / _safetensors.INDEX).write_text('{"weight_map": ')
    with self.assertRaisesRegex(CheckpointError, "has no weight_map"):
      hugging_face.load(self.folder, _params())

  def test_one_name_in_two_files(self):
    hugging_face.save(self.folder, _params())
    self.file.rename(self.folder / "a.safetensors")
    arrays = {"logit_scale": np.zeros(())}
    safetensors_numpy.save_file(arrays, self.folder / "b.safetensors")
    with self.assertRaisesRegex(CheckpointError, "as a.safetensors does"):
      hugging_face.load(self.folder, _params())

  def test_no_folder_and_nothing_in_it(self):
    with self.assertRaisesRegex(CheckpointError, "does not exist"):
      hugging_face.load(self.folder, _params())
    self.folder.mkdir()
    with self.assertRaisesRegex(CheckpointError, "no .safetensors file"):
      hugging_face.load(self.folder, _params())

  def test_config(self):
    self.folder.mkdir()
    with self.assertRaisesRegex(CheckpointError, "cannot be read"):
      hugging_face.read_config(self.folder)
    path = self.folder / "config.json"
    for text in ("{", "[1]"):
      path.write_text(text)
      with self.assertRaisesRegex(CheckpointError, "is damaged"):
        hugging_face.read_config(self.folder)
    path.write_text('{"model_type": "bert"}')
    self.assertEqual(
      hugging_face.read_config(self.folder), {"model_type": "bert"}
    )

  def test_locate(self):
    self.folder.mkdir()
    self.assertEqual(hugging_face.locate(self.folder), self.folder)
    with self.assertRaisesRegex(CheckpointError, "no folder, and no id"):
      hugging_face.locate("a/b/c")

    def offline(*args, **kwargs):
      raise OSError("no network")

    self.enter_context(
      absltest.mock.patch.object(huggingface_hub, "snapshot_download", offline)
    )
    with self.assertRaisesRegex(
      CheckpointError, "no network.*hf download owner/name --local-dir"
    ):
      hugging_face.locate("owner/name")


class _Trap:
  """Makes a file when it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (self.path, "w")


if __name__ == "__main__":
  absltest.main()
