"""Tests of trajectory regularised merging."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from scipy import special

from jaxmerge import continual
from jaxmerge import tree as tree_lib
from jaxmerge.continual import _merge_trm, _subspace, _trm, merges, strategies
from tests.continual import _problems
from tests.continual._problems import Training

TRAIN = Training(0.1, epochs=2, batch_size=8)
FEW = Training(0.1, optimizer="adam", iterations=4, batch_size=16)


def _reported(problem):
  """The problem with a report, and what it has been told."""
  found = {}

  def report(what, task, values):
    found.setdefault((what, task), {}).update(values)

  return dataclasses.replace(problem, report=report), found


def _strategy(**options):
  options.setdefault("coefficients", FEW)
  options.setdefault("path", continual.Path(2))
  return strategies.get("trm", training=TRAIN, **options)


@functools.cache
def _problem():
  return _problems.problem(hidden=True, capacity=0)


def _step(problem, seed=0):
  """A step with made-up networks."""
  draws = np.random.default_rng(seed)

  def near(scale, count=1):
    def one(leaf):
      shape = (len(leaf), count, *leaf.shape[1:])
      noise = draws.normal(size=shape)
      return jnp.asarray(np.asarray(leaf)[:, None] + scale * noise, "float32")

    return jax.tree.map(one, problem.params)

  def alone(tree):
    return jax.tree.map(lambda leaf: leaf[:, 0], tree)

  rows = np.zeros((problem.num_seeds, 0), np.int32)
  current = alone(near(0.0))
  expert = alone(near(0.2))
  return merges.Step(current, expert, 1, rows, current, near(0.1, 2))


class ObjectiveTest(parameterized.TestCase):
  def test_consistency_is_the_divergence(self):
    draws = np.random.default_rng(0)
    logits, targets = draws.normal(size=(2, 5, 4))
    mask = np.array([True, True, False, True])
    found = _trm.prediction_consistency(
      jnp.asarray(logits, jnp.float32),
      jnp.asarray(targets, jnp.float32),
      jnp.broadcast_to(mask, (5, 4)),
      2.0,
    )
    p = special.softmax(targets[:, mask] / 2, axis=1)
    q = special.softmax(logits[:, mask] / 2, axis=1)
    np.testing.assert_allclose(
      found, 4 * special.rel_entr(p, q).sum(axis=1), rtol=1e-4
    )

  def test_consistency_has_the_slope_of_the_divergence_alone(self):
    logits = jnp.array([[0.3, -0.2]])
    mask = jnp.ones((1, 2), bool)
    slope = jax.grad(
      lambda x: _trm.prediction_consistency(x, logits, mask).sum()
    )
    np.testing.assert_allclose(slope(logits), 0, atol=1e-7)

  def test_hinge(self):
    self.assertEqual(
      float(_trm.gradient_responsiveness(jnp.float32(2.0), 1.0)), 0
    )
    np.testing.assert_allclose(
      _trm.gradient_responsiveness(jnp.float32(0.4), 1.0), 0.6, rtol=1e-6
    )

  @parameterized.parameters(*_trm.DERIVATIVES)
  def test_slope_of_a_quadratics_gradient_norm(self, method):
    draws = np.random.default_rng(1)
    half = draws.normal(size=(6, 6))
    hessian = half @ half.T
    point = draws.normal(size=6)
    matrix = jnp.asarray(hessian, jnp.float32)
    x = jnp.asarray(point, jnp.float32)
    gradient = hessian @ point
    found = _trm.norm_gradient(
      lambda y: matrix @ y, x, matrix @ x, method=method, reach=0.1
    )
    np.testing.assert_allclose(
      found, hessian @ gradient / np.linalg.norm(gradient), rtol=1e-3
    )

  def test_both_slopes_agree_on_a_network(self):
    problem = _problem()
    images, labels = _problems.task_data(problem, 1)
    params = jax.tree.map(lambda leaf: leaf[0], problem.params)

    def gradient_fn(params):
      def loss(params):
        logits = _problems.hidden_fn(params, images)
        mask = jnp.ones(logits.shape, bool)
        return _trm.task_alignment(logits, labels, mask).mean()

      return jax.grad(loss)(params)

    found = [
      _trm.norm_gradient(
        gradient_fn, params, gradient_fn(params), method=method, reach=1e-3
      )
      for method in _trm.DERIVATIVES
    ]
    difference = tree_lib.norm(tree_lib.sub(*found))
    self.assertLess(float(difference / tree_lib.norm(found[1])), 0.02)

  def test_no_gradient_no_slope(self):
    zeros = jnp.zeros(3)
    for method in _trm.DERIVATIVES:
      found = _trm.norm_gradient(lambda x: 0 * x, zeros, zeros, method=method)
      np.testing.assert_array_equal(found, zeros)
    with self.assertRaisesRegex(ValueError, "derivative 'exact'"):
      _trm.norm_gradient(lambda x: x, zeros, zeros, method="exact")


class LossTest(parameterized.TestCase):
  @parameterized.parameters(
    (("alignment",), 0.0),
    (("alignment", "consistency"), 0.0),
    (("alignment", "consistency", "responsiveness"), 0.0),
    (("alignment", "consistency", "responsiveness"), 50.0),
  )
  def test_gradient_is_that_of_the_sum(self, terms, threshold):
    """Against the plain sum of the objectives, differentiated by JAX."""
    problem = _problem()
    step = _step(problem)
    groups = (0, 1)
    vectors = _trm.directions(step.current, step.expert, step.path, None)
    space = jax.tree.map(
      lambda leaf: leaf[0],
      _subspace.span(groups, step.current, vectors, 0.02),
    )
    images, labels = _problems.task_data(problem, 1)
    tasks = np.ones(len(labels), np.int32)
    masks = np.zeros((3, 6), bool)
    masks[:, :4] = True
    old = np.zeros((3, 6), bool)
    old[:, :2] = True
    weights = {"alignment": 0.7, "consistency": 1.3, "responsiveness": 0.5}
    frozen = {
      "space": space,
      "masks": masks,
      "old": old,
      "weights": {n: jnp.float32(v) for n, v in weights.items()},
      "temperature": jnp.float32(2),
      "threshold": jnp.float32(threshold),
      "reach": jnp.float32(1e-3),
    }
    batch = {"input": images, "label": labels, "task": tasks}
    loss = _trm.loss_fn(
      problem.logits_fn, groups, terms, "forward_over_reverse"
    )

    def mean(coefficients):
      from jaxmerge import training

      context = training.Context(frozen, batch, jax.random.key(0), None)
      losses, metrics = loss(coefficients, context)
      return losses.mean(), metrics

    mapped = jax.pmap(
      lambda a: jax.value_and_grad(mean, has_aux=True)(a), axis_name="devices"
    )
    start = jnp.asarray([[0.5, 0.1, 0.0], [0.4, 0.0, -0.1]])
    (value, metrics), slope = mapped(start[None])

    def plain(coefficients):
      params = _subspace.moved(groups, space, coefficients)

      def aligned(params):
        logits = problem.logits_fn(params, images)
        return _trm.task_alignment(logits, labels, masks[tasks]).mean()

      total = weights["alignment"] * aligned(params)
      if "consistency" in terms:
        losses = _trm.prediction_consistency(
          problem.logits_fn(params, images),
          problem.logits_fn(space.origin, images),
          old[tasks],
          2.0,
        )
        total += weights["consistency"] * losses.mean()
      if "responsiveness" in terms:
        norm = tree_lib.norm(jax.grad(aligned)(params))
        total += weights["responsiveness"] * jnp.maximum(0, threshold - norm)
      return total

    expected, expected_slope = jax.value_and_grad(plain)(start)
    np.testing.assert_allclose(value[0], expected, rtol=1e-5)
    np.testing.assert_allclose(slope[0], expected_slope, rtol=1e-3, atol=1e-5)
    names = {*terms, *(["gradient_norm"] if len(terms) == 3 else [])}
    self.assertEqual(set(metrics), names)


class MergeTest(parameterized.TestCase):
  @parameterized.parameters("global", "layer", "leaf")
  def test_lies_in_the_subspace(self, granularity):
    problem, found = _reported(_problem())
    step = _step(problem)
    merge = merges.trm(FEW, granularity=granularity, augment_subspace=False)
    merged, state = merge.update(problem, merge.init(problem), step)
    self.assertEqual(state, {})
    info = found["trm", 1]
    for seed in range(2):
      for place, name in enumerate(("in", "out")):
        way, *rows = (
          np.asarray(leaf[name]["kernel"][seed]).reshape(-1)
          - np.asarray(step.current[name]["kernel"][seed]).reshape(-1)
          for leaf in (
            merged,
            step.expert,
            jax.tree.map(lambda leaf: leaf[:, 0], step.path),
            jax.tree.map(lambda leaf: leaf[:, 1], step.path),
          )
        )
        matrix = np.stack(rows, axis=1)
        weights, residual, _, _ = np.linalg.lstsq(matrix, way)
        if granularity != "global":
          np.testing.assert_allclose(residual, 0, atol=1e-8)
          # Orthogonal directions: the first coefficient is the projection.
          first = rows[0] @ way / (rows[0] @ rows[0])
          np.testing.assert_allclose(
            info["coefficients"][seed, place, 0], first, rtol=1e-3
          )
        del weights
    groups = {"global": 1, "layer": 2, "leaf": 2}[granularity]
    self.assertEqual(info["coefficients"].shape, (2, groups, 3))
    self.assertEqual(
      info["directions"], ["task vector", "snapshot 2", "snapshot 1"]
    )
    self.assertEqual(info["dropped"], [[[]] * groups] * 2)
    for name in ("alignment", "consistency", "responsiveness"):
      self.assertEqual(info[f"step/{name}"].shape, (2, 4))

  def test_one_direction_and_one_term_is_a_line_search(self):
    """With the task vector alone the optimum of the loss is found."""
    problem, found = _reported(_problem())
    step = _step(problem)
    step = step._replace(
      path=jax.tree.map(lambda leaf: leaf[:, None], step.expert)
    )
    long = Training(0.05, optimizer="adam", iterations=300, batch_size=32)
    merge = merges.trm(
      long,
      augment_subspace=False,
      consistency=0.0,
      responsiveness=0.0,
      head="task",
    )
    merge.update(problem, {}, step)
    info = found["trm", 1]
    # The snapshot is the end of the training: nothing is left of it.
    self.assertEqual(info["dropped"], [[["snapshot 1"]]] * 2)
    self.assertEqual(set(info) & {"step/consistency", "step/hinge"}, set())
    images, labels = _problems.task_data(problem, 1)
    mask = np.zeros((len(labels), 6), bool)
    mask[:, list(problem.stream.tasks[1].classes)] = True
    grid = np.linspace(-4, 6, 2001)
    for seed in range(2):
      current, expert = (
        _problems.seed(tree, seed) for tree in (step.current, step.expert)
      )

      def loss(share, current=current, expert=expert):
        params = jax.tree.map(lambda a, b: a + share * (b - a), current, expert)
        logits = problem.logits_fn(params, images)
        return _trm.task_alignment(logits, labels, mask).mean()

      losses = jax.vmap(loss)(jnp.asarray(grid, jnp.float32))
      best = grid[int(jnp.argmin(losses))]
      self.assertBetween(best, -3.9, 5.9)
      self.assertLess(
        float(loss(info["coefficients"][seed, 0, 0])),
        float(losses.min()) + 0.02,
      )

  def test_responsiveness_raises_the_gradient(self):
    problem, found = _reported(_problem())
    step = _step(problem)
    norms = {}
    long = Training(0.05, optimizer="adam", iterations=40, batch_size=32)
    for weight in (0.0, 20.0):
      merge = merges.trm(
        long, responsiveness=weight, target=3.0, head="task", consistency=0.1
      )
      merged, _ = merge.update(problem, {}, step)
      norms[weight] = np.asarray(_norm(problem, merged))
    self.assertTrue((norms[20.0] > 1.2 * norms[0.0]).all(), norms)
    np.testing.assert_allclose(
      found["trm", 1]["plain_gradient_norm"],
      _norm(problem, tree_lib.lerp(step.current, step.expert, 0.5)),
      rtol=1e-5,
    )

  def test_both_derivatives_lead_to_the_same_merge(self):
    # Without ReLUs: the one sees their kinks, the other does not.
    problem = _problems.problem(capacity=0)
    step = _step(problem)
    found = []
    for derivative in _trm.DERIVATIVES:
      merge = merges.trm(FEW, responsiveness=5.0, derivative=derivative)
      found.append(merge.update(problem, {}, step)[0])
    way = tree_lib.norm(tree_lib.sub(found[0], step.current))
    difference = tree_lib.norm(tree_lib.sub(*found))
    self.assertLess(float(difference / way), 0.02)

  def test_cosines(self):
    problem, found = _reported(_problem())
    step = _step(problem)
    merge = merges.trm(FEW)
    merged, _ = merge.update(problem, {}, step)

    def way(tree, seed):
      return np.concatenate(
        [
          (np.asarray(a[seed]) - np.asarray(b[seed])).reshape(-1)
          for a, b in zip(
            jax.tree.leaves(tree), jax.tree.leaves(step.current), strict=True
          )
        ]
      )

    for seed in range(2):
      mine = way(merged, seed)
      for number in range(2):
        other = way(
          jax.tree.map(lambda leaf, n=number: leaf[:, n], step.path), seed
        )
        np.testing.assert_allclose(
          found["trm", 1]["cosines"][seed, number],
          mine @ other / np.linalg.norm(mine) / np.linalg.norm(other),
          rtol=1e-4,
        )

  def test_stream_compiles_once_and_holds_one_network(self):
    problem, found = _reported(_problem())
    strategy = _strategy()
    _trm.loss_fn.cache_clear()
    jax.clear_caches()
    state = strategy.init(problem)
    for task in range(3):
      state = strategy.observe(problem, state, task)
    self.assertEqual(_trm.loss_fn.cache_info().misses, 1)
    size = sum(leaf[0].nbytes for leaf in jax.tree.leaves(problem.params))
    self.assertEqual(
      strategy.memory(problem, state, 3), {"networks": size, "examples": 0}
    )
    self.assertNotIn(("trm", 0), found)
    for task in range(3):
      self.assertEqual(found["start", task]["loss"].shape, (2,))
      self.assertEqual(found["training", task]["loss"].shape, (2, 8))
      self.assertContainsSubset({"training", "merging"}, found["seconds", task])

  def test_the_number_of_devices_changes_nothing(self):
    found = []
    for devices in (1, 2):
      problem = _problems.problem(hidden=True, capacity=0, devices=devices)
      state = _problems.observe(_strategy(responsiveness=5.0), problem, 2)
      found.append(state.current)
    chex.assert_trees_all_close(*found, rtol=2e-3, atol=1e-4)

  def test_start_is_where_the_training_begins(self):
    problem, found = _reported(_problem())
    # Whatever the classes of the training's loss: learners are compared by it.
    strategy = _strategy(head="seen")
    state = strategy.init(problem)
    state = strategy.observe(problem, state, 0)
    before = state.current
    strategy.observe(problem, state, 1)
    np.testing.assert_allclose(
      found["start", 1]["gradient_norm"], _norm(problem, before), rtol=1e-4
    )

  def test_no_way_at_all(self):
    problem = _problem()
    step = _step(problem)
    merge = merges.trm(FEW)
    with self.assertRaisesRegex(
      ValueError, "task 1 .seed 0. has moved nothing"
    ):
      merge.update(problem, {}, step._replace(expert=step.current))

  @parameterized.parameters(
    ({"weight": 2.0}, "weight must be"),
    ({"granularity": "block"}, "granularity 'block'"),
    ({"alignment": -1.0}, "alignment must not be negative"),
    ({"consistency": float("nan")}, "consistency must not be negative"),
    ({"target": -1.0}, "target must not be negative"),
    ({"temperature": 0.0}, "temperature must be positive"),
    ({"tolerance": 0.0}, "tolerance must lie"),
    ({"head": "none"}, "head 'none'"),
    ({"derivative": "exact"}, "derivative 'exact'"),
    ({"samples": 0}, "samples must be at least 1"),
  )
  def test_bad_options(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      merges.trm(FEW, **options)

  def test_needs_a_path(self):
    with self.assertRaisesRegex(ValueError, r"give the learner path=Path"):
      continual.compose(
        "x", continual.Learner(TRAIN, start="merged"), merge=merges.trm()
      )
    with self.assertRaisesRegex(ValueError, "without snapshots has no length"):
      _strategy(path=continual.Path(0)).init(_problem())
    with self.assertRaisesRegex(
      ValueError, "8 snapshots need at least 9 steps, but the training has 8"
    ):
      _strategy(path=continual.Path(8)).init(_problem())

  def test_steps_of_the_smallest_task(self):
    base = _problem()
    last = base.stream.tasks[2]
    tasks = (*base.stream.tasks[:2], last._replace(train=last.train[:8]))
    problem = continual.make_problem(
      base.stream._replace(tasks=tasks),
      base.logits_fn,
      base.params,
      keys=base.keys,
    )
    _strategy(path=continual.Path(1)).init(problem)
    with self.assertRaisesRegex(ValueError, "the training has 2"):
      _strategy(path=continual.Path(2)).init(problem)


def _norm(problem, params):
  """Norm of the gradient of task 1's loss among its classes."""
  images, labels = _problems.task_data(problem, 1)
  mask = np.zeros((len(labels), 6), bool)
  mask[:, list(problem.stream.tasks[1].classes)] = True

  def loss(params):
    logits = problem.logits_fn(params, images)
    return _trm.task_alignment(logits, labels, mask).mean()

  return jax.vmap(lambda params: tree_lib.norm(jax.grad(loss)(params)))(params)


class DirectionTest(parameterized.TestCase):
  def test_names_are_in_the_order_of_the_directions(self):
    current, expert = {"w": jnp.zeros((1, 2))}, {"w": jnp.ones((1, 2))}
    path = {"w": jnp.array([[[1.0, 0.0], [2.0, 0.0]]])}
    gradient = {"w": jnp.array([[0.0, 5.0]])}
    found = _trm.directions(current, expert, path, gradient)
    # The gradient is made as long as the last part of the way.
    np.testing.assert_allclose(
      found["w"][0], [[1, 1], [0, -np.sqrt(2)], [2, 0], [1, 0]], rtol=1e-6
    )
    self.assertEqual(
      _trm.direction_names(2, True),
      ("task vector", "negative gradient", "snapshot 2", "snapshot 1"),
    )
    self.assertEqual(
      _trm.dropped_names(("a", "b"), np.array([[True, False], [True, True]])),
      [["b"], []],
    )

  def test_default_settings_are_valid(self):
    self.assertEqual(_merge_trm.COEFFICIENTS, merges.COEFFICIENTS)
    self.assertIn("weight=0.5, global", merges.trm().name)


if __name__ == "__main__":
  absltest.main()
