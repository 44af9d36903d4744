"""Tests of BECAME, gradient projection memory, PAM and Tunable MagMax."""

from __future__ import annotations

import dataclasses
import functools
import tempfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from scipy import optimize

from jaxmerge import checkpoints, continual, merging, models
from jaxmerge.continual import (
  _merge_became,
  _projection,
  _signs,
  merges,
  regularizers,
  strategies,
)
from tests.continual import _problems
from tests.continual._problems import STEPS, Training

BRIEF = Training(0.05, epochs=2, batch_size=8)
LORA = models.Lora(rank=2, alpha=4.0, targets="kernel")
Projection = continual.Projection


@functools.cache
def _problem(hidden=True):
  return _problems.problem(hidden=hidden, capacity=0)


def _reported(problem):
  found = {}

  def report(what, task, values):
    found.setdefault((what, task), {}).update(values)

  return dataclasses.replace(problem, report=report), found


def _kernel(tree, seed=0, name="out"):
  return np.asarray(tree[name]["kernel"][seed], np.float64)


class BecameTest(parameterized.TestCase):
  def test_coefficient_minimises_the_sum_of_quadratics(self):
    draws = np.random.default_rng(0)
    anchor, expert = draws.normal(size=(2, 8))
    new, old = draws.uniform(0.1, 2, size=(2, 8))

    def loss(share):
      point = anchor + share * (expert - anchor)
      return (new * (point - expert) ** 2 + old * (point - anchor) ** 2).sum()

    best = optimize.minimize_scalar(loss, bounds=(0, 1), method="bounded")
    found = _merge_became.became_coefficient(
      {"w": jnp.asarray(expert - anchor, jnp.float32)},
      {"w": jnp.asarray(new, jnp.float32)},
      {"w": jnp.asarray(old, jnp.float32)},
    )
    np.testing.assert_allclose(found, best.x, atol=1e-5)

  @parameterized.product(reduction=("mean", "sum"), projected=(False, True))
  def test_merge(self, reduction, projected):
    problem, told = _reported(_problem())
    merge = merges.became(reduction=reduction, labels="empirical", samples=16)
    draws = np.random.default_rng(1)

    def near(leaf):
      noise = draws.normal(size=leaf.shape)
      return leaf + jnp.asarray(0.2 * noise, jnp.float32)

    state = merge.init(problem)
    rows = np.zeros((2, 0), np.int32)
    first = jax.tree.map(near, problem.params)
    merged, state = merge.update(
      problem, state, merges.Step(problem.params, first, 0, rows, first)
    )
    chex.assert_trees_all_equal(merged, first)
    self.assertNotIn(("became", 0), told)
    anchor = jax.tree.map(near, first) if projected else first
    expert = jax.tree.map(near, anchor)
    merged, after = merge.update(
      problem, state, merges.Step(first, expert, 1, rows, anchor)
    )

    def fisher(params, task, seed):
      images, labels = _problems.task_data(problem, task)
      return merging.diagonal_fisher(
        problem.logits_fn,
        jax.tree.map(lambda leaf: leaf[seed], params),
        [(images[:16], labels[:16])],
        labels="empirical",
        reduction=reduction,
      )

    for seed in range(2):
      new, old = fisher(expert, 1, seed), fisher(first, 0, seed)
      products = [
        sum(
          (
            (_kernel(expert, seed, n) - _kernel(anchor, seed, n)) ** 2
            * np.asarray(one[n]["kernel"], np.float64)
          ).sum()
          for n in ("in", "out")
        )
        for one in (new, old)
      ]
      share = products[0] / sum(products)
      np.testing.assert_allclose(
        told["became", 1]["coefficient"][seed], share, rtol=1e-4
      )
      for name in ("in", "out"):
        begin = _kernel(anchor, seed, name)
        np.testing.assert_allclose(
          _kernel(merged, seed, name),
          begin + share * (_kernel(expert, seed, name) - begin),
          rtol=1e-4,
          atol=1e-6,
        )
        at_merge = fisher(merged, 1, seed)[name]["kernel"]
        np.testing.assert_allclose(
          after["fisher"][name]["kernel"][seed],
          np.asarray(old[name]["kernel"]) + np.asarray(at_merge),
          rtol=1e-3,
          atol=1e-6,
        )

  def test_reduction_matters_where_sizes_differ(self):
    stream = _problem().stream
    tasks = list(stream.tasks)
    tasks[1] = tasks[1]._replace(train=tasks[1].train[:8])
    problem = _problems.problem(
      hidden=True, capacity=0, stream=stream._replace(tasks=tuple(tasks))
    )
    found = {}
    for reduction in ("mean", "sum"):
      told_of, told = _reported(problem)
      strategy = strategies.get(
        "became", training=BRIEF, projection=None, reduction=reduction
      )
      _problems.observe(strategy, told_of, 2)
      found[reduction] = told["became", 1]["coefficient"]
    # A task of few examples counts less by their sum.
    self.assertTrue((found["sum"] < found["mean"]).all(), found)

  def test_anchor_is_the_projected_training(self):
    problem = _problem()
    seen = []

    def update(problem, state, step):
      seen.append(step)
      return step.expert, state

    watch = merges.Merge("watch", lambda problem: {}, update)
    strategy = continual.compose(
      "x",
      continual.Learner(BRIEF, start="merged", projection=Projection()),
      merge=watch,
    )
    _problems.observe(strategy, problem, 2)
    # The first task has nothing to spare: one training.
    chex.assert_trees_all_equal(seen[0].anchor, problem.params)
    alone = continual.compose(
      "x",
      continual.Learner(
        BRIEF, start="merged", projection=Projection(release=False)
      ),
      merge=watch,
    )
    state = alone.init(problem)._replace(current=seen[0].expert)
    held = strategy.observe(problem, strategy.init(problem), 0).learner
    alone.observe(problem, state._replace(learner=held), 1)
    chex.assert_trees_all_equal(seen[-1].expert, seen[1].anchor)
    difference = np.abs(_kernel(seen[1].expert) - _kernel(seen[1].anchor)).max()
    self.assertGreater(difference, 1e-3)

  def test_no_fisher(self):
    problem = _problem()
    merge = merges.became(samples=8)
    rows = np.zeros((2, 0), np.int32)
    state = merge.init(problem)
    same = merges.Step(problem.params, problem.params, 1, rows, problem.params)
    with self.assertRaisesRegex(
      ValueError, "task 1 .seed 0. is not finite, or"
    ):
      merge.update(problem, state, same)
    endless = jax.tree.map(lambda leaf: leaf * jnp.inf, problem.params)
    with self.assertRaisesRegex(ValueError, "task 0 .seed 0. is not finite"):
      merge.update(
        problem, state, merges.Step(problem.params, endless, 0, rows, endless)
      )
    coefficient = _merge_became.became_coefficient
    self.assertTrue(np.isnan(coefficient(1.0, 1.0, jnp.inf)))
    # The same logits for all inputs: no parameter matters.
    silent = dataclasses.replace(
      problem, logits_fn=lambda params, x: jnp.zeros((len(x), 6))
    )
    with self.assertRaisesRegex(ValueError, "task 0 .seed 0. is zero"):
      merge.update(
        silent, state, merges.Step(problem.params, problem.params, 0, rows)
      )
    for options, message in (
      ({"labels": "none"}, "labels 'none'"),
      ({"reduction": "max"}, "reduction 'max'"),
      ({"head": "none"}, "head 'none'"),
      ({"samples": 0}, "samples must be at least 1"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        merges.became(**options)


class ProjectionTest(parameterized.TestCase):
  @parameterized.parameters(0.5, 0.9, 0.99, 1.0)
  def test_directions_are_those_of_the_svd(self, threshold):
    draws = np.random.default_rng(4)
    rows = draws.normal(size=(30, 6)) * np.array([5, 3, 1, 0.5, 0.1, 0.01])
    found = _projection.grown(np.zeros((6, 6)), rows.T @ rows, threshold)
    _, values, vectors = np.linalg.svd(rows)
    shares = (values**2).cumsum() / (values**2).sum()
    count = int(np.argmax(shares >= threshold - 1e-12)) + 1
    np.testing.assert_allclose(
      found, vectors[:count].T @ vectors[:count], atol=1e-8
    )

  def test_a_second_task_adds_what_the_first_lacks(self):
    draws = np.random.default_rng(5)
    first = draws.normal(size=(20, 2)) @ np.eye(6)[:2]
    second = draws.normal(size=(20, 3)) @ np.eye(6)[1:4]
    projector = _projection.grown(np.zeros((6, 6)), first.T @ first, 1.0)
    np.testing.assert_allclose(
      projector, np.diag([1, 1, 0, 0, 0, 0.0]), atol=1e-7
    )
    projector = _projection.grown(projector, second.T @ second, 1.0)
    np.testing.assert_allclose(
      projector, np.diag([1, 1, 1, 1, 0, 0.0]), atol=1e-7
    )
    again = _projection.grown(projector, first.T @ first, 1.0)
    np.testing.assert_allclose(again, projector, atol=1e-7)

  @parameterized.parameters((64, 5), (64, 64), (24, 3))
  def test_stays_a_projector(self, size, rank):
    """Over many tasks, rounded to float32 between them."""
    draws = np.random.default_rng(9)
    projector = np.zeros((size, size), np.float32)
    for task in range(16):
      inputs = draws.normal(size=(125, rank)) @ draws.normal(size=(rank, size))
      inputs = inputs.astype(np.float32)
      before = projector
      gram = inputs.T @ inputs
      threshold = min(1.0, 0.97 + 0.003 * task)
      projector = _projection.grown(before, gram, threshold)
      values = np.linalg.eigvalsh(projector)
      self.assertLess(np.abs(values - values.round()).max(), 1e-5)
      self.assertBetween(values.round().max(), 1, 1)
      self.assertGreaterEqual(
        np.trace(projector @ gram), (threshold - 1e-5) * np.trace(gram)
      )
      # What was spared stays spared.
      np.testing.assert_allclose(projector @ before, before, atol=1e-4)
      projector = projector.astype(np.float32)

  @parameterized.parameters("sgd", "adam")
  def test_what_earlier_tasks_see_stays(self, optimizer):
    """Outputs on the first task do not move where all is spared."""
    stream = _problem(False).stream
    # Few examples, so that their inputs do not span everything.
    tasks = [task._replace(train=task.train[:4]) for task in stream.tasks]
    problem = _problems.problem(
      capacity=0, stream=stream._replace(tasks=tuple(tasks))
    )
    settings = Training(0.05, optimizer=optimizer, epochs=5, batch_size=4)
    found = {}
    for name, options in (
      ("gpm", {"projection": Projection(threshold=1.0, samples=None)}),
      ("naive", {}),
    ):
      strategy = strategies.get(name, training=settings, **options)
      state = strategy.init(problem)
      images, _ = _problems.task_data(problem, 0)
      logits = []
      for task in range(2):
        state = strategy.observe(problem, state, task)
        params = jax.tree.map(
          lambda leaf: leaf[0], strategy.params(problem, state)
        )
        logits.append(problem.logits_fn(params, images))
      found[name] = float(jnp.abs(logits[1] - logits[0]).max())
    self.assertLess(found["gpm"], 1e-4)
    self.assertGreater(found["naive"], 0.05)

  @parameterized.parameters("frozen", "free")
  def test_other_parameters(self, others):
    def logits_fn(params, images):
      flat = images.reshape(len(images), -1)
      return flat @ params["kernel"] + params["bias"][None]

    base = _problem(False)
    params = {
      "kernel": base.params["out"]["kernel"],
      "bias": jnp.zeros((2, 6)),
    }
    problem = continual.make_problem(
      base.stream, logits_fn, params, keys=base.keys
    )
    strategy = strategies.get(
      "gpm", training=BRIEF, projection=Projection(others=others)
    )
    state = strategy.init(problem)
    biases = []
    for task in range(2):
      state = strategy.observe(problem, state, task)
      biases.append(np.asarray(state.current["bias"]))
    self.assertGreater(np.abs(biases[0]).max(), 0)
    self.assertEqual(np.array_equal(*biases), others == "frozen")

  def test_bad_settings(self):
    for options, message in (
      ({"threshold": 0.0}, "threshold must lie"),
      ({"growth": -0.1}, "growth must not be negative"),
      ({"others": "all"}, "others 'all'"),
      ({"samples": 0}, "samples must be at least 1"),
      ({"training": Training(-1.0)}, "projection.training: learning rates"),
    ):
      strategy = strategies.get(
        "gpm", training=BRIEF, projection=Projection(**options)
      )
      with self.assertRaisesRegex(ValueError, message):
        strategy.init(_problem())


class PamTest(parameterized.TestCase):
  def test_signs_of_the_largest(self):
    problem = _problem(False)
    draws = np.random.default_rng(6)
    origin = problem.params
    start = jax.tree.map(
      lambda leaf: leaf + jnp.asarray(draws.normal(size=leaf.shape), "float32"),
      origin,
    )
    for reset, value in (("zero", origin), ("global", start)):
      signs = continual.Signs(fraction=0.25, reset=reset)
      none = _signs.data(problem, signs, start, origin, 0)
      self.assertFalse(none["sign"]["out"]["kernel"].any())
      found = _signs.data(problem, signs, start, origin, 1)
      chex.assert_trees_all_equal(found["value"], value)
      for seed in range(2):
        vector = _kernel(start, seed) - _kernel(origin, seed)
        bound = np.sort(np.abs(vector).reshape(-1))[-int(0.25 * vector.size)]
        np.testing.assert_array_equal(
          found["sign"]["out"]["kernel"][seed],
          np.where(np.abs(vector) >= bound, np.sign(vector), 0),
        )

  @parameterized.parameters(("leaf", (5, 5)), ("vector", (10, 0)))
  def test_scope_of_the_fraction(self, scope, expected):
    problem = _problem()
    draws = np.random.default_rng(8)
    start = {
      "large": jnp.asarray(draws.normal(size=(2, 10)) + 9, jnp.float32),
      "small": jnp.asarray(0.01 * draws.normal(size=(2, 10)), jnp.float32),
    }
    origin = jax.tree.map(jnp.zeros_like, start)
    signs = continual.Signs(fraction=0.5, scope=scope)
    found = _signs.data(problem, signs, start, origin, 1)["sign"]
    counts = tuple(int((found[n][0] != 0).sum()) for n in ("large", "small"))
    self.assertEqual(counts, expected)

  def test_global_adapter_is_the_mean(self):
    """Against the same training by hand, its signs held by hand."""
    problem = _problem(False)
    signs = continual.Signs(period=2, fraction=0.5)
    strategy = strategies.get(
      "pam", training=STEPS._replace(epochs=4), adapter=None, signs=signs
    )
    state = strategy.init(problem)
    after = []
    for task in range(2):
      state = strategy.observe(problem, state, task)
      after.append(strategy.params(problem, state))
    for seed in range(2):
      origin = _kernel(problem.params, seed)
      start = _kernel(after[0], seed)
      vector = start - origin
      bound = np.sort(np.abs(vector).reshape(-1))[-vector.size // 2]
      held = np.where(np.abs(vector) >= bound, np.sign(vector), 0)
      point = start
      images, labels = _problems.task_data(problem, 1)
      for number in range(1, 5):
        point = point - 0.1 * _problems.gradient(point, images, labels)
        if number % 2 == 0:
          other = (held != 0) & (np.sign(point - origin) != held)
          point = np.where(other, origin, point)
      np.testing.assert_allclose(
        _kernel(after[1], seed), (start + point) / 2, atol=1e-5
      )

  def test_adapters(self):
    problem = _problem()
    strategy = strategies.get("pam", training=BRIEF, adapter=LORA)
    state = strategy.init(problem)
    chex.assert_trees_all_equal(strategy.params(problem, state), problem.params)
    state = strategy.observe(problem, state, 0)
    adapters = state.current
    self.assertEqual(set(adapters), {"in/kernel", "out/kernel"})
    state = strategy.observe(problem, state, 1)
    params = strategy.params(problem, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, problem.params)
    for seed in range(2):
      for name in ("in", "out"):
        a, b = (
          np.asarray(state.current[f"{name}/kernel"][part][seed], np.float64)
          for part in "ab"
        )
        np.testing.assert_allclose(
          _kernel(params, seed, name),
          _kernel(problem.params, seed, name) + 2 * a @ b,
          atol=1e-5,
        )
    size = sum(leaf[0].nbytes for leaf in jax.tree.leaves(problem.params))
    small = sum(leaf[0].nbytes for leaf in jax.tree.leaves(state.current))
    self.assertEqual(
      strategy.memory(problem, state, 2)["networks"], size + small
    )

  def test_adapters_learn_what_the_loss_says(self):
    """One full-batch step of plain SGD on the factors, by hand."""
    problem = _problem(False)
    once = Training(0.5, momentum=0.0, epochs=1, batch_size=32)
    strategy = continual.compose(
      "x", continual.Learner(once, start="initial", adapter=LORA)
    )
    state = strategy.observe(problem, strategy.init(problem), 0)
    new = strategy.init(problem).current["out/kernel"]
    images, labels = _problems.task_data(problem, 0)
    for seed in range(2):
      a = np.asarray(new["a"][seed], np.float64)
      slope = _problems.gradient(_kernel(problem.params, seed), images, labels)
      np.testing.assert_allclose(
        state.current["out/kernel"]["b"][seed],
        -0.5 * 2 * a.T @ slope,
        atol=1e-5,
      )
      # B is zero: A has no slope in the first step.
      np.testing.assert_allclose(
        state.current["out/kernel"]["a"][seed], a, atol=1e-7
      )

  def test_magmax_on_adapters(self):
    problem = _problem()
    strategy = continual.compose(
      "x",
      continual.Learner(BRIEF, start="initial", adapter=LORA),
      merge=merges.by_rule("magmax", scale=1.0),
    )
    state = _problems.observe(strategy, problem, 2)
    chex.assert_tree_all_finite(strategy.params(problem, state))

  def test_what_adapters_cannot_do(self):
    problem = _problem()
    learner = continual.Learner(BRIEF, adapter=LORA)
    for more, message in (
      ({"merge": merges.by_rule("regmean")}, "a merge that runs the network"),
      ({"finetune": continual.Finetune()}, "fine-tuning"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        continual.compose("x", learner, **more)
    bad = learner._replace(projection=Projection())
    with self.assertRaisesRegex(ValueError, "without a projection"):
      continual.compose("x", bad).init(problem)
    bad = learner._replace(adapter=models.Lora(targets="query"))
    with self.assertRaisesRegex(ValueError, "targets 'query'"):
      continual.compose("x", bad).init(problem)
    for options, message in (
      ({"period": 0}, "period must be a whole number"),
      ({"period": 2.5}, "period must be a whole number"),
      ({"fraction": 0.0}, "fraction must lie"),
      ({"reset": "one"}, "reset 'one'"),
      ({"scope": "layer"}, "scope 'layer'"),
    ):
      strategy = strategies.get(
        "pam", training=BRIEF, adapter=None, signs=continual.Signs(**options)
      )
      with self.assertRaisesRegex(ValueError, message):
        strategy.init(problem)


class TunableTest(parameterized.TestCase):
  @parameterized.parameters(None, ((3.0, 1.0, 0.0),))
  def test_is_the_merge_of_the_networks(self, preferences):
    problem = _problem()
    seen = []

    def update(problem, state, step):
      seen.append(step.expert)
      return step.expert, state

    watch = merges.Merge("watch", lambda problem: {}, update)
    learner = continual.Learner(BRIEF)
    _problems.observe(continual.compose("x", learner, merge=watch), problem)
    strategy = strategies.get(
      "tunable_magmax", training=BRIEF, preferences=preferences, scale=0.7
    )
    found = _problems.observe(strategy, problem).current
    for seed in range(2):
      one = functools.partial(jax.tree.map, lambda leaf, s=seed: leaf[s])
      expected = merging.tunable_magmax(
        one(problem.params),
        [one(expert) for expert in seen],
        problem.keys_for("merge", "tunable_magmax")[seed],
        preferences=preferences,
        scale=0.7,
      )
      chex.assert_trees_all_close(one(found), expected, rtol=1e-6)

  @parameterized.parameters("labels", "cosine", "mmd", "ot")
  def test_similarity(self, similarity):
    """Target data of the second task prefer the second task."""
    problem, told = _reported(_problem())
    images, labels = _problems.task_data(problem, 1)
    options = {} if similarity == "labels" else {"temperature": 0.2}
    strategy = strategies.get(
      "tunable_magmax",
      training=BRIEF,
      similarity=similarity,
      target={"input": images, "label": labels},
      samples=16,
      **options,
    )
    _problems.observe(strategy, problem)
    if similarity != "labels":
      self.assertEqual(
        told["tunable_magmax", 0]["preferences"].tolist(), [[1.0], [1.0]]
      )
    found = told["tunable_magmax", 2]["preferences"]
    self.assertEqual(found.shape, (2, 3))
    np.testing.assert_allclose(found.sum(axis=1), 1)
    np.testing.assert_array_equal(found.argmax(axis=1), 1)

  def test_bad_options(self):
    problem = _problem()
    for options, message in (
      ({"preferences": (1, -1, 1)}, "not negative"),
      ({"preferences": (0, 0, 0)}, "first task must be positive"),
      ({"preferences": 5}, "one a task, got 5"),
      ({"preferences": ("a", 1, 1)}, "must be numbers"),
      ({"similarity": "rank", "target": {}}, "similarity 'rank'"),
      ({"similarity": "ot"}, "give both, or none"),
      ({"similarity": "labels", "target": {"input": 0}}, "need a 'label'"),
      ({"preferences": (1,), "similarity": "ot"}, "not both"),
      ({"temperature": 1.0}, "'temperature' is of a similarity"),
      ({"samples": 0}, "samples must be at least 1"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        merges.tunable_magmax(**options)
    with self.assertRaisesRegex(ValueError, "2 preferences for 3 tasks"):
      strategies.get("tunable_magmax", preferences=(1, 1)).init(problem)
    for labels, message in (
      (np.zeros(0, np.int32), "not empty"),
      (np.array([1.5]), "vector of integers"),
      (np.array([17]), "No task of the stream"),
    ):
      strategy = strategies.get(
        "tunable_magmax", similarity="labels", target={"label": labels}
      )
      with self.assertRaisesRegex(ValueError, message):
        strategy.init(problem)

  def test_no_example_is_compared_twice(self):
    problem = _problem()
    target = {"input": _problems.task_data(problem, 1)[0]}
    strategy = strategies.get(
      "tunable_magmax", training=BRIEF, similarity="mmd", target=target
    )
    seen = np.asarray(strategy.init(problem).merge["seen"])
    # A task has 32 examples, of 200 that are asked for.
    self.assertEqual(seen.shape, (2, 3, 32, 6))


class StrategyTest(parameterized.TestCase):
  @parameterized.parameters("became", "pam", "trm", "tunable_magmax")
  def test_resumed_is_unbroken(self, name):
    problem = _problem()
    options = {
      "pam": {"adapter": LORA},
      "trm": {"path": continual.Path(2)},
    }.get(name, {})
    strategy = strategies.get(name, training=BRIEF, **options)
    states = [strategy.init(problem)]
    for task in range(2):
      states.append(strategy.observe(problem, states[-1], task))
    with (
      tempfile.TemporaryDirectory() as folder,
      checkpoints.Store(folder) as store,
    ):
      store.save(1, states[1], {})
      store.wait()
      _, found, _ = store.restore(strategy.init(problem))
    again = strategy.observe(problem, found, 1)
    chex.assert_trees_all_equal(
      strategy.params(problem, again), strategy.params(problem, states[2])
    )

  @parameterized.parameters("became", "gpm", "pam", "trm", "tunable_magmax")
  def test_half_types(self, name):
    base = _problem()
    problem = continual.make_problem(
      base.stream,
      lambda params, images: _problems.hidden_fn(
        params, images.astype(jnp.bfloat16)
      ).astype(jnp.float32),
      jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base.params),
      keys=base.keys,
    )
    options = {
      "pam": {"adapter": LORA},
      "trm": {
        "path": continual.Path(2),
        "derivative": "forward_over_reverse",
      },
    }.get(name, {})
    strategy = strategies.get(
      name,
      training=Training(0.05, optimizer="adam", epochs=1, batch_size=8),
      **options,
    )
    state = _problems.observe(strategy, problem, 2)
    params = strategy.params(problem, state)
    chex.assert_trees_all_equal_dtypes(params, problem.params)
    chex.assert_tree_all_finite(params)
    if name == "trm":
      blind = strategies.get(name, training=BRIEF, path=continual.Path(2))
      with self.assertRaisesRegex(ValueError, "lost in parameters of bfloat16"):
        blind.init(problem)

  @parameterized.parameters("naive", "ewc", "trm")
  def test_half_logits(self, name):
    """Without strict promotion logits may be of a half type, too."""
    base = _problem()
    problem = continual.make_problem(
      base.stream,
      lambda params, x: _problems.hidden_fn(params, x.astype(jnp.bfloat16)),
      jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base.params),
      keys=base.keys,
    )
    options = {
      "ewc": {"weight": 1.0, "samples": 8},
      "trm": {
        "path": continual.Path(2),
        "derivative": "forward_over_reverse",
      },
    }.get(name, {})
    strategy = strategies.get(name, training=BRIEF, **options)
    with jax.numpy_dtype_promotion("standard"):
      state = _problems.observe(strategy, problem, 2)
    chex.assert_trees_all_equal_dtypes(state.current, problem.params)
    chex.assert_tree_all_finite(state.current)

  def test_parts_that_do_not_go_together(self):
    problem = _problem()
    only = Projection(release=False)
    for more in (
      {"signs": continual.Signs()},
      {"path": continual.Path(1)},
      {"regularizer": regularizers.ewc(1.0)},
    ):
      learner = continual.Learner(BRIEF, projection=only, **more)
      with self.assertRaisesRegex(ValueError, f"has {next(iter(more))}"):
        continual.compose("x", learner).init(problem)
    learner = continual.Learner(BRIEF, start="last", path=continual.Path(1))
    for merge in (merges.trm(), merges.became()):
      with self.assertRaisesRegex(ValueError, "start='merged'"):
        continual.compose("x", learner, merge=merge)
    adapted = continual.Learner(BRIEF, adapter=LORA)
    with self.assertRaisesRegex(ValueError, "runs the network"):
      continual.compose("x", adapted, merge=merges.running(align="weights"))
    for name in ("trm", "became", "tunable_magmax"):
      with self.assertRaisesRegex(ValueError, "bogus"):
        strategies.get(name, bogus=1)

  def test_memory_of_tunable_magmax(self):
    """All networks, the last, the merged and the initial one."""
    problem = _problem()
    strategy = strategies.get("tunable_magmax", training=BRIEF)
    state = _problems.observe(strategy, problem, 2)
    size = sum(leaf[0].nbytes for leaf in jax.tree.leaves(problem.params))
    self.assertEqual(strategy.memory(problem, state, 2)["networks"], 5 * size)


class StatisticsTest(parameterized.TestCase):
  def test_layers_in_a_condition(self):
    """A network with a condition needs a plain one for its statistics."""
    base = _problem(False)

    def logits_fn(params, images):
      return jax.lax.cond(
        jnp.asarray(len(images)) > 1,
        lambda: _problems.logits_fn(params, images),
        lambda: _problems.logits_fn(params, images),
      )

    def make(**options):
      return continual.make_problem(
        base.stream, logits_fn, base.params, keys=base.keys, **options
      )

    strategy = strategies.get("gpm", training=BRIEF)
    with self.assertRaisesRegex(ValueError, "within a cond"):
      strategy.init(make())
    problem = make(statistics_fn=_problems.logits_fn)
    state = _problems.observe(strategy, problem, 2)
    chex.assert_tree_all_finite(state.current)

  @parameterized.named_parameters(
    ("gpm", strategies.get("gpm", training=BRIEF), "projection"),
    (
      "running_regmean",
      continual.compose(
        "x", continual.Learner(BRIEF), merge=merges.running_regmean()
      ),
      "grams",
    ),
    (
      "regmean",
      continual.compose(
        "x", continual.Learner(BRIEF), merge=merges.by_rule("regmean")
      ),
      "'gram'",
    ),
  )
  def test_rows_that_do_not_count(self, strategy, held):
    """Examples that are masked leave nothing in the layers' statistics."""
    base = _problem(False)

    def make(**options):
      return continual.make_problem(
        base.stream, base.logits_fn, base.params, keys=base.keys, **options
      )

    nothing = make(mask_fn=lambda images: jnp.zeros(len(images), bool))
    for problem, empty in ((make(), False), (nothing, True)):
      state = _problems.observe(strategy, problem, 1)
      found = [
        np.abs(leaf).max()
        for path, leaf in jax.tree.leaves_with_path(state)
        if held in str(path)
      ]
      self.assertLen(found, 1)
      self.assertEqual(found[0] == 0, empty)


if __name__ == "__main__":
  absltest.main()
