"""Tests of Bezier simplices and of fitting them."""

from __future__ import annotations

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from absl.testing import absltest, parameterized

from jaxmerge import curves, training, tree
from jaxmerge.curves import _sampling


def _t(count, seed=0):
  return np.random.default_rng(seed).dirichlet(np.ones(count))


def _points(count, seed=0):
  values = np.random.default_rng(seed).normal(size=(count, 3))
  return [{"w": row} for row in values.astype(np.float32)]


def _cubic(t, corners, edges, common):
  """A Bezier simplex of degree 3 from its control points, by multinomials."""
  n, total = len(t), 0.0
  for indices in itertools.product(range(n), repeat=3):
    # Every ordered triple once is the multinomial's count.
    kinds = sorted(set(indices))
    if len(kinds) == 3:
      point = common
    elif len(kinds) == 1:
      point = corners[kinds[0]]
    else:
      # Degree raised from 2: (P_i + 2 P_ij) / 3 where i is there twice.
      i = max(kinds, key=indices.count)
      point = (corners[i] + 2 * edges[tuple(kinds)]) / 3
    total = total + np.prod([t[k] for k in indices]) * point
  return total


class WeightsTest(parameterized.TestCase):
  @parameterized.product(count=(2, 3, 5), common=(True, False))
  def test_sum_and_sign(self, count, common):
    for seed in range(5):
      weights = curves.simplex_weights(_t(count, seed), common=common)
      np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
      self.assertGreaterEqual(weights.min(), 0)
    size = count * (count + 1) // 2 + (common and count > 2)
    self.assertEqual(weights.shape, (size,))

  @parameterized.parameters(True, False)
  def test_two_models_are_a_curve(self, common):
    for t in (0.0, 0.3, 0.5, 0.77, 1.0):
      start, end, bend = curves.simplex_weights(
        jnp.array([1 - t, t]), common=common
      )
      want = curves.bernstein_weights(t, 3)
      np.testing.assert_allclose([start, bend, end], want, rtol=2e-7)

  @parameterized.parameters(3, 4)
  def test_cubic(self, count):
    points = [point["w"] for point in _points(count + count**2)]
    pairs = list(itertools.combinations(range(count), 2))
    corners, common = points[:count], points[count]
    edges = dict(zip(pairs, points[count + 1 :], strict=False))
    simplex = curves.BezierSimplex.through(
      [{"w": point} for point in corners],
      [{"w": edges[pair]} for pair in pairs],
      {"w": common},
    )
    t = _t(count)
    np.testing.assert_allclose(
      simplex(t)["w"], _cubic(t, corners, edges, common), rtol=1e-4, atol=1e-5
    )
    # Without the common point: t' Q t.
    plain = curves.BezierSimplex.through(
      [{"w": point} for point in corners],
      [{"w": edges[pair]} for pair in pairs],
    )
    want = sum(t[i] ** 2 * corners[i] for i in range(count)) + sum(
      2 * t[i] * t[j] * edges[i, j] for i, j in pairs
    )
    np.testing.assert_allclose(plain(t)["w"], want, rtol=1e-4, atol=1e-5)

  def test_edges_are_curves(self):
    *models, c = _points(4)
    bends = _points(3, 1)
    simplex = curves.BezierSimplex.through(models, bends, c)
    curve = curves.BezierCurve.through(models[0], bends[1], models[2])
    np.testing.assert_allclose(
      simplex([0.4, 0, 0.6])["w"], curve(0.6)["w"], rtol=1e-5, atol=1e-6
    )

  def test_vertices(self):
    models = _points(3)
    simplex = curves.BezierSimplex.through(models, _points(3, 1), models[0])
    for corner, model in zip(np.eye(3), models, strict=True):
      np.testing.assert_array_equal(simplex(corner)["w"], model["w"])

  def test_is_a_pytree(self):
    simplex = curves.BezierSimplex.through(_points(2), _points(1, 1))
    doubled = jax.jit(lambda s: jax.tree.map(lambda x: 2 * x, s))(simplex)
    np.testing.assert_allclose(
      doubled([0.5, 0.5])["w"], 2 * simplex([0.5, 0.5])["w"]
    )

  def test_errors(self):
    a, b, c = _points(3)
    through = curves.BezierSimplex.through
    with self.assertRaisesRegex(ValueError, "at least 2 models"):
      through([a], [])
    with self.assertRaisesRegex(ValueError, "3 models have 3 pairs, got 1"):
      through([a, b, c], [a])
    with self.assertRaisesRegex(ValueError, "no common control point"):
      through([a, b], [c], a)
    with self.assertRaisesRegex(ValueError, "2 barycentric coordinates"):
      through([a, b], [c])([1.0, 0.0, 0.0])
    for t in ([3.0, -2.0], [1.0, 1.0], [np.nan, 1.0]):
      with self.assertRaisesRegex(ValueError, "not negative and sum to 1"):
        through([a, b], [c])(t)
      with self.assertRaisesRegex(ValueError, "not negative and sum to 1"):
        curves.simplex_weights(jnp.array(t))
    with self.assertRaisesRegex(ValueError, "at least 2 models"):
      curves.simplex_weights(jnp.ones(1))
    with self.assertRaisesRegex(tree.TreeMismatchError, "w"):
      through([a, {"w": np.ones(2, np.float32)}], [c])


class SamplingTest(parameterized.TestCase):
  @parameterized.parameters((3, 1.0), (4, 3.0), (2, 2.0))
  def test_dirichlet(self, count, a):
    draw = _sampling.draw_barycentric(a, count, True)
    found = jax.vmap(draw, (None, 0))(jax.random.key(1), jnp.arange(3000))
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    # Each coordinate is Beta(a, (n - 1) a).
    for column in found.T:
      result = scipy.stats.kstest(
        column, scipy.stats.beta(a, (count - 1) * a).cdf
      )
      self.assertGreater(result.pvalue, 1e-3)


_TARGET = np.array([0.3, 1.0, -1.0], np.float32)
_ONES = {"x": np.ones(64, np.float32)}


def _quadratic(params, batch, key):
  del key
  distance = params["w"] - _TARGET
  return 0.5 * (distance @ distance) * batch["x"]


def _fit(models=None, **options):
  defaults = {
    "key": jax.random.key(0),
    "epochs": 150,
    "batch_size": 4,
    "learning_rate": 0.03,
    "final_learning_rate": 0.001,
    "momentum": 0.5,
    "weight_decay": 0.0,
    "devices": 1,
  }
  return curves.fit_simplex(
    _quadratic, models or _points(3), _ONES, **(defaults | options)
  )


class FitSimplexTest(parameterized.TestCase):
  def test_two_models_are_the_curve(self):
    """With the same draws of t the bend is the same."""
    a, b = _points(2)
    options = {
      "key": jax.random.key(3),
      "epochs": 5,
      "batch_size": 8,
      "concentration": 2.0,
    }
    merged, info = curves.fit_simplex(_quadratic, [a, b], _ONES, **options)
    curve = curves.fit_curve(
      _quadratic, a, b, _ONES, t_sampling="beta", **options
    ).curve
    np.testing.assert_allclose(
      info.simplex.point(2)["w"], curve.point(1)["w"], rtol=1e-5, atol=1e-6
    )
    self.assertGreater(
      np.abs(curve.point(1)["w"] - (a["w"] + b["w"]) / 2).max(), 0.05
    )
    np.testing.assert_allclose(
      merged["w"], curve(0.5)["w"], rtol=1e-5, atol=1e-6
    )
    self.assertEqual(info.simplex.num_points, 3)
    np.testing.assert_array_equal(info.grid, [[1, 0], [0, 1], [0.5, 0.5]])

  @parameterized.parameters(True, False)
  def test_closed_form(self, common):
    """The optimum is linear in the trained points: normal equations.

    E[w_i (sum_j w_j P_j - c)] = 0 for every trained i, the expectations by
    sampling t.
    """
    models = _points(3)
    t = np.random.default_rng(0).dirichlet(np.ones(3), 200_000)
    pairs = [(0, 1), (0, 2), (1, 2)]
    edges = [2 * t[:, i] * t[:, j] for i, j in pairs]
    if common:
      edges = [
        edge * (t[:, i] + t[:, j])
        for edge, (i, j) in zip(edges, pairs, strict=True)
      ]
      edges.append(6 * t.prod(axis=1))
    w = np.stack(edges, 1)
    fixed = t**2 @ np.stack([model["w"] for model in models])
    want = np.linalg.lstsq(w, _TARGET - fixed, rcond=None)[0]
    # Compared as networks: single points are badly determined.
    places = np.random.default_rng(1).dirichlet(np.ones(3), 5)
    merged, info = _fit(common=common, learning_rate=0.3, epochs=300)
    self.assertEqual(info.simplex.common, common)
    for place in places:
      i, j = np.array(pairs).T
      weights = 2 * place[i] * place[j]
      if common:
        weights = np.append(weights * (place[i] + place[j]), 6 * place.prod())
      best = weights @ want + place**2 @ np.stack([m["w"] for m in models])
      np.testing.assert_allclose(info.simplex(place)["w"], best, atol=0.12)
    np.testing.assert_allclose(merged["w"], info.simplex([1 / 3] * 3)["w"])
    for index, model in enumerate(models):
      np.testing.assert_array_equal(info.simplex.point(index)["w"], model["w"])

  def test_starts_as_the_plain_simplex(self):
    models = _points(3)
    options = {"epochs": 1, "learning_rate": 1e-12, "final_learning_rate": 0.0}
    merged, info = _fit(models, **options)
    t = _t(3)
    want = t @ np.stack([model["w"] for model in models])
    np.testing.assert_allclose(info.simplex(t)["w"], want, atol=1e-6)
    mean = np.mean([model["w"] for model in models], axis=0)
    np.testing.assert_allclose(merged["w"], mean, atol=1e-6)
    # Models, middles of pairs, and the middle of all.
    values = [model["w"] for model in models]
    values += [(values[0] + values[1]) / 2, (values[0] + values[2]) / 2]
    values += [(values[1] + values[2]) / 2, mean]
    want = [0.5 * ((value - _TARGET) ** 2).sum() for value in values]
    np.testing.assert_allclose(info.losses, want, rtol=1e-4)
    self.assertEqual(info.steps, 16)
    self.assertLen(info.history, 1)
    np.testing.assert_allclose(
      _fit(models, t=t, **options)[0]["w"], t @ np.stack(values[:3]), atol=1e-6
    )

  def test_seeds_and_devices(self):
    models = _points(3)
    stacked = [{"w": jnp.stack([m["w"], 2 * m["w"]])} for m in models]
    keys = jax.random.split(jax.random.key(0))
    options = {"epochs": 3, "batch_size": 8}
    merged, info = _fit(stacked, key=keys, seed_axis=True, **options)
    alone, one = _fit(
      [{"w": 2 * m["w"]} for m in models], key=keys[1], **options
    )
    np.testing.assert_allclose(merged["w"][1], alone["w"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(info.losses[1], one.losses, rtol=1e-4)
    four, _ = _fit(
      stacked, key=keys, seed_axis=True, **options | {"devices": 4}
    )
    chex.assert_trees_all_close(four, merged, atol=1e-5)
    own, _ = _fit(
      stacked,
      key=keys,
      seed_axis=True,
      t_shared=False,
      **options | {"devices": 4},
    )
    self.assertGreater(np.abs(own["w"] - merged["w"]).max(), 1e-3)

  def test_integer_leaves(self):
    models = [model | {"n": np.arange(2)} for model in _points(3)]
    merged, _ = _fit(models, epochs=1)
    np.testing.assert_array_equal(merged["n"], np.arange(2))

  @parameterized.parameters(
    ({"models": _points(1)}, "at least 2 models, got 1"),
    ({"concentration": 0.0}, "must be positive"),
    ({"concentration": np.nan}, "must be positive"),
    ({"grid_examples": 0}, "grid_examples must be at least 1"),
    ({"t": [0.5, 0.5]}, "t must hold 3 barycentric"),
    ({"t": [0.5, 0.7, -0.2]}, "t must hold 3 barycentric"),
    ({"t": [0.5, 0.7, 0.2]}, "t must hold 3 barycentric"),
    ({"models": [{"n": np.arange(2)}] * 3}, "nothing to train"),
    ({"batch_size": 65}, "larger than the data"),
  )
  def test_errors(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      _fit(**options)

  def test_mismatch(self):
    a, b, _ = _points(3)
    with self.assertRaisesRegex(tree.TreeMismatchError, "model 2"):
      _fit([a, b, {"w": np.ones(2, np.float32)}])

  def test_nan(self):
    with self.assertRaisesRegex(training.NonFiniteLossError, "learning rate"):
      _fit(learning_rate=1e20, final_learning_rate=1e20)


if __name__ == "__main__":
  absltest.main()
