"""Tests of permutation specifications, their derivation and their proof."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import linen as nn

from jaxmerge import alignment, tree
from jaxmerge.alignment import Axis, SpecError


class Mlp(nn.Module):
  @nn.compact
  def __call__(self, x):
    for width in (6, 5):
      x = nn.relu(nn.LayerNorm()(nn.Dense(width)(x)))
    return nn.Dense(3)(x)


class Cnn(nn.Module):
  norm: str = "batch"

  @nn.compact
  def __call__(self, x):
    for width in (4, 6):
      x = nn.Conv(width, (3, 3))(x)
      if self.norm == "batch":
        x = nn.BatchNorm(use_running_average=True)(x)
      else:
        x = nn.GroupNorm(num_groups=2)(x)
      x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
    return nn.Dense(3)(x.reshape(len(x), -1))


class Residual(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Dense(6)(x)
    x = x + nn.Dense(6)(nn.relu(x))
    return nn.Dense(3)(x)


def init(module, shape, seed=0):
  """Parameters without two neurons alike, and the function of a batch."""
  x = jax.random.normal(jax.random.key(9), (4, *shape))
  params = module.init(jax.random.key(seed), x)
  rng = np.random.default_rng(seed)
  params = jax.tree.map(
    lambda leaf: leaf + jnp.asarray(rng.uniform(0, 1, leaf.shape), leaf.dtype),
    params,
  )
  return params, lambda params: module.apply(params, x)


SPEC = {
  "hidden": (
    Axis("a", 1),
    Axis("bias", 0),
    Axis("b", 0, incoming=False),
  )
}


def two_layers():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
  params = {"a": draw(3, 4), "bias": draw(4), "b": draw(4, 2), "c": draw(2)}
  x = draw(5, 3)

  def apply_fn(p):
    hidden = jnp.tanh(x @ p["a"] + p["bias"][None])
    return hidden @ p["b"] + jnp.tanh(p["c"])[None]

  return params, apply_fn


class ApplyTest(parameterized.TestCase):
  def test_against_indexing(self):
    params, _ = two_layers()
    order = np.array([2, 0, 3, 1])
    got = alignment.apply_permutations(SPEC, params, {"hidden": order})
    np.testing.assert_array_equal(got["a"], params["a"][:, order])
    np.testing.assert_array_equal(got["bias"], params["bias"][order])
    np.testing.assert_array_equal(got["b"], params["b"][order])
    self.assertIs(got["c"], params["c"])
    back = {"hidden": np.argsort(order)}
    chex.assert_trees_all_equal(
      alignment.apply_permutations(SPEC, got, back), params
    )

  def test_blocks(self):
    # Two repetitions of three neurons of two entries each.
    values = np.arange(12).reshape(2, 3, 2)
    spec = {"heads": (Axis("w", -1, outer=2, inner=2),)}
    params = {"w": jnp.asarray(values.reshape(1, 12))}
    got = alignment.apply_permutations(spec, params, {"heads": [2, 0, 1]})
    np.testing.assert_array_equal(got["w"], values[:, [2, 0, 1]].reshape(1, 12))

  def test_one_leaf_in_two_groups(self):
    values = jnp.arange(12).reshape(3, 4)
    spec = {"in": (Axis("w", 0, incoming=False),), "out": (Axis("w", 1),)}
    moves = {"in": [1, 2, 0], "out": [3, 1, 0, 2]}
    got = alignment.apply_permutations(spec, {"w": values}, moves)
    np.testing.assert_array_equal(
      got["w"], np.asarray(values)[np.ix_([1, 2, 0], [3, 1, 0, 2])]
    )

  def test_traced_and_left_out(self):
    params, _ = two_layers()
    move = jax.jit(
      lambda order: alignment.apply_permutations(
        SPEC, params, {"hidden": order}
      )
    )
    order = jnp.array([2, 0, 3, 1])
    chex.assert_trees_all_equal(
      move(order),
      alignment.apply_permutations(SPEC, params, {"hidden": order}),
    )
    chex.assert_trees_all_equal(
      alignment.apply_permutations(SPEC, params, {}), params
    )
    with self.assertRaisesRegex(ValueError, r"must have shape \(4,\)"):
      move(jnp.arange(3))

  def test_random_permutations(self):
    params, _ = two_layers()
    draw = lambda seed: alignment.random_permutations(  # noqa: E731
      SPEC, params, jax.random.key(seed)
    )["hidden"]
    self.assertEqual(sorted(draw(0).tolist()), list(range(4)))
    chex.assert_trees_all_equal(draw(0), draw(0))
    self.assertGreater(
      len({tuple(draw(seed).tolist()) for seed in range(9)}), 3
    )

  @parameterized.parameters(
    ({"g": (Axis("x", 0),)}, "names leaf 'x', which the parameters do not"),
    ({"g": (Axis("a", 2),)}, r"axis 2 of leaf 'a', which has shape \(3, 4\)"),
    (
      {"g": (Axis("a", 1), Axis("b", 1))},
      r"4 neurons in leaf 'a' of shape \(3, 4\) \(axis 1\) but 2 in 'b'",
    ),
    ({"g": (Axis("a", 1), Axis("a", -1))}, "axis 1 of leaf 'a' is in group"),
    ({"g": (Axis("a", 0, inner=2),)}, "no multiple of outer"),
    ({"g": (Axis("a", 1, outer=-1, inner=-2),)}, "outer and inner must be"),
    ({"g": (Axis("a", 1, inner=0),)}, "outer and inner must be"),
    ({"g": (Axis("a", 1, outer=2.0),)}, "outer and inner must be"),
    ({"g": (Axis("a", 1.0),)}, "axis 1.0 of leaf 'a' is no integer"),
    ({"g": ()}, "group 'g' has no axes"),
  )
  def test_bad_specs(self, spec, message):
    params, apply_fn = two_layers()
    with self.assertRaisesRegex(SpecError, message):
      alignment.group_sizes(spec, params)
    with self.assertRaisesRegex(SpecError, message):
      alignment.check(spec, apply_fn, params)

  @parameterized.parameters(
    ({"other": [0]}, "of group 'other', which the specification does not"),
    ({"hidden": [0, 1, 2]}, "not one of its 4 neurons"),
    ({"hidden": [0, 1, 1, 2]}, "each of 0 to 3 once"),
    ({"hidden": np.arange(4.0)}, "not one of its 4"),
  )
  def test_bad_permutations(self, permutations, message):
    with self.assertRaisesRegex(ValueError, message):
      alignment.apply_permutations(SPEC, two_layers()[0], permutations)


class CheckTest(parameterized.TestCase):
  def test_right(self):
    params, apply_fn = two_layers()
    self.assertLess(alignment.check(SPEC, apply_fn, params), 1e-6)

  def test_missing_leaf(self):
    params, apply_fn = two_layers()
    axes = SPEC["hidden"]
    for left_out in axes:
      spec = {"hidden": tuple(axis for axis in axes if axis is not left_out)}
      with self.assertRaisesRegex(
        SpecError,
        f"axis {left_out.axis} of leaf '{left_out.leaf}' belongs to it",
      ):
        alignment.check(spec, apply_fn, params)

  def test_wrong_leaf(self):
    params, apply_fn = two_layers()
    params["d"] = jnp.arange(4.0)
    more = lambda p: apply_fn(p) + jnp.arange(4.0) @ p["d"]  # noqa: E731
    spec = {"hidden": (*SPEC["hidden"], Axis("d", 0))}
    with self.assertRaisesRegex(SpecError, "leaf 'd' does not belong to it"):
      alignment.check(spec, more, params)

  def test_two_wrong_leaves(self):
    params, apply_fn = two_layers()
    with self.assertRaisesRegex(SpecError, "more than one of its axes"):
      alignment.check({"hidden": SPEC["hidden"][:1]}, apply_fn, params)

  def test_neurons_that_are_alike(self):
    """Zero biases and scales of one, as they are initialised."""
    x = jax.random.normal(jax.random.key(1), (4, 7))
    params = Mlp().init(jax.random.key(0), x)
    before = jax.tree.map(np.array, params)
    apply_fn = lambda params: Mlp().apply(params, x)  # noqa: E731
    spec = alignment.derive_spec(params)
    self.assertLess(alignment.check(spec, apply_fn, params), 1e-5)
    for last in ("bias", "scale"):
      rest = {
        group: tuple(axis for axis in axes if not axis.leaf.endswith(last))
        for group, axes in spec.items()
      }
      with self.assertRaisesRegex(SpecError, "changes the function"):
        alignment.check(rest, apply_fn, params)
    chex.assert_trees_all_equal(params, before)

  def test_small_outputs(self):
    """A wrong specification is found though all outputs are near zero."""
    params, apply_fn = two_layers()
    small = lambda p: 1e-7 * apply_fn(p)  # noqa: E731
    self.assertLess(alignment.check(SPEC, small, params), 1e-5)
    with self.assertRaisesRegex(SpecError, "changes the function"):
      alignment.check({"hidden": SPEC["hidden"][:2]}, small, params)

  def test_two_neurons(self):
    """No draw is the identity, whatever the key."""
    params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0], [4.0]])}
    x = jnp.array([[1.0], [-2.0]])
    for seed in range(4):
      with self.assertRaisesRegex(SpecError, "axis 0 of leaf 'b' belongs"):
        alignment.check(
          {"hidden": (Axis("a", 1),)},
          lambda p: jnp.tanh(x @ p["a"]) @ p["b"],
          params,
          key=jax.random.key(seed),
          trials=1,
        )

  def test_variances_stay_positive(self):
    params, apply_fn = two_layers()
    params["n"] = {"var": jnp.array([1e-3, 1e-3, 1.0, 1.0])}

    def normed(p):
      inverse = jax.lax.rsqrt(p["n"]["var"])[:, None]
      return apply_fn({**p, "b": p["b"] * inverse})

    spec = {"hidden": (*SPEC["hidden"], Axis("n/var", 0))}
    self.assertLess(alignment.check(spec, normed, params), 1e-5)

  def test_bad_outputs(self):
    params, apply_fn = two_layers()
    for bad in (
      lambda p: apply_fn(p) * jnp.nan,
      lambda p: [],
    ):
      with self.assertRaisesRegex(ValueError, "must return arrays"):
        alignment.check(SPEC, bad, params)
    with self.assertRaisesRegex(ValueError, "returns a constant, 3 in all 20"):
      alignment.check(SPEC, lambda p: jnp.full((10, 2), 3.0), params)
    with self.assertRaisesRegex(ValueError, "trials must be at least 1"):
      alignment.check(SPEC, apply_fn, params, trials=0)


class DeriveTest(parameterized.TestCase):
  @parameterized.parameters(
    (Mlp(), (7,), {"Dense_0": 6, "Dense_1": 5}),
    (Cnn(), (8, 8, 2), {"Conv_0": 4, "Conv_1": 6}),
  )
  def test_function_is_unchanged(self, module, shape, sizes):
    params, apply_fn = init(module, shape)
    spec = alignment.derive_spec(params)
    self.assertEqual(alignment.group_sizes(spec, params), sizes)
    self.assertLess(alignment.check(spec, apply_fn, params), 1e-5)
    # Every leaf with neurons is in it: all but the last bias.
    named = {axis.leaf for axes in spec.values() for axis in axes}
    rest = set(tree.leaf_names(params)) - named
    self.assertLen(rest, 1)
    self.assertEndsWith(rest.pop(), "/bias")

  def test_what_parameters_do_not_show(self):
    for module, shape in ((Cnn("group"), (8, 8, 2)), (Residual(), (7,))):
      params, apply_fn = init(module, shape)
      spec = alignment.derive_spec(params)
      with self.assertRaisesRegex(SpecError, "changes the function"):
        alignment.check(spec, apply_fn, params)

  def test_natural_order(self):
    params = {
      f"Dense_{i}": {"kernel": jnp.ones((3 + i, 4 + i))} for i in range(12)
    }
    spec = alignment.derive_spec(params)
    self.assertEqual(list(spec), [f"Dense_{i}" for i in range(11)])

  def test_order_that_names_do_not_say(self):
    def build(**shapes):
      return {
        name: {"kernel": jnp.ones(shape)} for name, shape in shapes.items()
      }

    square = build(hidden=(4, 4), input=(4, 4), output=(4, 4))
    with self.assertRaisesRegex(SpecError, r"in layers=\[...\]"):
      alignment.derive_spec(square)
    spec = alignment.derive_spec(square, layers=["input", "hidden", "output"])
    self.assertEqual(list(spec), ["input", "hidden"])
    # Convolutions have an order of their own, whatever the dense layers are.
    with self.assertRaisesRegex(SpecError, "a, b, Dense_0 as well as b, a"):
      alignment.derive_spec(
        build(a=(3, 3, 4, 4), b=(3, 3, 4, 4), Dense_0=(16, 2))
      )
    # One square kernel has one place only.
    forced = build(body=(3, 4), heart=(4, 4), out_1=(4, 2))
    self.assertEqual(list(alignment.derive_spec(forced)), ["body", "heart"])
    norms = {"a_norm": {"scale": jnp.ones(4)}, "b_norm": {"scale": jnp.ones(4)}}
    with self.assertRaisesRegex(SpecError, "'a_norm' and 'b_norm', of one"):
      alignment.derive_spec({**forced, **norms})

  def test_layers(self):
    params = {
      "second": {"kernel": jnp.ones((4, 5))},
      "first": {"kernel": jnp.ones((3, 4))},
      "apart": {"kernel": jnp.ones((9, 9)), "table": jnp.ones((2, 2))},
    }
    spec = alignment.derive_spec(params, layers=["first", "second"])
    self.assertEqual(list(spec), ["first"])
    for layers, message in (
      (["first", "third"], "layer 'third' is not in the parameters"),
      (["first", "first"], "names a layer twice"),
      (["second", "first"], "do not form a chain"),
    ):
      with self.assertRaisesRegex(SpecError, message):
        alignment.derive_spec(params, layers=layers)

  @parameterized.parameters(
    ({"w": (3,)}, "no layer"),
    (
      {
        "Dense_0": {"kernel": (3, 4), "gain": (4,)},
        "Dense_1": {"kernel": (4, 2)},
      },
      "leaf 'Dense_0/gain' beside 'Dense_0/kernel' is neither",
    ),
    ({"a": {"kernel": (3,)}}, "must have shape"),
    (
      {"a": {"kernel": (3, 4)}, "b": {"kernel": (5, 2)}},
      "'a/kernel' has 4 outputs but 'b/kernel' takes 5",
    ),
    (
      {"a": {"kernel": (3, 4)}, "b": {"kernel": (4, 2)}, "e": {"t": (2, 2)}},
      "is of no layer",
    ),
    (
      {
        "a": {"kernel": (3, 4)},
        "b": {"kernel": (4, 2)},
        "n": {"scale": (4,)},
        "m": {"scale": (4,)},
      },
      "2 normalisations .* for 1 hidden layers",
    ),
    (
      {"a": {"kernel": (3, 4)}, "b": {"kernel": (4, 2)}, "n": {"scale": (3,)}},
      r"'n/scale' of shape \(3,\) does not fit the 4 outputs of layer 'a'",
    ),
  )
  def test_errors(self, shapes, message):
    params = jax.tree.map(
      jnp.ones, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple)
    )
    with self.assertRaisesRegex(SpecError, message):
      alignment.derive_spec(params)


if __name__ == "__main__":
  absltest.main()
