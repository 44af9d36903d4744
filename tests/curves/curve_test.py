"""Tests of the curves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from absl.testing import absltest, parameterized

from jaxmerge import curves, training, tree


def _tree(seed, dtype=np.float32):
  generator = np.random.default_rng(seed)
  return {
    "a": {"kernel": generator.normal(size=(3, 2)).astype(dtype)},
    "b": generator.normal(size=()).astype(dtype),
  }


class WeightsTest(parameterized.TestCase):
  @parameterized.product(num_points=(2, 3, 4, 9, 60), t=(0.0, 0.1, 0.5, 1.0))
  def test_bernstein_is_the_binomial(self, num_points, t):
    n = num_points - 1
    want = scipy.stats.binom.pmf(np.arange(num_points), n, t)
    got = curves.bernstein_weights(t, num_points)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)

  def test_bernstein_is_stable(self):
    """Powers of 1/2 would underflow in float32 here."""
    weights = np.asarray(curves.bernstein_weights(0.5, 400))
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)
    want = scipy.stats.binom.pmf(np.arange(400), 399, 0.5)
    np.testing.assert_allclose(weights, want, rtol=1e-3, atol=1e-12)

  @parameterized.product(num_points=(2, 3, 6), t=(0.0, 0.13, 0.5, 0.77, 1.0))
  def test_hat_interpolates(self, num_points, t):
    values = np.random.default_rng(0).normal(size=num_points)
    want = np.interp(t, np.linspace(0, 1, num_points), values)
    got = np.asarray(curves.hat_weights(t, num_points)) @ values
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)

  @parameterized.parameters(curves.bernstein_weights, curves.hat_weights)
  def test_gradient_at_the_ends(self, weights):
    for t in (0.0, 1.0):
      gradient = jax.jacfwd(lambda t: weights(t, 4))(t)
      self.assertTrue(np.isfinite(gradient).all())


class CurveTest(parameterized.TestCase):
  @parameterized.parameters(curves.BezierCurve, curves.PolyChain)
  def test_ends(self, kind):
    points = [_tree(seed) for seed in range(4)]
    curve = kind.through(*points)
    self.assertEqual(curve.num_points, 4)
    for t, index in ((0.0, 0), (1.0, -1)):
      for got, want in zip(
        jax.tree.leaves(curve(t)), jax.tree.leaves(points[index]), strict=True
      ):
        np.testing.assert_allclose(got, want, rtol=1e-6)

  def test_three_bends(self):
    w1, theta, w2 = (_tree(seed) for seed in range(3))
    got = curves.BezierCurve.through(w1, theta, w2)(0.3)
    want = jax.tree.map(
      lambda a, b, c: 0.49 * a + 0.42 * b + 0.09 * c, w1, theta, w2
    )
    for one, other in zip(
      jax.tree.leaves(got), jax.tree.leaves(want), strict=True
    ):
      np.testing.assert_allclose(one, other, rtol=1e-5)

  @parameterized.parameters(curves.BezierCurve, curves.PolyChain)
  def test_is_a_pytree(self, kind):
    curve = kind.through(_tree(0), _tree(1), _tree(2))
    doubled = jax.jit(lambda c: jax.tree.map(lambda x: 2 * x, c))(curve)
    self.assertIsInstance(doubled, kind)
    np.testing.assert_allclose(doubled(0.4)["b"], 2 * curve(0.4)["b"])
    many = jax.vmap(curve)(jnp.linspace(0, 1, 5))
    self.assertEqual(many["a"]["kernel"].shape, (5, 3, 2))

  def test_gradient_flows_to_t_and_points(self):
    curve = curves.BezierCurve.through({"w": 1.0}, {"w": 5.0}, {"w": 2.0})
    # d/dt = 2 (1-t) (theta - W1) + 2 t (W2 - theta)
    np.testing.assert_allclose(
      jax.grad(lambda t: curve(t)["w"])(0.25), 2 * 0.75 * 4 + 0.5 * -3
    )
    gradient = jax.grad(lambda c: c(0.5)["w"])(curve)
    np.testing.assert_allclose(gradient.points["w"], [0.25, 0.5, 0.25])

  @parameterized.parameters(jnp.bfloat16, jnp.float16)
  def test_half_types(self, dtype):
    point = {"w": jnp.array([1.0, 3.0], dtype)}
    curve = curves.BezierCurve.through(*[point] * 9)
    self.assertEqual(curve(0.37)["w"].dtype, dtype)
    np.testing.assert_array_equal(curve(0.37)["w"], point["w"])

  def test_integers_come_from_the_first_point(self):
    curve = curves.BezierCurve.through({"n": 3}, {"n": 5}, {"n": 7})
    self.assertEqual(int(curve(1.0)["n"]), 3)

  def test_errors(self):
    with self.assertRaisesRegex(ValueError, "at least 2 control points"):
      curves.BezierCurve.through({"w": 1.0})
    with self.assertRaisesRegex(tree.TreeMismatchError, "w"):
      curves.BezierCurve.through({"w": jnp.ones(2)}, {"w": jnp.ones(3)})
    with self.assertRaisesRegex(ValueError, "Unknown kind 'spline'"):
      curves.get("spline")


class ProfileTest(absltest.TestCase):
  def test_against_a_loop(self):
    curve = curves.BezierCurve.through({"w": 1.0}, {"w": 5.0}, {"w": 2.0})
    x = np.arange(7, dtype=np.float32)
    grid, values = curves.profile(
      lambda params, batch: params["w"] * batch["x"],
      curve,
      {"x": x},
      [0.0, 0.2, 1.0],
    )
    want = [float(curve(t)["w"]) * x.mean() for t in grid]
    np.testing.assert_allclose(values, want, rtol=1e-6)

  def test_seeds(self):
    curve = curves.PolyChain.through(
      {"w": jnp.array([0.0, 1.0])}, {"w": jnp.array([1.0, 3.0])}
    )
    _, values = curves.profile(
      lambda params, batch: params["w"] * batch["x"],
      curve,
      {"x": np.ones(4, np.float32)},
      3,
      seed_axis=True,
    )
    np.testing.assert_allclose(values, [[0, 0.5, 1], [1, 2, 3]])

  def test_grids_share_a_trace_of_their_size(self):
    traces = []

    def metric(params, batch):
      traces.append(None)
      return params["w"] * batch["x"]

    curve = curves.PolyChain.through({"w": 0.0}, {"w": 1.0})
    data = training.replicate({"x": np.ones(4, np.float32)}, 1)
    for grid in ([0.0, 0.5, 1.0], [0.2, 0.3, 0.4]):
      _, values = curves.profile(metric, curve, data, grid)
      np.testing.assert_allclose(values, grid, rtol=1e-6)
    self.assertLen(traces, 1)

  def test_weight_norms(self):
    generator = np.random.default_rng(0)
    points = generator.normal(size=(3, 2, 5)).astype(np.float32)
    curve = curves.BezierCurve.through(*({"w": p} for p in points))
    ts, norms = curves.weight_norms(curve, 4, seed_axis=True)
    for t, column in zip(ts, norms.T, strict=True):
      at = np.tensordot([(1 - t) ** 2, 2 * t * (1 - t), t**2], points, 1)
      np.testing.assert_allclose(column, np.linalg.norm(at, axis=1), rtol=1e-5)
    first = curves.BezierCurve.through(*({"w": p[0]} for p in points))
    np.testing.assert_allclose(curves.weight_norms(first, 4)[1], norms[0])
    with self.assertRaisesRegex(ValueError, "at least 2 points"):
      curves.weight_norms(first, [0.5])

  def test_error(self):
    curve = curves.PolyChain.through({"w": 0.0}, {"w": 1.0})
    with self.assertRaisesRegex(ValueError, "at least 2 points"):
      curves.profile(lambda *_: 0, curve, {"x": np.ones(4)}, 1)


if __name__ == "__main__":
  absltest.main()
