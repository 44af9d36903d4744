"""Tests of TALL masks and consensus merging."""

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
# Halves, so that everything is exact: integers and a power of two.
INTEGERS = hnp.arrays(np.int8, (3, 5), elements=st.integers(-3, 3))


def masks(taus, total, factor):
  """The definition, from task vectors [n, size]."""
  return [abs(tau) >= factor * abs(total - tau) for tau in taus]


def trees(taus, base):
  """Two leaves of each row."""
  split = lambda row: {"a": row[:2], "b": row[2:]}  # noqa: E731
  as_tree = lambda row: jax.tree.map(  # noqa: E731
    lambda x: jnp.asarray(x, jnp.float32), split(row)
  )
  return as_tree(base), [as_tree(base + tau) for tau in taus]


def flat(params):
  return np.concatenate([params["a"], params["b"]])


BASE = np.asarray([0.0, 1.0, -2.0, 3.0, 0.5])


class TallMasksTest(parameterized.TestCase):
  @SETTINGS
  @hypothesis.given(taus=INTEGERS, factor=st.sampled_from([0.0, 0.5, 1.0, 2.0]))
  def test_against_numpy(self, taus, factor):
    base, models = trees(taus, BASE)
    got = merging.tall_masks(base, models, tall_lambda=factor)
    for one, want in zip(got, masks(taus, taus.sum(0), factor), strict=True):
      np.testing.assert_array_equal(flat(one), want)

  @SETTINGS
  @hypothesis.given(taus=INTEGERS)
  def test_given_merge_and_own_thresholds(self, taus):
    base, models = trees(taus, BASE)
    total = 2 * taus[0] - taus[2]
    merged = trees([total], BASE)[1][0]
    factors = [0.5, 1.0, 2.0]
    got = merging.tall_masks(base, models, merged=merged, tall_lambda=factors)
    for i in range(3):
      want = masks(taus, total, factors[i])[i]
      np.testing.assert_array_equal(flat(got[i]), want)
      local = merging.localize(base, merged, got[i])
      np.testing.assert_array_equal(flat(local), BASE + want * total)

  def test_best_mask_for_a_factor_of_one(self):
    """No other mask is closer to the task's own parameters in L1."""
    rng = np.random.default_rng(0)
    taus = rng.normal(size=(3, 5))
    base, models = trees(taus, BASE)
    merged = merging.task_arithmetic(base, models)
    mask = merging.tall_masks(base, models, tall_lambda=1.0)[1]
    distance = lambda params: abs(flat(params) - flat(models[1])).sum()  # noqa: E731
    best = distance(merging.localize(base, merged, mask))
    for bits in np.ndindex(*[2] * 5):
      other = np.asarray(bits, bool)
      other = {"a": jnp.asarray(other[:2]), "b": jnp.asarray(other[2:])}
      self.assertLessEqual(
        best, distance(merging.localize(base, merged, other)) + 1e-6
      )

  @parameterized.parameters("float32", "bfloat16", "float16")
  def test_one_model_is_rebuilt(self, dtype):
    rng = np.random.default_rng(1)
    make = lambda: {"w": jnp.asarray(rng.normal(size=7), dtype)}  # noqa: E731
    base, model = make(), make()
    (mask,) = merging.tall_masks(base, [model])
    self.assertTrue(mask["w"].all())
    got = merging.localize(base, model, mask)
    chex.assert_trees_all_equal(got, model)

  def test_special_leaves(self):
    base = {
      "w": jnp.zeros(2),
      "empty": jnp.zeros((0, 2)),
      "steps": jnp.asarray([3, 4]),
      "key": jax.random.key(0),
      "none": None,
    }
    model = {**base, "w": jnp.ones(2), "steps": jnp.asarray([5, 6])}
    (mask,) = merging.tall_masks(base, [model])
    self.assertEqual(jax.tree.structure(mask), jax.tree.structure(base))
    np.testing.assert_array_equal(mask["steps"], [False, False])
    self.assertEqual(mask["key"].shape, ())
    got = merging.localize(base, model, mask)
    np.testing.assert_array_equal(got["steps"], base["steps"])
    np.testing.assert_array_equal(got["w"], 1.0)
    (mask,) = merging.tall_masks(base, [model], select="empty")
    self.assertFalse(mask["w"].any())

  def test_errors(self):
    base = {"w": jnp.zeros(2)}
    with self.assertRaisesRegex(ValueError, r"tall_lambda must lie in \[0"):
      merging.tall_masks(base, [base], tall_lambda=-0.1)
    with self.assertRaisesRegex(ValueError, "got 2 values of tall_lambda"):
      merging.tall_masks(base, [base], tall_lambda=[0.1, 0.2])
    with self.assertRaisesRegex(tree.TreeMismatchError, "in merged"):
      merging.tall_masks(base, [base], merged={"w": jnp.zeros(3)})
    with self.assertRaisesRegex(ValueError, "'w' of merged holds NaN"):
      merging.tall_masks(base, [base], merged={"w": jnp.full(2, jnp.nan)})
    with self.assertRaisesRegex(ValueError, "a mask is boolean"):
      merging.localize(base, base, {"w": jnp.zeros(2)})
    with self.assertRaisesRegex(tree.TreeMismatchError, "in mask"):
      merging.localize(base, base, {"w": jnp.zeros(3, bool)})


class ConsensusTest(parameterized.TestCase):
  @SETTINGS
  @hypothesis.given(
    taus=INTEGERS,
    min_tasks=st.integers(0, 3),
    factor=st.sampled_from([0.5, 1.0, 2.0]),
  )
  def test_against_numpy(self, taus, min_tasks, factor):
    base, models = trees(taus, BASE)
    got = merging.consensus(
      base, models, scale=0.5, tall_lambda=factor, min_tasks=min_tasks
    )
    total = taus.sum(0)
    used = np.sum(masks(taus, total, factor), axis=0)
    want = BASE + 0.5 * np.where(used >= min_tasks, total, 0)
    np.testing.assert_allclose(flat(got), want, rtol=1e-6)

  @parameterized.product(merge=["sum", "mean", "max"], min_tasks=[0, 1, 2, 3])
  def test_of_ties(self, merge, min_tasks):
    rng = np.random.default_rng(2)
    taus = rng.normal(size=(3, 5))
    base, models = trees(taus, np.zeros(5))
    got = merging.consensus(
      base,
      models,
      multi_task="ties",
      density=0.6,
      merge=merge,
      min_tasks=min_tasks,
      tall_lambda=0.4,
      scale=0.3,
    )
    total = flat(merging.ties(base, models, density=0.6, merge=merge))
    # The task vectors themselves are not trimmed.
    used = np.sum(masks(taus, total, 0.4), axis=0)
    want = 0.3 * np.where(used >= min_tasks, total, 0)
    np.testing.assert_allclose(flat(got), want, rtol=1e-5, atol=1e-7)

  def test_weights_enter_the_sum_alone(self):
    base = {"w": jnp.zeros(2)}
    models = [{"w": jnp.asarray(x)} for x in ([1.0, 4.0], [2.0, 0.0])]
    got = merging.consensus(base, models, weights=[2.0, 1.0], tall_lambda=0.5)
    # Sums 4 and 8. Entry 0: 1 >= 3/2 fails. Entry 1: 0 >= 8/2 fails.
    np.testing.assert_array_equal(got["w"], [0.0, 0.0])
    got = merging.consensus(
      base, models, weights=[2.0, 1.0], tall_lambda=0.5, min_tasks=1
    )
    np.testing.assert_array_equal(got["w"], [4.0, 8.0])

  @parameterized.parameters("task_arithmetic", "ties")
  def test_special_leaves_and_the_method(self, multi_task):
    base = {
      "w": jnp.zeros((2, 2), jnp.bfloat16),
      "x": jnp.zeros(3),
      "empty": jnp.zeros((0, 3)),
      "steps": jnp.asarray(3),
      "key": jax.random.key(0),
      "none": None,
    }
    models = [
      {**base, "w": jnp.full((2, 2), i, jnp.bfloat16), "x": jnp.ones(3) * i}
      for i in (1, 2)
    ]
    options = {"multi_task": multi_task, "density": 0.9}
    got = merging.consensus(base, models, **options)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, base)
    np.testing.assert_array_equal(got["x"], 3.0)
    method = merging.consensus_method(**options)
    state = method.init(base)
    for model in models:
      state = method.update(state, model)
    chex.assert_trees_all_equal(method.finalize(state), got)
    jitted = jax.jit(lambda *args: merging.consensus(*args, **options))
    chex.assert_trees_all_equal(jitted(base, models), got)
    scales = jnp.asarray([0.0, 1.0])
    together = jax.vmap(
      lambda scale: merging.consensus(base, models, scale=scale, **options)["x"]
    )(scales)
    np.testing.assert_array_equal(together, scales[:, None] * got["x"][None])

  def test_errors(self):
    base = {"w": jnp.zeros(2)}
    with self.assertRaisesRegex(ValueError, "min_tasks is 2 but the number of"):
      merging.consensus(base, [base])
    for options, message in (
      ({"min_tasks": -1}, "must not be negative"),
      ({"multi_task": "mean"}, "multi_task must be one of 'task_arithmetic'"),
      ({"merge": "median"}, "merge must be one of"),
      ({"density": 0.0}, "density must lie"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        merging.consensus(base, [base] * 2, **options)
      with self.assertRaisesRegex(ValueError, message):
        merging.consensus_method(**options)
    with self.assertRaisesRegex(ValueError, "'w' of model 1 holds NaN"):
      merging.consensus(base, [base, {"w": jnp.full(2, jnp.inf)}])
    with self.assertRaisesRegex(tree.TreeMismatchError, "'w'"):
      merging.consensus(base, [base, {"w": jnp.zeros(3)}])


if __name__ == "__main__":
  absltest.main()
