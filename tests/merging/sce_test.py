"""Tests of SCE."""

from __future__ import annotations

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxmerge import merging

SETTINGS = hypothesis.settings(max_examples=25, deadline=None)
# The mean and the variance of four small integers are exact in float32.
INTEGERS = hnp.arrays(np.int8, (4, 2, 3), elements=st.integers(-4, 4))


def sce(base, leaves, topk, weights=None, scale=1.0):
  """One leaf of SCE, entry by entry, in float64."""
  base = np.asarray(base, np.float64)
  taus = np.stack([np.asarray(leaf, np.float64) for leaf in leaves]) - base
  variance = taus.var(axis=0)
  count = max(1, int(topk * base.size))
  bound = np.sort(variance, axis=None)[-count]
  taus = np.where(variance >= bound, taus, 0)
  energy = np.array([(tau**2).sum() for tau in taus])
  if energy.sum() == 0:
    return base
  eta = energy / energy.sum() * (1 if weights is None else np.array(weights))
  merged = np.zeros_like(base)
  for at in np.ndindex(base.shape):
    entry = taus[(slice(None), *at)]
    sign = 1 if entry.sum() >= 0 else -1
    agrees = np.sign(entry) == sign
    if eta[agrees].sum():
      merged[at] = (eta * entry)[agrees].sum() / eta[agrees].sum()
  return base + scale * merged


class SceTest(parameterized.TestCase):
  @SETTINGS
  @hypothesis.given(taus=INTEGERS, topk=st.sampled_from([0.1, 0.34, 0.7, 1.0]))
  def test_against_numpy(self, taus, topk):
    base = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
    base = np.round(base * 4) / 4
    models = [{"w": jnp.asarray(base + tau, jnp.float32)} for tau in taus]
    got = merging.sce({"w": jnp.asarray(base)}, models, select_topk=topk)
    want = sce(base, [model["w"] for model in models], topk)
    np.testing.assert_allclose(got["w"], want, rtol=1e-5, atol=1e-6)

  @parameterized.product(dtype=["float32", "bfloat16"], topk=[0.5, 1.0])
  def test_leaves_on_their_own_with_weights_and_scale(self, dtype, topk):
    rng = np.random.default_rng(0)
    make = lambda: {  # noqa: E731
      "a": jnp.asarray(rng.normal(size=(4, 5)), dtype),
      "b": jnp.asarray(rng.normal(), dtype),
    }
    base, models = make(), [make() for _ in range(3)]
    got = merging.sce(
      base, models, weights=[1, 2, 0.5], select_topk=topk, scale=0.5
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(got, base)
    for name in ("a", "b"):
      leaves = [model[name] for model in models]
      np.testing.assert_allclose(
        np.asarray(got[name], np.float64),
        sce(base[name], leaves, topk, [1, 2, 0.5], 0.5),
        rtol=8e-3 if dtype == "bfloat16" else 1e-5,
        atol=1e-5,
      )

  def test_minority_is_erased(self):
    base = {"w": jnp.zeros(2)}
    models = [{"w": jnp.asarray(x)} for x in ([3.0, 1.0], [-1.0, 1.0])]
    # Coefficients 10/12 and 2/12; the second model's -1 is in the minority.
    np.testing.assert_allclose(
      merging.sce(base, models)["w"], [3.0, 1.0], rtol=1e-6
    )

  def test_tiny_task_vectors_keep_their_coefficients(self):
    base = {"w": jnp.zeros(2)}
    models = [{"w": jnp.asarray(x) * 1e-6} for x in ([3.0, 1.0], [1.0, 1.0])]
    got = merging.sce(base, models)["w"]
    np.testing.assert_allclose(got, [3e-6 * 10 / 12 + 1e-6 / 6, 1e-6], 1e-5)

  @parameterized.parameters(0.01, 0.5, 1.0)
  def test_equal_models_and_one_element(self, topk):
    """Nothing small or agreed upon is selected away."""
    base = {"w": jnp.asarray([0.1, 0.2, 0.3]), "one": jnp.ones(1)}
    model = {"w": jnp.asarray([0.3, -0.2, 1.7]), "one": jnp.zeros(1)}
    got = merging.sce(base, [model] * 3, select_topk=topk)
    chex.assert_trees_all_close(got, model, rtol=1e-6)
    got = merging.sce(base, [model], select_topk=topk)
    chex.assert_trees_all_close(got, model, rtol=1e-6)

  def test_selection_differs_from_leaf_to_leaf(self):
    base = {"a": jnp.zeros(4), "b": jnp.zeros(4)}
    models = [
      {"a": jnp.arange(4.0) + i * jnp.arange(4.0), "b": jnp.ones(4) * i}
      for i in (1, 2)
    ]
    options = {"^a": 0.25, ".*": 1.0}
    got = merging.sce(base, models, select_topk=options)
    self.assertEqual(np.count_nonzero(got["a"]), 1)
    self.assertEqual(np.count_nonzero(got["b"]), 4)
    by_prefix = merging.sce(base, models, select_topk={"a": 0.25, "b": 1.0})
    chex.assert_trees_all_equal(by_prefix, got)

  def test_containers_that_are_sequences(self):
    leaves = jnp.zeros(2), jnp.zeros(4)
    models = [(jnp.arange(2.0) * i, jnp.arange(4.0) * i) for i in (1, 2)]
    want = merging.sce(leaves, models, select_topk=0.5)
    self.assertEqual([np.count_nonzero(leaf) for leaf in want], [1, 2])
    lists = [list(model) for model in models]
    got = merging.sce(list(leaves), lists, select_topk=0.5)
    chex.assert_trees_all_equal(got, list(want))

  def test_special_leaves_and_the_method(self):
    base = {
      "w": jnp.zeros((2, 2)),
      "scalar": jnp.zeros(()),
      "empty": jnp.zeros((0, 3)),
      "steps": jnp.asarray(3),
      "mask": jnp.asarray([True]),
      "key": jax.random.key(0),
      "none": None,
    }
    models = [
      {
        **base,
        "w": jnp.full((2, 2), 1.0 + i),
        "steps": jnp.asarray(i),
        "scalar": jnp.asarray(2.0),
      }
      for i in range(2)
    ]
    got = merging.sce(base, models, select_topk=0.5)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, base)
    self.assertEqual(int(got["steps"]), 3)
    np.testing.assert_allclose(got["scalar"], 2.0)
    method = merging.sce_method(select_topk=0.5)
    state = method.init(base)
    self.assertIs(method.finalize(state)["w"], base["w"])
    for model in models:
      state = method.update(state, model)
    chex.assert_trees_all_equal(method.finalize(state), got)
    jitted = jax.jit(lambda *args: merging.sce(*args, select_topk=0.5))
    chex.assert_trees_all_close(jitted(base, models)["w"], got["w"])

  def test_errors(self):
    base = {"w": jnp.zeros(2)}
    for topk in (0.0, 1.5, float("nan"), {"w": -1.0}):
      with self.assertRaisesRegex(ValueError, "select_topk must lie"):
        merging.sce(base, [base], select_topk=topk)
      with self.assertRaisesRegex(ValueError, "select_topk must lie"):
        merging.sce_method(select_topk=topk)
    with self.assertRaisesRegex(ValueError, "not a traced value"):
      jax.jit(lambda k: merging.sce(base, [base], select_topk=k))(0.5)
    with self.assertRaisesRegex(ValueError, "models is empty"):
      merging.sce(base, [])
    bad = {"w": jnp.asarray([1.0, jnp.nan])}
    with self.assertRaisesRegex(ValueError, "'w' of params holds NaN"):
      method = merging.sce_method()
      method.update(method.init(base), bad)


if __name__ == "__main__":
  absltest.main()
