"""Curves between networks with batch normalisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest

from jaxmerge import curves, models

_MODEL = models.CNN(widths=(4, 4), num_classes=2)


def _data(examples=64):
  """Bright against dark images, on a background that varies."""
  generator = np.random.default_rng(0)
  y = generator.integers(0, 2, examples)
  x = generator.normal(size=(examples, 4, 4, 1)) + 2 * y[:, None, None, None]
  return {"x": x.astype(np.float32), "y": y.astype(np.int32)}


def _loss(params, batch, key):
  """Batch statistics, as in training; their updates are thrown away."""
  del key
  logits, _ = _MODEL.apply(
    {"params": params}, batch["x"], train=True, mutable="batch_stats"
  )
  return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


class BatchNormTest(absltest.TestCase):
  def test_statistics_are_not_trained(self):
    variables = [
      _MODEL.init(jax.random.key(seed), jnp.zeros((1, 4, 4, 1)))
      for seed in range(2)
    ]
    options = {"key": jax.random.key(2), "batch_size": 16, "devices": 1}
    message = "'batch_stats/.*is a running statistic.*reset_batch_stats"
    with self.assertRaisesRegex(ValueError, message):
      curves.fit_curve(_loss, *variables, _data(), **options)
    with self.assertRaisesRegex(ValueError, message):
      curves.fit_simplex(_loss, variables, _data(), **options)
    with self.assertRaisesRegex(ValueError, "carry no state"):
      curves.fit_curve(
        _loss,
        variables[0]["params"],
        variables[1]["params"],
        _data(),
        state=variables[0]["batch_stats"],
        **options,
      )
    line = curves.BezierCurve.through(*variables)
    weights = curves.BezierCurve.through(*(v["params"] for v in variables))
    np.testing.assert_array_equal(
      curves.weight_norms(line, 3)[1], curves.weight_norms(weights, 3)[1]
    )

  def test_fit_curve_on_params_only(self):
    init = jax.jit(_MODEL.init)
    start, end = (
      init(jax.random.key(seed), jnp.zeros((1, 4, 4, 1)))["params"]
      for seed in range(2)
    )
    data = _data()
    result = curves.fit_curve(
      _loss,
      start,
      end,
      data,
      key=jax.random.key(2),
      epochs=15,
      batch_size=16,
      learning_rate=0.1,
      devices=1,
    )
    loss = jax.jit(lambda params: _loss(params, data, None).mean())
    line = curves.BezierCurve.through(start, end)
    self.assertLess(loss(result.curve(0.5)), 0.5 * loss(line(0.5)))
    losses = [record["loss"][0] for record in result.history]
    self.assertLess(losses[-1], losses[0])
    # No statistics among what is trained.
    self.assertEqual(
      jax.tree.structure(result.curve(0.5)), jax.tree.structure(start)
    )


if __name__ == "__main__":
  absltest.main()
