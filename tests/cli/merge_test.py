"""Tests of `jaxmerge merge` and `jaxmerge validate`."""

from __future__ import annotations

import json
import os
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge.cli import _merge, _show
from jaxmerge.recipes import _folder
from tests.cli import _command
from tests.recipes import _merging, _on_disk


class MergeTest(_merging.MergingTest):
  def setUp(self):
    super().setUp()
    # The cache of compiled programs is that of the tests.
    self.enter_context(mock.patch.object(_merge, "keep_programs", lambda: None))
    self.a, self.b = self.model("a"), self.model("b")
    self.config = self.recipe("""\
      merge_method: linear
      models: [{model: $a}, {model: $b}]
      parameters: {weight: 1}
    """)
    self.out = self.root / "out"

  def _merge(self, *args):
    return _command.run("merge", self.config, self.out, *args)

  def test_merge(self):
    run = self._merge()
    self.assertEqual(run.status, 0, run.err)
    self.assertRegex(run.out, r"out: 7 tensors, [0-9.]+ k?B in .* s")
    self.assertEqual(run.err, "")
    for name, array in _on_disk.read(self.out).items():
      np.testing.assert_allclose(
        array, (self.a[name] + self.b[name]) / 2, rtol=1e-6, atol=1e-7
      )

  def test_json(self):
    run = self._merge("--json", "--max-shard-size", "200")
    self.assertEqual(run.status, 0, run.err)
    found = json.loads(run.out)
    self.assertEqual(found["out"], str(self.out))
    self.assertEqual(found["tensors"], 7)
    self.assertEqual(
      found["bytes_written"], sum(one.nbytes for one in self.a.values())
    )
    self.assertEqual(found["resumed"], 0)
    self.assertGreater(len(list(self.out.glob("*.safetensors"))), 1)

  def test_dry_run(self):
    run = _command.run("merge", self.config, "--dry-run")
    self.assertEqual(run.status, 0, run.err)
    for part in ("model.norm.weight", "6x4", "float32", "linear", "7 tensors"):
      self.assertIn(part, run.out)
    run = self._merge("--dry-run", "--json", "--max-shard-size", "0.2kB")
    found = json.loads(run.out)
    self.assertLen(found["tensors"], 7)
    self.assertGreater(len(found["files"]), 1)
    self.assertGreater(found["bytes_to_read"], 0)
    self.assertFalse(self.out.exists())

  def test_overwrite(self):
    self.out.mkdir()
    run = self._merge()
    self.assertEqual(run.status, 2)
    self.assertRegex(run.err, "error: .*out exists.*--overwrite")
    self.assertNotIn("Traceback", run.err)
    self.assertEqual(self._merge("--overwrite").status, 0)

  def test_verify(self):
    self._merge()
    run = _command.run("merge", "--verify", self.out)
    self.assertEqual((run.status, run.err), (0, ""))
    self.assertIn("as it was merged", run.out)
    file = self.root / "a/model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    run = _command.run("merge", "--verify", self.out)
    self.assertEqual(run.status, 1)
    self.assertRegex(run.err, "a/model.safetensors .*cut off")
    run = _command.run("merge", "--verify", "--json", self.out)
    self.assertEqual(run.status, 1)
    self.assertLen(json.loads(run.out)["problems"], 1)
    run = _command.run("merge", "--verify", self.root / "a")
    self.assertEqual(run.status, 2)
    self.assertIn("holds no jaxmerge.json", run.err)

  @parameterized.parameters(
    ("merge_method: linear\nmodls: 1", "line 2 .*no key 'modls'"),
    ("a: [", "no YAML"),
    ("merge_method: x\nmodels: [{model: a}]", "no method 'x'"),
  )
  def test_bad_recipes(self, text, message):
    self.config.write_text(text)
    for args in (
      ("merge", self.config, self.out),
      ("merge", self.config, "--dry-run"),
      ("validate", self.config),
    ):
      run = _command.run(*args)
      self.assertEqual((run.status, run.out), (2, ""))
      self.assertRegex(run.err, message)
      self.assertStartsWith(run.err, "error: ")
    self.assertFalse(self.out.exists())

  def test_bad_arguments(self):
    for args in (
      ("merge",),
      ("merge", self.config),
      ("merge", self.config, self.out, "--unknown"),
      ("merge", self.config, self.out, "more"),
      ("merge", self.root / "absent.yml", self.out),
      ("merge", self.config, self.out, "--max-shard-size", "much"),
      ("merge", self.config, self.out, "--max-shard-size", "0"),
      ("merge", self.config, self.out, "--max-shard-size", "-1"),
      ("validate",),
      ("validate", self.root / "absent.yml"),
      ("validate", self.root),
    ):
      run = _command.run(*args)
      self.assertEqual((run.status, run.out), (2, ""), args)
      self.assertTrue(run.err)
      self.assertNotIn("Traceback", run.err)
    self.assertFalse(self.out.exists())

  def test_a_damaged_model(self):
    (self.root / "a/model.safetensors").write_bytes(b"12")
    run = self._merge()
    self.assertEqual(run.status, 2)
    self.assertRegex(run.err, "error: .*a/model.safetensors is no whole")

  def test_interrupted(self):
    with mock.patch.object(
      _folder.Staging, "publish", side_effect=KeyboardInterrupt
    ):
      run = self._merge()
    self.assertEqual(run.status, 1)
    self.assertIn("Interrupted. Start it again to go on.", run.err)
    run = self._merge("--json")
    self.assertEqual(json.loads(run.out)["resumed"], 1)
    self.assertTrue(self.out.exists())

  def test_validate(self):
    run = _command.run("validate", self.config)
    self.assertEqual((run.status, run.err), (0, ""))
    self.assertIn("a recipe for linear", run.out)
    found = json.loads(_command.run("validate", self.config, "--json").out)
    self.assertEqual(found["merge_method"], "linear")
    self.assertEqual(found["parameters"], {"weight": 1})
    # No model is opened.
    (self.root / "a/model.safetensors").unlink()
    self.assertEqual(_command.run("validate", self.config).status, 0)

  @parameterized.parameters(
    ("1", 1),
    ("1000", 1000),
    ("5GB", 5 * 10**9),
    ("5 gb", 5 * 10**9),
    ("0.5kB", 500),
    ("2M", 2 * 10**6),
    ("1.5T", 15 * 10**11),
    ("5B", 5),
  )
  def test_sizes(self, text, wanted):
    self.assertEqual(_show.parse_size(text), wanted)


if __name__ == "__main__":
  absltest.main()
