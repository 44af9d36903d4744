"""Tests of REPAIR and of the activations of Flax modules."""

from __future__ import annotations

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import alignment, models, tree


def _draw(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _filled(model, x, seed):
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
  leaves, treedef = jax.tree.flatten(shapes)
  return treedef.unflatten(
    _draw(leaf.shape, 100 * seed + i) / np.float32(max(leaf.shape) ** 0.5)
    for i, leaf in enumerate(leaves)
  )


def _moments(activations):
  """Mean and deviation of every channel, in float64."""
  return {
    name: (
      np.float64(value).reshape(-1, value.shape[-1]).mean(0),
      np.float64(value).reshape(-1, value.shape[-1]).std(0),
    )
    for name, value in activations.items()
  }


_MLP = models.MLP(features=(8, 7, 6), num_classes=3, use_bias=True)
_CNN = models.CNN(widths=(4, 5), num_classes=3, norm="none")
_CASES = {
  "mlp": (_MLP, (50, 5), {}),
  "cnn": (_CNN, (20, 6, 6, 2), {}),
  "layer": (
    models.CNN(widths=(4, 5), num_classes=3, norm="layer"),
    (20, 6, 6, 2),
    {"kinds": (nn.LayerNorm,)},
  ),
  "group": (
    models.CNN(widths=(4, 6), num_classes=3, norm="group", num_groups=2),
    (20, 6, 6, 2),
    {"kinds": (nn.GroupNorm,)},
  ),
}


class RepairTest(parameterized.TestCase):
  @parameterized.product(name=tuple(_CASES), t=(0.5, 0.2))
  def test_statistics_match(self, name, t):
    model, shape, options = _CASES[name]
    x = _draw(shape)
    start, end = (_filled(model, x, seed) for seed in (1, 2))
    merged = tree.lerp(start, end, t)
    activations_fn = alignment.flax_activations(model, **options)
    # Three chunks and a rest.
    repaired, info = alignment.repair(
      merged, start, end, activations_fn, x, t=t, batch_size=len(x) // 3 - 1
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(repaired, merged)
    one, two, found, naive = (
      _moments(jax.jit(activations_fn)(params, x))
      for params in (start, end, repaired, merged)
    )
    self.assertLen(info.layers, 3 if name == "mlp" else 2)
    for i, layer in enumerate(info.layers):
      mean = (1 - t) * one[layer][0] + t * two[layer][0]
      std = (1 - t) * one[layer][1] + t * two[layer][1]
      np.testing.assert_allclose(found[layer][0], mean, atol=1e-4)
      np.testing.assert_allclose(found[layer][1], std, atol=1e-4)
      np.testing.assert_allclose(
        info.std_ratio_before[i], naive[layer][1].mean() / std.mean(), rtol=1e-4
      )
      worst = max(
        np.abs(naive[layer][0] - mean).max(),
        np.abs(naive[layer][1] - std).max(),
      )
      np.testing.assert_allclose(
        info.error_before[i], worst / std.mean(), rtol=1e-3
      )
    np.testing.assert_allclose(info.std_ratio_after, 1, atol=1e-4)
    self.assertLess(float(info.error_after.max()), 1e-4)
    self.assertGreater(float(info.error_before.min()), 1e-2)

  @parameterized.parameters("mlp", "cnn")
  def test_equal_ends_keep_the_function(self, name):
    model, shape, options = _CASES[name]
    x = _draw(shape)
    params = _filled(model, x, 1)
    repaired, info = alignment.repair(
      params,
      params,
      params,
      alignment.flax_activations(model, **options),
      x,
      t=0.3,
    )
    chex.assert_trees_all_close(repaired, params, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(info.std_ratio_before, 1, rtol=1e-6)

  def test_layers_that_are_named(self):
    x = _draw((50, 5))
    start, end = (_filled(_MLP, x, seed) for seed in (1, 2))
    merged = tree.lerp(start, end, 0.5)
    repaired, info = alignment.repair(
      merged,
      start,
      end,
      alignment.flax_activations(_MLP),
      x,
      layers=["Dense_1", "Dense_2"],
    )
    self.assertEqual(info.layers, ("Dense_1", "Dense_2"))
    for layer in ("Dense_0", "Dense_3"):
      chex.assert_trees_all_equal(repaired[layer], merged[layer])

  def test_order_of_a_jitted_function(self):
    """Dictionaries that come out of jit are sorted: Dense_10 before Dense_2."""
    model = models.MLP(features=(5,) * 11, num_classes=2, use_bias=True)
    x = _draw((30, 4))
    start, end = (_filled(model, x, seed) for seed in (1, 2))
    merged = tree.lerp(start, end, 0.5)
    plain = alignment.flax_activations(model)
    jitted = jax.jit(plain)
    want, _ = alignment.repair(merged, start, end, plain, x)
    order = tuple(f"Dense_{i}" for i in range(11))
    for activations_fn in (jitted, jax.jit(lambda p, b: jitted(p, b))):
      repaired, info = alignment.repair(merged, start, end, activations_fn, x)
      self.assertEqual(info.layers, order)
      chex.assert_trees_all_close(repaired, want, rtol=1e-4, atol=1e-4)
    # The order that is given is the order of the repair; a wrong one is seen.
    with self.assertWarnsRegex(RuntimeWarning, r"give it in layers=\[...\]"):
      _, info = alignment.repair(
        merged, start, end, plain, x, layers=order[::-1]
      )
    self.assertEqual(info.layers, order[::-1])

  def test_scale_only(self):
    model = models.MLP(features=(8, 7), num_classes=3)
    x = _draw((50, 5))
    start, end = (_filled(model, x, seed) for seed in (1, 2))
    merged = tree.lerp(start, end, 0.5)
    activations_fn = alignment.flax_activations(model)
    with self.assertRaisesRegex(ValueError, "no leaf 'Dense_0/bias'"):
      alignment.repair(merged, start, end, activations_fn, x)
    repaired, _ = alignment.repair(
      merged, start, end, activations_fn, x, scale_only=True
    )
    one, two, found = (
      _moments(activations_fn(params, x)) for params in (start, end, repaired)
    )
    for layer in ("Dense_0", "Dense_1"):
      np.testing.assert_allclose(
        found[layer][1], (one[layer][1] + two[layer][1]) / 2, rtol=1e-4
      )

  def test_constant_channel(self):
    """A neuron that is constant in the merged network keeps finite leaves."""

    def activations_fn(params, batch):
      return {"a": batch @ params["a"]["kernel"] + params["a"]["bias"][None]}

    def layer(kernel):
      return {"a": {"kernel": jnp.array([[kernel]]), "bias": jnp.zeros(1)}}

    repaired, info = alignment.repair(
      layer(0.0), layer(1.0), layer(-1.0), activations_fn, _draw((9, 1))
    )
    self.assertTrue(np.isfinite(repaired["a"]["kernel"]).all())
    np.testing.assert_allclose(info.std_ratio_after, [0])
    self.assertGreaterEqual(float(info.error_after[0]), 1)

  def test_channel_that_is_constant_up_to_rounding(self):
    def activations_fn(params, batch):
      return {"a": batch @ params["a"]["kernel"] + params["a"]["bias"][None]}

    def layer(kernel):
      return {
        "a": {"kernel": jnp.array([[kernel]]), "bias": jnp.full(1, 100.0)}
      }

    repaired, _ = alignment.repair(
      layer(1e-5), layer(1.0), layer(-1.0), activations_fn, _draw((9, 1))
    )
    np.testing.assert_allclose(repaired["a"]["kernel"], [[1e-5]])


class ErrorsTest(parameterized.TestCase):
  def _repair(self, activations_fn=None, data=None, **options):
    x = _draw((6, 5)) if data is None else data
    params = _filled(_MLP, _draw((6, 5)), 1)
    alignment.repair(
      params,
      params,
      params,
      activations_fn or alignment.flax_activations(_MLP),
      x,
      **options,
    )

  @parameterized.parameters(
    ({"t": np.ones(2)}, "t must be a scalar"),
    ({"t": 7.0}, r"t must lie in \[0, 1\]; got 7.0"),
    ({"t": np.float32("nan")}, r"t must lie in \[0, 1\]"),
    ({"batch_size": 0}, "batch_size must be at least 1"),
    ({"layers": ["Dense_9"]}, "layer 'Dense_9' is not among"),
    ({"layers": []}, "no layer to repair"),
    ({"layers": ["Dense_1", "Dense_1"]}, "names a layer twice"),
    (
      {"data": np.full((6, 5), np.nan, np.float32)},
      "data has entries that are NaN or infinite",
    ),
    ({"data": np.zeros((0, 5), np.float32)}, "at least one"),
    (
      {"activations_fn": lambda p, b: {"x": b}},
      "neither a leaf 'x/kernel' nor 'x/scale'",
    ),
    (
      {"activations_fn": lambda p, b: {"Dense_0": b}},
      r"leaf 'Dense_0/kernel' of shape \(5, 8\) does not fit",
    ),
  )
  def test_message(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      self._repair(**options)

  def test_parameters_that_are_not_finite(self):
    good = _filled(_MLP, _draw((6, 5)), 1)
    bad = {
      **good,
      "Dense_1": jax.tree.map(lambda x: x * np.nan, good["Dense_1"]),
    }
    fn = alignment.flax_activations(_MLP)
    for networks, who in (
      ((bad, good, good), "the merged network"),
      ((good, bad, good), "start"),
      ((good, good, bad), "end"),
    ):
      with self.assertRaisesRegex(
        ValueError, f"leaf 'Dense_1/bias' of {who} has entries that are NaN"
      ):
        alignment.repair(*networks, fn, _draw((6, 5)))

  def test_networks_that_differ(self):
    one = {"a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    other = {"a": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    with self.assertRaisesRegex(tree.TreeMismatchError, "in start but"):
      alignment.repair(one, one, other, lambda p, b: {"a": b}, jnp.ones((2, 2)))


class FlaxActivationsTest(parameterized.TestCase):
  def test_values_and_order(self):
    """Ten and more layers, whose names do not sort as they are computed."""
    model = models.MLP(features=(3,) * 11, num_classes=2)
    x = _draw((4, 3))
    params = _filled(model, x, 1)
    found = alignment.flax_activations(model, with_output=True)(params, x)
    self.assertEqual(list(found), [f"Dense_{i}" for i in range(12)])
    hidden = x
    for name, value in found.items():
      hidden = hidden @ params[name]["kernel"]
      np.testing.assert_allclose(value, hidden, rtol=1e-4, atol=1e-5)
      hidden = np.maximum(hidden, 0)
    hidden_only = alignment.flax_activations(model)(params, x)
    self.assertEqual(list(hidden_only), list(found)[:-1])
    some = alignment.flax_activations(model, layers=["Dense_10", "Dense_2"])
    self.assertEqual(list(some(params, x)), ["Dense_2", "Dense_10"])
    with self.assertRaisesRegex(ValueError, "'Conv_0' is not among"):
      alignment.flax_activations(model, layers=["Conv_0"])(params, x)

  def test_names_are_those_of_the_leaves(self):
    model = models.ResNet(depth=8, width=2, num_classes=3)
    x = jnp.ones((2, 4, 4, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    for params in (variables, variables["params"]):
      activations_fn = alignment.flax_activations(
        model,
        inputs=lambda batch: batch["image"],
        train=True,
        mutable="batch_stats",
      )
      found = jax.eval_shape(activations_fn, params, {"image": x})
      names = tree.leaf_names(params)
      kernels = {n.removesuffix("/kernel") for n in names if "kernel" in n}
      self.assertEqual(
        kernels - set(found),
        {n for n in kernels if n.endswith("Dense_0")},
      )
      self.assertLess(set(found), kernels)

  def test_errors(self):
    class Twice(nn.Module):
      @nn.compact
      def __call__(self, x):
        layer = nn.Dense(x.shape[-1])
        return layer(layer(x))

    x = jnp.ones((2, 3))
    params = Twice().init(jax.random.key(0), x)["params"]
    with self.assertRaisesRegex(ValueError, "'Dense_0' is called more than"):
      alignment.flax_activations(Twice())(params, x)
    with self.assertRaisesRegex(ValueError, "no layer of the kinds Conv"):
      alignment.flax_activations(Twice(), kinds=[nn.Conv])(params, x)


if __name__ == "__main__":
  absltest.main()
