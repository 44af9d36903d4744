"""Tests of the learning-rate schedule."""

from __future__ import annotations

import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import training


class ScheduleTest(parameterized.TestCase):
  @parameterized.parameters((0.07, 7e-5, 10, 469), (0.1, 0.0, 4, 5))
  def test_per_step(self, initial, final, epochs, steps):
    schedule = training.constant_linear_flat(initial, final, epochs, steps)
    total = epochs * steps
    at = np.arange(total + 3)
    want = np.interp(
      at, [round(0.5 * total), round(0.9 * total)], [initial, final]
    )
    got = np.array([schedule(step) for step in at])
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-8)

  def test_per_epoch_is_that_of_the_published_code(self):
    schedule = training.constant_linear_flat(0.07, 7e-4, 10, 7, per_epoch=True)
    want = [0.07] * 6 + [0.052675, 0.03535, 0.018025, 0.0007]
    got = [
      [float(schedule(7 * epoch + i)) for i in range(7)] for epoch in range(10)
    ]
    np.testing.assert_allclose(
      got, np.repeat(want, 7).reshape(10, 7), rtol=1e-5
    )

  @parameterized.parameters(
    ({"initial": 0.0}, "positive"),
    ({"final": -1.0}, "positive"),
    ({"epochs": 0}, "at least 1"),
    ({"start": 0.9, "stop": 0.5}, "start < stop"),
  )
  def test_errors(self, change, message):
    arguments = {
      "initial": 0.1,
      "final": 0.01,
      "epochs": 2,
      "steps_per_epoch": 3,
    } | change
    with self.assertRaisesRegex(ValueError, message):
      training.constant_linear_flat(**arguments)


if __name__ == "__main__":
  absltest.main()
