"""Tests of the stacking of layers."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

from jaxmerge import merging


def layer(seed, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  return {
    "kernel": jnp.asarray(rng.normal(size=(3, 3)), dtype),
    "bias": jnp.asarray(rng.normal(size=3), dtype),
    "count": jnp.asarray(seed),
  }


def layers(model, depth):
  return [layer(100 * model + i) for i in range(depth)]


def as_names(model, depth, name="layers_{}"):
  named = {name.format(i): x for i, x in enumerate(layers(model, depth))}
  return {"embed": jnp.asarray(model * 1.0), "head": None, **named}


def as_dict(model, depth, key=str):
  inner = {key(i): x for i, x in enumerate(layers(model, depth))}
  return {"embed": jnp.asarray(model * 1.0), "decoder": {"layers": inner}}


def as_list(model, depth):
  return {"embed": jnp.asarray(model * 1.0), "h": layers(model, depth)}


def as_tuple(model, depth):
  return (jnp.asarray(model * 1.0), {"h": tuple(layers(model, depth))})


def as_flat(model, depth):
  found = {"model.embed": jnp.asarray(model * 1.0)}
  for i, one in enumerate(layers(model, depth)):
    found.update({f"model.layers.{i}.{k}": v for k, v in one.items()})
  return found


class Outer(NamedTuple):
  body: dict
  head: jax.Array


def as_named_tuple(model, depth):
  body = {f"block_{i:02d}": x for i, x in enumerate(layers(model, depth))}
  return Outer(body, jnp.asarray(model * 1.0))


FORMS = {
  "names": as_names,
  "string_keys": as_dict,
  "int_keys": lambda model, depth: as_dict(model, depth, int),
  "list": as_list,
  "tuple": as_tuple,
  "flat": as_flat,
  "named_tuple": as_named_tuple,
}

SLICES = [(0, 0, 3), (1, 1, 5), merging.LayerSlice(0, 2, 4)]
ORIGIN = [
  (0, 0),
  (0, 1),
  (0, 2),
  (1, 1),
  (1, 2),
  (1, 3),
  (1, 4),
  (0, 2),
  (0, 3),
]


class PassthroughTest(parameterized.TestCase):
  @parameterized.product(form=list(FORMS), rest=[0, 1], jit=[False, True])
  def test_stacks(self, form, rest, jit):
    """The result is what the same function makes of the stacked layers."""
    make = FORMS[form]
    models = [make(0, 4), make(1, 12)]
    fn = lambda models: merging.passthrough(models, SLICES, rest=rest)  # noqa: E731
    got = (jax.jit(fn) if jit else fn)(models)

    stacked = [layer(100 * model + i) for model, i in ORIGIN]
    original, layers_ = make(rest, len(stacked)), layers(rest, len(stacked))
    want = jax.tree.map(
      lambda leaf: next(
        (
          new[key]
          for old, new in zip(layers_, stacked, strict=True)
          for key in old
          if leaf.shape == old[key].shape and np.array_equal(leaf, old[key])
        ),
        leaf,
      ),
      original,
    )
    chex.assert_trees_all_equal_structs(got, want)
    chex.assert_trees_all_equal(got, want)

  def test_numbers_with_padding_and_beyond(self):
    models = [as_named_tuple(0, 2)]
    got = merging.passthrough(models, [(0, 0, 2)] * 6)
    self.assertEqual(list(got.body), [f"block_{i:02d}" for i in range(12)])

  def test_leaves_are_not_copied(self):
    model = as_names(0, 2)
    got = merging.passthrough([model], [(0, 1, 2), (0, 0, 1)])
    self.assertIs(got["layers_0"]["kernel"], model["layers_1"]["kernel"])
    self.assertIs(got["embed"], model["embed"])
    self.assertLen(model, 4)

  def test_fewer_layers(self):
    got = merging.passthrough([as_list(0, 5)], [(0, 3, 5)])
    self.assertLen(got["h"], 2)

  def test_several_places(self):
    """One layer in two collections, the second without all of them."""
    model = {
      "params": {f"layers_{i}": i * 1.0 for i in range(3)},
      "batch_stats": {"layers_1": 10.0},
    }
    got = merging.passthrough([model], [(0, 1, 3), (0, 1, 2)])
    self.assertEqual(
      got,
      {
        "params": {"layers_0": 1.0, "layers_1": 2.0, "layers_2": 1.0},
        "batch_stats": {"layers_0": 10.0, "layers_2": 10.0},
      },
    )

  def test_pattern(self):
    model = {"norm_1": 5.0, "attn_0": 1.0, "mlp_0": 2.0, "a/b": 3.0}
    got = merging.passthrough(
      [model], [(0, 0, 1)] * 2, pattern=r"^(?:attn|mlp)_(\d+)$"
    )
    self.assertEqual(got, {**model, "attn_1": 1.0, "mlp_1": 2.0})
    got = merging.passthrough(
      [{"a/x_0": 1.0}], [(0, 0, 1)] * 2, pattern=r"x_(\d+)"
    )
    self.assertEqual(got, {"a/x_0": 1.0, "a/x_1": 1.0})

  @parameterized.parameters("float32", "bfloat16")
  def test_scale(self, dtype):
    model = {"layers_0": layer(0, dtype)}
    got = merging.passthrough(
      [model],
      [(0, 0, 1), (0, 0, 1, 0.5), (0, 0, 1, {"kernel": 0, ".*": 2.0})],
    )
    for name, factors in (("kernel", (1, 0.5, 0)), ("bias", (1, 0.5, 2))):
      for i, factor in enumerate(factors):
        leaf = got[f"layers_{i}"][name]
        self.assertEqual(leaf.dtype, dtype)
        np.testing.assert_array_equal(leaf, model["layers_0"][name] * factor)
    self.assertEqual(got["layers_1"]["count"], model["layers_0"]["count"])

  def test_gradient_of_scale(self):
    model = as_names(0, 2)

    def total(scale):
      got = merging.passthrough([model], [(0, 0, 1, scale)])
      return got["layers_0"]["bias"].sum()

    np.testing.assert_allclose(
      jax.grad(total)(0.3), model["layers_0"]["bias"].sum(), rtol=1e-6
    )

  def test_dtype(self):
    got = merging.passthrough([as_names(0, 2)], [(0, 0, 2)], dtype=jnp.bfloat16)
    self.assertEqual(got["layers_1"]["kernel"].dtype, jnp.bfloat16)
    self.assertEqual(got["embed"].dtype, jnp.bfloat16)
    self.assertEqual(got["layers_1"]["count"].dtype, jnp.int32)

  def test_state_of_an_nnx_module(self):
    class Net(nnx.Module):
      def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(3)])
        self.head = nnx.Linear(2, 1, rngs=rngs)

    state = nnx.state(Net(nnx.Rngs(0)))
    got = merging.passthrough([state], [(0, 0, 2), (0, 1, 3)])
    self.assertIsInstance(got, nnx.State)
    self.assertLen(got["layers"], 4)
    for new, old in enumerate((0, 1, 1, 2)):
      np.testing.assert_array_equal(
        got["layers"][new]["kernel"][...], state["layers"][old]["kernel"][...]
      )
    np.testing.assert_array_equal(
      got["head"]["kernel"][...], state["head"]["kernel"][...]
    )


class BadInputTest(parameterized.TestCase):
  @parameterized.parameters(
    ([], "slices is empty"),
    ([(0, 1)], r"slice 0 is \(0, 1\); give \(model, start, stop\)"),
    ([3], "slice 0 is 3; give"),
    ([(0, 0, 1), (0, 0, 1.0)], "slice 1 .* must be ints"),
    ([(2, 0, 1)], "slice 0 is of model 2, but there are 2 models"),
    ([(-1, 0, 1)], "slice 0 is of model -1"),
    ([(0, 2, 2)], "slice 0 has layers 2 to 2, which is no range"),
    ([(0, -1, 2)], "slice 0 has layers -1 to 2, which is no range"),
    (
      [(0, 0, 1), (1, 2, 5)],
      "slice 1 has layers 2 to 5, but model 1 has no layer 4; its layers are"
      " numbered 0 to 3",
    ),
    ([(0, 0, 1, {"kernel": 1.0})], "scale of slice 0 has no value for leaf"),
    ([(0, 0, 1, np.nan)], "scale of slice 0 is nan"),
  )
  def test_slices(self, slices, message):
    with self.assertRaisesRegex(ValueError, message):
      merging.passthrough([as_names(0, 3), as_names(1, 4)], slices)

  @parameterized.parameters(
    ("(", "not a valid regular expression"),
    ("layers_", "has 0 groups; give it one"),
    (r"(layers)_(\d+)", "has 2 groups"),
    (r"blocks_(\d+)", "no leaf of model 0 matches .* the names are: embed, "),
    (r"layers(_\d)", "finds '_0' in leaf .* which is not a number"),
    (r"(layers_\d+)", "finds 'layers_0' in leaf .* which is not a number"),
    (r"layers_(\d+)/kernel", "'layers_0/bias' of model 0 does not match"),
  )
  def test_pattern(self, pattern, message):
    with self.assertRaisesRegex(ValueError, message):
      merging.passthrough([as_names(0, 3)], [(0, 0, 11)], pattern=pattern)

  def test_names_that_clash(self):
    model = {"layers_0": 1.0, "layers_1": 2.0, "layers_2": 3.0}
    with self.assertRaisesRegex(
      ValueError, "layer 'layers_2' of the result would overwrite"
    ):
      merging.passthrough([model], [(0, 0, 2)] * 2, pattern=r"layers_([01])")
    got = merging.passthrough([model], [(0, 0, 1)], pattern=r"layers_([01])")
    self.assertEqual(got, {"layers_0": 1.0, "layers_2": 3.0})

  def test_containers(self):
    class Two(NamedTuple):
      layer_0: float
      layer_1: float

    with self.assertRaisesRegex(ValueError, "layers in a Two, at the tree"):
      merging.passthrough([Two(1.0, 2.0)], [(0, 0, 1)])
    with self.assertRaisesRegex(ValueError, "of the list at 'h', but not"):
      merging.passthrough([{"h": [1.0, 2.0]}], [(0, 0, 1)], pattern="h/(0)")
    with self.assertRaisesRegex(ValueError, "no place in model 0.*with rest"):
      merging.passthrough([as_names(0, 1), as_dict(1, 1)], [(1, 0, 1)])

  def test_the_rest(self):
    model = as_names(0, 2)
    with self.assertRaisesRegex(ValueError, "models is empty"):
      merging.passthrough([], [(0, 0, 1)])
    for rest in (1, -1, None):
      with self.assertRaisesRegex(ValueError, "rest must be the place"):
        merging.passthrough([model], [(0, 0, 1)], rest=rest)
    bad = {**model, "layers_1": {"w": jnp.asarray(jnp.nan)}}
    with self.assertRaisesRegex(ValueError, "'layers_0/w' of the result holds"):
      merging.passthrough([bad], [(0, 1, 2)])
    merging.passthrough([bad], [(0, 1, 2)], allow_nonfinite=True)
    merging.passthrough([bad], [(0, 0, 1)])


if __name__ == "__main__":
  absltest.main()
