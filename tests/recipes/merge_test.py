"""Tests of whole merges: what they write, and what happens when they cannot."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import xxhash
import yaml
from absl.testing import absltest, parameterized
from safetensors import numpy as safetensors_numpy

from jaxmerge import checkpoints, recipes
from jaxmerge.recipes import _blocks, _engine, _folder, _shards
from tests.recipes import _merging

_INDEX = "model.safetensors.index.json"


def _bytes(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in pathlib.Path(folder).rglob("*")
    if path.is_file()
  }


class MergeTest(_merging.MergingTest):
  def _pair(self, **kwargs):
    a = self.model("a", tokenizer={"a": 1}, generation_config={}, **kwargs)
    b = self.model("b", **kwargs)
    return a, b, self.of("linear", weight=1)

  def test_what_is_written(self):
    a, _, _ = self._pair()
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
      _bytes(self.root / "out"),
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
    a, b, recipe = self._pair()
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
    a, _, recipe = self._pair()
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
    _, _, recipe = self._pair()
    seen = []
    self.merge(recipe, seen=lambda done, total: seen.append((done, total)))
    done = [one for one, _ in seen]
    self.assertEqual(done, sorted(done))
    self.assertLen({total for _, total in seen}, 1)

  def test_the_same_bytes_again(self):
    _, _, recipe = self._pair()
    self.merge(recipe, "x/out")
    self.merge(recipe, "y/out")
    self.assertEqual(_bytes(self.root / "x/out"), _bytes(self.root / "y/out"))

  # Places.

  def test_output_that_is_there(self):
    _, _, recipe = self._pair()
    (self.root / "out").mkdir()
    (self.root / "out/old.txt").write_text("old")
    self.assert_refused(recipe, "out exists.*overwrite")
    self.assertEqual(_bytes(self.root / "out"), {"old.txt": b"old"})
    self.merge(recipe, overwrite=True)
    self.assertFalse((self.root / "out/old.txt").exists())
    (self.root / "file").write_text("x")
    self.assert_refused(recipe, "file is no folder", out="file", overwrite=True)
    self.assert_refused(recipe, "cannot be written", out="file/out")
    with self.assertRaisesRegex(ValueError, "max_shard_bytes"):
      self.merge(recipe, "other", max_shard_bytes=0)

  @parameterized.parameters("a", ".", "b")
  def test_no_model_is_overwritten(self, out):
    _, _, recipe = self._pair()
    before = _bytes(self.root)
    with self.assertRaises(recipes.RecipeError):
      self.merge(recipe, out, overwrite=True)
    self.assertEqual(_bytes(self.root), before)

  def test_no_model_is_overwritten_through_a_link(self):
    _, _, recipe = self._pair()
    (self.root / "link").symlink_to(self.root / "a")
    before = _bytes(self.root)
    with self.assertRaises(recipes.RecipeError):
      self.merge(recipe, "link", overwrite=True)
    self.assertEqual(_bytes(self.root), before)

  def test_links_out_of_the_folder(self):
    _, _, recipe = self._pair()
    shutil.move(self.root / "b/model.safetensors", self.root / "weights")
    (self.root / "b/model.safetensors").symlink_to(self.root / "weights")
    self.assert_refused(recipe, "is a link to .*weights, out of its folder")
    # As a hub's cache keeps its files.
    (self.root / "hub/blobs").mkdir(parents=True)
    shutil.move(self.root / "weights", self.root / "hub/blobs/1")
    (self.root / "hub/snapshots/x").mkdir(parents=True)
    (self.root / "hub/snapshots/x/model.safetensors").symlink_to(
      self.root / "hub/blobs/1"
    )
    self.merge(self.of("linear", ("a", "hub/snapshots/x"), weight=1))

  def test_links_beside_the_weights(self):
    _, _, recipe = self._pair()
    (self.root / "secret").write_text("{}")
    (self.root / "a/vocab.json").symlink_to(self.root / "secret")
    self.assert_refused(recipe, "vocab.json is a link to .*secret")

  def test_room(self):
    _, _, recipe = self._pair()
    full = mock.Mock(free=100)
    with mock.patch.object(shutil, "disk_usage", return_value=full):
      with self.assertRaisesRegex(recipes.RecipeError, "GB free, the result"):
        self.merge(recipe)
    self.assertFalse((self.root / "out").exists())

  def test_nothing_is_left_where_there_is_no_room(self):
    _, _, recipe = self._pair()
    full = mock.Mock(free=100)
    with mock.patch.object(shutil, "disk_usage", return_value=full):
      self.assert_refused(recipe, "GB free")

  @parameterized.parameters(
    (OSError(28, "No space left on device"), "No space is left"),
    (OSError(5, "Input/output error"), "cannot be written .*Input"),
    (OSError(30, "Read-only file system"), "cannot be written .*Read-only"),
  )
  def test_errors_while_writing(self, error, message):
    _, _, recipe = self._pair()
    with mock.patch.object(os, "pwrite", side_effect=error):
      self.assert_refused(recipe, message)
    (self.root / "out").mkdir()
    (self.root / "out/old").write_text("x")
    with mock.patch.object(os, "pwrite", side_effect=error):
      self.assert_refused(recipe, message, overwrite=True)
    self.assertEqual(_bytes(self.root / "out"), {"old": b"x"})

  @parameterized.parameters("publish", "finished")
  def test_errors_at_the_end(self, method):
    _, _, recipe = self._pair()
    (self.root / "out").mkdir()
    error = OSError(28, "No space left on device")
    with mock.patch.object(_folder.Staging, method, side_effect=error):
      self.assert_refused(recipe, "No space is left", overwrite=True)

  def test_a_place_that_cannot_be_written(self):
    _, _, recipe = self._pair()
    error = PermissionError(13, "Permission denied")
    with mock.patch.object(pathlib.Path, "mkdir", side_effect=error):
      self.assert_refused(recipe, "cannot be written .*Permission denied")

  def test_an_input_that_goes_meanwhile(self):
    _, _, recipe = self._pair()
    write = _shards.ShardWriter.write

    def cut(writer, name, start, values):
      file = self.root / "b/model.safetensors"
      if file.exists():
        os.truncate(file, 10)
      write(writer, name, start, values)

    init = _engine.Engine.__init__

    def in_blocks(engine, *args):
      init(engine, *args, block=4)

    with (
      mock.patch.object(_engine.Engine, "__init__", in_blocks),
      mock.patch.object(_shards.ShardWriter, "write", cut),
      self.assertRaisesRegex(checkpoints.CheckpointError, "cut off at byte"),
    ):
      self.merge(recipe)
    self.assert_nothing_left("a", "b")

  # Interrupted.

  def _interrupt(self, recipe, out, after, **kwargs):
    """Ends a merge by an interrupt when some files are finished."""
    finished = _folder.Staging.finished
    count = 0

    def stop(staging, *args):
      nonlocal count
      finished(staging, *args)
      count += 1
      if count == after:
        raise KeyboardInterrupt

    with (
      mock.patch.object(_folder.Staging, "finished", stop),
      self.assertRaises(KeyboardInterrupt),
    ):
      self.merge(recipe, out, **kwargs)

  def test_going_on(self):
    a, _, recipe = self._pair()
    self.merge(recipe, "whole/out", max_shard_bytes=100)
    files = len(list((self.root / "whole/out").glob("*.safetensors")))
    self.assertGreater(files, 4)
    for after in (1, 3, files):
      self._interrupt(recipe, "out", after, max_shard_bytes=100)
      self.assertFalse((self.root / "out").exists())
      report = recipes.merge_checkpoints(
        recipe, self.root / "out", max_shard_bytes=100
      )
      self.assertEqual(report.resumed, after)
      self.assertEqual(
        _bytes(self.root / "out"), _bytes(self.root / "whole/out")
      )
      self.assertEqual(recipes.verify(self.root / "out"), [])
      shutil.rmtree(self.root / "out")
    self.assert_nothing_left("a", "b", "whole")

  @parameterized.parameters("recipe", "input", "shards", "damage", "size")
  def test_beginning_anew(self, what):
    _, _, recipe = self._pair()
    size = 100
    self._interrupt(recipe, "out", 2, max_shard_bytes=size)
    staging = self.root / ".out.merging"
    first = sorted(staging.glob("*.safetensors"))[0]
    if what == "recipe":
      recipe["parameters"]["weight"] = 2
      recipe["parameters"]["normalize"] = False
    elif what == "input":
      self.model("b", _merging.network(seed=77))
    elif what == "shards":
      size = 200
    elif what == "damage":
      (staging / "progress.json").write_text("{")
    else:
      os.truncate(first, 9)
    report = recipes.merge_checkpoints(
      recipe, self.root / "out", max_shard_bytes=size
    )
    self.assertEqual(report.resumed, 1 if what == "size" else 0)
    self.merge(recipe, "whole/out", max_shard_bytes=size)
    self.assertEqual(_bytes(self.root / "out"), _bytes(self.root / "whole/out"))

  @parameterized.parameters(signal.SIGKILL, signal.SIGINT)
  def test_killed(self, number):
    # Ranks of so many entries take longer than to notice the first file.
    draws = np.random.default_rng(0)
    for name in "ab":
      self.model(
        name,
        {
          f"model.layers.{i}.w": draws.normal(size=(1024, 256)).astype(
            np.float32
          )
          for i in range(12)
        },
      )
    recipe = self.recipe(
      "merge_method: della_linear\nmodels: [{model: $b}]\nbase_model: $a\n"
      "parameters: {weight: 1, density: 0.5}"
    )
    command = [
      *(sys.executable, "-c", "from jaxmerge import cli; cli.main()"),
      *("merge", str(recipe), str(self.root / "out")),
      *("--max-shard-size", "1MB", "--quiet"),
    ]
    process = subprocess.Popen(
      command, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    self.addCleanup(process.wait)
    self.addCleanup(process.kill)
    progress = self.root / ".out.merging/progress.json"
    end = time.monotonic() + 60
    while not progress.exists() and time.monotonic() < end:
      time.sleep(0.002)
    process.send_signal(number)
    _, err = process.communicate()
    self.assertFalse((self.root / "out").exists(), "it was not killed in time")
    if number == signal.SIGKILL:
      self.assertEqual(process.returncode, -number)
    else:
      self.assertEqual(process.returncode, 1)
      self.assertIn("Interrupted. Start it again to go on.", err)
      self.assertNotIn("Traceback", err)
    size = 1_000_000
    report = recipes.merge_checkpoints(
      recipe, self.root / "out", max_shard_bytes=size
    )
    self.assertBetween(report.resumed, 1, 11)
    self.merge(recipe, "whole/out", max_shard_bytes=size)
    self.assertEqual(_bytes(self.root / "out"), _bytes(self.root / "whole/out"))
    self.assert_nothing_left("a", "b", "out", "whole", "recipe.yml")

  # Verifying.

  def test_verify(self):
    _, _, recipe = self._pair()
    self.merge(recipe, max_shard_bytes=200)
    out = self.root / "out"
    self.assertEqual(recipes.verify(out), [])
    file = self.root / "b/model.safetensors"
    before = file.read_bytes()
    file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    (problem,) = recipes.verify(out)
    self.assertRegex(problem, "b/model.safetensors: '.*' has changed")
    self.assertEqual(recipes.verify(out, inputs=False), [])
    file.write_bytes(before[:-1])
    self.assertRegex(recipes.verify(out)[0], "b/model.safetensors .*cut off")
    file.unlink()
    self.assertRegex(recipes.verify(out)[0], "b/model.safetensors does not")
    file.write_bytes(before)
    self.assertEqual(recipes.verify(out), [])
    shard = sorted(out.glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    (problem,) = recipes.verify(out)
    self.assertRegex(problem, f"{shard.name}: '.*' has changed")
    first = sorted(out.glob("*.safetensors"))[0]
    tensors = safetensors_numpy.load_file(first)
    name = min(tensors)
    tensors["other"] = tensors.pop(name)
    safetensors_numpy.save_file(tensors, first)
    self.assertIn(
      f"{first}: {name!r} is missing.", recipes.verify(out, inputs=False)
    )

  def test_a_result_that_was_moved(self):
    _, _, recipe = self._pair()
    self.merge(recipe)
    (self.root / "out").rename(self.root / "moved")
    self.assertEqual(recipes.verify(self.root / "moved"), [])

  @parameterized.parameters(
    None, "{", "[]", "{}", '{"outputs": {}}', '{"outputs": 1, "inputs": {}}'
  )
  def test_no_result_to_verify(self, text):
    (self.root / "x").mkdir()
    if text is not None:
      (self.root / "x/jaxmerge.json").write_text(text)
    with self.assertRaisesRegex(recipes.RecipeError, "holds no jaxmerge.json"):
      recipes.verify(self.root / "x")

  @parameterized.parameters(
    '{"outputs": {"x": 1}, "inputs": {}}',
    '{"outputs": {"x": ["a"]}, "inputs": {}}',
    "[" * 99_999,
  )
  def test_a_damaged_record(self, text):
    self.write("x", {"a": np.ones(2)}, file="x")
    (self.root / "x/jaxmerge.json").write_text(text)
    with self.assertRaisesRegex(recipes.RecipeError, "jaxmerge.json"):
      recipes.verify(self.root / "x")

  # Other inputs.

  def test_pickles(self):
    _, _, recipe = self._pair()
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
    a, b, recipe = self._pair()
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
    a, b, _ = self._pair()
    recipe = self.of(
      "linear", ("a/model.safetensors", "b/model.safetensors"), weight=1
    )
    for name, array in self.merge(recipe).items():
      np.testing.assert_allclose(
        array, (a[name] + b[name]) / 2, rtol=1e-6, atol=1e-7
      )

  def test_a_truncated_input(self):
    _, _, recipe = self._pair()
    file = self.root / "b/model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with self.assertRaisesRegex(
      checkpoints.CheckpointError, f"{file}.*cut off"
    ):
      self.merge(recipe)
    self.assert_nothing_left("a", "b")


class LoraTest(_merging.MergingTest):
  """Adapters that are applied to their base while merging."""

  def _adapter(self, name, tensors, prefix="base_model.model.", **config):
    self.write(
      name,
      {prefix + key: value for key, value in tensors.items()},
      file="adapter_model.safetensors",
      adapter_config={"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config},
    )

  def _factors(self, seed=0, rank=2, out=4, into=4):
    draws = np.random.default_rng(seed)
    return (
      draws.normal(size=(rank, into)).astype(np.float32),
      draws.normal(size=(out, rank)).astype(np.float32),
    )

  @parameterized.parameters(
    ({}, 4 / 2),
    ({"use_rslora": True}, 4 / np.sqrt(2)),
    ({"lora_alpha": 1}, 1 / 2),
    ({"alpha_pattern": {"mlp.up_proj": 6}}, 6 / 2),
    ({"alpha_pattern": {"other": 6}}, 4 / 2),
  )
  def test_applied(self, config, scale):
    a = self.model("a")
    down, up = self._factors()
    place = "model.layers.1.mlp.up_proj"
    self._adapter(
      "lora",
      {f"{place}.lora_A.weight": down, f"{place}.lora_B.weight": up},
      **config,
    )
    found = self.merge(
      self.of("passthrough", ("a+" + str(self.root / "lora"),))
    )
    self.assertCountEqual(found, a)
    for name, array in a.items():
      wanted = array
      if name == f"{place}.weight":
        wanted = array + scale * (up @ down)
      np.testing.assert_allclose(found[name], wanted, rtol=1e-5, atol=1e-5)

  def test_embeddings_and_modules_that_are_saved(self):
    a = self.model("a")
    draws = np.random.default_rng(3)
    down = draws.normal(size=(2, 6)).astype(np.float32)
    up = draws.normal(size=(4, 2)).astype(np.float32)
    head = np.ones((6, 4), np.float32)
    self._adapter(
      "lora",
      {
        "model.embed_tokens.lora_embedding_A": down,
        "model.embed_tokens.lora_embedding_B": up,
        "lm_head.modules_to_save.default.weight": head,
      },
    )
    found = self.merge(
      self.of("passthrough", ("a+" + str(self.root / "lora"),))
    )
    np.testing.assert_allclose(
      found["model.embed_tokens.weight"],
      a["model.embed_tokens.weight"] + 2 * (up @ down).T,
      rtol=1e-5,
      atol=1e-5,
    )
    np.testing.assert_array_equal(found["lm_head.weight"], head)

  def test_merged_with_its_base(self):
    a = self.model("a")
    down, up = self._factors()
    place = "model.layers.0.self_attn.q_proj"
    self._adapter(
      "lora", {f"{place}.lora_A.weight": down, f"{place}.lora_B.weight": up}
    )
    recipe = self.of(
      "task_arithmetic", ("a+" + str(self.root / "lora"),), "a", weight=0.25
    )
    found = self.merge(recipe)
    np.testing.assert_allclose(
      found[f"{place}.weight"],
      a[f"{place}.weight"] + 0.25 * 2 * (up @ down),
      rtol=1e-5,
      atol=1e-5,
    )
    # The adapter's own tensors have checksums.
    record = json.loads((self.root / "out/jaxmerge.json").read_text())
    file = self.root / "lora/adapter_model.safetensors"
    self.assertLen(record["inputs"][str(file)], 2)
    self.assertEqual(recipes.verify(self.root / "out"), [])
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    self.assertLen(recipes.verify(self.root / "out"), 1)

  @parameterized.parameters(
    ({"peft_type": "IA3"}, {}, "of the type IA3"),
    ({"use_dora": True}, {}, "DoRA"),
    ({}, {"x.lora_A.weight": np.ones((2, 4))}, "'x' has the factors"),
    (
      {},
      {
        "x.lora_A.weight": np.ones((2, 4)),
        "x.lora_B.weight": np.ones((4, 2)),
      },
      "'x.weight', which the network has not",
    ),
    (
      {},
      {
        "model.norm.lora_A.weight": np.ones((2, 4)),
        "model.norm.lora_B.weight": np.ones((4, 2)),
      },
      r"of shape \(4, 4\), which is \(4,\)",
    ),
    (
      {},
      {
        "model.norm.lora_A.weight": np.ones((2, 4)),
        "model.norm.lora_B.weight": np.ones((4, 3)),
      },
      "no LoRA of a linear layer",
    ),
    ({}, {"model.norm.weight": np.ones(5)}, "replaces .*has not"),
  )
  def test_what_does_not_fit(self, config, tensors, message):
    self.model("a")
    self._adapter("lora", tensors or {"x": np.ones(2)}, **config)
    with self.assertRaisesRegex(checkpoints.CheckpointError, message):
      self.merge(self.of("passthrough", ("a+" + str(self.root / "lora"),)))
    self.assert_nothing_left("a", "lora")


class PartsTest(parameterized.TestCase):
  @parameterized.parameters(
    ([], 10, [()]),
    ([5, 5, 5], 10, [(0, 1), (2,)]),
    ([5, 50, 5], 10, [(0,), (1,), (2,)]),
    ([50, 1, 1], 10, [(0,), (1, 2)]),
    ([0, 10, 0, 1], 10, [(0, 1, 2), (3,)]),
    ([1, 2, 3], 6, [(0, 1, 2)]),
  )
  def test_division(self, sizes, most, wanted):
    found = _shards.divide(sizes, most)
    self.assertEqual([shard.tensors for shard in found], wanted)
    names = [shard.name for shard in found]
    count = len(wanted)
    self.assertEqual(
      names,
      ["model.safetensors"]
      if count == 1
      else [
        f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)
      ],
    )

  @parameterized.parameters(
    (0, 4096), (1, 4096), (4096, 4096), (4097, 8192), (10**6, 2**20)
  )
  def test_padded(self, size, wanted):
    self.assertEqual(_blocks.padded(size), wanted)

  def test_buffers_are_aligned_and_used_again(self):
    pool = _blocks.Pool()
    first = pool.take(100, np.dtype(np.float32))
    other = pool.take(100, np.dtype(np.float32))
    self.assertFalse(np.shares_memory(first, other))
    for one in (first, other):
      self.assertEqual(one.ctypes.data % 64, 0)
      self.assertEqual((one.size, one.dtype), (100, np.float32))
    pool.give(first)
    self.assertTrue(
      np.shares_memory(pool.take(200, np.dtype(np.float16)), first)
    )
    self.assertFalse(
      np.shares_memory(pool.take(100, np.dtype(np.float32)), first)
    )


if __name__ == "__main__":
  absltest.main()
