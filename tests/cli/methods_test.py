"""Tests of `jaxmerge methods`."""

from __future__ import annotations

import json

from absl.testing import absltest

from jaxmerge import recipes
from tests.cli import _command


class MethodsTest(absltest.TestCase):
  def test_all(self):
    run = _command.run("methods")
    self.assertEqual((run.status, run.err), (0, ""))
    lines = run.out.splitlines()
    self.assertEqual(
      [line.split()[0] for line in lines[1:]], sorted(recipes.methods())
    )
    found = json.loads(_command.run("methods", "--json").out)
    self.assertEqual([one["name"] for one in found], list(recipes.methods()))

  def test_one(self):
    run = _command.run("methods", "slerp")
    self.assertEqual((run.status, run.err), (0, ""))
    self.assertRegex(run.out, r"slerp: .*\n.*models: 2\n")
    self.assertRegex(run.out, r"t +the merge +required")
    (found,) = json.loads(_command.run("methods", "ties", "--json").out)
    self.assertEqual(found["base"], "needed")
    self.assertEqual(found["models"], "1 or more")
    self.assertEqual(found["of_models"], {"weight": "required", "density": 1.0})
    self.assertEqual(found["parameters"]["lambda"], 1.0)

  def test_unknown(self):
    run = _command.run("methods", "tis")
    self.assertEqual((run.status, run.out), (2, ""))
    self.assertIn("no method 'tis'. Did you mean ties?", run.err)
    self.assertEqual(_command.run("methods", "a", "b").status, 2)


if __name__ == "__main__":
  absltest.main()
