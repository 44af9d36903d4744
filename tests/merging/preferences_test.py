"""Tests of preferences by the similarity of data."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from scipy import optimize
from scipy.spatial import distance

from jaxmerge import merging
from jaxmerge.merging import _set_distances

KINDS = ("cosine", "mmd", "ot")


def _sets(count=3, n=40, d=6, seed=0, apart=0.7):
  """Target, and sources that are further away from one to the next."""
  rng = np.random.default_rng(seed)
  make = lambda shift, size: (  # noqa: E731
    1 + rng.normal(size=(size, d)) + shift * np.eye(d)[0]
  ).astype(np.float32)
  target = make(0, n)
  return target, [make(apart * (i + 1), n + 7 * i) for i in range(count)]


def _softmax(distances, temperature=1.0):
  distances = np.asarray(distances)
  weights = np.exp(-distances / (temperature * distances.mean()))
  return weights / weights.sum()


def _cosine(target, sources):
  means = [one.astype(np.float64).mean(axis=0) for one in (target, *sources)]
  norms = [np.sqrt((one**2).sum()) for one in means]
  return [
    1 - (means[0] * one).sum() / (norms[0] * norm)
    for one, norm in zip(means[1:], norms[1:], strict=True)
  ]


def _mmd(target, sources):
  """The unbiased estimate, pair by pair."""
  sets = [one.astype(np.float64) for one in (target, *sources)]
  sigma = np.median(distance.pdist(np.concatenate(sets)))
  kernel = lambda x, y: np.exp(  # noqa: E731
    -(distance.cdist(x, y) ** 2) / (2 * sigma**2)
  )
  within = lambda x: kernel(x, x)[~np.eye(len(x), dtype=bool)].mean()  # noqa: E731
  x = sets[0]
  return [
    max(0, within(x) + within(y) - 2 * kernel(x, y).mean()) for y in sets[1:]
  ]


class FeaturesTest(parameterized.TestCase):
  @parameterized.product(
    similarity=["cosine", "mmd"], temperature=[1.0, 0.2], dtype=["f4", "f8"]
  )
  def test_against_numpy(self, similarity, temperature, dtype):
    target, sources = _sets()
    got = merging.task_preferences(
      target.astype(dtype),
      [jnp.asarray(one) for one in sources],
      similarity=similarity,
      temperature=temperature,
    )
    oracle = {"cosine": _cosine, "mmd": _mmd}[similarity]
    want = _softmax(oracle(target, sources), temperature)
    self.assertEqual((got.shape, got.dtype), ((3,), np.float64))
    np.testing.assert_allclose(got, want, rtol=1e-4)

  def test_transport_against_assignment(self):
    """Little entropy is the exact transport of equally many points."""
    target, sources = _sets(n=24, d=3, apart=2.0)
    sources = [one[:24] for one in sources]
    exact = []
    for one in sources:
      cost = distance.cdist(target, one, "sqeuclidean")
      exact.append(cost[optimize.linear_sum_assignment(cost)].mean())
    got = merging.task_preferences(
      target, sources, similarity="ot", epsilon=3e-3, max_iterations=20000
    )
    np.testing.assert_allclose(got, _softmax(exact), rtol=0.02)
    # The entropy is taken account of: much of it changes little.
    loose = merging.task_preferences(
      target, sources, similarity="ot", epsilon=0.5
    )
    np.testing.assert_allclose(loose, _softmax(exact), rtol=0.15)

  def test_entropic_cost_against_log_domain_iterations(self):
    """Sets of different sizes, by Sinkhorn's iterations in NumPy."""
    target, sources = _sets(n=15, d=3, apart=1.5)
    pool = np.concatenate([target, *sources]).astype(np.float64)
    unit = (distance.pdist(pool) ** 2).mean()

    def cost(x, y, epsilon):
      c = distance.cdist(x, y, "sqeuclidean") / unit
      f, g = np.zeros(len(x)), np.zeros(len(y))

      def soft(z, axis):
        return -epsilon * np.log(np.mean(np.exp(z / epsilon), axis=axis))

      for _ in range(500):
        f = soft(g[None] - c, 1)
        g = soft(f[:, None] - c, 0)
      # The dual, and the entropy is relative to the product of the marginals.
      return f.mean() + g.mean()

    within = [cost(one, one, 0.1) for one in (target, *sources)]
    want = [
      cost(target, one, 0.1) - (within[0] + mine) / 2
      for one, mine in zip(sources, within[1:], strict=True)
    ]
    got = _set_distances.sinkhorn(target, sources, 0.1, 2000)
    np.testing.assert_allclose(got, want, rtol=1e-3)

  @parameterized.parameters(*KINDS)
  def test_nearer_tasks_count_more(self, similarity):
    target, sources = _sets()
    got = merging.task_preferences(target, sources, similarity=similarity)
    self.assertGreater(got[0], got[1])
    self.assertGreater(got[1], got[2])
    np.testing.assert_allclose(got.sum(), 1, rtol=1e-12)
    # The scale of the features is of no account.
    scaled = merging.task_preferences(
      100 * target, [100 * one for one in sources], similarity=similarity
    )
    np.testing.assert_allclose(scaled, got, rtol=1e-3)
    cold = merging.task_preferences(
      target, sources, similarity=similarity, temperature=1e-4
    )
    np.testing.assert_allclose(cold, [1, 0, 0], atol=1e-6)
    one = merging.task_preferences(target, sources[:1], similarity=similarity)
    np.testing.assert_array_equal(one, [1])

  @parameterized.parameters(*KINDS)
  def test_equal_sets_and_equal_points(self, similarity):
    target, _ = _sets()
    got = merging.task_preferences(target, [target] * 4, similarity=similarity)
    np.testing.assert_allclose(got, [0.25] * 4, rtol=1e-3)
    ones = np.ones((5, 3), np.float32)
    got = merging.task_preferences(ones, [ones, ones], similarity=similarity)
    np.testing.assert_allclose(got, [0.5, 0.5], rtol=1e-3)

  @parameterized.parameters("mmd", "ot")
  def test_only_so_many_examples(self, similarity):
    target, sources = _sets(n=60)
    want = merging.task_preferences(
      target[::3],
      [one[::3][:20] for one in sources[:1]] + [sources[1][:20]],
      similarity=similarity,
    )
    # Evenly spaced: of 60 every third.
    got = merging.task_preferences(
      target,
      [sources[0], sources[1][:20]],
      similarity=similarity,
      max_examples=20,
    )
    np.testing.assert_allclose(got, want, rtol=1e-6)
    everything = merging.task_preferences(
      target,
      [sources[0], sources[1][:20]],
      similarity=similarity,
      max_examples=None,
    )
    self.assertGreater(np.abs(everything - got).max(), 1e-4)

  def test_kernels_in_blocks(self):
    x, (y, *_) = _sets(n=2500, d=4)
    want = np.exp(-0.5 * distance.cdist(x[:300], y) ** 2).sum(axis=1)
    got = _set_distances._kernel_sums(x, y)
    self.assertEqual(got.shape, (2500,))
    np.testing.assert_allclose(got[:300], want, rtol=1e-4)

  def test_half_precision(self):
    target, sources = _sets()
    half = lambda x: jnp.asarray(x, jnp.bfloat16)  # noqa: E731
    got = merging.task_preferences(half(target), [half(x) for x in sources])
    rounded = lambda x: np.asarray(half(x), np.float32)  # noqa: E731
    want = merging.task_preferences(
      rounded(target), [rounded(x) for x in sources]
    )
    np.testing.assert_allclose(got, want, rtol=1e-12)

  def test_no_convergence_is_a_warning(self):
    target, sources = _sets(apart=3.0)
    with self.assertWarnsRegex(
      RuntimeWarning, "target with source 0.*3 iterations; take more max_iter"
    ):
      merging.task_preferences(
        target, sources, similarity="ot", epsilon=1e-3, max_iterations=3
      )
    with warnings.catch_warnings():
      warnings.simplefilter("error")
      merging.task_preferences(target, sources, similarity="ot")


class LabelsTest(parameterized.TestCase):
  def test_classes_of_one_task_each(self):
    target = np.asarray([7, 7, 7, 2, 2, 5])
    got = merging.task_preferences(
      target, [[2, 2, 1], jnp.asarray([7]), [5, 4]], similarity="labels"
    )
    np.testing.assert_allclose(got, [2 / 6, 3 / 6, 1 / 6], rtol=1e-12)

  def test_classes_of_several_tasks(self):
    # Label 0: shares 1/2 and 1/4 of the tasks; label 1: 1/2 and 3/4.
    got = merging.task_preferences(
      [0, 0, 0, 1], [[0, 1], [0, 1, 1, 1]], similarity="labels"
    )
    first = 3 / 4 * (1 / 2) / (3 / 4) + 1 / 4 * (1 / 2) / (5 / 4)
    np.testing.assert_allclose(got, [first, 1 - first], rtol=1e-12)

  def test_unknown_labels_are_left_out(self):
    got = merging.task_preferences(
      [0, 1, 1, 9, 9, 9], [[0], [1], [3]], similarity="labels"
    )
    np.testing.assert_allclose(got, [1 / 3, 2 / 3, 0], rtol=1e-12)
    with self.assertRaisesRegex(ValueError, "no label of target is a label"):
      merging.task_preferences([9], [[0], [1]], similarity="labels")

  def test_lead_to_a_merge(self):
    preferences = merging.task_preferences(
      [0, 0, 0, 1], [[0], [1]], similarity="labels"
    )
    base = {"w": jnp.zeros(8)}
    models = [{"w": jnp.full(8, i)} for i in (1.0, 2.0)]
    rule = merging.get("tunable_magmax", preferences=preferences, scale=1.0)
    got = rule(base, models, key=jax.random.key(0))["w"]
    np.testing.assert_array_equal(np.sort(got), [1] * 6 + [2] * 2)


class ErrorsTest(parameterized.TestCase):
  @parameterized.parameters(
    ({"similarity": "l2"}, "similarity must be one of 'cosine', 'mmd'"),
    ({"temperature": 0.0}, "temperature must be positive and finite; got 0"),
    ({"temperature": np.nan}, "temperature must be positive"),
    ({"epsilon": -1.0}, "epsilon must be positive and finite; got -1"),
    ({"max_examples": 0}, "max_examples must be a positive integer; got 0"),
    ({"max_iterations": 1.5}, "max_iterations must be a positive integer"),
    (
      {"similarity": "mmd", "max_examples": 1},
      "max_examples must be at least 2 for similarity='mmd'",
    ),
  )
  def test_options(self, options, message):
    target, sources = _sets()
    with self.assertRaisesRegex(ValueError, message):
      merging.task_preferences(target, sources, **options)

  @parameterized.parameters(*KINDS)
  def test_sets(self, similarity):
    x, sources = _sets()
    give = lambda target, *sources: merging.task_preferences(  # noqa: E731
      target, list(sources), similarity=similarity
    )
    for bad, message in (
      (x[:, :2], "source 1 has 2 features and target has 6; take all from"),
      (x[:0], r"source 1 must be a floating-point matrix .* shape \(0, 6\)"),
      (x[0], r"source 1 must be .* got shape \(6,\) of float32; reshape"),
      (x.astype(int), r"source 1 must be .* int64; .*similarity='labels'"),
      (np.full_like(x, np.nan), "source 1 holds NaN or infinity; leave out"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        give(x, sources[0], bad)
    with self.assertRaisesRegex(ValueError, "target must be a floating-point"):
      give(x[0], x)
    with self.assertRaisesRegex(ValueError, "sources is empty; give the data"):
      give(x)
    with self.assertRaisesRegex(ValueError, "sources must be a sequence"):
      merging.task_preferences(x, x, similarity=similarity)

  def test_single_examples_and_no_direction(self):
    x, _ = _sets()
    with self.assertRaisesRegex(ValueError, "source 1 has one example, of"):
      merging.task_preferences(x, [x, x[:1]], similarity="mmd")
    with self.assertRaisesRegex(ValueError, "of source 0 is zero and has no d"):
      merging.task_preferences(x, [np.zeros_like(x)])
    with self.assertRaisesRegex(ValueError, "of the target is zero"):
      merging.task_preferences(np.zeros_like(x), [x])

  @parameterized.parameters(
    ([], r"target must be a vector of integer labels, not empty"),
    ([0.5], r"target must be .* got shape \(1,\) of float64"),
    ([[1]], r"target must be .* got shape \(1, 1\)"),
  )
  def test_labels(self, target, message):
    with self.assertRaisesRegex(ValueError, message):
      merging.task_preferences(target, [[1]], similarity="labels")


if __name__ == "__main__":
  absltest.main()
