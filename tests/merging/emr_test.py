"""Tests of EMR-Merging."""

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
INTEGERS = hnp.arrays(np.int8, (3, 5), elements=st.integers(-3, 3))
BASE = np.asarray([0.0, 1.0, -2.0, 3.0, 0.5])


def elect(taus):
  """The unified vector of [n, size], entry by entry."""
  unified = np.zeros(taus.shape[1])
  for p, entries in enumerate(taus.T):
    sign = np.sign(entries.sum())
    unified[p] = sign * max(
      [abs(x) for x in entries if np.sign(x) == sign], default=0
    )
  return unified


def as_trees(rows):
  split = lambda row: {"a": row[:2], "b": row[2:]}  # noqa: E731
  return [
    jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), split(row))
    for row in rows
  ]


def flat(params):
  return np.concatenate([params["a"], params["b"]])


class EmrTest(parameterized.TestCase):
  @SETTINGS
  @hypothesis.given(taus=INTEGERS)
  def test_against_numpy(self, taus):
    taus = taus.astype(np.float64)
    base, *models = as_trees([BASE, *(BASE + tau for tau in taus)])
    result = merging.emr(base, models)
    unified = elect(taus)
    np.testing.assert_array_equal(flat(result.unified), unified)
    self.assertEqual(result.scales.dtype, jnp.float32)
    for i, tau in enumerate(taus):
      mask = tau * unified > 0
      np.testing.assert_array_equal(flat(result.masks[i]), mask)
      kept = abs(mask * unified).sum()
      scale = abs(tau).sum() / kept if kept else 0
      np.testing.assert_allclose(result.scales[i], scale, rtol=1e-6)
      np.testing.assert_allclose(
        flat(merging.emr_params(base, result, i)),
        BASE + scale * mask * unified,
        rtol=1e-5,
        atol=1e-6,
      )

  @SETTINGS
  @hypothesis.given(taus=INTEGERS)
  def test_unified_rule(self, taus):
    base, *models = as_trees([BASE, *(BASE + tau for tau in taus)])
    weights = [1.0, -2.0, 0.5]
    got = merging.emr_unified(base, models, weights=weights, scale=0.5)
    unified = elect(taus * np.asarray(weights)[:, None])
    np.testing.assert_allclose(flat(got), BASE + 0.5 * unified, rtol=1e-6)
    result = merging.emr(base, models, weights=weights)
    np.testing.assert_allclose(flat(result.unified), unified, rtol=1e-6)
    method = merging.emr_unified_method(scale=0.5)
    state = method.init(base)
    for model, weight in zip(models, weights, strict=True):
      state = method.update(state, model, weight)
    chex.assert_trees_all_equal(method.finalize(state), got)

  @parameterized.parameters("float32", "bfloat16", "float16")
  def test_magnitude_of_each_task_is_kept(self, dtype):
    rng = np.random.default_rng(0)
    make = lambda: {"w": jnp.asarray(rng.normal(size=(9, 9)), dtype)}  # noqa: E731
    base, models = make(), [make() for _ in range(4)]
    result = merging.emr(base, models)
    chex.assert_trees_all_equal_shapes_and_dtypes(result.unified, base)
    for i, model in enumerate(models):
      got = merging.emr_params(base, result, i)
      chex.assert_trees_all_equal_shapes_and_dtypes(got, base)
      mass = lambda params: np.abs(  # noqa: E731
        np.asarray(params["w"], np.float64) - np.asarray(base["w"], np.float64)
      ).sum()
      np.testing.assert_allclose(mass(got), mass(model), rtol=5e-3)

  def test_one_task_is_rebuilt_and_small_numbers_are_not_lost(self):
    base = {"w": jnp.zeros(3)}
    model = {"w": jnp.asarray([1e-30, -2e-25, 0.0])}
    result = merging.emr(base, [model])
    np.testing.assert_array_equal(result.masks[0]["w"], [True, True, False])
    got = merging.emr_params(base, result, 0)
    chex.assert_trees_all_close(got, model, rtol=1e-6)

  def test_special_leaves(self):
    base = {
      "w": jnp.ones(2, jnp.bfloat16),
      "x": jnp.ones(2),
      "empty": jnp.zeros((0, 2)),
      "steps": jnp.asarray([3, 4]),
      "key": jax.random.key(0),
      "none": None,
    }
    model = {**base, "w": base["w"] * 3, "x": jnp.zeros(2)}
    result = merging.emr(base, [model, base], select="^w", dtype=jnp.float32)
    self.assertEqual(result.unified["w"].dtype, jnp.float32)
    np.testing.assert_array_equal(result.unified["x"], 0.0)
    self.assertFalse(result.masks[0]["x"].any())
    np.testing.assert_array_equal(result.scales, [1.0, 0.0])
    got = merging.emr_params(base, result, 0)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, base)
    np.testing.assert_array_equal(got["w"], model["w"])
    np.testing.assert_array_equal(got["x"], base["x"])
    np.testing.assert_array_equal(got["steps"], base["steps"])
    chex.assert_trees_all_equal(merging.emr_params(base, result, 1), base)

  def test_jit(self):
    base, *models = as_trees(np.random.default_rng(0).normal(size=(4, 5)))
    want = merging.emr(base, models)
    got = jax.jit(merging.emr)(base, models)
    chex.assert_trees_all_close(got, want, rtol=1e-6)
    rebuilt = jax.jit(merging.emr_params, static_argnums=2)(base, got, 2)
    chex.assert_trees_all_close(
      rebuilt, merging.emr_params(base, want, 2), rtol=1e-5
    )

  def test_errors(self):
    base = {"w": jnp.zeros(2)}
    result = merging.emr(base, [base])
    for task in (-1, 1):
      with self.assertRaisesRegex(ValueError, f"task is {task} but the number"):
        merging.emr_params(base, result, task)
    with self.assertRaisesRegex(tree.TreeMismatchError, "in unified"):
      merging.emr_params({"w": jnp.zeros(3)}, result, 0)
    with self.assertRaisesRegex(ValueError, "models is empty"):
      merging.emr(base, [])
    with self.assertRaisesRegex(tree.TreeMismatchError, "in model 1"):
      merging.emr(base, [base, {"w": jnp.zeros(3)}])
    with self.assertRaisesRegex(ValueError, "'w' of model 0 holds NaN"):
      merging.emr(base, [{"w": jnp.full(2, jnp.nan)}])


if __name__ == "__main__":
  absltest.main()
