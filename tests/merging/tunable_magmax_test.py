"""Tests of tunable MagMax."""

from __future__ import annotations

import fractions

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import strategies as st

from jaxmerge import merging
from jaxmerge.merging import (
  _choice,
  _gathered,
  _quota_assignment,
  _tunable_magmax,
)

KEY = jax.random.key(0)
SHAPE = (12, 25)


def _magnitudes(num_tasks, shape=SHAPE, seed=0, growing=0.0):
  """Task vectors; the later ones are larger, if they grow."""
  rng = np.random.default_rng(seed)
  size = num_tasks * int(np.prod(shape))
  values = rng.permutation(np.arange(1, size + 1)).reshape(num_tasks, *shape)
  signs = rng.choice([-1, 1], values.shape)
  steps = 1 + growing * np.arange(num_tasks).reshape(-1, *[1] * len(shape))
  tasks = np.arange(num_tasks).reshape(-1, *[1] * len(shape))
  # No two of an entry are equal.
  magnitudes = np.round(values * steps) * num_tasks + tasks
  return (magnitudes * signs).astype(np.float32)


def _merge(taus, preferences=None, key=KEY, **options):
  """One leaf, from zero and in full: the entries of the task vectors."""
  merged = merging.tunable_magmax(
    {"w": jnp.zeros(taus.shape[1:])},
    [{"w": jnp.asarray(tau)} for tau in taus],
    key,
    preferences=preferences,
    **{"scale": 1.0, **options},
  )
  return np.asarray(merged["w"])


def _owners(taus, merged):
  """Whose entry each one is."""
  matches = taus == merged
  assert (matches.sum(axis=0) == 1).all()
  return matches.argmax(axis=0)


def _quotas(size, preferences):
  """The definition, in fractions of whole numbers."""
  shares = [fractions.Fraction(one) for one in preferences]
  found = [size * share // sum(shares) for share in shares]
  takers = [i for i, share in enumerate(shares) if share]
  for i in takers[: size - sum(found)]:
    found[i] += 1
  return found


def _largest(taus, last):
  """Per entry the task of the largest magnitude up to a task, the later one."""
  magnitudes = np.abs(taus[: last + 1])
  return last - magnitudes[::-1].argmax(axis=0)


class AssignmentTest(parameterized.TestCase):
  @parameterized.product(
    shape=[(), (1,), (2,), (7,), (3, 4), (5, 1, 61)],
    preferences=[(1, 1, 1), (5, 1, 3), (0, 1, 0), (1, 0, 2), (0, 0, 3)],
  )
  def test_counts_are_the_quotas(self, shape, preferences):
    taus = _magnitudes(3, shape, growing=0.3)
    owner = _owners(taus, _merge(taus, preferences))
    np.testing.assert_array_equal(
      np.bincount(owner.ravel(), minlength=3),
      _quotas(int(np.prod(shape)), preferences),
    )

  @parameterized.product(
    preferences=[
      (1, 1, 1, 1, 1),
      (8, 1, 1, 1, 1),
      (1, 1, 1, 1, 8),
      (3, 0, 1, 0, 5),
      # More than a word has bits.
      tuple(range(40)),
      (*range(35, 0, -1), 90),
    ],
    growing=[0.0, 0.3],
  )
  def test_follows_the_definition(self, preferences, growing):
    count = len(preferences)
    taus = _magnitudes(count, growing=growing)
    wanted = _quotas(taus[0].size, preferences)
    quotas = jnp.asarray(wanted, jnp.uint32)
    base, leaves = jnp.zeros(SHAPE), [jnp.asarray(tau) for tau in taus]
    words = _quota_assignment._records(base, leaves)
    start = np.asarray(_quota_assignment._owners(words))
    np.testing.assert_array_equal(start, np.abs(taus).argmax(axis=0))
    words = _quota_assignment._drop_surplus(words, count, quotas, KEY)
    dropped = np.asarray(_quota_assignment._owners(words))
    # Each entry goes down the tasks that are the largest of all up to them,
    # and a task keeps what it has, or its quota.
    moved = 0
    active = np.ones(SHAPE, bool)
    for task in range(count - 1, 0, -1):
      mine = active & (_largest(taus, task) == task)
      kept = mine & (dropped == task)
      np.testing.assert_array_equal(dropped == task, kept)
      self.assertEqual(kept.sum(), min(mine.sum(), wanted[task]))
      moved += (mine & ~kept).sum()
      active &= ~kept
    self.assertGreater(moved, 0)
    np.testing.assert_array_equal(dropped == 0, active)
    # Only the first task gives now.
    final = np.asarray(_quota_assignment.assign(base, leaves, quotas, KEY))
    np.testing.assert_array_equal(final[final != dropped] > 0, True)
    np.testing.assert_array_equal(dropped[final != dropped], 0)
    np.testing.assert_array_equal(
      np.bincount(final.ravel(), minlength=count), wanted
    )

  def test_more_tasks_than_a_word_has_bits(self):
    taus = _magnitudes(70, (30, 50), growing=0.05)
    owner = _owners(taus, _merge(taus))
    self.assertEqual(set(np.bincount(owner.ravel())), {21, 22})
    preferences = [0] * 70
    preferences[33] = preferences[68] = 2
    preferences[40] = 1
    owner = _owners(taus, _merge(taus, preferences))
    found = np.bincount(owner.ravel(), minlength=70)
    np.testing.assert_array_equal(found, _quotas(1500, preferences))
    # The last task is over its quota and keeps what it had before.
    start = np.abs(taus).argmax(axis=0)
    quotas = _quotas(1500, [1] * 69 + [3])
    owner = _owners(taus, _merge(taus, [1] * 69 + [3]))
    self.assertGreater((start == 69).sum(), quotas[69])
    self.assertTrue((start[owner == 69] == 69).all())

  def test_nothing_over_quota_is_magmax(self):
    taus = _magnitudes(3)
    order = np.abs(taus).argsort(axis=0)
    # Each task is the largest on a third of the entries.
    wanted = np.arange(taus[0].size).reshape(SHAPE) % 3
    largest = np.take_along_axis(taus, order[2:], 0)[0]
    for task in range(3):
      taus[task] = np.where(wanted == task, largest, 0.1 * taus[task])
    base = {"w": jnp.full(SHAPE, 0.5)}
    models = [{"w": 0.5 + jnp.asarray(tau)} for tau in taus]
    want = merging.magmax(base, models, scale=0.25)
    for key in (KEY, jax.random.key(1)):
      got = merging.tunable_magmax(base, models, key, scale=0.25)
      chex.assert_trees_all_equal(got, want)
    other = merging.tunable_magmax(
      base, models, KEY, preferences=[1, 1, 2], scale=0.25
    )
    self.assertFalse((other["w"] == want["w"]).all())

  def test_ties_go_to_the_later_task(self):
    # The first is larger on the left, and none elsewhere.
    first = np.concatenate([np.full(20, 3.0), np.arange(20.0)])
    second = np.concatenate([np.ones(20), -np.arange(20.0)])
    taus = np.stack([first, second]).astype(np.float32)
    models = [{"w": jnp.asarray(tau)} for tau in taus]
    want = merging.magmax({"w": jnp.zeros(40)}, models, scale=1.0)["w"]
    np.testing.assert_array_equal(want, [*first[:20], *second[20:]])
    np.testing.assert_array_equal(_merge(taus), want)

  @parameterized.product(task=[0, 1, 2, 3], dtype=["float32", "bfloat16"])
  def test_one_task_alone(self, task, dtype):
    rng = np.random.default_rng(task)
    make = lambda: {  # noqa: E731
      "w": jnp.asarray(rng.integers(-8, 8, (9, 7)), dtype),
      "b": jnp.asarray(rng.integers(-8, 8), dtype),
      "steps": jnp.asarray(rng.integers(9)),
    }
    base, models = make(), [make() for _ in range(4)]
    preferences = [0.0] * 4
    preferences[task] = 0.3
    got = merging.tunable_magmax(
      base, models, KEY, preferences=preferences, scale=1.0
    )
    chex.assert_trees_all_equal(got, {**models[task], "steps": base["steps"]})

  def test_scale_and_half_precision(self):
    base = {"w": jnp.linspace(-1, 1, 40).astype(jnp.bfloat16)}
    models = [
      {"w": jax.random.normal(jax.random.key(i), (40,)).astype(jnp.bfloat16)}
      for i in range(3)
    ]
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (base, models))
    got = merging.tunable_magmax(base, models, KEY, scale=0.3)["w"]
    self.assertEqual(got.dtype, jnp.bfloat16)
    full = np.asarray(merging.tunable_magmax(*wide, KEY, scale=1.0)["w"])
    start = np.asarray(wide[0]["w"])
    want = jnp.asarray(start + np.float32(0.3) * (full - start), jnp.bfloat16)
    np.testing.assert_allclose(
      np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=1e-2
    )


class RandomnessTest(parameterized.TestCase):
  def test_what_is_dropped_is_random(self):
    shape = (100, 120)
    taus = np.stack([np.full(shape, value) for value in (1.0, 2.0, 3.0)])
    owner = _owners(taus, _merge(taus, [2, 1, 1]))
    np.testing.assert_array_equal(
      np.bincount(owner.ravel()), [6000, 3000, 3000]
    )
    for task, share in ((0, 0.5), (1, 0.25), (2, 0.25)):
      marks = owner == task
      for part in (marks[:50], marks[:, :60], marks[::2], marks.T[::4]):
        deviation = np.sqrt(share * (1 - share) / part.size)
        self.assertLess(abs(part.mean() - share), 5 * deviation)

  def test_what_a_task_was_handed_is_dropped_like_its_own(self):
    shape = (100, 120)
    taus = np.stack([np.full(shape, value) for value in (1.0, 2.0, 3.0)])
    taus[2, :, 60:] = 0.5
    owner = _owners(taus, _merge(taus, [2, 1, 1]))
    # Half of the left is handed to the second, which keeps a third of all.
    left = owner[:, :60]
    self.assertEqual((left == 2).sum(), 3000)
    share = (left[left < 2] == 1).mean()
    self.assertLess(abs(share - 1 / 3), 5 * np.sqrt(2 / 9 / 3000))

  def test_what_the_first_has_too_much_is_shared_out_at_random(self):
    shape = (100, 120)
    taus = np.stack([np.full(shape, value) for value in (3.0, 2.0, 1.0)])
    owner = _owners(taus, _merge(taus, [2, 1, 1]))
    np.testing.assert_array_equal(
      np.bincount(owner.ravel()), [6000, 3000, 3000]
    )
    for task, share in ((1, 0.25), (2, 0.25)):
      marks = owner == task
      for part in (marks[:50], marks[:, :60], marks[::2], marks.T[::4]):
        deviation = np.sqrt(share * (1 - share) / part.size)
        self.assertLess(abs(part.mean() - share), 5 * deviation)

  def test_keys_and_leaves(self):
    tau = _magnitudes(3)
    trees = [{"a": jnp.asarray(x), "b": jnp.asarray(x)} for x in tau]
    base = jax.tree.map(jnp.zeros_like, trees[0])
    merge = lambda key: merging.tunable_magmax(base, trees, key)  # noqa: E731
    got = merge(KEY)
    chex.assert_trees_all_equal(merge(jax.random.key(0)), got)
    self.assertFalse((got["a"] == got["b"]).all())
    self.assertFalse((merge(jax.random.key(1))["a"] == got["a"]).all())
    # A leaf is drawn by its name, whatever else there is.
    alone = merging.tunable_magmax(
      {"a": base["a"]}, [{"a": tree["a"]} for tree in trees], KEY
    )
    np.testing.assert_array_equal(alone["a"], got["a"])
    jitted = jax.jit(merge)(KEY)
    chex.assert_trees_all_equal(jitted, got)

  def test_keys_map(self):
    taus = _magnitudes(3)
    keys = jax.random.split(KEY, 3)
    base = {"w": jnp.zeros(SHAPE)}
    models = [{"w": jnp.asarray(tau)} for tau in taus]
    merge = lambda key: merging.tunable_magmax(  # noqa: E731
      base, models, key, preferences=jnp.asarray([1.0, 2.0, 3.0])
    )
    together = jax.vmap(merge)(keys)["w"]
    for key, one in zip(keys, together, strict=True):
      np.testing.assert_array_equal(one, merge(key)["w"])

  @hypothesis.settings(max_examples=30, deadline=None)
  @hypothesis.given(data=st.data())
  def test_choice_is_exact(self, data):
    words = np.asarray(
      data.draw(
        st.lists(st.sampled_from([0, 1, 5, 2**32 - 1]), min_size=9, max_size=9)
      ),
      np.uint32,
    )
    among = np.asarray(
      data.draw(st.lists(st.booleans(), min_size=9, max_size=9))
    )
    count = data.draw(st.integers(0, int(among.sum())))
    got = np.asarray(
      _choice.largest(jnp.asarray(words), jnp.asarray(among), np.uint32(count))
    )
    scores = np.where(among, (words >> 1) | 1, 0).astype(np.int64)
    order = np.lexsort((np.arange(9), -scores))
    want = np.zeros(9, bool)
    want[order[:count]] = True
    np.testing.assert_array_equal(got, want)


class PreferencesTest(parameterized.TestCase):
  @parameterized.parameters(
    (10, [0.1, 0.2, 0.7], [1, 2, 7]),
    (10, np.asarray([0.1, 0.2, 0.7], np.float32), [1, 2, 7]),
    (10, [1, 1, 1], [4, 3, 3]),
    (11, [True, True, False], [6, 5, 0]),
    (2, [1, 1, 1], [1, 1, 0]),
    (0, [1, 2], [0, 0]),
    # Task vectors of models without a share are not used.
    (3, [0, 1, 1], [0, 2, 1]),
    (7, [1e-30, 1.0], [1, 6]),
    # More than float32 counts.
    (2**25 + 1, [1, 1], [2**24 + 1, 2**24]),
    (3 * 10**8 + 1, [0.1] * 3, [10**8 + 1, 10**8, 10**8]),
  )
  def test_quotas(self, size, preferences, want):
    got = _tunable_magmax.quotas(size, preferences)
    self.assertEqual((got.tolist(), got.dtype), (want, np.uint32))

  def test_of_leaves(self):
    base = {"a": jnp.zeros(8), "b": jnp.zeros(8)}
    models = [jax.tree.map(lambda x, i=i: x + i, base) for i in (1.0, 2.0)]
    merge = lambda preferences: merging.tunable_magmax(  # noqa: E731
      base, models, KEY, preferences=preferences, scale=1.0
    )
    got = merge([{"^a": 3, ".*": 0}, 1])
    self.assertEqual([int((got[k] == 1).sum()) for k in "ab"], [6, 0])
    chex.assert_trees_all_equal(merge([{"a": 3, "b": 0}, 1.0]), got)

  def test_compiled_once(self):
    base = {"w": jnp.zeros((3, 11))}
    models = [{"w": jnp.full((3, 11), i)} for i in (1.0, 2.0)]
    merge = lambda *preferences: merging.tunable_magmax(  # noqa: E731
      base, models, KEY, preferences=preferences
    )
    merge(1, 1)
    before = _gathered._merge_leaf._cache_size()
    for i in range(3):
      merge(i, 1)
    self.assertEqual(_gathered._merge_leaf._cache_size(), before)

  def test_by_name_and_leaf_by_leaf(self):
    base = {"w": jnp.zeros(SHAPE)}
    models = [{"w": jnp.asarray(tau)} for tau in _magnitudes(3)]
    preferences = np.asarray([0.5, 0.2, 0.3])
    rule = merging.get("tunable_magmax", preferences=preferences, scale=0.3)
    self.assertTrue(rule.info.needs_key)
    self.assertFalse(rule.info.streams)
    want = merging.tunable_magmax(
      base, models, KEY, preferences=preferences, scale=0.3
    )
    chex.assert_trees_all_equal(rule(base, models, key=KEY), want)
    got = dict(merging.merge_leaves(rule, base, models, key=KEY))
    chex.assert_trees_all_equal(got, want)

  @parameterized.parameters(
    ([1, -1], "not negative; got -1; give 0 to a model"),
    ([1, np.nan], "finite and not negative; got nan"),
    ([1, np.inf], "finite and not negative; got inf"),
    ([1, 1, 1], "got 3 preferences for 2 models; give one for each model"),
    ([0, 0.0], "preferences are all zero; give at least one model a share"),
    ([{"w": 0, ".*": 1}, 0], "are all zero for leaf 'w'; give at least one"),
    ([{"v": 1}, 0], "preference 0 has no value for leaf 'w'"),
    (0.5, "preferences must be a sequence with one number for each model"),
    ("ab", "preferences must be a sequence with one number for each model"),
    (["a", "b"], "preferences must be real numbers; got 'a'"),
    (np.ones((2, 2)), r"preferences must have shape \(2,\); got \(2, 2\)"),
  )
  def test_errors(self, preferences, message):
    base, models = {"w": jnp.zeros(3)}, [{"w": jnp.ones(3)}] * 2
    with self.assertRaisesRegex(ValueError, message):
      merging.tunable_magmax(base, models, KEY, preferences=preferences)
    with self.assertRaisesRegex(ValueError, message):
      method = merging.tunable_magmax_method(KEY, preferences=preferences)
      merging.fold(method, base, models)

  def test_traced_weighted_or_without_a_key(self):
    base, models = {"w": jnp.zeros(3)}, [{"w": jnp.ones(3)}] * 2
    with self.assertRaisesRegex(ValueError, "not traced values"):
      jax.jit(
        lambda p: merging.tunable_magmax(base, models, KEY, preferences=p)
      )(jnp.ones(2))
    with self.assertRaisesRegex(ValueError, "no weights; give preferences"):
      merging.fold(merging.tunable_magmax_method(KEY), base, models, [1.0, 2.0])
    with self.assertRaisesRegex(ValueError, "takes no weights"):
      merging.get("tunable_magmax")(base, models, key=KEY, weights=[1, 2])
    with self.assertRaisesRegex(ValueError, "give a PRNG key"):
      merging.get("tunable_magmax")(base, models)
    with self.assertRaisesRegex(ValueError, "key must be one PRNG key"):
      merging.tunable_magmax(base, models, 3)


if __name__ == "__main__":
  absltest.main()
