"""Tests of the baselines of alignment."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import alignment, tree
from jaxmerge.alignment import Axis

SPEC = {"hidden": (Axis("a", 1), Axis("b", 0, incoming=False))}


def params(width, seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
  return {"a": draw(3, width), "b": draw(width, 2)}


def apply(p, x):
  return jnp.maximum(x @ p["a"], 0) @ p["b"]


class BaselinesTest(parameterized.TestCase):
  def test_trivial(self):
    a, b = params(4), params(4, 1)
    self.assertIs(alignment.keep_identity(a, b), b)
    self.assertIs(alignment.keep_first(a, b), a)
    with self.assertRaises(tree.TreeMismatchError):
      alignment.keep_identity(a, params(5))

  @parameterized.parameters(4, 8)
  def test_random_alignment_keeps_the_function(self, width):
    reference, model = params(width), params(4, 1)
    x = jax.random.normal(jax.random.key(0), (5, 3))
    moved = [
      alignment.random_alignment(reference, model, SPEC, key=jax.random.key(i))
      for i in range(3)
    ]
    for one in moved:
      self.assertEqual(one["a"].shape, (3, width))
      np.testing.assert_allclose(apply(one, x), apply(model, x), atol=1e-5)
    self.assertFalse(np.array_equal(moved[0]["a"], moved[1]["a"]))
    again = alignment.random_alignment(
      reference, model, SPEC, key=jax.random.key(0)
    )
    np.testing.assert_array_equal(again["a"], moved[0]["a"])

  def test_permutations_are_equally_likely(self):
    reference = {"a": jnp.ones((1, 3)), "b": jnp.ones((3, 1))}
    model = {"a": jnp.arange(3.0)[None], "b": jnp.ones((3, 1))}
    keys = jax.random.split(jax.random.key(0), 600)
    draw = lambda key: alignment.random_alignment(  # noqa: E731
      reference, model, SPEC, key=key
    )["a"][0]
    found = np.asarray(jax.jit(jax.vmap(draw))(keys)).astype(int)
    counts = np.unique(found @ [9, 3, 1], return_counts=True)[1]
    self.assertLen(counts, 6)
    # Six standard deviations.
    self.assertLess(np.abs(counts - 100).max(), 55)

  def test_logit_ensemble(self):
    a, b = params(4), params(6, 1)
    x = jax.random.normal(jax.random.key(0), (5, 3))
    np.testing.assert_allclose(
      alignment.logit_ensemble(apply, [a, b])(x),
      (apply(a, x) + apply(b, x)) / 2,
      rtol=1e-5,
    )
    np.testing.assert_allclose(
      jax.jit(alignment.logit_ensemble(apply, [a, b], [0.2, 0.8]))(x),
      0.2 * apply(a, x) + 0.8 * apply(b, x),
      rtol=1e-4,
    )
    for models, weights, message in (
      ([], None, "models is empty"),
      ([a, b], [1.0], "weights must be 2 finite numbers"),
      ([a], [np.nan], "weights must be 1 finite"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        alignment.logit_ensemble(apply, models, weights)


if __name__ == "__main__":
  absltest.main()
