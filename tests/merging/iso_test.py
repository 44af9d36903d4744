"""Tests of Iso-C and Iso-CTS."""

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


def matrices(seed, tasks, rows, columns):
  rng = np.random.default_rng(seed)
  return [rng.normal(size=(rows, columns)) for _ in range(tasks)]


def iso_c(taus):
  """U V' is the polar factor of the sum."""
  total = sum(taus)
  if total.shape[0] < total.shape[1]:
    return iso_c([total.T]).T
  values = np.linalg.svd(total, compute_uv=False)
  return values.mean() * scipy.linalg.polar(total)[0]


def iso_cts(taus, common, specific):
  """The merged matrix by the paper's equations, in float64."""
  u, s, vh = np.linalg.svd(sum(taus), full_matrices=False)
  u, s, vh = u[:, :common], s[:common], vh[:common]
  lefts, values, rights = [], [], []
  for tau in taus:
    left = tau - u @ u.T @ tau
    a, b, ch = np.linalg.svd(left, full_matrices=False)
    lefts.append(a[:, :specific])
    values.append(b[:specific])
    rights.append(ch[:specific].T)
  left = np.concatenate([*lefts, u], axis=1)
  right = np.concatenate([*rights, vh.T], axis=1)
  mean = np.concatenate([*values, s]).mean()
  merged = mean * scipy.linalg.polar(left)[0] @ scipy.linalg.polar(right)[0].T
  return merged, max(np.linalg.cond(left), np.linalg.cond(right))


def tsv(taus, count):
  """TSV-M by the paper's equations."""
  factors = [np.linalg.svd(tau) for tau in taus]
  u = np.concatenate([u[:, :count] for u, _, _ in factors], axis=1)
  s = np.concatenate([s[:count] for _, s, _ in factors])
  v = np.concatenate([vh[:count].T for _, _, vh in factors], axis=1)
  return (scipy.linalg.polar(u)[0] * s) @ scipy.linalg.polar(v)[0].T


def merge(fn, taus, **options):
  models = [{"w": jnp.asarray(tau, jnp.float32)} for tau in taus]
  base = {"w": jnp.zeros(np.shape(taus[0]))}
  return np.asarray(fn(base, models, **options)["w"])


class IsoCTest(parameterized.TestCase):
  @parameterized.parameters((2, 6, 4), (3, 3, 5), (3, 4, 4))
  def test_against_the_equations(self, tasks, rows, columns):
    @SETTINGS
    @hypothesis.given(seed=st.integers(0, 10**6))
    def check(seed):
      taus = matrices(seed, tasks, rows, columns)
      hypothesis.assume(np.linalg.cond(sum(taus)) < 100)
      want = iso_c(taus)
      got = merge(merging.iso_c, taus)
      np.testing.assert_allclose(got, want, atol=3e-4)
      values = np.linalg.svd(got, compute_uv=False)
      np.testing.assert_allclose(values, values[0], rtol=1e-4)
      np.testing.assert_allclose(
        values.sum(), np.linalg.norm(sum(taus), "nuc"), rtol=1e-4
      )

    check()

  def test_weights_and_scale(self):
    taus = matrices(0, 3, 5, 4)
    weights = [1.0, -0.5, 2.0]
    want = iso_c([w * tau for w, tau in zip(weights, taus, strict=True)])
    got = merge(merging.iso_c, taus, weights=weights, scale=1.3)
    np.testing.assert_allclose(got, 1.3 * want, atol=2e-5)

  def test_only_the_directions_that_there_are(self):
    """Equal singular values on the range, and none beside it."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(6, 2)))[0] for _ in range(2))
    total = u @ np.diag([3.0, 1.0]) @ v.T
    got = merge(merging.iso_c, [total / 2] * 2)
    # (3 + 1) / 6, the mean over all six.
    np.testing.assert_allclose(got, 2 / 3 * u @ v.T, atol=1e-5)

  @parameterized.parameters((1, 5), (5, 1), (1, 1))
  def test_one_singular_value_is_task_arithmetic(self, rows, columns):
    taus = matrices(0, 3, rows, columns)
    got = merge(merging.iso_c, taus)
    np.testing.assert_allclose(got, sum(taus), atol=1e-5)


class LargeTest(parameterized.TestCase):
  """Small singular values of large matrices are no rounding."""

  @parameterized.parameters(0.0, 1.5)
  def test_against_the_equations(self, decay):
    rng, side = np.random.default_rng(0), 256
    decays = np.arange(1.0, side + 1) ** -decay
    taus = []
    for _ in range(2):
      u, _, vh = np.linalg.svd(rng.normal(size=(side, side)))
      values = np.sort(rng.uniform(0.5, 1, side))[::-1] * decays
      taus.append(((u * values) @ vh).astype(np.float32).astype(np.float64))
    for name, want in (
      ("iso_c", iso_c(taus)),
      ("tsv_merge", tsv(taus, side // 2)),
    ):
      got = merge(getattr(merging, name), taus)
      error = np.linalg.norm(got - want) / np.linalg.norm(want)
      self.assertLess(error, 2e-3, name)


class IsoCtsTest(parameterized.TestCase):
  # The numbers of vectors are worked out by hand: of r, int(0.8 r) are common,
  # the rest is shared out, rounded to a multiple of the tasks.
  @parameterized.parameters(
    (2, 10, 12, 0.8, 8, 1),
    (2, 7, 6, 0.5, 2, 2),
    (3, 8, 8, 0.0, 2, 2),
    (3, 10, 9, 0.8, 6, 1),
  )
  def test_against_the_equations(
    self, tasks, rows, columns, fraction, common, specific
  ):
    @hypothesis.settings(SETTINGS, max_examples=6)
    @hypothesis.given(seed=st.integers(0, 10**6))
    def check(seed):
      taus = matrices(seed, tasks, rows, columns)
      want, condition = iso_cts(taus, common, specific)
      hypothesis.assume(condition < 30)
      got = merge(merging.iso_cts, taus, common_fraction=fraction)
      np.testing.assert_allclose(got, want, atol=2e-3)
      values = np.linalg.svd(got, compute_uv=False)
      np.testing.assert_allclose(values, values[0], rtol=1e-3)

    check()

  def test_weights_and_scale(self):
    taus, weights = matrices(1, 2, 6, 5), [0.5, 2.0]
    want, _ = iso_cts(
      [w * tau for w, tau in zip(weights, taus, strict=True)], 3, 1
    )
    got = merge(
      merging.iso_cts, taus, weights=weights, scale=0.5, common_fraction=0.6
    )
    np.testing.assert_allclose(got, 0.5 * want, atol=1e-4)

  def test_is_iso_c_where_no_task_has_its_own(self):
    taus = matrices(2, 3, 6, 5)
    want = iso_c(taus)
    for options in ({"common_fraction": 1.0}, {"common_fraction": 0.9}):
      got = merge(merging.iso_cts, taus, **options)
      np.testing.assert_allclose(got, want, atol=1e-4)
    # More tasks than vectors to share out, and one task alone.
    taus = matrices(3, 4, 3, 3)
    got = merge(merging.iso_cts, taus, common_fraction=0.0)
    np.testing.assert_allclose(got, iso_c(taus), atol=1e-4)
    got = merge(merging.iso_cts, taus[:1], common_fraction=0.5)
    np.testing.assert_allclose(got, iso_c(taus[:1]), atol=1e-4)

  def test_tasks_inside_the_common_space(self):
    """What is left of them is rounding, and is left out."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(6, 2)))[0] for _ in range(2))
    taus = [u @ np.diag([3.0, 1.0]) @ v.T] * 2
    got = merge(merging.iso_cts, taus, common_fraction=0.5)
    np.testing.assert_allclose(got, 4 / 3 * u @ v.T, atol=1e-5)

  def test_errors(self):
    base = {"w": jnp.zeros((2, 2))}
    for fraction in (-0.1, 1.5, float("nan")):
      with self.assertRaisesRegex(ValueError, "common_fraction must lie"):
        merging.iso_cts(base, [base], common_fraction=fraction)
      with self.assertRaisesRegex(ValueError, "common_fraction must lie"):
        merging.iso_cts_method(common_fraction=fraction)
    with self.assertRaisesRegex(ValueError, "not a traced value"):
      jax.jit(lambda f: merging.iso_cts(base, [base], common_fraction=f))(0.5)


if __name__ == "__main__":
  absltest.main()
