"""Tests of converting checkpoints between safetensors and Orbax."""

from __future__ import annotations

import json
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from absl.testing import absltest, parameterized

from jaxmerge import checkpoints, recipes
from jaxmerge.checkpoints import _header
from jaxmerge.recipes import _convert
from tests.recipes import _on_disk


def _same_bits(one, other):
  return (
    one.dtype == other.dtype
    and one.shape == other.shape
    and one.tobytes() == other.tobytes()
  )


class ConvertTest(_on_disk.OnDiskTest):
  def _convert(self, source, out, **kwargs):
    return recipes.convert(self.root / source, self.root / out, **kwargs)

  def assert_same_bits(self, found, wanted):
    self.assertCountEqual(found, wanted)
    for name, array in wanted.items():
      self.assertTrue(_same_bits(np.asarray(found[name]), array), name)

  def _orbax(self, name, tree):
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(self.root / name, tree)

  def test_there_and_back_is_bit_identical(self):
    draws = np.random.default_rng(0)
    wanted = {}
    for dtype in _header.DTYPES.values():
      for shape in ((), (3,), (2, 1, 3)):
        raw = draws.bytes(dtype.itemsize * int(np.prod(shape)))
        array = np.frombuffer(raw, dtype).reshape(shape)
        if dtype == np.bool_:
          array = np.frombuffer(raw, np.uint8).reshape(shape) > 127
        wanted[f"a.{dtype}.{len(shape)}.weight"] = array
    wanted["nan"] = np.asarray([0x7FC1, 0xFFFF], np.uint16).view(
      ml_dtypes.bfloat16
    )
    opened = {name: np.array(one) for name, one in wanted.items()}
    checkpoints._safetensors.write(self.root / "a", opened)
    (self.root / "a/config.json").write_text('{"x": 1}')
    (self.root / "a/tokenizer.model").write_bytes(b"\0\1")
    (self.root / "a/other.py").write_text("")
    report = self._convert("a", "b")
    self.assertEqual((report.layout, report.tensors), ("orbax", len(wanted)))
    self.assertEqual(
      report.bytes_written, sum(one.nbytes for one in wanted.values())
    )
    report = self._convert("b", "c")
    self.assertEqual(report.layout, "safetensors")
    self.assert_same_bits(checkpoints.open(self.root / "c"), wanted)
    for name in "bc":
      files = [one.name for one in (self.root / name).iterdir()]
      self.assertNotIn("other.py", files)
      self.assertEqual(
        json.loads((self.root / name / "config.json").read_text()), {"x": 1}
      )
      self.assertEqual(
        (self.root / name / "tokenizer.model").read_bytes(), b"\0\1"
      )
    self.assert_nothing_left("a", "b", "c")

  def test_the_tree(self):
    tensors = {name: one for name, one in _on_disk.llama().items()}
    self.write("a", tensors)
    self._convert("a", "b", to="orbax")
    with ocp.StandardCheckpointer() as checkpointer:
      tree = checkpointer.restore(self.root / "b")
    for name, array in tensors.items():
      node = tree
      for key in name.split("."):
        node = node[key]
      np.testing.assert_array_equal(node, array)
    self.assertLen(jax.tree.leaves(tree), len(tensors))

  def test_from_a_tree_of_jax(self):
    tree = {
      "params": {
        "dense": {"kernel": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)},
        "list": [jnp.ones(1), jnp.zeros(2)],
      },
      "step": 3,
    }
    self._orbax("a", tree)
    seen = []
    report = self._convert(
      "a",
      "b",
      max_shard_bytes=8,
      seen=lambda done, total: seen.append((done, total)),
    )
    self.assertEqual(seen[-1], (report.bytes_written, report.bytes_written))
    found = checkpoints.open(self.root / "b")
    self.assertCountEqual(
      found,
      ["params.dense.kernel", "params.list.0", "params.list.1", "step"],
    )
    self.assertEqual(found["params.dense.kernel"].dtype, ml_dtypes.bfloat16)
    self.assertEqual(int(np.asarray(found["step"])), 3)
    self.assertGreater(len(list((self.root / "b").glob("*.safetensors"))), 1)
    self._convert("b", "c")
    self._convert("c", "d")
    self.assert_same_bits(
      checkpoints.open(self.root / "d"), _on_disk.read(self.root / "b")
    )

  def test_a_run_with_steps(self):
    with checkpoints.Store(self.root / "run") as store:
      for step in (1, 2):
        store.save(step, {"w": np.full(2, step)})
    self._convert("run", "a")
    found = _on_disk.read(self.root / "a")
    np.testing.assert_array_equal(found["w"], [2, 2])
    self.assertEqual(
      [one.name for one in (self.root / "a").iterdir()], ["model.safetensors"]
    )

  def test_an_adapter_keeps_the_name_of_its_file(self):
    self.write(
      "a",
      {"base_model.model.q.lora_A.weight": np.ones((2, 3))},
      file="adapter_model.safetensors",
      adapter_config={"r": 2},
    )
    self._convert("a", "b")
    self._convert("b", "c")
    self.assertCountEqual(
      [one.name for one in (self.root / "c").iterdir()],
      ["adapter_config.json", "adapter_model.safetensors"],
    )

  @parameterized.parameters(
    (("a", "a.b"), "'a' is a tensor and the beginning of 'a.b'"),
    (("a.b.c", "a"), "'a' is a tensor and the beginning of 'a.b.c'"),
    (("a/b",), "'a/b' has a slash"),
    (("a..b",), "'a..b' has a slash, or a part of no letter"),
    ((".a",), "'.a' has a slash, or a part of no letter"),
    (("",), "'' has a slash, or a part of no letter"),
  )
  def test_names_that_would_not_come_back(self, names, message):
    self.write("a", {name: np.ones(2) for name in names})
    with self.assertRaisesRegex(recipes.RecipeError, message):
      self._convert("a", "b")
    self.assert_nothing_left("a")

  def test_keys_that_would_not_come_back(self):
    self._orbax("a", {"a.b": np.ones(2), "a": {"c": np.ones(3)}})
    with self.assertRaisesRegex(recipes.RecipeError, "'a.b' has a dot"):
      self._convert("a", "b")
    self.assert_nothing_left("a")

  def test_names_alike(self):
    tensors = {"a.b": np.ones(2), "ab": np.ones(3), "a.bc": np.ones(1)}
    self.write("a", tensors)
    self._convert("a", "b")
    self._convert("b", "c")
    self.assert_same_bits(_on_disk.read(self.root / "c"), tensors)

  def test_what_cannot_be_converted(self):
    self.write("a", {"w": np.ones((0, 3))})
    with self.assertRaisesRegex(
      recipes.RecipeError, r"'w' of shape \(0, 3\) is empty"
    ):
      self._convert("a", "b")
    with self.assertRaisesRegex(recipes.RecipeError, "is safetensors already"):
      self._convert("a", "b", to="safetensors")
    with self.assertRaisesRegex(recipes.RecipeError, "no layout 'flax'"):
      self._convert("a", "b", to="flax")
    self._orbax("c", {"w": np.ones(2)})
    with self.assertRaisesRegex(recipes.RecipeError, "is orbax already"):
      self._convert("c", "b", to="orbax")
    self.assert_nothing_left("a", "c")

  def test_pickled(self):
    self.write("a", {"w": np.ones(2)})
    (self.root / "a/model.safetensors").unlink()
    (self.root / "a/pytorch_model.bin").write_bytes(b"cos\nsystem\n.")
    with self.assertRaisesRegex(checkpoints.CheckpointError, "is pickled"):
      self._convert("a", "b")

  def test_links(self):
    self.write("a", {"w": np.ones(2)})
    self._convert("a", "b")
    (self.root / "b/manifest.ocdbt").rename(self.root / "manifest")
    (self.root / "b/manifest.ocdbt").symlink_to(self.root / "manifest")
    with self.assertRaisesRegex(recipes.RecipeError, "ocdbt is a link to"):
      self._convert("b", "c")
    (self.root / "a/model.safetensors").rename(self.root / "w.bin")
    (self.root / "a/model.bin").symlink_to(self.root / "w.bin")
    with self.assertRaisesRegex(recipes.RecipeError, "bin is a link to"):
      self._convert("a", "c", weights_only=True)
    self.assert_nothing_left("a", "b", "manifest", "w.bin")

  def test_places(self):
    self.write("a", {"w": np.ones(2)})
    self._convert("a", "b")
    with self.assertRaisesRegex(recipes.RecipeError, "b exists.*--overwrite"):
      self._convert("a", "b")
    self.write("a", {"w": np.zeros(3)})
    self._convert("a", "b", overwrite=True)
    self.assertEqual(checkpoints.open(self.root / "b")["w"].shape, (3,))
    with self.assertRaisesRegex(
      recipes.RecipeError, "holds .*a, which is read"
    ):
      self._convert("a", "a", overwrite=True)
    self.assert_nothing_left("a", "b")

  def test_an_error_while_writing(self):
    self.write("a", {"w": np.ones(2)})
    self._convert("a", "b")
    full = OSError(28, "No space left on device")
    with (
      mock.patch.object(_convert, "_write_orbax", side_effect=full),
      self.assertRaisesRegex(recipes.RecipeError, "No space is left"),
    ):
      self._convert("a", "b", overwrite=True)
    self.assertIn("w", checkpoints.open(self.root / "b"))
    self.assert_nothing_left("a", "b")

  def test_damaged(self):
    self.write("a", {"w": np.arange(2000.0)})
    self._convert("a", "b")
    for file in (self.root / "b").rglob("d/*"):
      file.unlink()
    with self.assertRaisesRegex(ValueError, "is damaged|no tensor|is empty"):
      self._convert("b", "c")
    self.assert_nothing_left("a", "b")


if __name__ == "__main__":
  absltest.main()
