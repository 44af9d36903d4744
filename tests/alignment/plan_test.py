"""Tests of the ground cost and the transport solvers."""

from __future__ import annotations

import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from scipy import optimize
from scipy.spatial import distance

from jaxmerge import alignment
from jaxmerge.alignment import _assignment


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


class EmdTest(parameterized.TestCase):
  def oracle(self, cost, a, b):
    """The linear program, by another solver than the one under test."""
    n, m = cost.shape
    sums = np.zeros((n + m, n * m))
    for i in range(n):
      sums[i, i * m : (i + 1) * m] = 1
    for j in range(m):
      sums[n + j, j::m] = 1
    found = optimize.linprog(
      cost.ravel(), A_eq=sums, b_eq=np.concatenate([a, b])
    )
    return found.fun

  @parameterized.parameters((4, 7), (7, 4), (1, 5), (5, 5))
  def test_against_a_linear_program(self, n, m):
    cost = random_cost(0, max(n, m))[:n, :m]
    rng = np.random.default_rng(1)
    a, b = (x / x.sum() for x in (rng.random(n) + 0.1, rng.random(m) + 0.1))
    uniform = np.full(n, 1 / n), np.full(m, 1 / m)
    for given, (rows, columns) in (((), uniform), ((a, b), (a, b))):
      if n == m and not given:
        continue
      given = [jnp.asarray(x, jnp.float32) for x in given]
      for fn in (alignment.exact_plan, jax.jit(alignment.exact_plan)):
        got = fn(jnp.asarray(cost), *given)
        self.assertIsNone(got.permutation)
        self.assertTrue(got.converged)
        alignment.check_plan(got.plan, rows, columns)
        np.testing.assert_allclose(
          got.cost, self.oracle(cost, rows, columns), rtol=1e-5
        )
        self.assertLess(float(got.error), 1e-6)

  def test_uniform_marginals_given_are_an_assignment(self):
    cost = jnp.asarray(random_cost(0, 5))
    got = alignment.exact_plan(cost, jnp.full(5, 0.2), np.full(5, 0.2))
    np.testing.assert_array_equal(
      got.permutation, optimize.linear_sum_assignment(cost)[1]
    )

  def test_zero_mass(self):
    a = jnp.array([0.5, 0.0, 0.5])
    got = alignment.exact_plan(jnp.asarray(random_cost(0, 3)), a)
    np.testing.assert_array_equal(got.plan[1], np.zeros(3))

  def test_vmap(self):
    costs = jnp.asarray(np.stack([random_cost(seed, 6) for seed in range(3)]))
    got = jax.jit(jax.vmap(alignment.exact_plan))(costs[:, :4])
    for i in range(3):
      one = alignment.exact_plan(costs[i, :4])
      np.testing.assert_allclose(got.plan[i], one.plan, rtol=1e-6)
      np.testing.assert_allclose(got.cost[i], one.cost, rtol=1e-5)

  def test_not_finite(self):
    got = alignment.exact_plan(jnp.full((3, 2), np.nan))
    self.assertFalse(got.converged)

  def test_gradient_of_the_cost_holds_the_plan(self):
    cost = jnp.asarray(random_cost(0, 4))[:3]
    grad = jax.grad(lambda c: alignment.exact_plan(c).cost)(cost)
    np.testing.assert_allclose(grad, alignment.exact_plan(cost).plan)

  def test_without_pot(self):
    with mock.patch.dict(sys.modules, {"ot": None}):
      with self.assertRaisesRegex(
        ImportError, r"shape \(2, 3\) .* pip install 'jaxmerge\[alignment\]'"
      ):
        alignment.exact_plan(jnp.ones((2, 3)))
      alignment.exact_plan(jnp.ones((2, 2)))

  @parameterized.product(
    bad=[
      (np.ones(3) / 3, r"a must have shape \(2,\) .* \(2, 3\); got \(3,\)"),
      (np.array([1.5, -0.5]), "a must be finite and not negative"),
      (np.array([np.nan, 1.0]), "a must be finite"),
      (np.ones(2), "a must sum to 1; it sums to 2: divide it by its sum"),
    ],
    solve=[alignment.exact_plan, alignment.sinkhorn_plan],
  )
  def test_bad_marginals(self, bad, solve):
    with self.assertRaisesRegex(ValueError, bad[1]):
      solve(jnp.ones((2, 3)), bad[0])


class HungarianTest(parameterized.TestCase):
  """The solver of accelerators; a CPU would take SciPy."""

  def test_against_scipy(self):
    costs = np.stack([random_cost(seed, 9) for seed in range(2)])
    costs = np.concatenate([costs, np.full((1, 9, 9), np.nan, np.float32)])
    for fn in (jax.vmap(_assignment._hungarian), _assignment._on_host):
      got = fn(jnp.asarray(-costs))
      for cost, permutation in zip(costs[:2], got, strict=False):
        np.testing.assert_array_equal(
          permutation, optimize.linear_sum_assignment(cost)[1]
        )
      np.testing.assert_array_equal(got[2], np.arange(9))

  def test_accelerators_do_not_call_back(self):
    program = jax.jit(jax.vmap(alignment.exact_plan)).trace(jnp.ones((2, 3, 3)))
    for platform, calls_back in (("cpu", True), ("cuda", False)):
      text = program.lower(lowering_platforms=(platform,)).as_text()
      self.assertEqual("callback" in text, calls_back, platform)


class CheckPlanTest(parameterized.TestCase):
  def test_right(self):
    alignment.check_plan(np.full((2, 3), 1 / 6))
    alignment.check_plan(np.array([[0.2, 0.8]]), [1.0], [0.2, 0.8])
    alignment.check_plan(np.eye(2) * 0.5001)

  @parameterized.parameters(
    (np.eye(2), (), "row 0 of the plan sums to 1, but its marginal is 0.5 .*"),
    (
      np.array([[0.5, 0.0], [0.4, 0.1]]),
      (),
      "column 0 of the plan sums to 0.9, but its marginal is 0.5",
    ),
    (np.eye(2) / 2, ([0.9, 0.1],), "row 0 .* 0.5, but its marginal is 0.9"),
    (np.eye(2) / 2, (np.ones(3),), r"a must have shape \(2,\)"),
    (np.array([[1.5, -0.5]]), (), "finite and not negative"),
    (np.array([[np.nan]]), (), "finite and not negative"),
    (np.ones(2), (), "must be a matrix"),
  )
  def test_wrong(self, plan, marginals, message):
    with self.assertRaisesRegex(ValueError, message):
      alignment.check_plan(plan, *marginals)


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
    options = {"epsilon": 1e-3, "max_iterations": max_iterations}
    message = rf"did not converge in {max_iterations} iterations: .* off by \d"
    with self.assertWarnsRegex(RuntimeWarning, message):
      got = alignment.sinkhorn_plan(cost, **options)
    with self.assertRaisesRegex(alignment.ConvergenceError, message):
      alignment.sinkhorn_plan(cost, strict=True, **options)
    self.assertFalse(got.converged)
    self.assertEqual(int(got.n_iters), max_iterations)
    self.assertGreater(float(got.error), 1e-3)

  def test_rectangular_with_marginals(self):
    # Against the scaling algorithm, written plainly in float64.
    cost = random_cost(3, 9)[:5]
    rng = np.random.default_rng(0)
    a, b = (x / x.sum() for x in (rng.random(5) + 0.2, rng.random(9) + 0.2))
    kernel = np.exp(-cost / (0.05 * cost.mean()))
    v = np.ones(9)
    for _ in range(5000):
      u = a / (kernel @ v)
      v = b / (kernel.T @ u)
    expected = u[:, None] * kernel * v
    got = alignment.sinkhorn_plan(
      jnp.asarray(cost),
      jnp.asarray(a, jnp.float32),
      jnp.asarray(b, jnp.float32),
      epsilon=0.05,
      threshold=1e-5,
    )
    np.testing.assert_allclose(got.plan, expected, atol=1e-5)
    np.testing.assert_allclose(got.cost, (expected * cost).sum(), rtol=1e-4)

  def test_unbalanced(self):
    # The same with the exponent of Chizat et al.
    cost, tau = random_cost(3, 6)[:4], 0.8
    a, b = np.full(4, 1 / 4), np.full(6, 1 / 6)
    kernel = np.exp(-cost / (0.1 * cost.mean()))
    v = np.ones(6)
    for _ in range(2000):
      u = (a / (kernel @ v)) ** tau
      v = (b / (kernel.T @ u)) ** tau
    expected = u[:, None] * kernel * v
    got = alignment.sinkhorn_plan(
      jnp.asarray(cost), epsilon=0.1, tau_a=tau, tau_b=tau, threshold=1e-6
    )
    self.assertTrue(got.converged)
    np.testing.assert_allclose(got.plan, expected, atol=1e-5)
    self.assertGreater(float(got.error), 1e-2)

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

  @parameterized.product(name=["tau_a", "tau_b"], value=[0.0, 1.1])
  def test_tau(self, name, value):
    with self.assertRaisesRegex(ValueError, rf"{name} must lie in \(0, 1\]"):
      alignment.sinkhorn_plan(jnp.ones((2, 2)), **{name: value})


class CostTest(parameterized.TestCase):
  @parameterized.product(
    solve=[alignment.exact_plan, alignment.sinkhorn_plan],
    cost=[
      np.ones(4, np.float32),
      np.ones((2, 3, 3), np.float32),
      np.ones((0, 0), np.float32),
      np.ones((2, 2), np.int32),
    ],
  )
  def test_no_matrix(self, solve, cost):
    with self.assertRaisesRegex(ValueError, "must be a floating-point matrix"):
      solve(jnp.asarray(cost))

  @parameterized.parameters(alignment.exact_plan, alignment.sinkhorn_plan)
  def test_half_types(self, solve):
    got = solve(jnp.asarray(random_cost(0, 4), jnp.bfloat16))
    self.assertEqual(got.plan.dtype, jnp.float32)


if __name__ == "__main__":
  absltest.main()
