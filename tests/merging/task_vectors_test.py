"""Task arithmetic, MagMax, TIES, DARE, DELLA, Breadcrumbs against NumPy."""

from __future__ import annotations

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import strategies

from jaxmerge import merging

# Sums of a few such numbers are exact, so that signs and ties are.
NUMBERS = strategies.integers(-8, 8).map(lambda number: number / 4)
STACKS = hnp.arrays(
  np.float32,
  strategies.tuples(strategies.just(3), strategies.just(12)),
  elements=NUMBERS,
)
quick = hypothesis.settings(max_examples=30, deadline=None)


def _tree(values):
  """Two leaves of one vector of 12."""
  return {"a": jnp.asarray(values[:8].reshape(4, 2)), "b": values[8:]}


def _vector(params):
  return np.concatenate([np.asarray(params[name]).ravel() for name in "ab"])


def _merge(name, base, stack, *args, **options):
  models = [_tree(base + tau) for tau in stack]
  return _vector(getattr(merging, name)(_tree(base), models, *args, **options))


def _trim(tau, density):
  """What the sort keeps: the k largest magnitudes and their equals."""
  k = max(1, int(density * tau.size))
  least = np.sort(np.abs(tau))[::-1][k - 1]
  return np.where(np.abs(tau) >= least, tau, 0)


def _disjoint(stack, merge, by="mass", zero=None):
  """Elects and merges column by column, as the paper's algorithm 1 says."""
  votes = [
    np.sign(column.sum() if by == "mass" else np.sign(column).sum())
    for column in stack.T
  ]
  majority = np.sign(np.sum(votes)) if zero is None else zero
  merged = []
  for column, vote in zip(stack.T, votes, strict=True):
    sign = vote if vote else majority
    agreeing = [x for x in column if (x > 0 if sign > 0 else x < 0)]
    if not agreeing:
      merged.append(0.0)
    elif merge == "mean":
      merged.append(np.mean(agreeing))
    elif merge == "sum":
      merged.append(np.sum(agreeing))
    else:
      merged.append(max(agreeing, key=abs))
  return np.array(merged)


BASE = np.linspace(-1.5, 1.25, 12, dtype=np.float32)
ZERO = np.zeros(12, np.float32)


class SumTest(parameterized.TestCase):
  @quick
  @hypothesis.given(STACKS, hnp.arrays(np.float32, 3, elements=NUMBERS))
  def test_task_arithmetic(self, stack, weights):
    got = _merge("task_arithmetic", BASE, stack, weights=weights, scale=0.3)
    np.testing.assert_allclose(
      got, BASE + 0.3 * weights @ stack, rtol=1e-5, atol=1e-5
    )

  def test_negation_and_analogy(self):
    a, b, c = np.eye(3, 12, dtype=np.float32)
    got = _merge("task_arithmetic", ZERO, [a, b, c], weights=[-1, 1, 1])
    np.testing.assert_array_equal(got, b + c - a)

  def test_mean(self):
    stack = np.random.default_rng(0).normal(size=(3, 12)).astype(np.float32)
    got = _merge(
      "task_arithmetic", BASE, stack, weights=[1, 2, 5], normalize=True
    )
    want = BASE + np.average(stack, axis=0, weights=[1, 2, 5])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)

  def test_ema(self):
    stack = np.random.default_rng(0).normal(size=(4, 12)).astype(np.float32)
    want = BASE.astype(np.float64)
    for tau in stack:
      want = 0.8 * want + 0.2 * (BASE + tau)
    got = _merge("ema", BASE, stack, decay=0.8)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)

  def test_task_vector(self):
    params = {"w": jnp.asarray([1.0, 2.0]), "n": jnp.asarray(3)}
    base = {"w": jnp.asarray([0.5, 4.0]), "n": jnp.asarray(1)}
    got = merging.task_vector(base, params)
    np.testing.assert_array_equal(got["w"], [0.5, -2.0])
    self.assertEqual(int(got["n"]), 3)


class LargestTest(parameterized.TestCase):
  @quick
  @hypothesis.given(STACKS)
  def test_magmax(self, stack):
    want = []
    for column in stack.T:
      best = max(abs(column))
      want.append([x for x in column if abs(x) == best][-1])
    for name in ("magmax", "max_abs"):
      got = _merge(name, ZERO, stack, scale=0.5)
      np.testing.assert_array_equal(got, 0.5 * np.array(want))

  def test_later_wins(self):
    stack = np.stack([ZERO + 2, ZERO - 2, ZERO + 1])
    np.testing.assert_array_equal(_merge("magmax", ZERO, stack, scale=1.0), -2)

  def test_random_mix(self):
    """Each model is drawn as often as its weight says."""
    size, weights = 60_000, np.array([1.0, 2.0, 5.0])
    models = [{"w": jnp.full(size, i + 1.0)} for i in range(3)]
    got = merging.random_mix(
      {"w": jnp.zeros(size)}, models, jax.random.key(3), weights=weights
    )["w"]
    shares = [np.mean(np.asarray(got) == i + 1) for i in range(3)]
    # Five standard deviations.
    np.testing.assert_allclose(shares, weights / 8, atol=5 * 0.5 / size**0.5)


class TiesTest(parameterized.TestCase):
  @parameterized.product(
    by=["mass", "count"],
    merge=["mean", "sum", "max"],
    zero_sign=["majority", "positive"],
  )
  def test_against_the_algorithm(self, by, merge, zero_sign):
    rng = np.random.default_rng(0)
    zero = 1 if zero_sign == "positive" else None
    for density in (0.1, 0.4, 1.0):
      stack = rng.integers(-8, 9, (3, 12)).astype(np.float32) / 4
      trimmed = np.stack([_trim(tau, density) for tau in stack])
      got = _merge(
        "ties",
        ZERO,
        stack,
        density=density,
        scale=0.5,
        elect=by,
        merge=merge,
        zero_sign=zero_sign,
      )
      want = 0.5 * _disjoint(trimmed, merge, by, zero)
      np.testing.assert_allclose(got, want, rtol=1e-6)

  @quick
  @hypothesis.given(STACKS)
  def test_zero_votes(self, stack):
    # Everything kept, and every vote that can be zero.
    stack = np.concatenate([stack[:1], -stack[:1], stack[2:]])
    got = _merge("ties", ZERO, stack, density=1.0)
    np.testing.assert_allclose(got, _disjoint(stack, "mean"), rtol=1e-6)

  def test_leaf_scope(self):
    stack = np.random.default_rng(1).integers(-8, 9, (3, 12)) / 4
    stack = stack.astype(np.float32)
    got = _merge("ties", ZERO, stack, density=0.4, scope="leaf")
    want = [
      _disjoint(np.stack([_trim(tau[part], 0.4) for tau in stack]), "mean")
      for part in (slice(0, 8), slice(8, 12))
    ]
    np.testing.assert_allclose(got, np.concatenate(want), rtol=1e-6)

  def test_weights(self):
    stack = np.stack([ZERO + 1, ZERO + 3, ZERO - 2])
    got = _merge("ties", ZERO, stack, density=1.0, weights=[1, 3, 1])
    np.testing.assert_allclose(got, (1 + 9) / 4, rtol=1e-6)

  def test_density_of_each_model(self):
    stack = np.random.default_rng(2).normal(size=(2, 12)).astype(np.float32)
    trimmed = np.stack([_trim(stack[0], 0.25), _trim(stack[1], 0.75)])
    got = _merge("ties", ZERO, stack, density=[0.25, 0.75])
    np.testing.assert_allclose(got, _disjoint(trimmed, "mean"), rtol=1e-6)

  def test_mixed_precision(self):
    """One threshold for leaves of several dtypes."""
    with jax.enable_x64(True):
      base = {"a": jnp.zeros(3, jnp.float64), "b": jnp.zeros(3, jnp.float32)}
      model = {
        "a": jnp.asarray([1.0, 5.0, 2.0], jnp.float64),
        "b": jnp.asarray([4.0, 3.0, 0.5], jnp.float32),
      }
      got = merging.ties(base, [model], density=0.5)
      np.testing.assert_array_equal(got["a"], [0, 5, 0])
      np.testing.assert_array_equal(got["b"], [4, 3, 0])

  def test_traced_density(self):
    fn = jax.jit(lambda d: merging.ties({"w": ZERO}, [{"w": BASE}], density=d))
    with self.assertRaisesRegex(ValueError, "density must be a number"):
      fn(0.5)


class DroppedTest(parameterized.TestCase):
  @parameterized.parameters("dare", "della")
  def test_expectation_is_the_task_vector(self, name):
    base, tau = {"w": jnp.zeros(6)}, jnp.asarray([0.5, -1, 2, 0, 3, -0.1])
    keys = jax.random.split(jax.random.key(0), 4000)

    def one(key):
      merge = getattr(merging, name)
      options = {"variant": "linear", "density": 0.4}
      return merge(base, [{"w": tau}], key, **options)["w"]

    drawn = np.asarray(jax.vmap(one)(keys))
    # The probability of the smallest is 0.3 at the least.
    error = 5 * np.abs(tau) * (1 / 0.3 - 1) ** 0.5 / len(keys) ** 0.5
    self.assertTrue((np.abs(drawn.mean(0) - tau) <= error + 1e-6).all())

  def test_dare_keeps_the_density(self):
    size = 50_000
    got = merging.dare(
      {"w": jnp.zeros(size)},
      [{"w": jnp.ones(size)}],
      jax.random.key(1),
      density=0.25,
    )["w"]
    self.assertEqual(set(np.unique(got)), {0.0, 4.0})
    self.assertAlmostEqual(float((got > 0).mean()), 0.25, delta=0.01)

  def test_models_and_leaves_are_dropped_apart(self):
    base = {"a": jnp.zeros(64), "b": jnp.zeros(64)}
    ones = {"a": jnp.ones(64), "b": jnp.ones(64)}
    key = jax.random.key(0)
    both = merging.dare(base, [ones, ones], key)
    self.assertEqual(set(np.unique(both["a"])), {0.0, 2.0, 4.0})
    self.assertFalse((both["a"] == both["b"]).all())

  def test_dare_ties(self):
    stack = np.stack([ZERO + 1, ZERO - 3, ZERO + 1])
    options = {"density": 1.0, "variant": "ties"}
    got = _merge("dare", ZERO, stack, jax.random.key(0), **options)
    np.testing.assert_array_equal(got, -3)
    got = _merge(
      "dare", ZERO, stack, jax.random.key(0), elect="count", **options
    )
    np.testing.assert_array_equal(got, 2)

  @parameterized.parameters("l1", "l2", "linf")
  def test_rescale_matches_the_norm(self, rescale):
    tau = np.random.default_rng(0).normal(size=500).astype(np.float32)
    got = merging.dare(
      {"w": jnp.zeros(500)},
      [{"w": tau}],
      jax.random.key(0),
      density=0.3,
      rescale=rescale,
    )["w"]
    order = {"l1": 1, "l2": 2, "linf": np.inf}[rescale]
    np.testing.assert_allclose(
      np.linalg.norm(got, order), np.linalg.norm(tau, order), rtol=1e-5
    )

  def test_della_probabilities(self):
    """They rise with the rank within a column, from 0.4 to 0.6."""
    tau = np.array([[1.0, -4.0], [2.0, 3.0], [-3.0, 1.0]], np.float32)
    ranks = np.array([[0, 2], [1, 1], [2, 0]])
    keys = jax.random.split(jax.random.key(0), 8000)

    def one(key):
      base, models = {"w": jnp.zeros((3, 2))}, [{"w": jnp.asarray(tau)}]
      return merging.della(base, models, key, variant="linear")["w"]

    drawn = np.asarray(jax.vmap(one)(keys))
    probability = 0.5 + 0.2 * (ranks / 2 - 0.5)
    np.testing.assert_allclose((drawn != 0).mean(0), probability, atol=0.03)
    kept = np.abs(drawn).max(0)
    # The mean over the models that agree divides by their weight, one.
    np.testing.assert_allclose(kept, np.abs(tau) / probability, rtol=1e-5)

  @parameterized.parameters((0.5, 0.25), (0.3, 0.0), (0.9, 0.3), (1.0, 0.5))
  def test_breadcrumbs(self, density, gamma):
    tau = np.random.default_rng(0).permutation(20).astype(np.float32) + 1
    got = merging.breadcrumbs(
      {"w": jnp.zeros(20)}, [{"w": tau}], density=density, gamma=gamma
    )["w"]
    keep = int(density * 20)
    outliers = min(int(gamma * 20), 20 - keep)
    want = np.sort(tau)[::-1][outliers : outliers + keep]
    np.testing.assert_array_equal(np.sort(got[got != 0])[::-1], want)


if __name__ == "__main__":
  absltest.main()
