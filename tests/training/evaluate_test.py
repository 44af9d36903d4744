"""Tests of evaluation."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import training


def _metric(params, batch):
  value = params["w"] * batch["x"]
  return {"one": value, "many": jnp.stack([value, -value], axis=1)}


class EvaluateTest(parameterized.TestCase):
  @parameterized.product(
    devices=(1, 2, 4), examples=(1, 10, 17), batch_size=(1, 4, 1000)
  )
  def test_mean(self, devices, examples, batch_size):
    x = np.random.default_rng(0).normal(size=examples).astype(np.float32)
    means = training.evaluate(
      _metric,
      {"w": jnp.float32(3)},
      {"x": x},
      batch_size=batch_size,
      devices=devices,
    )
    want = 3 * np.float64(x).mean()
    np.testing.assert_allclose(means["one"], want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
      means["many"], [want, -want], rtol=1e-5, atol=1e-6
    )

  def test_seeds_and_rows(self):
    means = training.evaluate(
      _metric,
      {"w": jnp.array([1.0, 2.0])},
      {"x": np.arange(10, dtype=np.float32)},
      indices=[8, 9],
      seed_axis=True,
      devices=2,
    )
    np.testing.assert_allclose(means["one"], [8.5, 17.0])

  def test_padding_may_be_infinite(self):
    """A padded example's value is left out, not multiplied by zero."""
    data = {"x": np.array([0, 1, 1], np.float32)}
    means = training.evaluate(
      lambda params, batch: params / batch["x"],
      jnp.float32(1),
      data,
      indices=[1, 2, 1],
      batch_size=2,
      devices=1,
    )
    self.assertEqual(means, 1.0)

  def test_half_types_are_summed_in_float32(self):
    mean = training.evaluate(
      lambda params, batch: (params * batch["x"]).astype(jnp.float16),
      jnp.float32(100),
      {"x": np.ones(3000, np.float32)},
    )
    self.assertEqual(mean, 100.0)

  def test_index_out_of_range(self):
    with self.assertRaisesRegex(ValueError, r"must lie in \[0, 3\), got -1"):
      training.evaluate(
        _metric,
        {"w": jnp.float32(1)},
        {"x": np.zeros(3, np.float32)},
        indices=[-1, 2],
      )

  def test_nothing_to_evaluate(self):
    with self.assertRaisesRegex(ValueError, "no example"):
      training.evaluate(
        _metric, {"w": jnp.float32(1)}, {"x": np.zeros(3)}, indices=[]
      )


if __name__ == "__main__":
  absltest.main()
