"""Tests of barriers."""

from __future__ import annotations

import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import curves


class BarrierTest(parameterized.TestCase):
  def test_closed_form(self):
    """L(t) = 2 + t + 6 t (1 - t): an excess of 1.5 at 1/2, mean 3.5."""
    ts = np.linspace(0, 1, 1001)
    found = curves.barrier(2 + ts + 6 * ts * (1 - ts), ts)
    np.testing.assert_allclose(found.barrier, 1.5)
    np.testing.assert_allclose(found.t, 0.5)
    np.testing.assert_allclose(found.midpoint, 4.0)
    np.testing.assert_allclose(found.mean, 3.5, atol=1e-5)
    # d/dt = 7 - 12 t.
    np.testing.assert_allclose(found.maximum, 2 + 49 / 24, atol=1e-5)
    np.testing.assert_allclose(found.minimum, 2)

  def test_accuracy(self):
    found = curves.barrier(
      [0.9, 0.4, 0.6, 0.8], [0, 0.25, 0.5, 1], higher_is_better=True
    )
    # 0.9 - 0.1 / 4 - 0.4
    np.testing.assert_allclose(found.barrier, 0.475)
    np.testing.assert_allclose(found.t, 0.25)
    np.testing.assert_allclose(found.minimum, 0.4)
    np.testing.assert_allclose(found.mean, (0.65 + 0.5 + 2 * 0.7) / 4)

  def test_never_negative(self):
    found = curves.barrier([3.0, 1.0, 3.0], [0, 0.5, 1])
    self.assertEqual((found.barrier, found.t), (0.0, 0.0))

  def test_midpoint_off_the_grid(self):
    found = curves.barrier([0.0, 4.0, 10.0, 10.0], [0, 0.2, 0.8, 1])
    np.testing.assert_allclose(found.midpoint, 7.0)

  def test_seeds(self):
    values = np.random.default_rng(0).normal(size=(2, 3, 5))
    ts = [0, 0.1, 0.5, 0.6, 1]
    found = curves.barrier(values, ts)
    for i in range(2):
      for j in range(3):
        one = curves.barrier(values[i, j], ts)
        for many, single in zip(found, one, strict=True):
          self.assertEqual(many.shape, (2, 3))
          self.assertEqual(many[i, j], single)

  def test_non_finite(self):
    found = curves.barrier(
      [[0, np.nan, 0], [0, np.inf, 0], [0, 1, 0]], [0, 0.5, 1]
    )
    np.testing.assert_array_equal(found.barrier, [np.nan, np.inf, 1])
    np.testing.assert_array_equal(found.midpoint, [np.nan, np.inf, 1])
    np.testing.assert_array_equal(found.t, [np.nan, 0.5, 0.5])

  @parameterized.parameters(
    ([1, 2], [0.1, 1], "both ends included"),
    ([1, 2], [0, 0.9], "both ends included"),
    ([1], [0], "both ends included"),
    ([1, 2, 3], [0, 0.5, 0.5, 1], "must ascend"),
    ([[1, 2]] * 3, [0, 0.5, 1], "the grid has 3 points"),
    (1.0, [0, 1], "the grid has 2 points"),
  )
  def test_errors(self, values, grid, message):
    with self.assertRaisesRegex(ValueError, message):
      curves.barrier(values, grid)


if __name__ == "__main__":
  absltest.main()
