"""Tests of strategies, their learners, merges and regularisers."""

from __future__ import annotations

import dataclasses
import tempfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from scipy import special

from jaxmerge import checkpoints, continual, merging, training
from jaxmerge.continual import (
  _learners,
  _objective,
  merges,
  regularizers,
  strategies,
  streams,
)
from tests.continual import _problems

Training = continual.Training
BRIEF = Training(0.05, epochs=1, batch_size=8)
# Full batches of one task's 32 examples: a step that can be redone by hand.
STEPS = Training(0.1, momentum=0.0, epochs=3, batch_size=32)


def _softmax_gradient(kernel, images, labels, mask=None):
  """Mean gradient of the cross-entropy of a linear network."""
  x = images.reshape(len(images), -1).astype(np.float64)
  logits = x @ kernel
  if mask is not None:
    logits = np.where(mask, logits, -np.inf)
  errors = special.softmax(logits, axis=1)
  errors[np.arange(len(x)), labels] -= 1
  return x.T @ errors / len(x)


def _task_data(problem, task):
  rows = problem.stream.tasks[task].train
  return problem.stream.train["image"][rows], (
    problem.stream.train["label"][rows]
  )


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
    images, labels = _task_data(problem, 1)
    for i in range(2):
      kernel = np.asarray(first.current["out"]["kernel"][i], np.float64)
      stored = _problems.seed(first.buffer, i)
      held = stored.label >= 0
      gradient = _softmax_gradient(kernel, images, labels)
      seen = np.arange(6) < 4
      reference = _softmax_gradient(
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
    images, labels = _task_data(problem, 0)
    for i in range(2):
      kernel = np.asarray(problem.params["out"]["kernel"][i], np.float64)
      start, credit = kernel.copy(), np.zeros_like(kernel)
      for _ in range(3):
        gradient = _softmax_gradient(kernel, images, labels)
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


class RegularizerTest(parameterized.TestCase):
  def test_fisher_and_penalty(self):
    problem = _problems.problem(capacity=0)
    regularizer = regularizers.ewc(3.0, labels="empirical")
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
      images, labels = _task_data(problem, task)
      squares = [
        _softmax_gradient(kernel, images[j : j + 1], labels[j : j + 1]) ** 2
        for j in range(len(labels))
      ]
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

    # Apart from a constant the two are one function.
    other = np.zeros((9, 6))
    np.testing.assert_allclose(
      combined(point) - combined(other),
      separate(point) - separate(other),
      rtol=1e-4,
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
    (lambda: regularizers.ewc(1.0, labels="true"), "Unknown labels 'true'"),
    (lambda: regularizers.ewc(1.0, samples=0), "samples must be at least 1"),
    (lambda: regularizers.si(1.0, damping=0.0), "damping must be positive"),
    (lambda: regularizers.lwf(temperature=0.0), "temperature must be"),
  )
  def test_bad_options(self, make, message):
    with self.assertRaisesRegex(ValueError, message):
      make()


class MergeTest(parameterized.TestCase):
  def _experts(self, problem, strategy):
    """The networks of the tasks, as the strategies share them."""
    _problems.observe(strategy, problem)
    return [
      value[0]
      for name, value in sorted(problem.memo.items())
      if name.startswith("experts/")
    ]

  def test_running_mean(self):
    problem = _problems.problem(capacity=0)
    strategy = strategies.get("avg", training=BRIEF)
    state = _problems.observe(strategy, problem)
    experts = self._experts(problem, strategy)
    self.assertLen(experts, 3)
    mean = np.mean([one["out"]["kernel"] for one in experts], axis=0)
    np.testing.assert_allclose(
      state.current["out"]["kernel"], mean, rtol=1e-5, atol=1e-6
    )

  @parameterized.parameters(
    ("magmax", {"scale": 0.5}),
    ("ties", {"density": 0.4}),
    ("average", {}),
    ("model_stock", {}),
    ("random_mix", {}),
  )
  def test_rules_are_those_of_merging(self, name, options):
    problem = _problems.problem(capacity=0)
    strategy = strategies.get(f"merge:{name}", training=BRIEF, **options)
    state = _problems.observe(strategy, problem)
    experts = self._experts(problem, strategy)
    rule = merging.get(name, **options)
    for i in range(2):
      wanted = rule(
        _problems.seed(problem.params, i),
        [_problems.seed(one, i) for one in experts],
        key=problem.keys_for("merge", name)[i],
      )
      chex.assert_trees_all_close(
        _problems.seed(state.current, i), wanted, rtol=1e-5, atol=1e-6
      )

  def test_running_regmean_keeps_what_each_does_on_its_inputs(self):
    problem = _problems.problem(capacity=0)
    merge = merges.running_regmean(alpha=1.0, damping=0.0)
    draws = np.random.default_rng(0)
    first, second = (
      {"out": {"kernel": jnp.asarray(draws.normal(size=(2, 9, 6)), "float32")}}
      for _ in range(2)
    )
    none = np.zeros((2, 0), np.int32)
    state = merge.init(problem)
    _, state = merge.update(
      problem, state, merges.Step(problem.params, first, 0, none)
    )
    merged, _ = merge.update(
      problem, state, merges.Step(first, second, 1, none)
    )
    x, y = (
      _task_data(problem, task)[0].reshape(-1, 9).astype(float)
      for task in (0, 1)
    )
    for i in range(2):
      a, b = (
        np.asarray(one["out"]["kernel"][i], float) for one in (first, second)
      )
      # The least squares of both, stacked.
      inputs = np.concatenate([x, y])
      outputs = np.concatenate([x @ a, y @ b])
      wanted = np.linalg.lstsq(inputs, outputs, rcond=None)[0]
      np.testing.assert_allclose(
        merged["out"]["kernel"][i], wanted, rtol=2e-2, atol=2e-3
      )

  def test_memory_of_running_rules_does_not_grow(self):
    problem = _problems.problem(capacity=0)
    bytes_of = {}
    for name in ("merge:magmax", "merge:model_stock"):
      strategy = strategies.get(name, training=BRIEF)
      state = _problems.observe(strategy, problem)
      bytes_of[name] = [
        strategy.memory(problem, state, tasks)["networks"] for tasks in (1, 3)
      ]
    self.assertEqual(*bytes_of["merge:magmax"])
    network = 9 * 6 * 4
    self.assertEqual(bytes_of["merge:model_stock"], [2 * network, 4 * network])

  def test_alignment_undoes_a_permutation(self):
    problem = _problems.problem(hidden=True, capacity=0)
    order = np.random.default_rng(0).permutation(8)
    moved = {
      "in": {"kernel": problem.params["in"]["kernel"][:, :, order]},
      "out": {"kernel": problem.params["out"]["kernel"][:, order]},
    }
    none = np.zeros((2, 0), np.int32)
    step = merges.Step(problem.params, moved, 1, none)
    for align in ("ot", "weights"):
      merged, _ = merges.running(align=align).update(problem, {}, step)
      chex.assert_trees_all_close(merged, problem.params, atol=1e-6)
    plain, _ = merges.running().update(problem, {}, step)
    self.assertGreater(
      float(jnp.abs(plain["in"]["kernel"] - moved["in"]["kernel"]).max()), 0.01
    )

  def test_the_ends_of_a_curve(self):
    problem = _problems.problem(hidden=True)
    rows = problem.rows_of([0, 1])
    expert = jax.tree.map(lambda leaf: leaf + 0.1, problem.params)
    step = merges.Step(problem.params, expert, 1, rows)
    for t, wanted in ((0.0, problem.params), (1.0, expert)):
      merged, _ = merges.curve(BRIEF, t=t).update(problem, {}, step)
      chex.assert_trees_all_close(merged, wanted, atol=1e-6)
    half, _ = merges.curve(BRIEF, t=0.5).update(problem, {}, step)
    second, _ = merges.curve(BRIEF, t="1/t").update(problem, {}, step)
    chex.assert_trees_all_close(half, second)

  @parameterized.parameters(
    (lambda: merges.running(2.0), "weight must be '1/t' or lie in"),
    (lambda: merges.running(align="cca"), "Unknown align 'cca'"),
    (lambda: merges.by_rule("slerp"), "at most 2 models"),
    (lambda: merges.by_rule("tiess"), "unknown merge method 'tiess'"),
    (lambda: merges.curve(t="half"), "t must be '1/t', 'best' or lie in"),
    (lambda: merges.curve(hold_out=0.0), "hold_out must lie in"),
    (lambda: merges.simplex(concentration=0.0), "concentration must be"),
    (lambda: merges.running_regmean(alpha=2.0), "alpha must lie in"),
    (lambda: merges.running_regmean(damping=-1.0), "damping must not be"),
    (lambda: merges.running_regmean(samples=0), "samples must be at least"),
  )
  def test_bad_options(self, make, message):
    with self.assertRaisesRegex(ValueError, message):
      make()


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
        kernel = kernel - 0.1 * _softmax_gradient(kernel, images, labels)
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
