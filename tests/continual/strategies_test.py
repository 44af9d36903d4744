"""Tests of strategies and their learners."""

from __future__ import annotations

import dataclasses
import functools
import tempfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from scipy import special

from jaxmerge import checkpoints, continual, models, training
from jaxmerge.continual import (
  _learners,
  _objective,
  _run,
  merges,
  regularizers,
  strategies,
  streams,
)
from tests.continual import _problems
from tests.continual._problems import BRIEF, STEPS, Training

# Tests of merges run these.
_NOT = (
  "merge:average",
  "merge:fisher_average",
  "merge:magmax",
  "merge:model_stock",
  "merge:random_mix",
  "merge:regmean",
  "merge:ties",
)


@functools.cache
def _shared(hidden=False):
  """A problem whose experts several tests share."""
  return _problems.problem(hidden, capacity=8 if hidden else 0)


def _init(training=BRIEF, replay=True, **options):
  """The first state of a learner with these options."""
  strategy = continual.compose("x", continual.Learner(training, **options))
  return strategy.init(_problems.problem(capacity=8 if replay else 0))


def _rehearse(**options):
  return _init(rehearsal=continual.Rehearsal(**options))


class StrategyTest(parameterized.TestCase):
  @parameterized.parameters(
    *(n for n in strategies.names() if not n.startswith("merge:"))
  )
  def test_every_strategy_runs(self, name):
    problem = _shared(hidden=True)
    options = {
      "ewc": {"weight": 1.0},
      "pam": {"adapter": models.Lora(2, 4.0, "kernel")},
      # Four steps a task.
      "trm": {"path": continual.Path(2)},
    }.get(name, {})
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
    for name in ("naive", "er", "joint", "regmean_replay"):
      strategy = strategies.get(name, training=long)
      params = strategy.params(problem, _problems.observe(strategy, problem))
      found[name] = continual.accuracies(problem, params).mean()
    self.assertLess(found["naive"], 0.6)
    self.assertGreater(found["joint"], 0.8)
    for name in ("er", "regmean_replay"):
      self.assertGreater(found[name], found["naive"] + 0.1, name)

  @parameterized.parameters(
    *(n for n in strategies.names() if n.startswith("merge:") and n not in _NOT)
  )
  def test_every_rule_runs(self, name):
    problem = _shared()
    state = _problems.observe(strategies.get(name, training=BRIEF), problem)
    chex.assert_trees_all_equal_shapes_and_dtypes(state.current, problem.params)
    chex.assert_tree_all_finite(state.current)
    change = jax.tree.map(lambda a, b: a - b, state.current, problem.params)
    self.assertGreater(float(jnp.abs(change["out"]["kernel"]).max()), 1e-3)

  def test_joint_is_a_training_on_everything(self):
    problem = _problems.problem(capacity=0)
    settings = STEPS._replace(batch_size=96)
    strategy = strategies.get("joint", training=settings)
    state = _problems.observe(strategy, problem)
    self.assertFalse(strategy.measured(problem, 1))
    rows = np.concatenate([task.train for task in problem.stream.tasks])
    images, labels = (
      problem.stream.train[name][rows] for name in ("input", "label")
    )
    for i in range(2):
      kernel = np.asarray(problem.params["out"]["kernel"][i], np.float64)
      for _ in range(3):
        kernel = kernel - 0.1 * _problems.gradient(kernel, images, labels)
      np.testing.assert_allclose(
        state.current["out"]["kernel"][i], kernel, rtol=1e-3, atol=1e-5
      )

  def test_cumulative_starts_again_on_all_so_far(self):
    problem = _problems.problem(capacity=0)
    settings = STEPS._replace(batch_size=96)
    strategy = strategies.get("cumulative", training=settings)
    state = strategy.init(problem)
    for task in range(2):
      state = strategy.observe(problem, state, task)
      images, labels = (
        np.concatenate(parts)
        for parts in zip(
          *(_problems.task_data(problem, t) for t in range(task + 1)),
          strict=True,
        )
      )
      kernel = np.asarray(problem.params["out"]["kernel"][0], np.float64)
      for _ in range(3):
        kernel = kernel - 0.1 * _problems.gradient(kernel, images, labels)
      np.testing.assert_allclose(
        state.current["out"]["kernel"][0], kernel, rtol=1e-3, atol=1e-5
      )

  @parameterized.parameters(("expert", 1), ("merged", 1), ("both", 2))
  def test_finetuning_of_the_merged_network(self, teacher, soup):
    problem = _problems.problem(capacity=8)
    heat, weight = 3.0, 2.0
    strategy = continual.compose(
      "tuned",
      continual.Learner(STEPS, start="initial"),
      merge=merges.running(0.25),
      finetune=continual.Finetune(STEPS, weight, heat, teacher, soup),
    )
    first = _problems.observe(strategy, problem, 1)
    second = strategy.observe(problem, first, 1)
    experts = [one[0]["out"]["kernel"] for one in problem.memo.values()]
    chex.assert_trees_all_equal(first.current["out"]["kernel"], experts[0])
    for i in range(2):
      buffer = _problems.seed(second.buffer, i)
      rows = buffer.items[buffer.label >= 0]
      self.assertLen(set(rows), 16)
      images, labels = (
        problem.stream.train[name][rows] for name in ("input", "label")
      )
      old, expert = (np.asarray(one[i], np.float64) for one in experts)
      kernel = 0.75 * old + 0.25 * expert
      taught = {
        "expert": expert,
        "merged": kernel,
        "both": (kernel + expert) / 2,
      }[teacher]
      x = images.reshape(16, 9).astype(float)
      seen = np.arange(6) < 4

      def soft(kernel, x=x):
        return special.softmax((x @ kernel)[:, :4] / heat, axis=1)

      for _ in range(3):
        errors = np.zeros((16, 6))
        errors[:, :4] = heat * (soft(kernel) - soft(taught))
        gradient = _problems.gradient(kernel, images, labels, seen)
        kernel = kernel - 0.1 * (gradient + weight * x.T @ errors / 16)
      np.testing.assert_allclose(
        second.current["out"]["kernel"][i], kernel, rtol=1e-4, atol=1e-5
      )

  @parameterized.parameters(
    (
      "mpf",
      {"curve": BRIEF, "finetune": continual.Finetune(BRIEF)},
    ),
    ("der", {"batch_size": 8}),
    ("si", {}),
  )
  def test_going_on_from_a_checkpoint_changes_no_bit(self, name, options):
    problem = _problems.problem(hidden=True)
    strategy = strategies.get(name, training=BRIEF, **options)
    whole = _problems.observe(strategy, problem)
    # Another process: nothing is left but what was saved.
    fresh = _problems.problem(hidden=True)
    state = _problems.observe(strategy, fresh, 2)
    with tempfile.TemporaryDirectory() as folder:
      with checkpoints.Store(folder) as store:
        store.save(2, state, {})
        store.wait()
      with checkpoints.Store(folder) as store:
        _, state, _ = store.restore(strategy.init(problem))
    fresh = dataclasses.replace(fresh, memo={})
    chex.assert_trees_all_equal(
      strategy.observe(fresh, state, 2).current, whole.current
    )

  def test_seeds_at_once_are_seeds_apart(self):
    strategy = strategies.get("er", training=BRIEF, batch_size=8, online=True)
    problem = _problems.problem(seeds=5)
    together = _problems.observe(strategy, problem, 2)
    for i in range(5):
      alone = dataclasses.replace(
        problem,
        params=jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], problem.params),
        keys=problem.keys[i : i + 1],
        memo={},
      )
      one = _problems.observe(strategy, alone, 2)
      chex.assert_trees_all_close(
        _problems.seed((together.current, together.buffer), i),
        _problems.seed((one.current, one.buffer), 0),
        rtol=1e-5,
        atol=1e-6,
      )
    kernels = np.asarray(together.current["out"]["kernel"])
    self.assertGreater(np.abs(kernels[1:] - kernels[0]).min(axis=0).max(), 0.01)

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
    experts = [value[0] for value in problem.memo.values()]
    self.assertLen(experts, 3)
    for task, expert in enumerate(experts):
      chex.assert_trees_all_equal(strategy.params(problem, state, task), expert)
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
    for name, options, each in (
      ("buffer_only", {}, example),
      ("er", {"online": True}, example),
      ("der", {}, example + 6 * 4),
    ):
      strategy = strategies.get(name, training=BRIEF, **options)
      state = strategy.init(problem)
      # Five of its slots are taken.
      label = state.buffer.label.at[:, :5].set(1)
      state = state._replace(buffer=state.buffer._replace(label=label))
      self.assertEqual(
        strategy.memory(problem, state, 1),
        {"networks": network, "examples": 5 * each},
      )
    each = strategies.get("independent", training=BRIEF)
    state = each.init(problem)
    self.assertEqual(
      [each.memory(problem, state, n)["networks"] for n in (1, 3)],
      [2 * network, 4 * network],
    )

  def test_validation_accuracy(self):
    problem = _shared()
    found = continual.accuracies(problem, problem.params, split="validation")
    for i in range(2):
      kernel = np.asarray(problem.params["out"]["kernel"][i], np.float64)
      for t, task in enumerate(problem.stream.tasks):
        images, labels = (
          problem.stream.train[name][task.validation]
          for name in ("input", "label")
        )
        hits = _problems.logits(kernel, images).argmax(axis=1) == labels
        self.assertEqual(found[i, t], hits.mean())
    stream = streams.class_incremental(
      _problems.source(4, 0), _problems.source(4, 1), num_tasks=3
    )
    bare = _problems.problem(capacity=0, stream=stream)
    with self.assertRaisesRegex(ValueError, "no validation examples"):
      continual.accuracies(bare, bare.params, split="validation")

  def test_accuracy_on_the_classes_of_the_task(self):
    source, test = _problems.source(8, 0), _problems.source(10, 1)
    single = streams.class_incremental(source, test, num_tasks=3)
    multi = streams.task_incremental(source, test, num_tasks=3)
    whole = streams.data_incremental(source, test, num_tasks=2, seed=0)
    params = _problems.problem(capacity=0).params
    kernel = np.asarray(params["out"]["kernel"][0])
    logits = test.inputs.reshape(-1, 9) @ kernel
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
    (lambda: strategies.get("merge:ties", densty=1), "'densty'"),
    (lambda: strategies.get("merge:passthrough"), "slices"),
    (lambda: _init(start="first"), "Unknown start 'first'"),
    (lambda: _init(rows="all"), "Unknown rows 'all'"),
    (lambda: _rehearse(batch_size=0), "batch_size must be at least 1, got 0"),
    (lambda: _rehearse(weight=-1.0), "weight must not be negative"),
    (lambda: _rehearse(soft_weight=-1.0), "soft_weight must not be negative"),
    (
      lambda: _rehearse(online=True, project=True, soft_weight=1.0),
      "project and soft_weight exclude each other",
    ),
    (lambda: _rehearse(project=True), "set online=True"),
    (lambda: _init(rows="buffer", replay=False), "has no replay"),
    (
      lambda: strategies.get("avg", finetune=continual.Finetune(distill=-1.0)),
      "distill must not be negative",
    ),
    (
      lambda: continual.compose(
        "x",
        continual.Learner(rehearsal=continual.Rehearsal(online=True)),
        merge=merges.curve(),
      ),
      "Set online=False",
    ),
    (lambda: _init(Training(final_learning_rate=0.0)), "must be positive"),
    (lambda: _init(Training(epochs=0)), "epochs must be at least 1, got 0"),
    (lambda: _init(Training(iterations=0)), "iterations must be at least 1"),
    (lambda: _init(Training(batch_size=0)), "batch_size must be at least 1"),
    (lambda: _init(Training(clip=0.0)), "clip must be positive, got 0.0"),
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
    result = _run.run(
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
