"""`import jaxmerge` brings in nothing heavy."""

from __future__ import annotations

import subprocess
import sys

from absl.testing import absltest

_HEAVY = (
  "array_record",
  "flax",
  "matplotlib",
  "ml_collections",
  "optax",
  "orbax",
  "ott",
  "sklearn",
  "tensorflow",
  "tensorflow_datasets",
  "torch",
)


def _run(code: str) -> str:
  return subprocess.run(
    [sys.executable, "-c", code], check=True, capture_output=True, text=True
  ).stdout


class ImportTest(absltest.TestCase):
  def test_no_heavy_module(self):
    loaded = _run("import jaxmerge, sys; print(*sys.modules)").split()
    self.assertIn("jaxmerge", loaded)
    roots = {name.partition(".")[0] for name in loaded}
    self.assertEmpty(sorted(roots.intersection(_HEAVY)))

  def test_merging_alone_stays_light(self):
    loaded = _run(
      "import jaxmerge, sys\n"
      "from jaxmerge import merging, tree\n"
      "print(*sys.modules)"
    ).split()
    roots = {name.partition(".")[0] for name in loaded}
    heavy = {"tensorflow_datasets", "tensorflow", "matplotlib", "sklearn"}
    self.assertEmpty(sorted(roots & heavy))


if __name__ == "__main__":
  absltest.main()
