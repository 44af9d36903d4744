"""Tests of the structure, shape and dtype check."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import linen as nn
from flax import nnx

from jaxmerge import tree


class Pair(NamedTuple):
  left: jax.Array
  right: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Box:
  content: jax.Array


def linen_params(width=3):
  model = nn.Sequential([nn.Dense(width), nn.relu, nn.Dense(2)])
  return model.init(jax.random.key(0), jnp.ones((1, 4)))


def nnx_state(width=3):
  return nnx.state(nnx.Linear(4, width, rngs=nnx.Rngs(0)))


class CheckMatchTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("linen", linen_params),
    ("nnx", nnx_state),
    ("namedtuple", lambda: Pair(jnp.ones(2), jnp.ones(3))),
    ("dataclass", lambda: Box(jnp.ones(2))),
    ("scalars", lambda: {"a": 1.0, "b": 2, "c": True}),
    ("none", lambda: {"a": None, "b": jnp.ones(2)}),
    ("key", lambda: {"key": jax.random.key(0)}),
    ("empty", dict),
    ("no_array", lambda: {"fn": jnp.tanh, "name": "relu"}),
    ("half", lambda: [jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.float16)]),
  )
  def test_equal_trees_match(self, make):
    tree.check_match(make(), make(), make())

  def test_tracers_and_shape_structs(self):
    params = linen_params()
    shapes = jax.eval_shape(lambda: params)
    tree.check_match(params, shapes)

    @jax.jit
    def traced(x):
      tree.check_match(x, params, shapes)
      return x

    traced(params)

  def test_scalars_count_as_arrays(self):
    tree.check_match({"a": 1.0}, {"a": np.float32(2)}, {"a": jnp.zeros(())})
    # Without x64, JAX sees NumPy's float64 as float32.
    tree.check_match({"a": np.ones(2)}, {"a": jnp.ones(2)})

  @parameterized.named_parameters(
    ("linen", linen_params, "params/layers_0/bias"),
    ("nnx", nnx_state, "bias"),
  )
  def test_shape(self, make, name):
    with self.assertRaisesRegex(
      tree.TreeMismatchError,
      rf"leaf '{name}' has shape \(3,\) in reference but \(5,\) in tree 2; .+",
    ):
      tree.check_match(make(), make(), make(5))

  def test_dtype(self):
    a, b = {"w": jnp.ones(2)}, {"w": jnp.ones(2, jnp.bfloat16)}
    with self.assertRaisesRegex(
      tree.TreeMismatchError,
      "leaf 'w' has dtype float32 in A but bfloat16 in B; cast",
    ):
      tree.check_match(a, b, names=["A", "B"])
    tree.check_match(a, b, check_dtype=False)

  def test_missing_leaf_names_the_first_path_on_either_side(self):
    a = {"x": 1.0, "y": {"k": 1.0, "l": 2.0}}
    b = {"x": 1.0, "y": {"l": 2.0}}
    with self.assertRaisesRegex(
      tree.TreeMismatchError,
      "leaf 'y/k' is in reference but missing from tree 1",
    ):
      tree.check_match(a, b)
    with self.assertRaisesRegex(
      tree.TreeMismatchError,
      "leaf 'y/k' is in tree 1 but missing from reference",
    ):
      tree.check_match(b, a)

  def test_none_is_no_leaf(self):
    with self.assertRaisesRegex(tree.TreeMismatchError, "leaf 'x' is in"):
      tree.check_match({"x": None}, {"x": 1.0})

  def test_other_containers(self):
    with self.assertRaisesRegex(
      tree.TreeMismatchError, "same leaf names but other containers"
    ):
      tree.check_match([1.0], (1.0,))

  def test_leaves_that_are_no_arrays_are_compared_by_type(self):
    with self.assertRaisesRegex(tree.TreeMismatchError, "dtype str in"):
      tree.check_match({"x": "relu"}, {"x": jnp.ones(())})

  def test_number_of_names(self):
    with self.assertRaisesRegex(ValueError, "names has 1 entries for 2 trees"):
      tree.check_match({}, {}, names=["only"])

  def test_is_a_value_error(self):
    self.assertTrue(issubclass(tree.TreeMismatchError, ValueError))


if __name__ == "__main__":
  absltest.main()
