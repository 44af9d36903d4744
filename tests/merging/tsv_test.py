"""Tests of TSV-M."""

from __future__ import annotations

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from absl.testing import absltest, parameterized
from hypothesis import strategies as st

from jaxmerge import merging

SETTINGS = hypothesis.settings(max_examples=15, deadline=None)


def orthonormal(rng, rows, columns):
  return np.linalg.qr(rng.normal(size=(rows, columns)))[0]


def task_matrices(seed, tasks, rows, columns):
  """Matrices whose singular values are well apart."""
  rng, full = np.random.default_rng(seed), min(rows, columns)
  return [
    orthonormal(rng, rows, full)
    @ np.diag(np.arange(full, 0, -1) + rng.uniform(0, 0.3, full))
    @ orthonormal(rng, columns, full).T
    for _ in range(tasks)
  ]


def root(matrix):
  """A (A' A)^(-1/2), with the pseudo-inverse."""
  values, vectors = np.linalg.eigh(matrix.T @ matrix)
  inverse = np.where(values > 1e-10, 1 / np.sqrt(np.abs(values) + 1e-30), 0)
  return matrix @ (vectors * inverse) @ vectors.T


def tsv(taus, count):
  """The merged matrix by the paper's equations, in float64."""
  factors = [np.linalg.svd(tau, full_matrices=False) for tau in taus]
  u = np.concatenate([u[:, :count] for u, _, _ in factors], axis=1)
  s = np.concatenate([s[:count] for _, s, _ in factors])
  v = np.concatenate([vh[:count].T for _, _, vh in factors], axis=1)
  return root(u) @ np.diag(s) @ root(v).T, u, v


def merge(taus, base=None, **options):
  base = np.zeros(np.shape(taus[0])) if base is None else base
  models = [{"w": jnp.asarray(base + tau, jnp.float32)} for tau in taus]
  base = {"w": jnp.asarray(base, jnp.float32)}
  return np.asarray(merging.tsv_merge(base, models, **options)["w"])


class TsvTest(parameterized.TestCase):
  @parameterized.parameters((2, 6, 5), (3, 4, 9))
  def test_against_the_equations(self, tasks, rows, columns):
    @SETTINGS
    @hypothesis.given(seed=st.integers(0, 10**6))
    def check(seed):
      taus = task_matrices(seed, tasks, rows, columns)
      weights = np.random.default_rng(seed).uniform(0.5, 2.0, tasks)
      want, u, v = tsv(
        [w * tau for w, tau in zip(weights, taus, strict=True)],
        min(rows, columns) // tasks,
      )
      # The factor of vectors that nearly depend on each other is not stable.
      hypothesis.assume(max(np.linalg.cond(u), np.linalg.cond(v)) < 30)
      got = merge(taus, weights=list(weights), scale=0.5)
      np.testing.assert_allclose(got, 0.5 * want, atol=2e-4)

    check()

  def test_factors_are_the_nearest_orthonormal(self):
    """SciPy's polar decomposition, with the paper's number of vectors."""
    taus = task_matrices(3, 2, 6, 5)
    _, u, v = tsv(taus, 2)
    s = np.concatenate([np.linalg.svd(tau)[1][:2] for tau in taus])
    left, right = scipy.linalg.polar(u)[0], scipy.linalg.polar(v)[0]
    np.testing.assert_allclose(
      merge(taus), left @ np.diag(s) @ right.T, atol=1e-5
    )

  @parameterized.parameters(0.2, 0.5, 0.99, 1.0)
  def test_rank_fraction(self, fraction):
    """More vectors than the matrix has sides, at the end."""
    taus = task_matrices(5, 2, 6, 5)
    want, _, _ = tsv(taus, max(1, int(fraction * 5)))
    got = merge(taus, rank_fraction=fraction)
    np.testing.assert_allclose(got, want, atol=3e-5)

  def test_orthogonal_tasks_are_all_recovered(self):
    rng = np.random.default_rng(0)
    left, right = orthonormal(rng, 8, 6), orthonormal(rng, 7, 6)
    taus = [
      left[:, at] @ np.diag([3.0, 1.5]) @ right[:, at].T
      for at in (slice(0, 2), slice(2, 4), slice(4, 6))
    ]
    got = merge(taus)
    np.testing.assert_allclose(got, sum(taus), atol=1e-5)
    for i, tau in enumerate(taus):
      inside = left[:, 2 * i : 2 * i + 2]
      np.testing.assert_allclose(inside @ inside.T @ got, tau, atol=1e-5)

  def test_equal_models_of_low_rank_are_that_model(self):
    (tau,) = task_matrices(1, 1, 6, 5)
    u, s, vh = np.linalg.svd(tau, full_matrices=False)
    tau = u[:, :2] @ np.diag(s[:2]) @ vh[:2]
    base = np.round(np.linspace(-1, 1, 30).reshape(6, 5), 1)
    np.testing.assert_allclose(merge([tau] * 2, base), base + tau, atol=1e-5)
    # Opposites cancel.
    np.testing.assert_allclose(merge([tau, -tau]), 0 * tau, atol=1e-5)

  def test_a_task_without_a_change_disturbs_nothing(self):
    one, two = task_matrices(2, 2, 6, 5)
    want = merge([one, two], rank_fraction=0.4)
    got = merge([one, 0 * one, two], rank_fraction=0.4)
    np.testing.assert_allclose(got, want, atol=1e-5)
    got = merge([one, one, two], weights=[1, 0, 1], rank_fraction=0.4)
    np.testing.assert_allclose(got, want, atol=1e-5)
    # Vectors of singular values that are zero count as little.
    left, right = two[:, 0], two[1]
    sizes = np.linalg.norm(left), np.linalg.norm(right)
    u, s, vh = np.linalg.svd(one, full_matrices=False)
    want = (
      root(np.column_stack([u[:, :2], left / sizes[0]]))
      @ np.diag([*s[:2], sizes[0] * sizes[1]])
      @ root(np.column_stack([vh[:2].T, right / sizes[1]])).T
    )
    got = merge([one, np.outer(left, right)], rank_fraction=0.4)
    np.testing.assert_allclose(got, want, atol=1e-4)

  @parameterized.parameters((1, 4, 3), (5, 1, 2), (2, 2, 5), (1, 1, 2))
  def test_fewer_vectors_than_tasks(self, rows, columns, tasks):
    """One vector is kept of each, where they depend on each other too."""
    rng = np.random.default_rng(0)
    taus = [rng.normal(size=(rows, columns)) for _ in range(tasks)]
    want, _, _ = tsv(taus, 1)
    np.testing.assert_allclose(merge(taus), want, atol=1e-4)

  def test_large_and_small_entries(self):
    """Squares neither overflow nor vanish."""
    taus = task_matrices(4, 2, 4, 4)
    want = merge(taus)
    for factor in (2.0**80, 2.0**-80):
      got = merge([factor * tau for tau in taus])
      np.testing.assert_allclose(got / factor, want, rtol=1e-4, atol=1e-5)

  def test_complex_leaves(self):
    rng = np.random.default_rng(0)
    u, v = (
      np.linalg.qr(rng.normal(size=(4, 4)) + 1j * rng.normal(size=(4, 4)))[0]
      for _ in range(2)
    )
    taus = [
      jnp.asarray(u[:, at] @ np.diag([2.0, 1.0]) @ v[:, at].conj().T)
      for at in (slice(0, 2), slice(2, 4))
    ]
    taus = [tau.astype(jnp.complex64) for tau in taus]
    base = {"w": jnp.zeros((4, 4), jnp.complex64)}
    got = merging.tsv_merge(base, [{"w": tau} for tau in taus])["w"]
    np.testing.assert_allclose(got, taus[0] + taus[1], atol=1e-5)

  def test_errors(self):
    base = {"w": jnp.zeros((2, 2))}
    for fraction in (0.0, 1.5, float("nan"), {"w": -1.0}):
      with self.assertRaisesRegex(ValueError, "rank_fraction must lie"):
        merging.tsv_merge(base, [base], rank_fraction=fraction)
      with self.assertRaisesRegex(ValueError, "rank_fraction must lie"):
        merging.tsv_merge_method(rank_fraction=fraction)
    with self.assertRaisesRegex(ValueError, "not a traced value"):
      jax.jit(lambda f: merging.tsv_merge(base, [base], rank_fraction=f))(0.5)


if __name__ == "__main__":
  absltest.main()
