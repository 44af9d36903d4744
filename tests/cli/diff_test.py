"""Tests of `jaxmerge diff`."""

from __future__ import annotations

import json

import numpy as np
from absl.testing import absltest

from tests.cli import _command
from tests.recipes import _on_disk


class DiffTest(_on_disk.OnDiskTest):
  def setUp(self):
    super().setUp()
    self.a = {
      "w": np.asarray([3.0, 4.0], np.float32),
      "same": np.ones(3, np.float32),
    }
    self.b = {**self.a, "w": np.asarray([3.0, 1.0], np.float32)}
    self.base = {"w": np.asarray([2.0, 2.0], np.float32)}

  def _run(self, *options, **others):
    for name, tensors in (("a", self.a), ("b", self.b), ("base", self.base)):
      self.write(name, tensors)
    return _command.run("diff", self.root / "a", self.root / "b", *options)

  def test_text(self):
    found = self._run()
    self.assertEqual((found.status, found.err), (0, ""))
    lines = found.out.splitlines()
    cosine = f"{13 / np.sqrt(250):.6g}"
    self.assertEqual(lines[1].split(), ["w", "50.00%", "3", "0.6", cosine, "3"])
    self.assertEqual(lines[2].split()[:3], ["total", "20.00%", "3"])
    self.assertEqual(lines[3], "Equal: 1 of 2 tensors.")
    found = self._run("--all")
    self.assertRegex(found.out, r"same +0\.00% +0 +0 +1 +0")
    self.b = self.a
    self.assertEqual(self._run().out, "Equal: 2 of 2 tensors.\n")

  def test_base(self):
    found = self._run("--base", self.root / "base")
    self.assertEqual(found.status, 0)
    self.assertIn("not in the base, or in another shape: same", found.out)
    row = found.out.splitlines()[2].split()
    self.assertEqual(row[0], "w")
    # (1, 2) and (1, -1)
    self.assertEqual(
      row[-4:], ["2.236", "1.414", f"{-1 / np.sqrt(10):.6g}", "50.00%"]
    )
    found = self._run("--base", self.root / "base", "--json", "--all")
    found = json.loads(found.out)
    rows = {row["name"]: row for row in found["tensors"]}
    self.assertNotIn("task", rows["same"])
    task = rows["w"]["task"]
    self.assertEqual(
      (task["kept"], task["shared"], task["conflicts"], task["conflict_rate"]),
      (2, 2, 1, 0.5),
    )
    self.assertEqual(found["total"]["task"]["conflicts"], 1)

  def test_structure(self):
    self.a |= {"x": np.ones(2), "y": np.ones((2, 3)), "z": np.ones(2)}
    self.b |= {"y": np.ones(6), "z": np.ones(2, np.int8), "v": np.ones(())}
    found = self._run()
    self.assertEqual(found.status, 1)
    self.assertIn(f"only in {self.root / 'a'}: x\n", found.out)
    self.assertIn(f"only in {self.root / 'b'}: v\n", found.out)
    self.assertIn("shapes of y: 2x3 and 6\n", found.out)
    self.assertIn("dtypes of z: float64 and int8\n", found.out)
    found = self._run("--json")
    self.assertEqual(found.status, 1)
    found = json.loads(found.out)
    self.assertFalse(found["same_structure"])
    self.assertEqual((found["only_a"], found["only_b"]), (["x"], ["v"]))
    self.assertEqual(found["shapes"], {"y": [[2, 3], [6]]})
    self.assertEqual(found["dtypes"], {"z": ["float64", "int8"]})
    self.assertEqual([row["name"] for row in found["tensors"]], ["w"])

  def test_json_has_no_numbers_that_json_has_not(self):
    self.a["w"] = np.zeros(2, np.float32)
    self.b["w"] = np.asarray([np.nan, 1], np.float32)

    def refuse(word):
      raise ValueError(word)

    found = self._run("--json")
    (row,) = json.loads(found.out, parse_constant=refuse)["tensors"]
    self.assertIsNone(row["norm"])
    self.assertEqual(row["not_finite"], 1)
    self.assertRegex(self._run().out, r"w +100\.00% +- +- +- +-")

  def test_bad_input(self):
    self.write("a", self.a)
    found = _command.run("diff", self.root / "a")
    self.assertEqual(found.status, 2)
    self.assertIn("Missing argument 'B'", found.err)
    found = _command.run("diff", self.root / "a", self.root / "b")
    self.assertEqual(found.status, 2)
    self.assertRegex(found.err, "^error: .*b is no folder")


if __name__ == "__main__":
  absltest.main()
