"""Tests of `jaxmerge convert`."""

from __future__ import annotations

import json

import numpy as np
from absl.testing import absltest

from tests.cli import _command
from tests.recipes import _on_disk


class ConvertTest(_on_disk.OnDiskTest):
  def _run(self, source, out, *options):
    return _command.run(
      "convert", self.root / source, self.root / out, *options
    )

  def test_there_and_back(self):
    tensors = _on_disk.llama(dtype=_on_disk.BFLOAT16)
    self.write("a", tensors, _on_disk.CONFIG)
    found = self._run("a", "b", "--quiet")
    self.assertEqual((found.status, found.err), (0, ""))
    self.assertRegex(found.out, r"b: orbax, 16 tensors, 1\.62 kB\n")
    found = self._run("b", "c", "--json", "--max-shard-size", "500")
    self.assertEqual(
      json.loads(found.out),
      {
        "out": str(self.root / "c"),
        "layout": "safetensors",
        "tensors": 16,
        "bytes_written": sum(one.nbytes for one in tensors.values()),
      },
    )
    self.assertTrue((self.root / "c/model.safetensors.index.json").exists())
    back = _on_disk.read(self.root / "c")
    self.assertCountEqual(back, tensors)
    for name, array in tensors.items():
      self.assertEqual(back[name].tobytes(), array.tobytes())
    found = _command.run("diff", self.root / "a", self.root / "c")
    self.assertEqual(
      (found.status, found.out), (0, "Equal: 16 of 16 tensors.\n")
    )

  def test_bad_input(self):
    self.write("a", {"a": np.ones(2), "a.b": np.ones(2)})
    for args, message in (
      (("a", "b"), "^error: .*'a' is a tensor and the beginning of 'a.b'"),
      (("a", "a"), "^error: .*a exists"),
      (("a", "b", "--to", "flax"), "Invalid value for '--to'"),
      (("a", "b", "--to", "safetensors"), "^error: .*is safetensors already"),
      (("a", "b", "--max-shard-size", "1 mile"), "is no size"),
    ):
      found = self._run(*args)
      self.assertEqual(found.status, 2)
      self.assertRegex(found.err, message)
    self.assert_nothing_left("a")


if __name__ == "__main__":
  absltest.main()
