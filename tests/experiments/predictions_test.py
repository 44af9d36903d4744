"""Tests of predictions on texts that lie in buckets of lengths."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from experiments import _predictions
from tests.experiments import _magmax


class PredictionsTest(_magmax.Folders):
  def test_one_program_a_bucket(self):
    back = self.build().backbone
    programs = _predictions._compiled(back.logits_fn)
    before = programs._cache_size()
    rows = np.arange(0, 40, 3)
    found = _predictions.predictions(
      back.logits_fn, back.params, back.test, batch_size=7
    )
    self.assertLen(back.test.buckets, 2)
    self.assertEqual(programs._cache_size() - before, 2)
    part = _predictions.predictions(
      back.logits_fn, back.params, back.test, rows, batch_size=7
    )
    np.testing.assert_array_equal(part, found[rows])
    self.assertEqual(programs._cache_size() - before, 2)
    # Each text on its own.
    alone = jax.jit(back.logits_fn)
    for inputs, places in back.test.buckets:
      for ids, place in zip(inputs, places, strict=True):
        logits = alone(back.params, jnp.asarray(ids[None]))
        self.assertEqual(int(logits.argmax()), found[place])
    accuracy = _predictions.accuracy(back.logits_fn, back.params, back.test)
    self.assertAlmostEqual(accuracy, (found == back.test.labels).mean())

  def test_accuracy_of_tasks(self):
    back = self.build().backbone
    tasks = [np.array([1, 5, 9]), np.array([0, 2])]
    found = _predictions.predictions(back.logits_fn, back.params, back.test)
    hits = found == back.test.labels
    np.testing.assert_allclose(
      _predictions.task_accuracies(
        back.logits_fn, back.params, back.test, tasks
      ),
      [hits[task].mean() for task in tasks],
    )


if __name__ == "__main__":
  absltest.main()
