"""Tests of the analysis of task vectors."""

from __future__ import annotations

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxmerge import merging, tree

SETTINGS = hypothesis.settings(max_examples=25, deadline=None)
VECTORS = hnp.arrays(np.int8, (3, 7), elements=st.integers(-4, 4))
DENSITIES = st.sampled_from([0.01, 0.2, 0.5, 0.75, 1.0])


def as_tree(row, dtype=jnp.float32):
  return {
    "a": jnp.asarray(row[:3], dtype),
    "b": [jnp.asarray(row[3:], dtype)],
    "steps": jnp.asarray(len(row)),
    "key": jax.random.key(1),
    "none": None,
  }


def flat(params):
  return np.concatenate([params["a"], params["b"][0]])


def trim(row, density):
  bound = np.sort(abs(row))[-max(1, int(density * len(row)))]
  return np.where(abs(row) >= bound, row, 0)


class KeepTest(parameterized.TestCase):
  @SETTINGS
  @hypothesis.given(rows=VECTORS, density=DENSITIES)
  def test_top_and_bottom(self, rows, density):
    row = rows[0]
    count = max(1, int(density * 7))
    got = merging.keep(as_tree(row), density)
    np.testing.assert_array_equal(flat(got), trim(row, density))
    bound = np.sort(abs(row))[count - 1]
    got = merging.keep(as_tree(row), density, which="bottom")
    np.testing.assert_array_equal(flat(got), row * (abs(row) <= bound))

  def test_leaf_by_leaf(self):
    row = np.asarray([1, -2, 3, 10, -20, 30, 40])
    got = merging.keep(as_tree(row), 0.5, scope="leaf")
    np.testing.assert_array_equal(flat(got), [0, 0, 3, 0, 0, 30, 40])
    got = merging.keep(as_tree(row), 0.5, scope="leaf", which="bottom")
    np.testing.assert_array_equal(flat(got), [1, 0, 0, 10, -20, 0, 0])
    got = merging.keep(as_tree(row), 0.5, scope="vector")
    np.testing.assert_array_equal(flat(got), [0, 0, 0, 0, -20, 30, 40])

  @parameterized.product(
    scope=["vector", "leaf"], density=[0.01, 0.3, 0.5, 1.0]
  )
  def test_random_keeps_the_number(self, scope, density):
    vector = {"a": jnp.ones((20, 5)), "b": jnp.ones(31), "c": jnp.ones(())}
    counts = []
    for seed in range(3):
      got = merging.keep(
        vector,
        density,
        which="random",
        scope=scope,
        key=jax.random.key(seed),
      )
      counts.append([int(jnp.sum(leaf)) for leaf in jax.tree.leaves(got)])
    for one in counts:
      if scope == "leaf":
        want = [max(1, int(density * n)) for n in (100, 31, 1)]
        self.assertEqual(one, want)
      else:
        self.assertEqual(sum(one), max(1, int(density * 132)))

  def test_random_is_uniform(self):
    vector = {"a": jnp.ones(4), "b": jnp.ones(6)}
    keys = jax.random.split(jax.random.key(0), 1000)
    got = jax.vmap(
      lambda key: merging.keep(vector, 0.3, which="random", key=key)
    )(keys)
    rates = np.concatenate([got["a"].mean(0), got["b"].mean(0)])
    # Five standard deviations of a mean of 1,000 draws.
    np.testing.assert_allclose(rates, 0.3, atol=5 * np.sqrt(0.21 / 1000))
    # Two entries are drawn together as they are without replacement.
    both = (got["a"][:, 0] * got["b"][:, 0]).mean()
    np.testing.assert_allclose(both, 3 / 10 * 2 / 9, atol=0.04)

  @parameterized.parameters("float32", "bfloat16", "float16")
  def test_dtype_and_special_leaves(self, dtype):
    vector = {**as_tree(np.arange(7), dtype), "empty": jnp.zeros((0, 2))}
    for which in ("top", "bottom", "random"):
      got = merging.keep(vector, 0.5, which=which, key=jax.random.key(0))
      chex.assert_trees_all_equal_shapes_and_dtypes(got, vector)
      self.assertEqual(int(got["steps"]), 7)
    # Leaves of two dtypes are one vector.
    mixed = {"a": jnp.asarray([1.0, 5.0], dtype), "b": jnp.asarray([2.0, 4.0])}
    got = merging.keep(mixed, 0.5)
    np.testing.assert_array_equal(got["a"], jnp.asarray([0, 5], dtype))
    np.testing.assert_array_equal(got["b"], [0, 4])

  def test_no_leaves_and_jit(self):
    self.assertEqual(merging.keep({"n": None, "s": 3}, 0.5)["s"], 3)
    row = np.asarray([1, -2, 3, 10, -20, 30, 40])
    jitted = jax.jit(lambda vector: merging.keep(vector, 0.5))
    chex.assert_trees_all_equal(
      jitted(as_tree(row)), merging.keep(as_tree(row), 0.5)
    )

  def test_errors(self):
    vector = {"w": jnp.ones(2)}
    for density in (0.0, -1.0, 1.1, float("nan")):
      with self.assertRaisesRegex(ValueError, "density must lie in"):
        merging.keep(vector, density)
    with self.assertRaisesRegex(ValueError, "which must be one of 'top'"):
      merging.keep(vector, 0.5, which="middle")
    with self.assertRaisesRegex(ValueError, "scope must be one of"):
      merging.keep(vector, 0.5, scope="tensor")
    with self.assertRaisesRegex(ValueError, "'random' needs a key"):
      merging.keep(vector, 0.5, which="random")
    with self.assertRaisesRegex(ValueError, "holds NaN"):
      merging.keep({"w": jnp.asarray([jnp.nan])}, 0.5)
    with self.assertRaisesRegex(ValueError, "not a traced value"):
      jax.jit(merging.keep)(vector, 0.5)


class SignConflictsTest(parameterized.TestCase):
  @SETTINGS
  @hypothesis.given(rows=VECTORS, density=DENSITIES, leaf=st.booleans())
  def test_against_numpy(self, rows, density, leaf):
    if leaf:
      trimmed = np.stack(
        [
          np.concatenate([trim(row[:3], density), trim(row[3:], density)])
          for row in rows
        ]
      )
    else:
      trimmed = np.stack([trim(row, density) for row in rows])
    positive, negative = (trimmed > 0).sum(0), (trimmed < 0).sum(0)
    got = merging.sign_conflicts(
      [as_tree(row) for row in rows],
      density,
      scope="leaf" if leaf else "vector",
    )
    conflicts = ((positive > 0) & (negative > 0)).sum()
    kept = (positive + negative > 0).sum()
    self.assertEqual(int(got.conflicts), conflicts)
    self.assertEqual(int(got.kept), kept)
    self.assertEqual(int(got.shared), (positive + negative > 1).sum())
    self.assertEqual(int(got.total), 7)
    np.testing.assert_allclose(got.rate, conflicts / kept if kept else 0)

  def test_dtypes_and_jit(self):
    vectors = [
      {"a": jnp.asarray([1, 2], jnp.bfloat16), "b": jnp.asarray([-4.0])},
      {"a": jnp.asarray([-3, 2], jnp.bfloat16), "b": jnp.asarray([1.0])},
    ]
    got = jax.jit(lambda v: merging.sign_conflicts(v, 0.7))(vectors)
    # Kept: 2 and -4 of the first, -3 and 2 of the second.
    self.assertEqual([int(x) for x in got[1:]], [0, 3, 1, 3])
    self.assertEqual(got.rate.dtype, jnp.float32)

  def test_errors(self):
    vector = {"w": jnp.ones(2)}
    with self.assertRaisesRegex(ValueError, "at least 2 task vectors; got 1"):
      merging.sign_conflicts([vector])
    with self.assertRaisesRegex(ValueError, "density must lie"):
      merging.sign_conflicts([vector] * 2, 0.0)
    with self.assertRaisesRegex(ValueError, "scope must be one of"):
      merging.sign_conflicts([vector] * 2, scope="all")
    with self.assertRaisesRegex(tree.TreeMismatchError, "in task vector 1"):
      merging.sign_conflicts([vector, {"w": jnp.ones(3)}])


class CosineMatrixTest(parameterized.TestCase):
  @SETTINGS
  @hypothesis.given(rows=VECTORS)
  def test_against_numpy(self, rows):
    rows = rows.astype(np.float64)
    got = merging.cosine_matrix([as_tree(row) for row in rows])
    for i, one in enumerate(rows):
      for j, two in enumerate(rows):
        norms = np.linalg.norm(one) * np.linalg.norm(two)
        want = one @ two / norms if norms else 0
        np.testing.assert_allclose(got[i, j], want, atol=1e-6)
    np.testing.assert_array_equal(np.diag(got), rows.any(axis=1))

  @parameterized.parameters(1e-30, 1e30)
  def test_scale_and_half_types(self, factor):
    vectors = [
      {"a": jnp.asarray(x, jnp.bfloat16) * factor, "empty": jnp.zeros((0, 1))}
      for x in ([1.0, 1.0], [1.0, 0.0])
    ]
    got = jax.jit(merging.cosine_matrix)(vectors)
    self.assertEqual(got.dtype, jnp.float32)
    half = np.sqrt(0.5)
    np.testing.assert_allclose(got, [[1, half], [half, 1]], rtol=1e-6)

  def test_zero_and_single_vectors(self):
    zero = as_tree(np.zeros(7))
    np.testing.assert_array_equal(merging.cosine_matrix([zero]), [[0.0]])
    with self.assertRaisesRegex(ValueError, "is empty"):
      merging.cosine_matrix([])


class UpdateConsistencyTest(parameterized.TestCase):
  @SETTINGS
  @hypothesis.given(steps=VECTORS)
  def test_against_numpy(self, steps):
    base = np.arange(7) / 4
    path = base + np.cumsum(steps, axis=0)
    got = merging.update_consistency(
      as_tree(base), [as_tree(row) for row in path]
    )
    counts = np.maximum((steps > 0).sum(0), (steps < 0).sum(0))
    np.testing.assert_array_equal(flat(got.counts), counts)
    self.assertEqual(int(got.counts["steps"]), 0)
    moved = abs(steps.sum(axis=0, dtype=np.float64))
    for count in range(4):
      members = moved[counts == count]
      self.assertEqual(int(got.numbers[count]), len(members))
      np.testing.assert_allclose(
        got.magnitudes[count], members.mean() if len(members) else 0, rtol=1e-6
      )

  def test_half_types_and_jit(self):
    base = {"w": jnp.ones(2, jnp.bfloat16), "none": None}
    checkpoints = [{"w": base["w"] * i, "none": None} for i in (2, 3)]
    got = jax.jit(merging.update_consistency)(base, checkpoints)
    np.testing.assert_array_equal(got.counts["w"], [2, 2])
    np.testing.assert_array_equal(got.magnitudes, [0, 0, 2])

  def test_errors(self):
    base = {"w": jnp.ones(2)}
    with self.assertRaisesRegex(ValueError, "is empty"):
      merging.update_consistency(base, [])
    with self.assertRaisesRegex(tree.TreeMismatchError, "in checkpoint 0"):
      merging.update_consistency(base, [{"w": jnp.ones(3)}])


class SelectedSharesTest(parameterized.TestCase):
  @SETTINGS
  @hypothesis.given(taus=VECTORS)
  def test_against_numpy(self, taus):
    base = np.arange(7) / 4
    models = [as_tree(base + tau) for tau in taus]
    weights = [1.0, 0.5, 2.0]
    got = merging.selected_shares(as_tree(base), models, weights=weights)
    sizes = abs(taus * np.asarray(weights)[:, None])
    # The last of the largest.
    winners = 2 - np.argmax(sizes[::-1], axis=0)
    winners[sizes.max(axis=0) == 0] = -1
    want = [(winners == i).sum() for i in range(3)]
    np.testing.assert_array_equal(got.numbers, want)
    self.assertEqual(int(got.unchanged), (winners == -1).sum())
    self.assertEqual(int(got.total), 7)
    np.testing.assert_allclose(got.shares, np.asarray(want) / 7, rtol=1e-6)

  def test_is_what_magmax_takes(self):
    rng = np.random.default_rng(0)
    base = {"w": jnp.zeros(100)}
    models = [{"w": jnp.asarray(rng.normal(size=100))} for _ in range(3)]
    models = [jax.tree.map(lambda x: x.astype(jnp.float32), m) for m in models]
    merged = merging.magmax(base, models, scale=1.0)["w"]
    shares = jax.jit(merging.selected_shares)(base, models).shares
    for model, share in zip(models, shares, strict=True):
      np.testing.assert_allclose((merged == model["w"]).mean(), share)

  def test_errors(self):
    base = {"w": jnp.ones(2)}
    with self.assertRaisesRegex(ValueError, "models is empty"):
      merging.selected_shares(base, [])
    with self.assertRaisesRegex(ValueError, "got 1 weights for 2 models"):
      merging.selected_shares(base, [base] * 2, weights=[1.0])


if __name__ == "__main__":
  absltest.main()
