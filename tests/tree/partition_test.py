"""Tests of partition and combine."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

from jaxmerge import tree


class IsFloatTest(parameterized.TestCase):
  @parameterized.parameters(
    (1.0, True),
    (1, False),
    (True, False),
    (None, False),
    ("a", False),
    (jnp.tanh, False),
    (np.float64(1), True),
    (np.ones(2, np.int8), False),
    (np.ones(2, np.complex64), True),
    (jax.ShapeDtypeStruct((2,), jnp.bfloat16), True),
    (jax.ShapeDtypeStruct((2,), jnp.float8_e4m3fn), True),
    (jax.ShapeDtypeStruct((2,), jnp.int4), False),
  )
  def test_values(self, leaf, expected):
    self.assertIs(tree.is_float(leaf), expected)

  def test_prng_key(self):
    self.assertFalse(tree.is_float(jax.random.key(0)))
    self.assertFalse(tree.is_float(jax.random.PRNGKey(0)))


def mixed():
  return {
    "w": jnp.arange(3.0),
    "n": jnp.arange(3),
    "none": None,
    "key": jax.random.key(1),
    "list": [1, 2.0, None, "text", True],
  }


class PartitionTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("mixed", mixed),
    ("nnx", lambda: nnx.state(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))),
    (
      "equinox",
      lambda: eqx.nn.MLP(2, 2, 3, 1, use_bias=False, key=jax.random.key(0)),
    ),
    ("empty", dict),
    ("none", lambda: None),
    ("leaf", lambda: 2.0),
  )
  def test_round_trip(self, make):
    params = make()
    selected, rest = tree.partition(params)
    got = tree.combine(selected, rest)
    self.assertEqual(jax.tree.structure(got), jax.tree.structure(params))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(params), strict=True):
      self.assertIs(a, b)
    self.assertTrue(all(map(tree.is_float, jax.tree.leaves(selected))))
    self.assertFalse(any(map(tree.is_float, jax.tree.leaves(rest))))
    swapped = tree.combine(rest, selected)
    self.assertEqual(jax.tree.structure(swapped), jax.tree.structure(params))

  def test_gradient_of_the_float_part(self):
    selected, rest = tree.partition({"w": jnp.ones(2), "n": jnp.arange(2)})

    @jax.jit
    @jax.grad
    def grad(selected, rest):
      params = tree.combine(selected, rest)
      return (params["w"] * params["n"].astype(jnp.float32)).sum()

    np.testing.assert_array_equal(grad(selected, rest)["w"], [0.0, 1.0])

  def test_predicate(self):
    selected, rest = tree.partition([1, 2, 3], lambda leaf: leaf > 1)
    self.assertEqual(selected, [None, 2, 3])
    self.assertEqual(rest, [1, None, None])

  def test_mask(self):
    params = {"a": {"k": 1.0}, "b": {"k": 2.0}, "c": None}
    selected, rest = tree.partition(params, tree.select(params, "^a"))
    self.assertEqual(selected, {"a": {"k": 1.0}, "b": {"k": None}, "c": None})
    self.assertEqual(rest, {"a": {"k": None}, "b": {"k": 2.0}, "c": None})

  def test_mask_that_is_callable(self):
    model = eqx.nn.Linear(2, 3, key=jax.random.key(0))
    selected, _ = tree.partition(model, tree.select(model, "bias"))
    self.assertIsNone(selected.weight)
    self.assertIs(selected.bias, model.bias)

  def test_mask_of_other_structure(self):
    with self.assertRaisesRegex(tree.TreeMismatchError, "'b' is in mask but"):
      tree.partition({"a": 1.0}, {"a": True, "b": False})

  def test_mask_of_arrays(self):
    with self.assertRaisesRegex(ValueError, "tree of Python bools"):
      tree.partition({"a": 1.0}, {"a": 1})


class CombineTest(absltest.TestCase):
  def test_both_have_a_leaf(self):
    with self.assertRaisesRegex(ValueError, "leaf 'b/0' is in both parts"):
      tree.combine({"a": None, "b": [1]}, {"a": 2, "b": [3]})

  def test_other_containers(self):
    with self.assertRaisesRegex(
      tree.TreeMismatchError, "leaf 'b' is in selected but missing from rest"
    ):
      tree.combine({"a": 1, "b": None}, {"a": None})


if __name__ == "__main__":
  absltest.main()
