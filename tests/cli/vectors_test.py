"""Tests of `jaxmerge extract` and `jaxmerge apply`."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
from absl.testing import absltest, parameterized

from tests.cli import _command
from tests.recipes import _on_disk


class VectorsTest(_on_disk.OnDiskTest):
  def setUp(self):
    super().setUp()
    self.base = _on_disk.llama()
    self.tuned = _on_disk.tuned(self.base)
    self.write("base", self.base, _on_disk.CONFIG)
    self.write("tuned", self.tuned, _on_disk.CONFIG)

  def _extract(self, out, *options):
    return _command.run(
      "extract",
      self.root / "base",
      self.root / "tuned",
      self.root / out,
      *options,
    )

  def _apply(self, vector, out, *options):
    return _command.run(
      "apply", self.root / "base", self.root / vector, self.root / out, *options
    )

  def test_a_task_vector(self):
    found = self._extract("vector")
    self.assertEqual((found.status, found.err), (0, ""))
    self.assertRegex(found.out, r"vector: 15 tensors, 3\.17 kB\n")
    self.assertIn(
      "left out: model.rotary.position_ids, holds no floating-point", found.out
    )
    found = self._apply("vector", "out", "--scale", "0.5")
    self.assertRegex(found.out, r"out: 15 tensors changed, 1 copied, 3\.21 kB")
    for name, array in _on_disk.read(self.root / "out").items():
      wanted = (self.base[name] + self.tuned[name]) / 2
      np.testing.assert_allclose(array, wanted, rtol=0, atol=1e-6)

  def test_an_adapter(self):
    found = self._extract("lora", "--rank", "2")
    self.assertEqual((found.status, found.err), (0, ""))
    self.assertRegex(
      found.out, r"model\.layers\.0\.self_attn\.k_proj\.weight +4x8 +\S+ +\d+"
    )
    self.assertRegex(
      found.out, r"left out: model\.norm\.weight, norm \S+ \(has 1 axes\)"
    )
    self.assertRegex(
      found.out, r"lora: rank 2, \S+ kB, \d+\.\d+% of the squared"
    )
    self.assertIn("can be put in whole by --save-rest", found.out)
    found = self._extract("whole", "--rank", "8", "--save-rest")
    self.assertIn("saved whole: model.norm.weight", found.out)
    self.assertIn("100.00% of the squared norm", found.out)
    self.assertNotIn("--save-rest", found.out)
    found = self._apply("whole", "out", "--json")
    found = json.loads(found.out)
    self.assertLen(found["changed"], 15)
    self.assertEqual(found["copied"], ["model.rotary.position_ids"])
    for name, array in _on_disk.read(self.root / "out").items():
      np.testing.assert_allclose(array, self.tuned[name], rtol=0, atol=2e-6)

  def test_json(self):
    found = json.loads(self._extract("vector", "--json").out)
    self.assertLen(found["tensors"], 15)
    self.assertEqual(
      found["bytes_written"],
      4 * sum(one.size for one in self.base.values()) - 20,
    )
    found = json.loads(self._extract("lora", "--json", "--rank", "1").out)
    self.assertEqual(found["rank"], 1)
    self.assertLen(found["kept"], 9)
    self.assertBetween(found["share"], 0, 1)
    self.assertIn("why", found["left_out"][0])

  @parameterized.parameters(
    (("--rank", "0"), "Invalid value for '--rank'"),
    (("--save-rest",), "--save-rest is for adapters: give --rank"),
    (("--select", "("), r"^error: '\(' is no regular expression"),
    (("--select", "absent"), "^error: .*that 'absent' selects"),
    (("--dtype", "int8"), "Invalid value for '--dtype'"),
    (("--max-shard-size", "0"), "'0' is no size"),
  )
  def test_bad_options(self, options, message):
    found = self._extract("vector", *options)
    self.assertEqual(found.status, 2)
    self.assertRegex(found.err, message)
    self.assert_nothing_left("base", "tuned")

  def test_bad_input(self):
    found = self._apply("tuned", "out")
    self.assertEqual(found.status, 2)
    self.assertRegex(found.err, "^error: .*tuned holds neither")
    self._extract("vector")
    found = self._extract("vector")
    self.assertEqual(found.status, 2)
    self.assertRegex(found.err, "^error: .*vector exists")
    self.assertEqual(self._extract("vector", "--overwrite").status, 0)
    found = self._apply("vector", "base", "--overwrite")
    self.assertEqual(found.status, 2)
    self.assertRegex(found.err, "^error: .*base, which is read")
    found = self._apply("vector", "out", "--scale", "inf")
    self.assertEqual(found.status, 2)
    self.assert_nothing_left("base", "tuned", "vector")

  def test_help_imports_nothing_heavy(self):
    found = subprocess.run(
      [
        sys.executable,
        "-c",
        "import sys\n"
        "from jaxmerge.cli import _main\n"
        "assert _main.run(['--help']) == 0\n"
        "for name in ('apply', 'convert', 'diff', 'extract', 'info'):\n"
        "  assert _main.run([name, '--help']) == 0\n"
        "heavy = {'jax', 'numpy', 'orbax', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy",
      ],
      check=False,
      capture_output=True,
      text=True,
    )
    self.assertEqual(found.returncode, 0, found.stderr)


if __name__ == "__main__":
  absltest.main()
