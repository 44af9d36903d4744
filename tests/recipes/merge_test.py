"""Tests of whole merges: what is read, and what is written."""

from __future__ import annotations

import json
from unittest import mock

import numpy as np
import xxhash
import yaml
from absl.testing import absltest
from safetensors import numpy as safetensors_numpy

from jaxmerge import checkpoints, recipes
from jaxmerge.recipes import _engine
from tests.recipes import _merging

_INDEX = "model.safetensors.index.json"


class MergeTest(_merging.MergingTest):
  def test_what_is_written(self):
    a, _, _ = self.pair()
    (self.root / "a/special.jinja").write_text("{{ x }}")
    (self.root / "a/pytorch_model.bin").write_bytes(b"x")
    (self.root / "a/README.md").write_text("old")
    (self.root / "a/deep").mkdir()
    (self.root / "a/deep/config.json").write_text("{}")
    text = """\
      # A comment that is kept.
      merge_method: task_arithmetic
      base_model: $a
      models: [{model: $b, parameters: {weight: 0.5}}]
      name: my-merge
    """
    report = recipes.merge_checkpoints(self.recipe(text), self.root / "out")
    self.assertEqual(report.out, self.root / "out")
    self.assertEqual(report.tensors, len(a))
    size = sum(array.nbytes for array in a.values())
    self.assertEqual(report.bytes_written, size)
    self.assertGreaterEqual(report.bytes_read, 2 * size)
    self.assertEqual(report.resumed, 0)
    self.assertCountEqual(
      _merging.file_bytes(self.root / "out"),
      (
        *("model.safetensors", "config.json", "tokenizer.json"),
        *("generation_config.json", "special.jinja", "deep/config.json"),
        *("README.md", "recipe.yml", "jaxmerge.json"),
      ),
    )
    out = self.root / "out"
    self.assertEqual(
      json.loads((out / "config.json").read_text()), _merging.config()
    )
    self.assertEqual(
      (out / "recipe.yml").read_text(), (self.root / "recipe.yml").read_text()
    )
    card = (out / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    head = yaml.safe_load(head)
    places = [str(self.root / "b"), str(self.root / "a")]
    self.assertCountEqual(head["base_model"], places)
    self.assertEqual(head["tags"], ["merge", "jaxmerge"])
    self.assertStartsWith(body, "# my-merge\n")
    for part in ("`task_arithmetic`", "# A comment that is kept.", *places):
      self.assertIn(part, body)
    with safetensors_numpy.safe_open(out / "model.safetensors", "np") as file:
      self.assertEqual(file.metadata(), {"format": "pt"})
    self.assert_nothing_left("a", "b", "out", "recipe.yml")

  def test_checksums(self):
    a, b, recipe = self.pair()
    recipe["exclude"] = "norm"
    found = self.merge(recipe)
    record = json.loads((self.root / "out/jaxmerge.json").read_text())
    self.assertEqual(record["method"], "linear")
    self.assertEqual(record["checksum"], "xxh3_128")

    def digests(tensors):
      return {
        name: xxhash.xxh3_128_hexdigest(array.tobytes())
        for name, array in tensors.items()
      }

    self.assertEqual(record["outputs"], {"model.safetensors": digests(found)})
    del b["model.norm.weight"]
    self.assertEqual(
      record["inputs"],
      {
        str(self.root / "a/model.safetensors"): digests(a),
        str(self.root / "b/model.safetensors"): digests(b),
      },
    )

  def test_checksums_of_blocks_and_of_what_is_read_twice(self):
    draws = np.random.default_rng(0)
    for name in "ab":
      self.model(name, {"w": draws.normal(size=(100, 99)).astype(np.float32)})
    recipe = self.of("ties", "b", "a", weight=1, density=0.3)
    self.merge(recipe, "whole")
    init = _engine.Engine.__init__

    def in_blocks(engine, *args):
      init(engine, *args, block=4096)

    with mock.patch.object(_engine.Engine, "__init__", in_blocks):
      self.merge(recipe, "blocks")
    records = [
      json.loads((self.root / name / "jaxmerge.json").read_text())
      for name in ("whole", "blocks")
    ]
    self.assertEqual(records[0], records[1])
    self.assertEqual(recipes.verify(self.root / "blocks"), [])

  def test_shards(self):
    a, _, recipe = self.pair()
    whole = self.merge(recipe, "whole")
    found = self.merge(recipe, max_shard_bytes=150)
    np.testing.assert_equal(found, whole)
    index = json.loads((self.root / "out" / _INDEX).read_text())
    files = sorted((self.root / "out").glob("*.safetensors"))
    self.assertEqual(
      index["metadata"]["total_size"], sum(one.nbytes for one in a.values())
    )
    self.assertCountEqual(index["weight_map"], a)
    self.assertEqual(
      sorted(set(index["weight_map"].values())), [file.name for file in files]
    )
    for file in files:
      tensors = safetensors_numpy.load_file(file)
      self.assertLessEqual(
        sum(one.nbytes for one in tensors.values()) * (len(tensors) > 1), 150
      )
    self.assertEqual(
      {k: v.shape for k, v in checkpoints.open(self.root / "out").items()},
      {k: v.shape for k, v in a.items()},
    )

  def test_progress(self):
    _, _, recipe = self.pair()
    seen = []
    self.merge(recipe, seen=lambda done, total: seen.append((done, total)))
    done = [one for one, _ in seen]
    self.assertEqual(done, sorted(done))
    self.assertLen({total for _, total in seen}, 1)

  def test_the_same_bytes_again(self):
    _, _, recipe = self.pair()
    self.merge(recipe, "x/out")
    self.merge(recipe, "y/out")
    self.assertEqual(
      _merging.file_bytes(self.root / "x/out"),
      _merging.file_bytes(self.root / "y/out"),
    )

  def test_pickles(self):
    _, _, recipe = self.pair()
    (self.root / "b/model.safetensors").unlink()
    (self.root / "b/pytorch_model.bin").write_bytes(b"cos\nsystem\n.")
    with self.assertRaisesRegex(checkpoints.CheckpointError, "is pickled"):
      self.merge(recipe)
    self.assert_nothing_left("a", "b")

  def test_pickles_of_weights_alone(self):
    try:
      import torch
    except ImportError:
      self.skipTest("PyTorch is not installed")
    a, b, recipe = self.pair()
    (self.root / "b/model.safetensors").unlink()
    torch.save(
      {k: torch.tensor(v) for k, v in b.items()},
      self.root / "b/pytorch_model.bin",
    )
    for name, array in self.merge(recipe, weights_only=True).items():
      np.testing.assert_allclose(array, (a[name] + b[name]) / 2, rtol=1e-6)

  def test_orbax(self):
    import orbax.checkpoint as ocp

    trees = [
      {
        "dense": {"kernel": np.full((2, 3), value, np.float32)},
        "n": np.int32(4),
      }
      for value in (1.0, 3.0)
    ]
    for name, one in zip("ab", trees, strict=True):
      with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(self.root / name, one)
    found = self.merge(self.of("linear", weight=1))
    np.testing.assert_array_equal(
      found["dense.kernel"], np.full((2, 3), 2, np.float32), strict=True
    )
    self.assertEqual(found["n"], 4)

  def test_a_single_file(self):
    a, b, _ = self.pair()
    recipe = self.of(
      "linear", ("a/model.safetensors", "b/model.safetensors"), weight=1
    )
    for name, array in self.merge(recipe).items():
      np.testing.assert_allclose(
        array, (a[name] + b[name]) / 2, rtol=1e-6, atol=1e-7
      )

  def test_a_truncated_input(self):
    _, _, recipe = self.pair()
    file = self.root / "b/model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with self.assertRaisesRegex(
      checkpoints.CheckpointError, f"{file}.*cut off"
    ):
      self.merge(recipe)
    self.assert_nothing_left("a", "b")


if __name__ == "__main__":
  absltest.main()
