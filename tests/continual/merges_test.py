"""Tests of merges."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import merging
from jaxmerge.continual import merges, strategies
from tests.continual import _problems
from tests.continual._problems import BRIEF


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


if __name__ == "__main__":
  absltest.main()
