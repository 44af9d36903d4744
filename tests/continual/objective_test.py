"""Tests of the losses of strategies, against steps by hand."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from scipy import special

from jaxmerge.continual import _objective, strategies, streams
from tests.continual import _problems
from tests.continual._problems import BRIEF, STEPS


class ObjectiveTest(parameterized.TestCase):
  def test_cross_entropy_leaves_masked_classes_alone(self):
    draws = np.random.default_rng(0)
    logits = jnp.asarray(draws.normal(size=(5, 4)), jnp.float32)
    labels = jnp.array([0, 1, 0, 1, 0])
    mask = jnp.broadcast_to(jnp.array([True, True, False, True]), (5, 4))
    found = _objective.cross_entropy(logits, labels, mask)
    kept = np.asarray(logits, np.float64)[:, [0, 1, 3]]
    wanted = special.logsumexp(kept, axis=1) - kept[np.arange(5), labels]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    grads = jax.grad(lambda x: _objective.cross_entropy(x, labels, mask).sum())(
      logits
    )
    np.testing.assert_array_equal(grads[:, 2], 0)
    self.assertGreater(np.abs(grads[:, 3]).min(), 0)

  @parameterized.parameters(1.0, 2.0, 5.0)
  def test_distillation(self, heat):
    draws = np.random.default_rng(1)
    logits, targets = draws.normal(size=(2, 3, 4)).astype(np.float32)
    mask = np.array([[1, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0]], bool)
    found = _objective.distillation(
      jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(mask), heat
    )
    for i in range(2):
      p = special.softmax(targets[i][mask[i]] / heat)
      q = special.log_softmax(logits[i][mask[i]] / heat)
      np.testing.assert_allclose(found[i], -(heat**2) * p @ q, rtol=1e-5)
    self.assertEqual(found[2], 0)

  def test_agem_projects_where_gradients_disagree(self):
    problem = _problems.problem(capacity=16, per="total")
    batch = len(problem.stream.tasks[0].train)
    one = STEPS._replace(epochs=1, batch_size=batch, learning_rate=0.5)
    strategy = strategies.get("agem", training=one, batch_size=4000)
    first = _problems.observe(strategy, problem, 1)
    second = strategy.observe(problem, first, 1)
    images, labels = _problems.task_data(problem, 1)
    for i in range(2):
      kernel = np.asarray(first.current["out"]["kernel"][i], np.float64)
      stored = _problems.seed(first.buffer, i)
      held = stored.label >= 0
      gradient = _problems.gradient(kernel, images, labels)
      seen = np.arange(6) < 4
      reference = _problems.gradient(
        kernel, stored.items["image"][held], stored.label[held], seen
      )
      product = (gradient * reference).sum()
      self.assertLess(product, 0)
      wanted = gradient - product / (reference**2).sum() * reference
      step = np.asarray(second.current["out"]["kernel"][i]) - kernel
      # The reference is a large sample of the buffer with replacement.
      np.testing.assert_allclose(step, -0.5 * wanted, rtol=0.2, atol=2e-3)
      plain = np.abs(step + 0.5 * gradient).max()
      self.assertGreater(plain, 3 * np.abs(step + 0.5 * wanted).max())

  def test_path_integral_of_plain_steps(self):
    problem = _problems.problem(capacity=0)
    strategy = strategies.get("si", training=STEPS, weight=1.0, damping=0.1)
    state = _problems.observe(strategy, problem, 1)
    images, labels = _problems.task_data(problem, 0)
    for i in range(2):
      kernel = np.asarray(problem.params["out"]["kernel"][i], np.float64)
      start, credit = kernel.copy(), np.zeros_like(kernel)
      for _ in range(3):
        gradient = _problems.gradient(kernel, images, labels)
        step = -0.1 * gradient
        credit -= gradient * step
        kernel = kernel + step
      wanted = np.maximum(credit, 0) / ((kernel - start) ** 2 + 0.1)
      found = state.learner.regularizer["precision"]["out"]["kernel"][i]
      np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-6)

  @parameterized.parameters(
    ("naive", {}),
    ("er", {"batch_size": 8}),
    ("er", {"batch_size": 8, "online": True}),
    ("der", {"batch_size": 8}),
    ("agem", {"batch_size": 8}),
    ("si", {}),
  )
  def test_number_of_devices_changes_nothing(self, name, options):
    strategy = strategies.get(name, training=BRIEF, **options)
    # 28 a task: a last batch that does not divide by 8.
    stream = streams.class_incremental(
      _problems.source(14, 0), _problems.source(4, 1), num_tasks=3
    )
    found = [
      _problems.observe(
        strategy, _problems.problem(devices=devices, stream=stream), 2
      ).current
      for devices in (1, 4)
    ]
    chex.assert_trees_all_close(found[0], found[1], atol=1e-5)


if __name__ == "__main__":
  absltest.main()
