"""Tests of the ground cost and the transport solvers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from scipy import optimize
from scipy.spatial import distance

from jaxmerge import alignment


def random_cost(seed, n):
  return np.random.default_rng(seed).random((n, n)).astype(np.float32)


class SquaredDistancesTest(parameterized.TestCase):
  @parameterized.parameters((1, 1, 1), (4, 7, 3), (5, 5, 33))
  def test_against_scipy(self, n, m, d):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, d)).astype(np.float32)
    y = rng.normal(size=(m, d)).astype(np.float32)
    got = alignment.squared_distances(jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(
      got, distance.cdist(x, y, "sqeuclidean"), rtol=1e-5
    )

  def test_close_points_far_from_the_origin(self):
    x = np.float32(1000) + np.eye(3, dtype=np.float32) / 64
    got = alignment.squared_distances(jnp.asarray(x), jnp.asarray(x))
    np.testing.assert_array_equal(got, (1 - np.eye(3)) * 2 / 64**2)

  def test_half_types_in_float32(self):
    x = jnp.asarray([[1.0, 0.125]], jnp.bfloat16)
    got = alignment.squared_distances(x, jnp.zeros((1, 2), jnp.bfloat16))
    self.assertEqual(got.dtype, jnp.float32)
    self.assertEqual(float(got[0, 0]), 1 + 1 / 64)

  def test_shapes(self):
    with self.assertRaisesRegex(
      ValueError, r"got shapes \(2, 3\) and \(2, 4\)"
    ):
      alignment.squared_distances(jnp.ones((2, 3)), jnp.ones((2, 4)))


class ExactPlanTest(parameterized.TestCase):
  @parameterized.parameters(1, 5, 40)
  def test_against_scipy(self, n):
    for seed in range(5):
      cost = random_cost(seed, n)
      _, columns = optimize.linear_sum_assignment(cost)
      for fn in (alignment.exact_plan, jax.jit(alignment.exact_plan)):
        got = fn(jnp.asarray(cost))
        np.testing.assert_array_equal(got.permutation, columns)
        expected = np.eye(n)[columns] / n
        np.testing.assert_allclose(got.plan, expected, rtol=1e-6)
        np.testing.assert_allclose(
          got.cost, cost[range(n), columns].mean(), rtol=1e-5
        )
        self.assertTrue(got.converged)
        self.assertEqual(float(got.error), 0.0)

  def test_ties(self):
    cost = np.random.default_rng(0).integers(0, 3, (12, 12)).astype(np.float32)
    got = alignment.exact_plan(jnp.asarray(cost))
    np.testing.assert_array_equal(np.sort(got.permutation), np.arange(12))
    rows, columns = optimize.linear_sum_assignment(cost)
    np.testing.assert_allclose(got.cost, cost[rows, columns].mean(), rtol=1e-6)

  def test_vmap(self):
    costs = np.stack([random_cost(seed, 9) for seed in range(3)])
    got = jax.vmap(alignment.exact_plan)(jnp.asarray(costs))
    for cost, permutation in zip(costs, got.permutation, strict=True):
      np.testing.assert_array_equal(
        permutation, optimize.linear_sum_assignment(cost)[1]
      )

  @parameterized.parameters(np.nan, np.inf)
  def test_not_finite(self, value):
    got = alignment.exact_plan(jnp.full((3, 3), value))
    self.assertFalse(got.converged)

  def test_gradient_of_the_cost_holds_the_plan(self):
    cost = jnp.asarray(random_cost(0, 4))
    grad = jax.grad(lambda c: alignment.exact_plan(c).cost)(cost)
    np.testing.assert_allclose(grad, alignment.exact_plan(cost).plan)


class SinkhornPlanTest(parameterized.TestCase):
  def test_small_epsilon_is_close_to_exact(self):
    cost = jnp.asarray(random_cost(0, 20))
    exact = alignment.exact_plan(cost)
    got = alignment.sinkhorn_plan(cost, epsilon=2e-3, max_iterations=20_000)
    self.assertTrue(got.converged)
    np.testing.assert_allclose(got.cost, exact.cost, rtol=0.03)
    np.testing.assert_array_equal(got.plan.argmax(1), exact.permutation)

  @parameterized.parameters(3e-2, 1.0)
  def test_marginals(self, epsilon):
    n = 30
    cost = jnp.asarray(random_cost(1, n))
    got = alignment.sinkhorn_plan(cost, epsilon=epsilon)
    self.assertTrue(got.converged)
    self.assertIsNone(got.permutation)
    for axis in (0, 1):
      np.testing.assert_allclose(got.plan.sum(axis), 1 / n, atol=1e-3)
    self.assertLess(float(got.error), 2e-3)
    self.assertGreater(int(got.n_iters), 0)

  def test_large_epsilon_is_uniform(self):
    got = alignment.sinkhorn_plan(jnp.asarray(random_cost(1, 6)), epsilon=1e4)
    np.testing.assert_allclose(got.plan, 1 / 36, rtol=1e-3)

  def test_epsilon_is_relative(self):
    cost = jnp.asarray(random_cost(2, 8))
    a = alignment.sinkhorn_plan(cost, epsilon=0.05)
    b = alignment.sinkhorn_plan(cost * 1024, epsilon=0.05)
    np.testing.assert_allclose(a.plan, b.plan, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(a.cost * 1024, b.cost, rtol=1e-4)

  @parameterized.parameters(1, 10)
  def test_too_few_iterations_are_reported(self, max_iterations):
    cost = jnp.asarray(random_cost(0, 30))
    got = alignment.sinkhorn_plan(
      cost, epsilon=1e-3, max_iterations=max_iterations
    )
    self.assertFalse(got.converged)
    self.assertEqual(int(got.n_iters), max_iterations)
    self.assertGreater(float(got.error), 1e-3)

  def test_zero_cost(self):
    got = alignment.sinkhorn_plan(jnp.zeros((4, 4)))
    self.assertTrue(got.converged)
    np.testing.assert_allclose(got.plan, 1 / 16, rtol=1e-6)

  def test_jit_and_vmap(self):
    costs = jnp.asarray(np.stack([random_cost(seed, 6) for seed in range(3)]))
    got = jax.jit(jax.vmap(lambda c: alignment.sinkhorn_plan(c, epsilon=0.1)))(
      costs
    )
    for i in range(3):
      one = alignment.sinkhorn_plan(costs[i], epsilon=0.1)
      np.testing.assert_allclose(got.plan[i], one.plan, atol=1e-5)
    self.assertEqual(got.converged.shape, (3,))

  @parameterized.parameters("epsilon", "max_iterations", "threshold")
  def test_options(self, name):
    with self.assertRaisesRegex(ValueError, f"{name} must be positive; got 0"):
      alignment.sinkhorn_plan(jnp.ones((2, 2)), **{name: 0})


class SquareTest(parameterized.TestCase):
  @parameterized.product(
    solve=[alignment.exact_plan, alignment.sinkhorn_plan],
    shape=[(2, 3), (4,), (2, 3, 3), (0, 0)],
  )
  def test_not_square(self, solve, shape):
    with self.assertRaisesRegex(ValueError, "must be a square matrix"):
      solve(jnp.ones(shape))


if __name__ == "__main__":
  absltest.main()
