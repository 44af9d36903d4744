"""The benchmark of fine-tuning computes the same on both sides."""

from __future__ import annotations

import importlib.util
import pathlib
import tempfile
import unittest

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest

from benchmarks import magmax
from experiments import _backbone
from tests.experiments import _magmax


class MagmaxBenchmarkTest(absltest.TestCase):
  def test_both_sides_have_one_loss(self):
    if not all(
      importlib.util.find_spec(name) for name in ("torch", "transformers")
    ):
      raise unittest.SkipTest(
        "PyTorch and transformers are not installed: pip install -e '.[bench]'"
      )
    from benchmarks import _torch_finetune

    with tempfile.TemporaryDirectory() as folder:
      root = pathlib.Path(folder)
      _magmax.write_set(root)
      _magmax.write_model(root / "model")
      config = _magmax.config(root / "model")
      back = _backbone.texts(config, str(root))
      ids, labels = back.pool.inputs[:8], back.pool.labels[:8]
      for padding in _torch_finetune.PADDING:
        steps = _torch_finetune.Steps(
          str(root / "model"),
          np.asarray(back.head),
          ids,
          labels,
          8,
          "eager",
          "foreach",
        )
        steps.run(padding)
        logits = back.logits_fn(back.params, jnp.asarray(ids))
        wanted = optax.softmax_cross_entropy_with_integer_labels(
          logits, jnp.asarray(labels)
        ).mean()
        self.assertAlmostEqual(steps.loss, float(wanted), places=4)

        def mean(params):
          return optax.softmax_cross_entropy_with_integer_labels(
            back.logits_fn(params, jnp.asarray(ids)), jnp.asarray(labels)
          ).mean()

        # The first step of AdamW is the sign of the gradient.
        grads = jax.grad(mean)(back.params)
        with jax.numpy_dtype_promotion("standard"):
          step = optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(5e-5, weight_decay=0.1)
          )
          updates, _ = step.update(grads, step.init(back.params), back.params)
        moved = optax.apply_updates(back.params, updates)
        steps.run(padding)
        self.assertAlmostEqual(steps.loss, float(mean(moved)), places=4)

  def test_report(self):
    text = magmax.report(
      {
        "times": {"jaxmerge": [1.0, 3.0], "torch, fixed": [4.0, 2.0]},
        "examples_per_second": {"jaxmerge": 20.0, "torch, fixed": 13.3},
        "mean_length": 11.0,
        "merge": {
          "5": {
            "update": 0.02,
            "copy": 0.01,
            "peak_mb": 900.0,
            "before_mb": 600.0,
          }
        },
        "evaluation": {
          "buckets": 4,
          "runs": [
            {"seconds": 9.0, "programs": 4, "accuracy": 0.5},
            {"seconds": 5.0, "programs": 4, "accuracy": 0.25},
          ],
        },
      }
    )
    self.assertIn("| torch, fixed | 13.3 | 2.00 - 4.00 | 1.50x |", text)
    self.assertIn("| 5 | 20.0 | 10.0 | 2.00x | 900 | 600 |", text)
    self.assertIn("| second | 5.0 | 4 | 4 | 25.00 |", text)


if __name__ == "__main__":
  absltest.main()
