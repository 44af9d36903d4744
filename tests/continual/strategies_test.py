"""Tests of strategies and their learners."""

from __future__ import annotations

import dataclasses
import tempfile

import chex
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import checkpoints, continual, training
from jaxmerge.continual import (
  _learners,
  _objective,
  regularizers,
  strategies,
  streams,
)
from tests.continual import _problems
from tests.continual._problems import BRIEF, STEPS, Training


class StrategyTest(parameterized.TestCase):
  # Rules have a test of their own; passthrough needs the option slices.
  @parameterized.parameters(
    *(n for n in strategies.names() if not n.startswith("merge:")),
    "merge:fisher_average",
    "merge:regmean",
  )
  def test_every_strategy_runs(self, name):
    problem = _problems.problem(hidden=True)
    options = {"weight": 1.0} if name == "ewc" else {}
    strategy = strategies.get(name, training=BRIEF, **options)
    state = _problems.observe(strategy, problem)
    params = strategy.params(problem, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, problem.params)
    chex.assert_tree_all_finite(params)
    accuracy = continual.accuracies(problem, params)
    self.assertEqual(accuracy.shape, (2, 3))
    self.assertGreater(accuracy.mean(), 0.1)

  def test_replay_remembers_what_naive_forgets(self):
    problem = _problems.problem(hidden=True, capacity=16)
    long = Training(0.05, epochs=10, batch_size=8)
    found = {}
    for name in ("naive", "er", "buffer_only", "cumulative", "regmean_replay"):
      strategy = strategies.get(name, training=long)
      params = strategy.params(problem, _problems.observe(strategy, problem))
      found[name] = continual.accuracies(problem, params).mean()
    self.assertLess(found["naive"], 0.6)
    self.assertGreater(found["cumulative"], 0.8)
    for name in ("er", "buffer_only", "regmean_replay"):
      self.assertGreater(found[name], found["naive"] + 0.1, name)

  def test_joint_is_a_training_on_everything(self):
    problem = _problems.problem(capacity=0)
    settings = STEPS._replace(batch_size=96)
    strategy = strategies.get("joint", training=settings)
    state = _problems.observe(strategy, problem)
    self.assertFalse(strategy.measured(problem, 1))
    rows = np.concatenate([task.train for task in problem.stream.tasks])
    images, labels = (
      problem.stream.train[name][rows] for name in ("image", "label")
    )
    for i in range(2):
      kernel = np.asarray(problem.params["out"]["kernel"][i], np.float64)
      for _ in range(3):
        kernel = kernel - 0.1 * _problems.gradient(kernel, images, labels)
      np.testing.assert_allclose(
        state.current["out"]["kernel"][i], kernel, rtol=1e-3, atol=1e-5
      )

  def test_going_on_from_a_checkpoint_changes_no_bit(self):
    problem = _problems.problem(hidden=True)
    strategy = strategies.get(
      "mpf", training=BRIEF, curve=BRIEF, finetune=continual.Finetune(BRIEF)
    )
    whole = _problems.observe(strategy, problem)
    state = _problems.observe(strategy, problem, 2)
    with tempfile.TemporaryDirectory() as folder:
      with checkpoints.Store(folder) as store:
        store.save(2, state, {})
        store.wait()
      with checkpoints.Store(folder) as store:
        _, state, _ = store.restore(strategy.init(problem))
    fresh = dataclasses.replace(problem, memo={})
    chex.assert_trees_all_equal(
      strategy.observe(fresh, state, 2).current, whole.current
    )

  def test_seeds_at_once_are_seeds_apart(self):
    strategy = strategies.get("er", training=BRIEF, batch_size=8)
    both = _problems.observe(strategy, _problems.problem(hidden=True), 2)
    one = _problems.observe(
      strategy, _problems.problem(hidden=True, seeds=1), 2
    )
    chex.assert_trees_all_close(
      _problems.seed(both.current, 0), _problems.seed(one.current, 0), rtol=1e-5
    )

  def test_experts_are_trained_once(self):
    names = []

    def keep(name, make, like):
      names.append(name)
      made = make()
      chex.assert_trees_all_equal_shapes_and_dtypes(made, like())
      return made

    problem = dataclasses.replace(_problems.problem(capacity=0), keep=keep)
    for name in ("avg", "merge:ties", "independent"):
      _problems.observe(strategies.get(name, training=BRIEF), problem)
    self.assertLen(names, 3)

  def test_independent_networks_know_their_task(self):
    problem = _problems.problem(capacity=0)
    strategy = strategies.get("independent", training=BRIEF)
    state = _problems.observe(strategy, problem)
    self.assertTrue(strategy.by_task)
    for task in range(3):
      params = strategy.params(problem, state, task)
      self.assertGreater(
        continual.accuracies(problem, params)[:, task].mean(), 0.6
      )

  def test_memory(self):
    problem = _problems.problem()
    network = 9 * 6 * 4
    example = 9 * 4 + 4 + 4
    naive = strategies.get("naive", training=BRIEF)
    state = _problems.observe(naive, problem)
    self.assertEqual(
      naive.memory(problem, state, 3), {"networks": network, "examples": 0}
    )
    only = strategies.get("buffer_only", training=BRIEF)
    state = _problems.observe(only, problem)
    self.assertEqual(
      only.memory(problem, state, 3),
      {"networks": network, "examples": 3 * 8 * example},
    )

  def test_accuracy_on_the_classes_of_the_task(self):
    source, test = _problems.source(8, 0), _problems.source(10, 1)
    single = streams.class_incremental(source, test, num_tasks=3)
    multi = streams.task_incremental(source, test, num_tasks=3)
    whole = streams.data_incremental(source, test, num_tasks=2, seed=0)
    params = _problems.problem(capacity=0).params
    kernel = np.asarray(params["out"]["kernel"][0])
    logits = test.images.reshape(-1, 9) @ kernel
    hits = logits.argmax(axis=1) == test.labels
    task = test.labels // 2
    own = logits.reshape(-1, 3, 2)[np.arange(len(task)), task].argmax(axis=1)
    for stream, expected in (
      (single, [hits[task == t].mean() for t in range(3)]),
      (multi, [(own == test.labels % 2)[task == t].mean() for t in range(3)]),
      (whole, [hits.mean()] * 2),
    ):
      problem = _problems.problem(capacity=0, stream=stream)
      found = continual.accuracies(problem, problem.params)[0]
      np.testing.assert_allclose(found, expected, rtol=1e-12)

  @parameterized.parameters("reservoir", "ring", "class_balanced", "herding")
  def test_every_policy_fills_the_buffer(self, policy):
    per = "task" if policy in ("reservoir", "ring") else "total"
    problem = _problems.problem(policy=policy, per=per, capacity=12)
    strategy = strategies.get("buffer_only", training=BRIEF)
    state = _problems.observe(strategy, problem)
    labels = np.asarray(state.buffer.label)
    counts = [(labels[0] == label).sum() for label in range(6)]
    self.assertGreater(min(counts), 0)

  @parameterized.parameters(
    (lambda: strategies.get("mfp"), "Unknown strategy 'mfp'; did you mean"),
    (lambda: strategies.get("avg", lr=1), "Unknown option 'lr' of avg"),
    (
      lambda: strategies.get("mpf").init(_problems.problem(capacity=0)),
      "needs stored examples, but the problem has no replay",
    ),
    (
      lambda: strategies.get("er").init(_problems.problem(capacity=0)),
      "no replay buffer",
    ),
    (
      lambda: strategies.get("naive", head="own").init(_problems.problem()),
      "Unknown head 'own'",
    ),
    (
      lambda: strategies.get("avg", finetune=continual.Finetune(soup=0)),
      "soup must be at least 1",
    ),
    (
      lambda: strategies.get("avg", finetune=continual.Finetune(teacher="me")),
      "Unknown teacher 'me'",
    ),
    (
      lambda: strategies.get(
        "avg", finetune=continual.Finetune(Training(optimizer="lamb"))
      ),
      "unknown optimizer 'lamb'",
    ),
    (
      lambda: strategies.get("naive", training=Training(-1.0)).init(
        _problems.problem()
      ),
      "learning rates must be positive",
    ),
    (
      lambda: continual.compose(
        "x",
        continual.Learner(
          rehearsal=continual.Rehearsal(soft_weight=1.0, online=False)
        ),
      ).init(_problems.problem()),
      "set online=True",
    ),
    (
      lambda: continual.compose(
        "x",
        continual.Learner(rehearsal=continual.Rehearsal(online=True)),
        finetune=continual.Finetune(),
      ),
      "Set online=False",
    ),
    (
      lambda: continual.accuracies(
        _problems.problem(), _problems.problem().params, split="dev"
      ),
      "Unknown split 'dev'",
    ),
  )
  def test_bad_input(self, make, message):
    with self.assertRaisesRegex(ValueError, message):
      make()

  def test_bad_parameters(self):
    problem = _problems.problem()
    for params, message in (
      (_problems.seed(problem.params, 0), "leading axis of 2 seeds"),
      ({"n": jnp.zeros((2, 3), jnp.int32)}, "must be floating-point"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        continual.make_problem(
          problem.stream, _problems.logits_fn, params, keys=problem.keys
        )

  def test_equal_learners_have_equal_names(self):
    first, second = (
      continual.Learner(BRIEF, regularizer=regularizers.ewc(1.0))
      for _ in range(2)
    )
    self.assertEqual(_learners.describe(first), _learners.describe(second))
    third = first._replace(regularizer=regularizers.ewc(2.0))
    self.assertNotEqual(_learners.describe(first), _learners.describe(third))

  def test_iterations(self):
    problem = _problems.problem(capacity=0)
    settings = Training(0.05, iterations=7, batch_size=8)
    result = _learners.run(
      problem,
      settings,
      _objective.Terms(),
      problem.params,
      problem.rows_of([0]),
      {
        "labels": {
          "masks": jnp.ones((2, 3, 6), bool),
          "weight": jnp.ones(2),
        }
      },
      problem.keys,
    )
    self.assertEqual(result.steps, 7)
    self.assertIsInstance(result, training.TrainResult)


if __name__ == "__main__":
  absltest.main()
