"""Tests of merges that are interrupted, and go on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import recipes
from jaxmerge.recipes import _folder
from tests.recipes import _merging

# The command, which waits after each file: however busy the machine is, the
# first one is noticed before the last is written.
_SLOWLY = """
import signal
import time
from jaxmerge import cli
from jaxmerge.recipes import _folder

finished = _folder.Staging.finished

def slowly(*args):
  finished(*args)
  time.sleep(0.5)

_folder.Staging.finished = slowly
# A shell starts what is in its background with interrupts ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
cli.main()
"""


class ResumeTest(_merging.MergingTest):
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
    a, _, recipe = self.pair()
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
        _merging.file_bytes(self.root / "out"),
        _merging.file_bytes(self.root / "whole/out"),
      )
      self.assertEqual(recipes.verify(self.root / "out"), [])
      shutil.rmtree(self.root / "out")
    self.assert_nothing_left("a", "b", "whole")

  @parameterized.parameters("recipe", "input", "shards", "damage", "size")
  def test_beginning_anew(self, what):
    _, _, recipe = self.pair()
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
    self.assertEqual(
      _merging.file_bytes(self.root / "out"),
      _merging.file_bytes(self.root / "whole/out"),
    )

  @parameterized.parameters(signal.SIGKILL, signal.SIGINT)
  def test_killed(self, number):
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
      *(sys.executable, "-c", _SLOWLY),
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
    self.assertEqual(
      _merging.file_bytes(self.root / "out"),
      _merging.file_bytes(self.root / "whole/out"),
    )
    self.assert_nothing_left("a", "b", "out", "whole", "recipe.yml")


if __name__ == "__main__":
  absltest.main()
