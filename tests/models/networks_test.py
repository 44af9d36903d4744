"""Tests of the convolutional networks and the vision transformer."""

from __future__ import annotations

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import models, tree

_NORMS = ("batch", "group", "layer", "none")


def _draw(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _shapes(model, shape):
  return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))


def _filled(model, shape):
  """Variables drawn by NumPy: nothing to compile."""
  return jax.tree.map(
    lambda leaf: 0.3 + 0.2 * _draw(leaf.shape), _shapes(model, shape)
  )


def _small(kind, **options):
  return {
    "cnn": lambda: models.CNN(widths=(4, 8), num_groups=2, **options),
    "vgg": lambda: models.VGG(
      plan=(4, "M", 8), hidden=(6,), num_groups=2, **options
    ),
    "resnet": lambda: models.ResNet(depth=8, width=4, num_groups=2, **options),
  }[kind]()


class BatchNormTest(parameterized.TestCase):
  def _variables(self, channels):
    draw = np.random.default_rng(0).uniform(0.5, 2, (4, channels))
    scale, bias, mean, var = draw.astype(np.float32)
    return {
      "params": {"scale": scale, "bias": bias},
      "batch_stats": {"mean": mean, "var": var},
    }

  @parameterized.parameters((jnp.float32, 1e-5), (jnp.bfloat16, 1e-2))
  def test_equals_flax(self, dtype, tolerance):
    variables = self._variables(3)
    x = jnp.asarray(2 * _draw((4, 5, 5, 3)) + 1).astype(dtype)
    ours = models.BatchNorm()
    flax = nn.BatchNorm(momentum=0.9, epsilon=1e-5, dtype=jnp.float32)
    chex.assert_trees_all_equal_shapes_and_dtypes(
      ours.init(jax.random.key(0), x),
      nn.BatchNorm(use_running_average=False).init(
        jax.random.key(0), x.astype(jnp.float32)
      ),
    )
    y, state = ours.apply(variables, x, train=True, mutable="batch_stats")
    # Flax does not promote half types in strict mode.
    wide = x.astype(jnp.float32)
    want, want_state = flax.apply(
      variables, wide, use_running_average=False, mutable="batch_stats"
    )
    self.assertEqual(y.dtype, dtype)
    np.testing.assert_allclose(
      y.astype(jnp.float32), want, rtol=tolerance, atol=tolerance
    )
    chex.assert_trees_all_close(state, want_state, rtol=1e-5)
    np.testing.assert_allclose(
      ours.apply(variables, wide),
      flax.apply(variables, wide, use_running_average=True),
      rtol=1e-5,
      atol=1e-5,
    )

  def test_mask_over_devices(self):
    """8 examples on 4 devices, the last 3 left out: one device all alone."""
    variables = self._variables(3)
    x, mask = _draw((8, 2, 2, 3)), np.arange(8) < 5
    x[5:] += 100
    real = np.float64(x[:5])
    mean, var = real.mean((0, 1, 2)), real.var((0, 1, 2))
    params, stats = variables["params"], variables["batch_stats"]
    want = (real - mean) / np.sqrt(var + 1e-5) * params["scale"]
    want = want + params["bias"]

    def apply(x, mask):
      return models.BatchNorm("devices").apply(
        variables, x, train=True, mask=mask, mutable="batch_stats"
      )

    y, state = jax.pmap(apply, axis_name="devices")(
      x.reshape(4, 2, 2, 2, 3), mask.reshape(4, 2)
    )
    np.testing.assert_allclose(
      y.reshape(x.shape)[:5], want, rtol=1e-4, atol=1e-4
    )
    new = state["batch_stats"]
    for device in range(4):
      for name, value in (("mean", mean), ("var", var)):
        np.testing.assert_allclose(
          new[name][device],
          0.9 * stats[name] + 0.1 * value,
          rtol=1e-5,
          atol=1e-5,
        )


class ConvolutionalTest(parameterized.TestCase):
  @parameterized.product(kind=("cnn", "vgg", "resnet"), norm=_NORMS)
  def test_variables(self, kind, norm):
    variables = _shapes(_small(kind, norm=norm), (8, 8, 3))
    names = tree.leaf_names(variables["params"])
    self.assertEqual(
      norm != "none", any("Norm" in name for name in names), names
    )
    # A bias before a normalisation would be a parameter without effect.
    biases = {
      name.removesuffix("bias") for name in names if name.endswith("/bias")
    }
    for name in names:
      layer = name.rpartition("/")[0]
      if "Conv" in layer.split("/")[-1] or "Shortcut" in layer:
        self.assertEqual(f"{layer}/" in biases, norm == "none", layer)
    self.assertEqual("batch_stats" in variables, norm == "batch")
    if norm == "batch":
      self.assertEqual(
        {name.split("/")[-1] for name in tree.leaf_names(variables)},
        {"kernel", "bias", "scale", "mean", "var"},
      )

  def test_only_training_changes_statistics(self):
    model = _small("resnet")
    x = _draw((4, 8, 8, 3))
    variables = _filled(model, (8, 8, 3))
    apply = functools.partial(model.apply, mutable="batch_stats")
    y, state = jax.jit(apply)(variables, x)
    chex.assert_shape(y, (4, 10))
    chex.assert_trees_all_equal(state["batch_stats"], variables["batch_stats"])
    _, state = jax.jit(functools.partial(apply, train=True))(variables, x)
    changed = jax.tree.map(
      lambda new, old: not np.allclose(new, old),
      state["batch_stats"],
      variables["batch_stats"],
    )
    self.assertTrue(all(jax.tree.leaves(changed)), changed)

  def test_mask_leaves_examples_out(self):
    """The logits of the others do not feel an example that is masked."""
    model = _small("resnet")
    x = _draw((4, 8, 8, 3))
    variables = _filled(model, (8, 8, 3))
    apply = jax.jit(
      lambda x: model.apply(
        variables,
        x,
        train=True,
        mask=jnp.array([1.0, 1, 1, 0]),
        mutable="batch_stats",
      )
    )
    y, state = apply(x)
    other = x.copy()
    other[3] += 10
    y2, state2 = apply(other)
    np.testing.assert_allclose(y2[:3], y[:3], rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(state2, state, rtol=1e-5)
    self.assertFalse(np.allclose(y2[3], y[3]))

  def test_cnn_matches_scipy(self):
    """One stage without normalisation, and the flattened head."""
    import scipy.signal

    model = models.CNN(widths=(3,), num_classes=2, norm="none", head="flatten")
    x = _draw((2, 6, 4, 2))
    params = jax.tree.map(
      lambda leaf: _draw(leaf.shape, 1), _shapes(model, (6, 4, 2))["params"]
    )
    kernel = params["Conv_0"]["kernel"]
    hidden = np.zeros((2, 6, 4, 3))
    for example, out, channel in np.ndindex(2, 3, 2):
      hidden[example, ..., out] += scipy.signal.correlate2d(
        np.float64(x[example, ..., channel]), kernel[:, :, channel, out], "same"
      )
    hidden = np.maximum(hidden + params["Conv_0"]["bias"], 0)
    hidden = hidden.reshape(2, 3, 2, 2, 2, 3).max((2, 4)).reshape(2, -1)
    want = hidden @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    np.testing.assert_allclose(
      model.apply({"params": params}, x), want, rtol=1e-4, atol=1e-4
    )

  def test_resnet20_size(self):
    """Convolutions, shortcuts, two values a normalised channel, the head."""
    convolutions = 9 * 3 * 16 + 9 * (
      6 * 16 * 16 + 16 * 32 + 5 * 32 * 32 + 32 * 64 + 5 * 64 * 64
    )
    shortcuts = 16 * 32 + 32 * 64
    channels = 7 * 16 + 7 * 32 + 7 * 64
    want = convolutions + shortcuts + 2 * channels + 64 * 10 + 10
    params = _shapes(models.get("resnet20"), (32, 32, 3))["params"]
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    self.assertEqual(sum(sizes), want)
    kernels = [n for n in tree.leaf_names(params) if n.endswith("kernel")]
    self.assertLen(kernels, 20 + 2)

  def test_resnet_shrinks_twice(self):
    model = models.ResNet(depth=8, width=2, norm="none")
    _, captured = jax.eval_shape(
      lambda key, x: model.init_with_output(key, x, capture_intermediates=True),
      jax.random.key(0),
      jnp.zeros((1, 16, 16, 3)),
    )
    blocks = captured["intermediates"]
    self.assertEqual(
      [blocks[f"Block_{i}"]["__call__"][0].shape for i in range(3)],
      [(1, 16, 16, 2), (1, 8, 8, 4), (1, 4, 4, 8)],
    )

  def test_vgg11_has_eleven_layers_less_two(self):
    """VGG-11 for small images has one dense layer in place of three."""
    params = _shapes(models.get("vgg11"), (32, 32, 3))["params"]
    kernels = [n for n in tree.leaf_names(params) if n.endswith("kernel")]
    self.assertLen(kernels, 11 - 2)

  @parameterized.parameters(
    (lambda: models.CNN(widths=()), "widths and num_classes"),
    (lambda: models.CNN(norm="instance"), "choose one of batch, group"),
    (lambda: models.CNN(head="sum"), "choose one of pool, flatten"),
    (lambda: models.CNN(widths=(4, 6), norm="group", num_groups=4), "its 6"),
    (lambda: models.VGG(plan=("M",)), "positive numbers of channels"),
    (lambda: models.VGG(plan=(4, "P")), "positive numbers of channels"),
    (lambda: models.VGG(hidden=(0,)), "hidden widths"),
    (lambda: models.ResNet(depth=19), r"6n \+ 2"),
    (lambda: models.ResNet(width=0), "width and num_classes"),
    (lambda: models.ViT(dim=10, heads=3), "does not divide dim=10"),
    (lambda: models.ViT(depth=0), "positive"),
    (lambda: models.ViT(pool="max"), "choose one of mean, class"),
  )
  def test_bad_attributes(self, build, message):
    with self.assertRaisesRegex(ValueError, message):
      build()

  @parameterized.parameters(
    (models.CNN(widths=(4,)), (5, 5), "takes images of shape"),
    (models.VGG(plan=(4, "M", "M")), (2, 2, 1), "fewer pools"),
    (models.ViT(patch=4, dim=4, heads=1), (6, 8, 1), "do not divide images"),
  )
  def test_bad_images(self, model, shape, message):
    with self.assertRaisesRegex(ValueError, message):
      _shapes(model, shape)


class ViTTest(parameterized.TestCase):
  @parameterized.parameters("mean", "class")
  def test_names_and_shapes(self, pool):
    model = models.ViT(patch=4, dim=8, depth=2, heads=2, mlp_dim=6, pool=pool)
    params = _shapes(model, (8, 8, 3))["params"]
    shapes = jax.tree.map(lambda leaf: leaf.shape, params)
    tokens = 4 + (pool == "class")
    self.assertEqual(shapes["positions"], (1, tokens, 8))
    self.assertEqual("class_token" in shapes, pool == "class")
    block = shapes["Block_1"]
    for name in ("query", "key", "value"):
      self.assertEqual(block["Attention"][name]["kernel"], (8, 2, 4))
    self.assertEqual(block["Attention"]["out"]["kernel"], (2, 4, 8))
    self.assertEqual(block["Dense_0"]["kernel"], (8, 6))
    self.assertEqual(block["Dense_1"]["kernel"], (6, 8))

  def test_positions_matter(self):
    """Without positions, attention and the mean do not see the order."""
    model = models.ViT(patch=4, dim=8, depth=1, heads=2, num_classes=3)
    x = _draw((2, 4, 8, 1))
    flipped = np.concatenate([x[:, :, 4:], x[:, :, :4]], axis=2)
    params = _filled(model, (4, 8, 1))["params"]
    params["positions"] = _draw((1, 2, 8))
    apply = jax.jit(lambda params, x: model.apply({"params": params}, x))
    self.assertFalse(np.allclose(apply(params, x), apply(params, flipped)))
    params["positions"] = jnp.zeros((1, 2, 8))
    np.testing.assert_allclose(
      apply(params, x), apply(params, flipped), rtol=1e-4, atol=1e-5
    )

  def test_tiny(self):
    params = _shapes(models.get("vit-tiny"), (32, 32, 3))["params"]
    self.assertEqual(params["Block_11"]["Dense_0"]["kernel"].shape, (192, 768))


if __name__ == "__main__":
  absltest.main()
