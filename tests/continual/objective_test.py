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

  def test_quadratic_penalty(self):
    draws = np.random.default_rng(2)
    params, center, precision = (
      {"w": draws.normal(size=(3, 4)).astype(np.float32), "b": np.float32(b)}
      for b in (2.0, -1.0, 0.5)
    )
    found = _objective.quadratic_penalty(
      *jax.tree.map(jnp.asarray, (params, center, precision))
    )
    wanted = sum(
      (precision[k].astype(float) * (params[k] - center[k]) ** 2).sum() / 2
      for k in params
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5)

  def test_a_loss_with_the_gradient_asked_for(self):
    draws = np.random.default_rng(3)
    params, grads = (
      {"w": jnp.asarray(draws.normal(size=(3, 4)), jnp.float32), "b": b}
      for b in (jnp.ones(()), jnp.full((), 7.0))
    )
    value, found = jax.value_and_grad(
      lambda params: _objective.with_gradient(
        (params["w"] ** 3).sum(), params, grads
      )
    )(params)
    np.testing.assert_allclose(value, (params["w"] ** 3).sum(), rtol=1e-6)
    chex.assert_trees_all_equal(found, grads)

  @parameterized.parameters(
    # New classes push the old ones down on bright images; the same ones agree.
    (streams.class_incremental, {}, True),
    (streams.data_incremental, {"seed": 0}, False),
  )
  def test_agem_projects_where_gradients_disagree(
    self, make, options, disagree
  ):
    train, test = (
      one._replace(inputs=one.inputs + 1)
      for one in (_problems.source(12, 0), _problems.source(4, 1))
    )
    stream = make(train, test, num_tasks=3, **options)
    # A buffer of one example: every batch of it is that one.
    problem = _problems.problem(stream=stream, capacity=1, per="total")
    images, labels = _problems.task_data(problem, 1)
    one = STEPS._replace(epochs=1, batch_size=len(labels))
    strategy = strategies.get("agem", training=one, batch_size=3)
    first = _problems.observe(strategy, problem, 1)
    second = strategy.observe(problem, first, 1)
    for i in range(2):
      kernel = np.asarray(first.current["out"]["kernel"][i], np.float64)
      stored = _problems.seed(first.buffer, i)
      self.assertEqual(stored.task[0], 0)
      gradient = _problems.gradient(kernel, images, labels)
      seen = [
        label in {*labels, *stream.tasks[0].classes} for label in range(6)
      ]
      reference = _problems.gradient(
        kernel, stored.items["input"], stored.label, np.array(seen)
      )
      product = (gradient * reference).sum()
      self.assertEqual(product < 0, disagree)
      if disagree:
        gradient -= product / (reference**2).sum() * reference
      np.testing.assert_allclose(
        second.current["out"]["kernel"][i],
        kernel - 0.1 * gradient,
        rtol=1e-5,
        atol=1e-6,
      )

  def test_path_integral_of_plain_steps(self):
    problem = _problems.problem(capacity=0)
    strategy = strategies.get("si", training=STEPS, weight=1.5, damping=0.1)
    state = _problems.observe(strategy, problem, 2)
    for i in range(2):
      kernel = np.asarray(problem.params["out"]["kernel"][i], np.float64)
      omega = np.zeros_like(kernel)
      for task in (0, 1):
        images, labels = _problems.task_data(problem, task)
        start, credit = kernel, np.zeros_like(kernel)
        for _ in range(3):
          gradient = _problems.gradient(kernel, images, labels)
          pull = 2 * 1.5 * omega * (kernel - start)
          step = -0.1 * (gradient + pull)
          # The penalty moves the network, but earns nothing.
          credit -= gradient * step
          kernel = kernel + step
        omega += np.maximum(credit, 0) / ((kernel - start) ** 2 + 0.1)
      np.testing.assert_allclose(
        state.current["out"]["kernel"][i], kernel, rtol=1e-4, atol=1e-6
      )
      found = state.learner.regularizer["precision"]["out"]["kernel"][i]
      np.testing.assert_allclose(found, omega, rtol=1e-3, atol=1e-6)

  @parameterized.parameters(
    ("naive", {}),
    ("er", {"batch_size": 8}),
    ("er", {"batch_size": 8, "online": True}),
    ("der", {"batch_size": 8}),
    ("agem", {"batch_size": 8}, 2),
    ("si", {}),
  )
  def test_number_of_devices_changes_nothing(self, name, options, *more):
    strategy = strategies.get(name, training=BRIEF, **options)
    # 27 a task: three whole batches and one of 3, which neither 2 nor 4
    # devices share evenly; of 4 one holds padding alone.
    stream = streams.class_incremental(
      _problems.source(9, 0), _problems.source(4, 1), num_tasks=2
    )
    self.assertLen(stream.tasks[0].train, 27)
    found = [
      _problems.observe(
        strategy, _problems.problem(devices=devices, stream=stream)
      )
      for devices in (1, 4, *more)
    ]
    for other in found[1:]:
      chex.assert_trees_all_close(found[0].current, other.current, atol=1e-5)
      if found[0].buffer is not None:
        chex.assert_trees_all_close(
          found[0].buffer.items, other.buffer.items, atol=1e-5
        )


if __name__ == "__main__":
  absltest.main()
