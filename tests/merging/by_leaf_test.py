"""Merging leaf by leaf, from checkpoints that are read."""

from __future__ import annotations

import collections
import tempfile

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import strategies

from jaxmerge import merging, tree
from jaxmerge.merging import _streamed_threshold


class CountingReader:
  """Lazy leaves of a tree; counts what is read, and who holds it."""

  def __init__(self, params):
    self.reads: collections.Counter[str] = collections.Counter()
    self.tree = tree.map_with_name(self._lazy, params)

  def _lazy(self, name, leaf):
    def read():
      self.reads[name] += 1
      return leaf

    return merging.LazyLeaf(leaf.shape, leaf.dtype, read)


def _params(seed, dtype=np.float32):
  rng = np.random.default_rng(seed)
  return {
    "a": {"kernel": rng.normal(size=(6, 5)).astype(dtype)},
    "b": rng.normal(size=7).astype(dtype),
    "steps": np.int32(seed) * np.ones(2, np.int32),
  }


class MergeLeavesTest(parameterized.TestCase):
  @parameterized.parameters(
    ("magmax", {}, 1),
    ("average", {}, 1),
    ("sce", {}, 1),
    ("ties", {"scope": "leaf"}, 1),
    # Two passes for the threshold, one for the signs, one for the merge.
    ("ties", {"density": [0.3, 0.7]}, 4),
    ("ties", {"zero_sign": "positive"}, 3),
  )
  def test_lazy_leaves(self, name, options, passes):
    base, models = _params(0), [_params(1), _params(2)]
    method = merging.get(name, **options)
    lazy = [CountingReader(params) for params in (base, *models)]
    for reader in lazy:
      self.assertEmpty(reader.reads)
    got = dict(
      merging.merge_leaves(
        method, lazy[0].tree, [reader.tree for reader in lazy[1:]]
      )
    )
    want = method(base, models)
    for leaf, value in zip(
      tree.leaf_names(want), jax.tree.leaves(want), strict=True
    ):
      np.testing.assert_array_equal(got[leaf], value, err_msg=leaf)
    for reader in lazy[1:]:
      self.assertEqual(reader.reads["b"], passes)
      self.assertEqual(reader.reads["a/kernel"], passes)

  def test_memory_mapped_files(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    trees = []
    for seed in range(3):
      params = _params(seed)
      for i, leaf in enumerate(jax.tree.leaves(params)):
        np.save(f"{folder}/{seed}-{i}.npy", leaf)
      trees.append(
        jax.tree.unflatten(
          jax.tree.structure(params),
          [
            np.load(f"{folder}/{seed}-{i}.npy", mmap_mode="r") for i in range(3)
          ],
        )
      )
    base, *models = trees
    got = dict(merging.merge_leaves(merging.get("ties"), base, models))
    want = merging.ties(_params(0), [_params(1), _params(2)])
    np.testing.assert_array_equal(got["a/kernel"], want["a"]["kernel"])
    np.testing.assert_array_equal(got["b"], want["b"])
    np.testing.assert_array_equal(got["steps"], [0, 0])

  def test_values_of_leaves(self):
    """Weights and options as prefixes, mappings and one value a model."""
    base, *models = (_params(seed) for seed in range(3))
    prefix = {"a": 0.5, "b": 2.0, "steps": 1.0}
    for method in (
      merging.get("magmax", scale=prefix),
      merging.get("magmax", scale={"kernel": 0.5, ".*": 2.0}),
      merging.get("ties", density=[0.2, 0.9], scale=prefix),
      merging.get("ties", density={"^a": 0.2, ".*": 0.9}, scope="leaf"),
      merging.get("task_arithmetic", select="kernel", dtype=jnp.bfloat16),
    ):
      weights = [{"kernel": 1.0, ".*": 2.0}, prefix]
      want = method(base, models, weights=weights)
      got = dict(merging.merge_leaves(method, base, models, weights=weights))
      for leaf, value in zip(
        tree.leaf_names(want), jax.tree.leaves(want), strict=True
      ):
        np.testing.assert_array_equal(got[leaf], value, err_msg=leaf)
        self.assertEqual(got[leaf].dtype, value.dtype)

  def test_mixed_precision(self):
    with jax.enable_x64(True):
      base = {"a": jnp.zeros(40, jnp.float64), "b": jnp.zeros(40, jnp.bfloat16)}
      rng = np.random.default_rng(0)
      models = [
        {
          "a": jnp.asarray(rng.normal(size=40)),
          "b": jnp.asarray(rng.normal(size=40), jnp.bfloat16),
        }
        for _ in range(2)
      ]
      method = merging.get("ties", density=0.3)
      got = dict(merging.merge_leaves(method, base, models))
      for name, leaf in method(base, models).items():
        np.testing.assert_array_equal(got[name], leaf)

  def test_passthrough(self):
    """Layers are renamed unread, and read once for each place they take."""
    model = {
      "embed": np.ones(3, np.float32),
      **{f"h_{i}": {"w": np.full(2, i, np.float32)} for i in range(3)},
    }
    slices = [(0, 0, 2), (0, 1, 3, {"w": 0.5})]
    for dtype in (None, jnp.bfloat16):
      reader = CountingReader(model)
      method = merging.get("passthrough", slices=slices, dtype=dtype)
      leaves = merging.merge_leaves(method, None, [reader.tree])
      name, _ = next(leaves)
      self.assertEqual(name, "embed")
      self.assertEqual(sum(reader.reads.values()), 1)
      got = dict(leaves)
      want = method(None, [model])
      for name, leaf in want.items():
        if name != "embed":
          np.testing.assert_array_equal(got[f"{name}/w"], leaf["w"])
          self.assertEqual(got[f"{name}/w"].dtype, leaf["w"].dtype)
      self.assertEqual(dict(reader.reads)["h_1/w"], 2)
    bad = {**model, "embed": np.full(3, np.nan, np.float32)}
    with self.assertRaisesRegex(ValueError, "'embed' of the result holds NaN"):
      next(merging.merge_leaves(method, None, [bad]))

  def test_statistics(self):
    models = [_params(1), _params(2)]
    fishers = [jax.tree.map(np.square, params) for params in models]
    grams = [
      {"a/kernel": params["a"]["kernel"] @ params["a"]["kernel"].T}
      for params in models
    ]
    for name, known in (("fisher_average", fishers), ("regmean", grams)):
      method = merging.get(name)
      lazy = [CountingReader(one) for one in known]
      got = merging.merge_leaves(
        method, None, models, statistics=[one.tree for one in lazy]
      )
      want = method(None, models, statistics=known)
      np.testing.assert_array_equal(dict(got)["a/kernel"], want["a"]["kernel"])
      for one in lazy:
        self.assertEqual(one.reads["a/kernel"], 1)
    bad = [*fishers[:1], {**fishers[1], "b": np.full(7, np.nan, np.float32)}]
    fisher = merging.get("fisher_average")
    with self.assertRaisesRegex(ValueError, "'b' of Fisher 1 holds NaN"):
      list(merging.merge_leaves(fisher, None, models, statistics=bad))
    with self.assertRaisesRegex(ValueError, "Fisher 0 is missing; collect it"):
      merging.merge_leaves(fisher, None, models, statistics=[None, None])
    with self.assertRaisesRegex(
      tree.TreeMismatchError, "Gram matrices 0 has an entry for 'c', which is"
    ):
      statistics = [{"c": np.eye(6)}] * 2
      next(merging.merge_leaves(method, None, models, statistics=statistics))

  def test_all_bits_of_what_is_passed_on(self):
    base = {"w": np.ones(2, np.float32), "n": np.array([2**40, 3], np.int64)}
    base["h"] = np.array([1 / 3])
    method = merging.get("magmax", select="w")
    got = dict(merging.merge_leaves(method, base, [base]))
    np.testing.assert_array_equal(got["n"], [2**40, 3])
    self.assertEqual(got["h"][0], 1 / 3)
    model = {"h_0": np.array([1 / 3])}
    method = merging.get("passthrough", slices=[(0, 0, 1)])
    got = dict(merging.merge_leaves(method, None, [model]))
    self.assertEqual(got["h_0"][0], 1 / 3)

  def test_longer_than_32_bits_count(self):
    """What is kept of a vector of billions is counted before it is read."""

    class ReadError(Exception):
      pass

    def read():
      raise ReadError

    big = {"w": merging.LazyLeaf((70_000, 70_000), np.float32, read)}
    with self.assertRaises(ReadError):
      next(merging.merge_leaves(merging.get("ties"), big, [big]))

  @parameterized.parameters(
    ("ties", {"scope": "leaf", "density": [0.2, 0.3, 0.4]}, "density"),
    ("ties", {"density": [0.2, 0.3, 0.4]}, "densities"),
    ("ema", {"decay": [0.2, 0.3, 0.4]}, "decay"),
  )
  def test_too_many_values(self, name, options, what):
    trees = [_params(seed) for seed in range(3)]
    method = merging.get(name, **options)
    with self.assertRaisesRegex(ValueError, f"got 3 .*{what}.* for 2 models"):
      list(merging.merge_leaves(method, trees[0], trees[1:]))

  @parameterized.parameters(
    ("ties", {"scope": "leaf", "density": 0.0}, "density must lie"),
    ("magmax", {"dtype": np.int32}, "dtype must be floating-point"),
    ("consensus", {"min_tasks": 5}, "consensus takes at least 5 models"),
    ("tsv_merge", {"rank_fraction": 7}, "rank_fraction must lie"),
    ("passthrough", {"slices": [(0, 5, 6)]}, "no layer"),
  )
  def test_options_before_reading(self, name, options, message):
    nothing = merging.LazyLeaf((2,), np.float32, lambda: self.fail("read"))
    params = {"h_0": nothing}
    with self.assertRaisesRegex(ValueError, message):
      method = merging.get(name, **options)
      merging.merge_leaves(method, params, [params, params])

  @parameterized.parameters(
    ("magmax", {"dtype": None, "select": None}),
    ("tsv_merge", {"row_axes": None, "rank_fraction": None}),
  )
  def test_options_that_are_none(self, name, options):
    base, model = _params(0), _params(1)
    method = merging.get(name, **options)
    got = dict(merging.merge_leaves(method, base, [model]))
    np.testing.assert_array_equal(got["b"], method(base, [model])["b"])

  def test_errors(self):
    base, model = _params(0), _params(1)
    nothing = merging.LazyLeaf((7,), np.float32, lambda: self.fail("read"))
    other = {**model, "b": merging.LazyLeaf((8,), np.float32, nothing.read)}
    method = merging.get("magmax")
    with self.assertRaisesRegex(
      tree.TreeMismatchError, r"'b' has shape \(7,\) in base but \(8,\)"
    ):
      next(merging.merge_leaves(method, base, [other]))
    wrong = merging.LazyLeaf((7,), np.float32, lambda: np.zeros(8, np.float32))
    with self.assertRaisesRegex(
      tree.TreeMismatchError,
      r"'b' of model 0 was announced as float32 of shape",
    ):
      list(merging.merge_leaves(method, base, [{**model, "b": wrong}]))
    bad = {**model, "b": np.full(7, np.nan, np.float32)}
    with self.assertRaisesRegex(ValueError, "'b' of model 0 holds NaN"):
      list(merging.merge_leaves(method, base, [bad]))
    with self.assertRaisesRegex(ValueError, "give a PRNG key"):
      next(merging.merge_leaves(merging.get("dare"), base, [model]))
    with self.assertRaisesRegex(ValueError, "density must lie"):
      next(
        merging.merge_leaves(merging.get("ties", density=2.0), base, [model])
      )

  def test_errors_at_once(self):
    """What is wrong is said before the first leaf is asked for."""
    base, model = _params(0), _params(1)
    for method, given, message in (
      (merging.get("ties", scope="layer"), [model], "scope must be one of"),
      (merging.get("magmax"), [], "models is empty"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        merging.merge_leaves(method, base, given)
    twice = {"a/k": np.ones(2), "a": {"k": np.ones(2)}, "h_0": np.ones(2)}
    for method in (
      merging.get("magmax"),
      merging.get("passthrough", slices=[(0, 0, 1)]),
    ):
      with self.assertRaisesRegex(ValueError, "two leaves are named 'a/k'"):
        merging.merge_leaves(method, twice, [twice])
    method = merging.get("weighted_average")
    with self.assertRaisesRegex(ValueError, "weights sum to 0 for leaf 'a/"):
      merging.merge_leaves(method, None, [model] * 2, weights=[1, -1])
    bad = {**model, "b": np.full(7, np.nan, np.float32)}
    with self.assertRaisesRegex(ValueError, "'b' of model 0 holds NaN"):
      list(merging.merge_leaves(merging.get("average"), None, [bad]))


class StreamedThresholdTest(parameterized.TestCase):
  @hypothesis.settings(max_examples=40, deadline=None)
  @hypothesis.given(
    hnp.arrays(
      np.float32,
      24,
      elements=strategies.floats(width=32, allow_nan=False),
    ),
    strategies.integers(1, 24),
  )
  def test_is_the_sort(self, values, k):
    pieces = [jnp.asarray(values[:5]), jnp.asarray(values[5:]).reshape(19, 1)]
    other = jnp.arange(24.0) - 12
    got, of_other = _streamed_threshold.streamed_kth_largest_bits(
      lambda: [(0, pieces[0]), (1, other), (0, pieces[1])], [k, 2]
    )
    want = np.sort(np.abs(values))[::-1][k - 1]
    self.assertEqual(got.view(np.float32), want)
    self.assertEqual(of_other.view(np.float32), 11)

  def test_more_than_a_block(self):
    """Blocks of the counting make no difference."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(1 << 20) + 3).astype(np.float32)
    for k in (1, 1000, values.size):
      (got,) = _streamed_threshold.streamed_kth_largest_bits(
        lambda: [(0, jnp.asarray(values))], [k]
      )
      self.assertEqual(
        got.view(np.float32), np.sort(np.abs(values))[::-1][k - 1]
      )

  def test_wide(self):
    with jax.enable_x64(True):
      values = np.random.default_rng(0).normal(size=100)
      values[:50] = values[0] + np.arange(50) * 2e-16
      for k in (1, 30, 100):
        (got,) = _streamed_threshold.streamed_kth_largest_bits(
          lambda: [(0, jnp.asarray(values))], [k], np.uint64
        )
        self.assertEqual(
          got.view(np.float64), np.sort(np.abs(values))[::-1][k - 1]
        )


if __name__ == "__main__":
  absltest.main()
