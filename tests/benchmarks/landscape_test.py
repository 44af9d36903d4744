"""The landscape benchmark compares like with like."""

from __future__ import annotations

import importlib.util

import numpy as np
from absl.testing import absltest

from benchmarks import landscape

_HAS_TORCH = importlib.util.find_spec("torch") is not None


class LandscapeTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.images, self.labels = landscape.load(30, None)
    self.problem = landscape.Problem(self.images, self.labels, 5, 3)

  def _oracle(self, row):
    start, bend, end = landscape.draw_points()
    hidden = self.images.astype(np.float64)
    for number, layer in enumerate(zip(start, bend, end, strict=True)):
      hidden = hidden @ np.tensordot(row, np.stack(layer), 1)
      if number < 3:
        hidden = np.maximum(hidden, 0)
    top = hidden.max(axis=1)
    logs = np.log(np.exp(hidden - top[:, None]).sum(axis=1)) + top
    rows = np.arange(len(self.labels))
    hits = hidden.argmax(axis=1) == self.labels
    return (logs - hidden[rows, self.labels]).mean(), hits.mean()

  def _check(self, found, task):
    for place in range(len(self.problem.weights[task])):
      loss, accuracy = self._oracle(self.problem.weights[task][place])
      np.testing.assert_allclose(found[0][place], loss, rtol=1e-3)
      np.testing.assert_allclose(found[1][place], accuracy, atol=0.04)

  def test_weights(self):
    profile, plane = self.problem.weights.values()
    np.testing.assert_allclose(profile[2], [0.25, 0.5, 0.25])
    self.assertEqual(plane.shape, (9, 3))
    np.testing.assert_allclose(plane.sum(axis=1), 1)

  def test_jaxmerge(self):
    for task in ("profile", "plane"):
      self._check(self.problem.jaxmerge(task), task)

  @absltest.skipUnless(
    _HAS_TORCH, "PyTorch is not installed: pip install -e '.[bench]'"
  )
  def test_torch(self):
    for task in ("profile", "plane"):
      self._check(self.problem.torch(task, 13), task)

  def test_summary(self):
    found = landscape.summarize(
      {
        "jaxmerge": [1.0, 2.0, 1.0],
        "torch 1": [9.0, 9.0, 9.0],
        "torch 2": [4.0, 4.0, 6.0],
      }
    )
    self.assertEqual(found["best"], "torch 2")
    self.assertEqual(found["ratio"], 4.0)
    self.assertEqual(found["ratio_range"], [2.0, 6.0])


if __name__ == "__main__":
  absltest.main()
