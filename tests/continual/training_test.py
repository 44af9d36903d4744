"""Tests of how a task's training is planned, and of examples of the host."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import continual
from jaxmerge.continual import _training, strategies, streams
from tests.continual import _problems

Training = continual.Training


class ScheduleTest(parameterized.TestCase):
  @parameterized.parameters((0.0, None), (0.1, None), (0.25, 0.02))
  def test_cosine_after_a_warmup(self, warmup, final):
    settings = Training(
      0.2, final, schedule="cosine", warmup=warmup, optimizer="adamw"
    )
    rate = _training.optimizer(settings, 4, 10).learning_rate
    rise, end = round(40 * warmup), final or 0.0
    for step in range(41):
      if step < rise:
        wanted = 0.2 * step / rise
      else:
        angle = np.pi * (step - rise) / (40 - rise)
        wanted = end + (0.2 - end) * (1 + np.cos(angle)) / 2
      np.testing.assert_allclose(float(rate(step)), wanted, atol=1e-7)

  def test_cosine_over_iterations(self):
    settings = Training(0.2, schedule="cosine", iterations=7, batch_size=4)
    plan = _training.plan(settings, np.zeros((1, 6), np.int32))
    self.assertEqual((plan.epochs, plan.rows.shape), (1, (1, 28)))
    np.testing.assert_allclose(
      float(plan.optimizer.learning_rate(7)), 0, atol=1e-8
    )
    self.assertGreater(float(plan.optimizer.learning_rate(6)), 0)

  @parameterized.parameters((1, 0.6), (4, 0.9))
  def test_a_warmup_as_long_as_a_short_run(self, steps, warmup):
    settings = Training(0.2, schedule="cosine", warmup=warmup)
    rate = _training.optimizer(settings, 1, steps).learning_rate
    rates = [float(rate(step)) for step in range(steps)]
    self.assertTrue(np.isfinite(rates).all())
    self.assertLessEqual(max(rates), 0.2 + 1e-6)

  def test_adamw_of_clipped_gradients(self):
    settings = Training(
      0.1, optimizer="adamw", weight_decay=0.3, clip=0.5, batch_size=1
    )
    step = _training.optimizer(settings, 1, 100).transformation
    params = {"w": jnp.array([1.0, -2.0])}
    state = step.init(params)
    w, m, v = np.array([1.0, -2.0]), np.zeros(2), np.zeros(2)
    for t in range(1, 4):
      gradient = np.array([3.0, 4.0]) * t
      updates, state = step.update(
        {"w": jnp.asarray(gradient, jnp.float32)}, state, params
      )
      params = jax.tree.map(jnp.add, params, updates)
      clipped = gradient * 0.5 / np.linalg.norm(gradient)
      m, v = 0.9 * m + 0.1 * clipped, 0.999 * v + 0.001 * clipped**2
      unbiased = m / (1 - 0.9**t), v / (1 - 0.999**t)
      w = w - 0.1 * (unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8) + 0.3 * w)
      np.testing.assert_allclose(params["w"], w, rtol=1e-5)

  @parameterized.parameters(
    ({"schedule": "step"}, "unknown schedule 'step'"),
    ({"warmup": 1.0, "schedule": "cosine"}, r"in \[0, 1\), got 1.0"),
    ({"warmup": 0.1}, "warmup needs schedule='cosine'"),
    ({"momentum": 1.0}, "momentum must lie"),
    ({"weight_decay": -1.0}, "weight_decay must not be negative"),
  )
  def test_bad_settings(self, fields, message):
    with self.assertRaisesRegex(ValueError, f"here: .*{message}"):
      continual.check_training(Training(**fields), "here")


class SamplesTest(absltest.TestCase):
  def test_a_sorted_set_gives_samples_of_every_class(self):
    mixed = _problems.source(20, 0)
    order = np.argsort(mixed.labels, kind="stable")
    sorted_set = mixed._replace(
      inputs=mixed.inputs[order], labels=mixed.labels[order]
    )
    for source, first in ((mixed, True), (sorted_set, False)):
      stream = streams.class_incremental(
        source, _problems.source(4, 1), num_tasks=2
      )
      problem = _problems.problem(capacity=0, stream=stream)
      rows = stream.tasks[1].train
      (batch,) = problem.batches(1, 10)
      self.assertLen(batch["label"], 10)
      self.assertLen(np.unique(batch["label"]), 3)
      same = (batch["input"] == source.inputs[rows[:10]]).all()
      self.assertEqual(same, first)
      # All of them, in order.
      np.testing.assert_array_equal(
        np.concatenate([b["label"] for b in problem.batches(1)]),
        source.labels[rows],
      )
      self.assertLen(problem.batches(1, 1000)[0]["label"], len(rows))


class HostTest(absltest.TestCase):
  def _problem(self, **options):
    return _problems.problem(capacity=0, seeds=1, **options)

  def test_inputs_as_they_are_change_nothing(self):
    plain = self._problem()
    pool = plain.stream.train["input"]
    host = self._problem(augment_on_host=lambda rows, draws: pool[rows])
    self.assertNotIn("input", host.train.value)
    strategy = strategies.get("naive", training=_problems.STEPS)
    chex.assert_trees_all_close(
      _problems.observe(strategy, host).current,
      _problems.observe(strategy, plain).current,
      rtol=1e-5,
    )

  def test_every_epoch_and_task_has_random_numbers_of_its_own(self):
    pool = self._problem().stream.train["input"]
    seen = []

    def augment(rows, draws):
      seen.append((tuple(rows[:2].tolist()), draws.random()))
      return pool[rows]

    strategy = strategies.get("naive", training=_problems.STEPS)
    for _ in range(2):
      _problems.observe(strategy, self._problem(augment_on_host=augment), 2)
    # Three epochs of two tasks, the same in both runs.
    self.assertEqual(seen[:6], seen[6:])
    self.assertLen({number for _, number in seen[:6]}, 6)

  def test_not_augmented_where_the_settings_say_so(self):
    host = self._problem(
      augment_on_host=lambda rows, draws: self.fail("was augmented")
    )
    plain = self._problem()
    strategy = strategies.get(
      "naive", training=_problems.STEPS._replace(augment=False)
    )
    chex.assert_trees_all_close(
      _problems.observe(strategy, host, 1).current,
      _problems.observe(strategy, plain, 1).current,
      rtol=1e-5,
    )

  def test_curves(self):
    host = _problems.problem(seeds=1, augment_on_host=lambda rows, draws: rows)
    with self.assertRaisesRegex(ValueError, "mpf fits a curve on stored"):
      strategies.get("mpf").init(host)

  def test_several_seeds(self):
    with self.assertRaisesRegex(ValueError, "for one seed, got 2 keys"):
      _problems.problem(capacity=0, augment_on_host=lambda rows, draws: rows)

  def test_accuracies(self):
    host = self._problem(augment_on_host=lambda rows, draws: rows)
    with self.assertRaisesRegex(ValueError, "made on the host"):
      continual.accuracies(host, host.params)


if __name__ == "__main__":
  absltest.main()
