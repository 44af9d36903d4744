"""Tests of leaf names and selection by name."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized
from flax import linen as nn
from flax import nnx

from jaxmerge import tree


class LeafNamesTest(parameterized.TestCase):
  def test_linen(self):
    params = nn.Dense(2).init(jax.random.key(0), jnp.ones((1, 3)))
    self.assertEqual(tree.leaf_names(params), ["params/bias", "params/kernel"])
    self.assertEqual(
      tree.leaf_names(params, "."), ["params.bias", "params.kernel"]
    )

  def test_nnx_has_no_box_in_the_name(self):
    state = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    self.assertEqual(tree.leaf_names(state), ["bias", "kernel"])
    nested = {"net": {"0": state}}
    self.assertEqual(tree.leaf_names(nested), ["net/0/bias", "net/0/kernel"])

  @parameterized.parameters(
    (1.0, [""]),
    ({}, []),
    ({"a": None, "b": 1}, ["b"]),
    ([1, (2, 3)], ["0", "1/0", "1/1"]),
    # Here "value" is a name: it is the key of a dict.
    ({"value": 1, "x": {"value": 2}}, ["value", "x/value"]),
  )
  def test_plain_containers(self, value, names):
    self.assertEqual(tree.leaf_names(value), names)

  def test_same_order_as_leaves(self):
    params = {"b": 1, "a": {"z": 2, "c": 3}}
    by_name = dict(
      zip(tree.leaf_names(params), jax.tree.leaves(params), strict=True)
    )
    self.assertEqual(by_name, {"a/c": 3, "a/z": 2, "b": 1})


class MapWithNameTest(absltest.TestCase):
  def test_maps_name_and_leaf(self):
    got = tree.map_with_name(
      lambda name, leaf: leaf + len(name), {"a": {"b": 1}, "c": None}
    )
    self.assertEqual(got, {"a": {"b": 4}, "c": None})

  def test_on_nnx_state(self):
    state = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    got = tree.map_with_name(
      lambda name, leaf: leaf * 0 if name == "kernel" else leaf + 1, state
    )
    self.assertEqual(jax.tree.structure(got), jax.tree.structure(state))
    self.assertEqual(float(got["bias"][...].sum()), 2.0)


class SelectTest(parameterized.TestCase):
  params = {
    "Dense_0": {"bias": 1, "kernel": 2},
    "Dense_1": {"bias": 3, "kernel": 4},
    "none": None,
  }

  @parameterized.parameters(
    ("kernel", [False, True, False, True]),
    ("^Dense_0/", [True, True, False, False]),
    ("1/b", [False, False, True, False]),
    (lambda name: name.endswith("bias"), [True, False, True, False]),
  )
  def test_mask(self, pattern, flags):
    mask = tree.select(self.params, pattern)
    self.assertEqual(jax.tree.leaves(mask), flags)
    self.assertEqual(jax.tree.structure(mask), jax.tree.structure(self.params))

  @parameterized.parameters("^ense", lambda name: False)
  def test_no_match(self, pattern):
    with self.assertRaisesRegex(
      ValueError, "no leaf name matches .* the names are: Dense_0/bias"
    ):
      tree.select(self.params, pattern)

  def test_no_leaf(self):
    with self.assertRaisesRegex(ValueError, r"the names are: \(none\)"):
      tree.select({}, "a")

  def test_bad_pattern(self):
    with self.assertRaisesRegex(ValueError, "not a valid regular expression"):
      tree.select(self.params, "(")


if __name__ == "__main__":
  absltest.main()
