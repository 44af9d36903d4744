"""Tests of regularisers."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from scipy import special

from jaxmerge.continual import _objective, regularizers, strategies, streams
from tests.continual import _problems
from tests.continual._problems import STEPS, Training


class RegularizerTest(parameterized.TestCase):
  @parameterized.parameters(("exact", None), ("empirical", None), ("exact", 20))
  def test_fisher_and_penalty(self, kind, samples):
    problem = _problems.problem(capacity=0)
    regularizer = regularizers.ewc(3.0, labels=kind, samples=samples)
    state = regularizer.init(problem)
    self.assertEqual(
      float(np.abs(state["precision"]["out"]["kernel"]).max()), 0
    )
    draws = np.random.default_rng(0)
    networks = [
      {"out": {"kernel": jnp.asarray(draws.normal(size=(2, 9, 6)), "float32")}}
      for _ in range(2)
    ]
    for task, params in enumerate(networks):
      state = regularizer.after_task(problem, state, params, task, None)
    point = draws.normal(size=(9, 6))

    def fisher(kernel, task):
      images, labels = _problems.task_data(problem, task)
      squares = []
      for x, y in zip(images[:samples], labels[:samples], strict=True):
        p = special.softmax(_problems.logits(kernel, x[None])[0])
        chances = p if kind == "exact" else np.eye(6)[y]
        squares.append(
          sum(
            chance * _problems.gradient(kernel, x[None], np.array([c])) ** 2
            for c, chance in enumerate(chances)
          )
        )
      return np.mean(squares, axis=0)

    kernels = [np.asarray(one["out"]["kernel"][0], float) for one in networks]
    fishers = [fisher(kernel, task) for task, kernel in enumerate(kernels)]

    def separate(theta):
      return sum(
        (f * (theta - kernel) ** 2).sum() / 2
        for f, kernel in zip(fishers, kernels, strict=True)
      )

    data = regularizer.terms(problem, state, networks[1], 2)["quadratic"]
    self.assertEqual(float(data["weight"][0]), 3)

    def combined(theta):
      return float(
        _objective.quadratic_penalty(
          {"k": jnp.asarray(theta, jnp.float32)},
          {"k": data["center"]["out"]["kernel"][0]},
          {"k": data["precision"]["out"]["kernel"][0]},
        )
      )

    np.testing.assert_allclose(
      state["precision"]["out"]["kernel"][0], sum(fishers), rtol=1e-4, atol=1e-7
    )
    # Apart from a constant the two are one function.
    other = np.zeros((9, 6))
    np.testing.assert_allclose(
      combined(point) - combined(other),
      separate(point) - separate(other),
      rtol=1e-4,
    )

  @parameterized.product(
    kind=("exact", "empirical"), scenario=("task", "class")
  )
  def test_fisher_of_the_classes_of_a_task(self, kind, scenario):
    make = {
      "task": streams.task_incremental,
      "class": streams.class_incremental,
    }[scenario]
    stream = make(_problems.source(6, 0), _problems.source(4, 1), num_tasks=3)
    problem = _problems.problem(capacity=0, stream=stream)
    head = "all" if scenario == "task" else "task"
    regularizer = regularizers.ewc(1.0, labels=kind, head=head, chunk_size=2)
    state = regularizer.after_task(
      problem, regularizer.init(problem), problem.params, 1, None
    )
    images, labels = _problems.task_data(problem, 1)
    kernel = np.asarray(problem.params["out"]["kernel"][0], np.float64)
    own = np.isin(np.arange(6), [2, 3])
    wanted = np.zeros_like(kernel)
    for x, y in zip(images, labels, strict=True):
      chances = special.softmax(_problems.logits(kernel, x[None])[0][own])
      for c, chance in zip((2, 3), chances, strict=True):
        weight = chance if kind == "exact" else float(c == y)
        gradient = _problems.gradient(kernel, x[None], np.array([c]), own)
        wanted += weight * gradient**2 / len(labels)
    np.testing.assert_allclose(
      state["precision"]["out"]["kernel"][0], wanted, rtol=1e-4, atol=1e-7
    )

  def test_online_fisher_decays(self):
    problem = _problems.problem(capacity=0)
    regularizer = regularizers.ewc(1.0, online=True, decay=0.5)
    params = problem.params
    once = regularizer.after_task(
      problem, regularizer.init(problem), params, 0, None
    )
    again = regularizer.after_task(problem, once, params, 0, None)
    chex.assert_trees_all_close(
      again["precision"],
      jax.tree.map(lambda leaf: 1.5 * leaf, once["precision"]),
      rtol=1e-5,
    )

  def test_a_strong_penalty_keeps_the_network(self):
    problem = _problems.problem(capacity=0)
    moved = {}
    # Small steps: a strong penalty has a large curvature.
    settings = Training(0.01, momentum=0.0, epochs=10, batch_size=8)
    for weight in (1e-6, 100.0):
      strategy = strategies.get("ewc", training=settings, weight=weight)
      first = _problems.observe(strategy, problem, 1)
      second = strategy.observe(problem, first, 1)
      # Where the task before has information.
      important = first.learner.regularizer["precision"]["out"]["kernel"]
      step = second.current["out"]["kernel"] - first.current["out"]["kernel"]
      moved[weight] = float((important * step**2).sum())
    self.assertLess(moved[100.0], 0.3 * moved[1e-6])

  def test_first_task_knows_no_penalty(self):
    problem = _problems.problem(capacity=0)
    naive = strategies.get("naive", training=STEPS)
    plain = [_problems.observe(naive, problem, n).current for n in (1, 2)]
    for name in ("ewc", "si"):
      strategy = strategies.get(name, training=STEPS, weight=0.5)
      found = [_problems.observe(strategy, problem, n).current for n in (1, 2)]
      chex.assert_trees_all_close(found[0], plain[0], rtol=1e-5, atol=1e-6)
      change = found[1]["out"]["kernel"] - plain[1]["out"]["kernel"]
      self.assertGreater(float(jnp.abs(change).max()), 1e-3)

  @parameterized.parameters(
    (None, 1 / 2, 1 / 2, "old", 2),
    (3.0, 1.0, 3.0, "old", 2),
    (None, 1 / 2, 1 / 2, "seen", 4),
  )
  def test_lwf_steps(self, weight, own_share, old_share, over, classes):
    problem = _problems.problem(capacity=0)
    heat = 2.0
    strategy = strategies.get(
      "lwf", training=STEPS, weight=weight, temperature=heat, over=over
    )
    first = _problems.observe(strategy, problem, 1)
    second = strategy.observe(problem, first, 1)
    images, labels = _problems.task_data(problem, 1)
    x = images.reshape(len(images), -1).astype(float)
    for i in range(2):
      kernel = np.asarray(first.current["out"]["kernel"][i], np.float64)
      # The old task's classes are 0 and 1, softened.
      old = np.zeros((len(x), classes))
      old[:, :2] = special.softmax(
        _problems.logits(kernel, images)[:, :2] / heat, 1
      )
      for _ in range(3):
        now = _problems.logits(kernel, images)[:, :classes] / heat
        errors = np.zeros((len(x), 6))
        errors[:, :classes] = heat * (special.softmax(now, 1) - old)
        gradient = own_share * _problems.gradient(
          kernel, images, labels, np.arange(6) < 4
        )
        kernel = kernel - 0.1 * (gradient + old_share * x.T @ errors / len(x))
      np.testing.assert_allclose(
        second.current["out"]["kernel"][i], kernel, rtol=1e-4, atol=1e-6
      )

  def test_lwf_weights_are_those_of_the_task(self):
    problem = _problems.problem(capacity=0)
    regularizer = regularizers.lwf()
    for task, share in ((0, 0.0), (1, 1 / 2), (2, 2 / 3)):
      terms = regularizer.terms(problem, {}, problem.params, task)
      np.testing.assert_allclose(terms["distill"]["weight"], share, rtol=1e-6)
      np.testing.assert_allclose(
        terms["labels"]["weight"], 1 - share, rtol=1e-6
      )
      masks = np.asarray(terms["distill"]["masks"][0])
      np.testing.assert_array_equal(masks.sum(axis=-1), 2 * task)

  @parameterized.parameters(
    (lambda: regularizers.ewc(0.0), "weight must be positive"),
    (lambda: regularizers.ewc(1.0, decay=0.5), "decay must lie in"),
    (
      lambda: regularizers.ewc(1.0, online=True, decay=1.5),
      "decay must lie in",
    ),
    (lambda: regularizers.si(-1.0), "weight must be positive"),
    (lambda: regularizers.lwf(0.0), "weight must be positive"),
    (lambda: regularizers.ewc(1.0, labels="true"), "Unknown labels 'true'"),
    (lambda: regularizers.ewc(1.0, samples=0), "samples must be at least 1"),
    (lambda: regularizers.si(1.0, damping=0.0), "damping must be positive"),
    (lambda: regularizers.lwf(temperature=0.0), "temperature must be"),
    (lambda: regularizers.lwf(over="all"), "Unknown over 'all'"),
  )
  def test_bad_options(self, make, message):
    with self.assertRaisesRegex(ValueError, message):
      make()


if __name__ == "__main__":
  absltest.main()
