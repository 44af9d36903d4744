"""Tests of the command that runs the benchmarks of alignment."""

from __future__ import annotations

import importlib
import sys

from absl import app
from absl.testing import absltest

from benchmarks import alignment


class AlignmentTest(absltest.TestCase):
  def test_commands(self):
    got = alignment.commands(["transport", "matching"], smoke=True)
    self.assertEqual(
      got,
      [
        [sys.executable, "-m", "benchmarks.alignment_transport", "--smoke"],
        [sys.executable, "-m", "benchmarks.alignment_matching", "--smoke"],
      ],
    )

  def test_modules_are_there(self):
    for name in alignment.SECTIONS.values():
      self.assertIsNotNone(importlib.util.find_spec(name))

  def test_unknown(self):
    with self.assertRaisesRegex(app.UsageError, "unknown sections speed"):
      alignment.commands(["speed"], smoke=False)


if __name__ == "__main__":
  absltest.main()
