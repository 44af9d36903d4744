"""Tests of weight matching."""

from __future__ import annotations

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from scipy import optimize

from jaxmerge import alignment, tree
from jaxmerge.alignment import Axis
from tests.alignment import _networks

KEY = jax.random.key(0)


def inner_product(a, b, skip=()):
  return sum(
    float(np.sum(np.asarray(x, np.float64) * np.asarray(y, np.float64)))
    for name, x, y in zip(
      tree.leaf_names(a), jax.tree.leaves(a), jax.tree.leaves(b), strict=True
    )
    if name not in skip
  )


def shuffled(spec, params, seed=3):
  """A permuted copy, and the permutations that undo it."""
  drawn = alignment.random_permutations(spec, params, jax.random.key(seed))
  undo = {group: np.argsort(order) for group, order in drawn.items()}
  return alignment.apply_permutations(spec, params, drawn), undo


class RecoveryTest(parameterized.TestCase):
  @parameterized.parameters("mlp", "cnn", "transformer")
  def test_known_permutation(self, name):
    params, spec, apply_fn = _networks.NETWORKS[name]()
    x = _networks.inputs(name)
    self.assertLess(
      alignment.check(spec, lambda p: apply_fn(p, x), params), 1e-5
    )
    model, undo = shuffled(spec, _networks.noisy(params, 0.03))
    aligned, info = alignment.weight_matching(params, model, spec, key=KEY)
    self.assertTrue(info.converged)
    for group, order in undo.items():
      np.testing.assert_array_equal(info.permutations[group], order)
    chex.assert_trees_all_close(
      apply_fn(aligned, x), apply_fn(model, x), atol=1e-5
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(aligned, model)

  @parameterized.parameters("mlp", "cnn", "transformer")
  def test_objective_of_unlike_networks(self, name):
    make = _networks.NETWORKS[name]
    (params, spec, _), (model, _, _) = make(seed=0), make(seed=1)
    before = jax.tree.map(np.array, model)
    aligned, info = alignment.weight_matching(params, model, spec, key=KEY)
    chex.assert_trees_all_equal(before, model)
    self.assertTrue((np.diff(info.objectives) >= 0).all(), info.objectives)
    self.assertEqual(info.objectives.shape, (info.n_iters + 1,))
    self.assertGreater(info.n_iters, 1)
    skip = {"batch_stats/Norm_0/mean"}
    np.testing.assert_allclose(
      inner_product(params, aligned, skip), info.objectives[-1], rtol=1e-5
    )
    # No group has a better permutation.
    again, more = alignment.weight_matching(
      params, aligned, spec, key=KEY, restarts=0
    )
    self.assertEqual(more.n_iters, 1)
    chex.assert_trees_all_equal(again, aligned)

  def test_start_is_identity(self):
    (params, spec, _), (model, _, _) = _networks.mlp(), _networks.mlp(seed=1)
    _, info = alignment.weight_matching(
      params, model, spec, key=KEY, restarts=0, max_sweeps=1
    )
    np.testing.assert_allclose(
      info.objectives[0], inner_product(params, model), rtol=1e-5
    )
    self.assertEqual((info.n_iters, info.converged), (1, False))


class OracleTest(parameterized.TestCase):
  def test_one_group_against_scipy(self):
    (params, _, _), (model, _, _) = (
      _networks.mlp((4, 9, 3), seed=seed) for seed in (0, 1)
    )
    a, b = (
      [np.asarray(p[f"Dense_{i}"]["kernel"], np.float64) for i in (0, 1)]
      for p in (params, model)
    )
    biases = [np.asarray(p["Dense_0"]["bias"]) for p in (params, model)]
    similarity = a[0].T @ b[0] + np.outer(*biases) + a[1] @ b[1].T
    _, expected = optimize.linear_sum_assignment(similarity, maximize=True)
    # Without a specification it is derived.
    _, info = alignment.weight_matching(params, model, key=KEY)
    np.testing.assert_array_equal(info.permutations["Dense_0"], expected)

  def test_a_sweep_against_scipy(self):
    (params, spec, _), (model, _, _) = _networks.mlp(), _networks.mlp(seed=1)
    _, info = alignment.weight_matching(
      params, model, spec, key=KEY, restarts=0, max_sweeps=1
    )
    found = []
    for order in itertools.permutations(range(2)):
      moves = [np.arange(8), np.arange(7)]
      for i in order:
        moves[i] = best_move(params, model, moves, i)
      found.append(moves)
    self.assertTrue(
      any(
        np.array_equal(info.permutations["hidden_0"], moves[0])
        and np.array_equal(info.permutations["hidden_1"], moves[1])
        for moves in found
      )
    )

  def test_brute_force(self):
    for seed in range(3):
      (params, spec, _), (model, _, _) = (
        _networks.mlp((3, 4, 4, 2), seed=2 * seed + i) for i in range(2)
      )
      _, info = alignment.weight_matching(
        params, model, spec, key=KEY, restarts=8
      )
      orders = np.array(list(itertools.permutations(range(4))))
      a, b = (
        [np.asarray(p[f"Dense_{i}"]["kernel"], np.float64) for i in range(3)]
        for p in (params, model)
      )
      c, d = (
        [np.asarray(p[f"Dense_{i}"]["bias"], np.float64) for i in range(3)]
        for p in (params, model)
      )
      best = max(
        np.sum(a[0] * b[0][:, p])
        + np.sum(c[0] * d[0][p])
        + np.sum(a[1] * b[1][np.ix_(p, q)])
        + np.sum(c[1] * d[1][q])
        + np.sum(a[2] * b[2][q])
        + np.sum(c[2] * d[2])
        for p in orders
        for q in orders
      )
      np.testing.assert_allclose(info.objectives[-1], best, rtol=1e-5)

  def test_two_axes_of_one_group(self):
    # A recurrent kernel: the objective is quadratic in the permutation.
    spec = {"state": (Axis("w", 0, False), Axis("w", 1), Axis("b", 0))}
    draw = np.random.default_rng(0).normal
    params, model = (
      {
        "w": jnp.asarray(draw(size=(5, 5)), jnp.float32),
        "b": jnp.asarray(draw(size=5), jnp.float32),
      }
      for _ in range(2)
    )
    aligned, info = alignment.weight_matching(
      params, model, spec, key=KEY, restarts=30
    )
    self.assertTrue((np.diff(info.objectives) >= 0).all())
    np.testing.assert_allclose(
      info.objectives[-1], inner_product(params, aligned), rtol=1e-5
    )
    w, v = (np.asarray(p["w"], np.float64) for p in (params, model))
    b, c = (np.asarray(p["b"], np.float64) for p in (params, model))
    values = sorted(
      np.sum(w * v[np.ix_(p, p)]) + np.sum(b * c[list(p)])
      for p in itertools.permutations(range(5))
    )
    self.assertGreater(info.objectives[-1], values[-6])


def best_move(params, model, moves, i):
  """SciPy's answer for one of the hidden layers of an MLP of three."""
  a, b = (
    [np.asarray(p[f"Dense_{j}"]["kernel"], np.float64) for j in range(3)]
    for p in (params, model)
  )
  c, d = (
    [np.asarray(p[f"Dense_{j}"]["bias"], np.float64) for j in range(3)]
    for p in (params, model)
  )
  if i == 0:
    similarity = a[0].T @ b[0] + np.outer(c[0], d[0])
    similarity += a[1] @ b[1][:, moves[1]].T
  else:
    similarity = a[1].T @ b[1][moves[0]] + np.outer(c[1], d[1])
    similarity += a[2] @ b[2].T
  return optimize.linear_sum_assignment(similarity, maximize=True)[1]


class OptionsTest(parameterized.TestCase):
  def test_running_statistics_do_not_count(self):
    params, spec, _ = _networks.cnn()
    model, undo = shuffled(spec, _networks.noisy(params, 0.03))
    model["batch_stats"]["Norm_0"]["mean"] = 1e4 * jnp.arange(6.0)
    aligned, info = alignment.weight_matching(params, model, spec, key=KEY)
    np.testing.assert_array_equal(info.permutations["first"], undo["first"])
    np.testing.assert_array_equal(
      aligned["batch_stats"]["Norm_0"]["mean"], 1e4 * undo["first"]
    )
    params["batch_stats"]["Norm_0"]["mean"] = jnp.arange(6.0)
    _, info = alignment.weight_matching(
      params, model, spec, key=KEY, select="mean"
    )
    np.testing.assert_array_equal(info.permutations["first"], np.arange(6))

  def test_half_types(self):
    params, spec, _ = _networks.mlp()
    model, undo = shuffled(spec, _networks.noisy(params, 0.03))
    half = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)  # noqa: E731
    aligned, info = alignment.weight_matching(
      half(params), half(model), spec, key=KEY
    )
    chex.assert_trees_all_equal_dtypes(aligned, half(model))
    np.testing.assert_array_equal(
      info.permutations["hidden_0"], undo["hidden_0"]
    )

  def test_same_key_same_result(self):
    (params, spec, _), (model, _, _) = _networks.mlp(), _networks.mlp(seed=1)
    chex.assert_trees_all_equal(
      alignment.weight_matching(params, model, spec, key=KEY)[0],
      alignment.weight_matching(params, model, spec, key=KEY)[0],
    )

  def test_groups_that_do_not_count_stay(self):
    params, spec, _ = _networks.mlp()
    model, _ = shuffled(spec, params)
    _, info = alignment.weight_matching(
      params, model, spec, key=KEY, select="Dense_0", restarts=0
    )
    np.testing.assert_array_equal(info.permutations["hidden_1"], np.arange(7))

  def test_errors(self):
    params, spec, _ = _networks.mlp()
    match = lambda model, **options: alignment.weight_matching(  # noqa: E731
      params, model, spec, key=KEY, **options
    )
    other, _, _ = _networks.mlp((5, 8, 6, 3))
    with self.assertRaisesRegex(
      tree.TreeMismatchError, r"leaf 'Dense_1/bias' has shape \(7,\)"
    ):
      match(other)
    with self.assertRaisesRegex(tree.TreeMismatchError, "leaf 'Dense_3/"):
      match(_networks.mlp((5, 8, 7, 3, 3))[0])
    bad = jax.tree.map(jnp.array, params)
    bad["Dense_1"]["kernel"] = bad["Dense_1"]["kernel"].at[1, 1].set(jnp.nan)
    with self.assertRaisesRegex(
      ValueError, "leaf 'Dense_1/kernel' of model has entries that are NaN"
    ):
      match(bad)
    with self.assertRaisesRegex(alignment.SpecError, "leaf 'x'"):
      alignment.weight_matching(params, params, {"g": (Axis("x", 0),)}, key=KEY)
    with self.assertRaisesRegex(ValueError, "no leaf name matches"):
      match(params, select="nothing")
    for options, message in (
      ({"restarts": -1}, "restarts must be"),
      ({"max_sweeps": 0}, "max_sweeps must be"),
      ({"tolerance": -1.0}, "tolerance must be"),
      ({"tolerance": float("nan")}, "tolerance must be"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        match(params, **options)
    with self.assertRaisesRegex(TypeError, "outside of jax.jit"):
      jax.jit(match)(params)


if __name__ == "__main__":
  absltest.main()
