"""Tests of the assignment problem."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from scipy import optimize

from jaxmerge import alignment


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def total(similarity, permutation):
  rows = np.arange(len(permutation))
  return np.asarray(similarity, np.float64)[rows, permutation].sum()


class SolveAssignmentTest(parameterized.TestCase):
  # From 256 on there are prices.
  @parameterized.parameters(1, 2, 7, 255, 256, 300)
  def test_against_scipy(self, n):
    similarity = draw(n, n)
    got = alignment.solve_assignment(similarity)
    self.assertEqual((got.dtype, got.shape), (jnp.int32, (n,)))
    _, expected = optimize.linear_sum_assignment(similarity, maximize=True)
    np.testing.assert_array_equal(got, expected)

  @parameterized.parameters(
    (lambda n: np.eye(n)[::-1],),
    (lambda n: np.zeros((n, n)),),
    (lambda n: 1e30 * draw(n, n),),
    (lambda n: draw(n, n) - 1e6 * np.eye(n),),
    (lambda n: np.round(draw(n, n)),),
  )
  def test_prices_keep_the_optimum(self, make):
    similarity = make(300).astype(np.float32)
    got = np.asarray(alignment.solve_assignment(jnp.asarray(similarity)))
    self.assertEqual(sorted(got.tolist()), list(range(300)))
    _, expected = optimize.linear_sum_assignment(
      similarity.astype(np.float64), maximize=True
    )
    np.testing.assert_allclose(
      total(similarity, got), total(similarity, expected), rtol=1e-12
    )

  def test_batch_and_jit(self):
    similarity = jnp.asarray(draw(2, 3, 6, 6))
    got = alignment.solve_assignment(similarity)
    self.assertEqual(got.shape, (2, 3, 6))
    for i, j in np.ndindex(2, 3):
      _, expected = optimize.linear_sum_assignment(
        np.asarray(similarity[i, j]), maximize=True
      )
      np.testing.assert_array_equal(got[i, j], expected)
    np.testing.assert_array_equal(
      jax.jit(alignment.solve_assignment)(similarity), got
    )

  def test_bfloat16(self):
    similarity = jnp.asarray(draw(5, 5)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(
      alignment.solve_assignment(similarity),
      alignment.solve_assignment(similarity.astype(jnp.float32)),
    )

  @parameterized.parameters(
    (np.zeros((2, 3)), r"shape \[..., n, n\].*\(2, 3\)"),
    (np.zeros((0, 0)), "n at least 1"),
    (np.zeros(3), "n, n"),
    (np.zeros((2, 2), np.int32), "floating-point; got int32"),
    (np.array([[1.0, np.nan], [0.0, 1.0]]), "must be finite"),
  )
  def test_errors(self, similarity, message):
    with self.assertRaisesRegex(ValueError, message):
      alignment.solve_assignment(similarity)

  def test_not_finite_in_jit_ends(self):
    bad = jnp.full((4, 4), jnp.nan)
    jax.block_until_ready(jax.jit(alignment.solve_assignment)(bad))


if __name__ == "__main__":
  absltest.main()
