"""Tests of merges."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from scipy import special

from jaxmerge import merging
from jaxmerge.continual import merges, strategies, streams
from tests.continual import _problems
from tests.continual._problems import BRIEF


class MergeTest(parameterized.TestCase):
  def _experts(self, problem, strategy):
    """The networks of the tasks, as the strategies share them."""
    if isinstance(strategy, str):
      strategy = strategies.get(strategy, training=BRIEF)
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

  @parameterized.parameters(
    ("fisher_average", {}, merging.diagonal_fisher, None),
    ("regmean", {"alpha": 0.5}, merging.gram_matrices, 20),
  )
  def test_rules_get_statistics_of_their_task(
    self, name, options, collect, samples
  ):
    problem = _problems.problem(capacity=0)
    strategy = strategies.get(
      f"merge:{name}", training=BRIEF, samples=samples, **options
    )
    state = _problems.observe(strategy, problem)
    experts = self._experts(problem, strategy)
    images = [_problems.task_data(problem, t)[0][:samples] for t in range(3)]
    rule = getattr(merging, name)
    for i in range(2):
      models = [_problems.seed(one, i) for one in experts]
      found = [
        collect(problem.logits_fn, model, [x])
        for model, x in zip(models, images, strict=True)
      ]
      chex.assert_trees_all_close(
        _problems.seed(state.current, i),
        rule(models, found, **options),
        rtol=1e-4,
        atol=1e-6,
      )

  def test_heads_of_other_tasks_carry_no_information(self):
    stream = streams.task_incremental(
      _problems.source(20, 0), _problems.source(10, 1), num_tasks=3
    )
    problem = _problems.problem(capacity=0, stream=stream)
    strategy = strategies.get("merge:fisher_average", training=BRIEF)
    state = _problems.observe(strategy, problem)
    experts = self._experts(problem, strategy)
    # A head without a hidden layer: only its own task's network weighs.
    for task, expert in enumerate(experts):
      own = slice(2 * task, 2 * task + 2)
      np.testing.assert_allclose(
        state.current["out"]["kernel"][..., own],
        expert["out"]["kernel"][..., own],
        rtol=1e-3,
        atol=1e-4,
      )

  def test_simplex_takes_iterations(self):
    problem = _problems.problem(hidden=True)
    iterations = BRIEF._replace(iterations=3)
    merge = merges.simplex(iterations)
    state = merge.init(problem)
    rows = problem.rows_of([0])
    step = merges.Step(problem.params, problem.params, 0, rows)
    _, state = merge.update(problem, state, step)
    moved = jax.tree.map(lambda leaf: leaf + 0.1, problem.params)
    merged, _ = merge.update(
      problem, state, step._replace(expert=moved, task=1)
    )
    chex.assert_tree_all_finite(merged)

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
      _problems.task_data(problem, task)[0].reshape(-1, 9).astype(float)
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

  def test_running_regmean_of_three_tasks(self):
    problem = _problems.problem(capacity=0)
    merge = merges.running_regmean(alpha=0.6, damping=0.1)
    draws = np.random.default_rng(1)
    networks = draws.normal(size=(3, 2, 9, 6)).astype(np.float32)
    none = np.zeros((2, 0), np.int32)
    state, current = merge.init(problem), problem.params
    for task, network in enumerate(networks):
      step = merges.Step(
        current, {"out": {"kernel": jnp.asarray(network)}}, task, none
      )
      current, state = merge.update(problem, state, step)
    total = np.zeros((9, 9))
    wanted = networks[0].astype(float)
    for task, network in enumerate(networks):
      x = _problems.task_data(problem, task)[0].reshape(-1, 9).astype(float)
      gram = x.T @ x / len(x)
      gram = gram + 0.1 * np.trace(gram) / 9 * np.eye(9)
      gram = np.where(np.eye(9, dtype=bool), gram, 0.6 * gram)
      products = total @ wanted + gram @ network
      total = total + gram
      wanted = np.linalg.solve(total, products)
    np.testing.assert_allclose(
      current["out"]["kernel"], wanted, rtol=1e-3, atol=1e-4
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
    # The merged, the initial one, and those of the tasks.
    self.assertEqual(bytes_of["merge:model_stock"], [3 * network, 5 * network])

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
    curved, _ = merges.curve(BRIEF, t=1.0, align="ot").update(
      problem, {}, step._replace(buffer=problem.rows_of([0, 1]))
    )
    chex.assert_trees_all_close(curved, problem.params, atol=1e-6)

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

  def test_best_point_of_a_curve_is_that_on_held_out_examples(self):
    problem = _problems.problem()
    far = jax.tree.map(lambda leaf: -20 * leaf, problem.params)
    rows = problem.rows_of([0, 1])[:, ::2]
    step = merges.Step(far, self._experts(problem, "avg")[0], 1, rows)
    merge = merges.curve(BRIEF, t="best", hold_out=0.25)
    best, _ = merge.update(problem, {}, step)
    # Every fourth is held out, the curve is fitted on the others.
    last = np.arange(rows.shape[1]) % 4 == 0
    fitted = step._replace(buffer=rows[:, ~last])
    examples = problem.examples(rows[:, last])
    grid = np.linspace(0, 1, 21)
    points = [
      np.asarray(
        merges.curve(BRIEF, t=float(t)).update(problem, {}, fitted)[0]["out"][
          "kernel"
        ]
      )
      for t in grid
    ]
    for i in range(2):
      labels = examples["label"][i]
      losses = []
      for point in points:
        logits = _problems.logits(point[i], examples["input"][i])
        chances = special.log_softmax(logits, axis=1)
        losses.append(-chances[np.arange(len(labels)), labels].mean())
      found = int(np.argmin(losses))
      self.assertGreater(losses[0], losses[found])
      np.testing.assert_allclose(
        best["out"]["kernel"][i], points[found][i], rtol=1e-5, atol=1e-5
      )

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


if __name__ == "__main__":
  absltest.main()
