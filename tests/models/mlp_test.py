"""Tests of the fully connected networks."""

from __future__ import annotations

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import models


def _num_params(params) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def _init(model, shape):
  return model.init(jax.random.key(0), jnp.zeros((1, *shape)))["params"]


class MLPTest(parameterized.TestCase):
  @parameterized.product(
    shape=((28, 28, 1), (32, 32, 3), (64,)), use_bias=(False, True)
  )
  def test_names_and_shapes(self, shape, use_bias):
    model = models.MLP(features=(7, 5), num_classes=3, use_bias=use_bias)
    widths = (int(np.prod(shape)), 7, 5, 3)
    expected = {}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
      expected[f"Dense_{i}"] = {"kernel": (fan_in, fan_out)}
      if use_bias:
        expected[f"Dense_{i}"]["bias"] = (fan_out,)
    params = _init(model, shape)
    self.assertEqual(jax.tree.map(jnp.shape, params), expected)
    logits = model.apply({"params": params}, jnp.ones((4, *shape)))
    chex.assert_shape(logits, (4, 3))
    chex.assert_type(logits, jnp.float32)

  @parameterized.product(
    features=((6, 4), (5,), ()),
    use_bias=(False, True),
    kernel_init=("lecun_normal", "he_normal", "torch"),
  )
  def test_function_matches_numpy(self, features, use_bias, kernel_init):
    model = models.MLP(
      features=features,
      num_classes=3,
      use_bias=use_bias,
      kernel_init=kernel_init,
    )
    params = _init(model, (2, 4))
    # Biases that start at zero would hide a missing one.
    rng = np.random.default_rng(0)
    params = jax.tree.map(
      lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params
    )
    x = rng.normal(size=(5, 2, 4)).astype(np.float32)
    hidden = x.reshape(5, 8).astype(np.float64)
    for i in range(len(features) + 1):
      layer = params[f"Dense_{i}"]
      hidden = hidden @ np.asarray(layer["kernel"], np.float64)
      if use_bias:
        hidden = hidden + np.asarray(layer["bias"], np.float64)
      if i < len(features):
        hidden = np.maximum(hidden, 0.0)
    for apply in (model.apply, jax.jit(model.apply)):
      np.testing.assert_allclose(
        apply({"params": params}, jnp.asarray(x)), hidden, rtol=1e-5, atol=1e-5
      )

  def test_torch_init_fills_its_bounds(self):
    model = models.MLP(features=(400, 300), use_bias=True, kernel_init="torch")
    params = _init(model, (100,))
    for name, fan_in in (("Dense_0", 100), ("Dense_1", 400), ("Dense_2", 300)):
      bound = 1 / np.sqrt(fan_in)
      for leaf in params[name].values():
        self.assertLessEqual(float(jnp.abs(leaf).max()), bound * (1 + 1e-6))
      kernel = np.asarray(params[name]["kernel"], np.float64)
      self.assertGreater(kernel.max(), 0.98 * bound)
      self.assertLess(kernel.min(), -0.98 * bound)
      # Five standard errors of the mean and of the mean square.
      n = kernel.size
      self.assertLess(abs(kernel.mean()), 5 * bound / np.sqrt(3 * n))
      self.assertLess(
        abs((kernel**2).mean() - bound**2 / 3),
        5 * bound**2 * np.sqrt(4 / 45 / n),
      )
    self.assertGreater(float(jnp.abs(params["Dense_0"]["bias"]).max()), 0.05)

  @parameterized.parameters(("lecun_normal", 1.0), ("he_normal", 2.0))
  def test_normal_init_variance(self, kernel_init, gain):
    model = models.MLP(features=(500,), use_bias=True, kernel_init=kernel_init)
    params = _init(model, (200,))
    kernel = np.asarray(params["Dense_0"]["kernel"], np.float64)
    np.testing.assert_allclose(kernel.var(), gain / 200, rtol=0.03)
    chex.assert_trees_all_equal(params["Dense_0"]["bias"], jnp.zeros(500))

  @parameterized.parameters(
    ({"features": (4, 0)}, "positive widths"),
    ({"features": (4,), "num_classes": 0}, "num_classes must be positive"),
    ({"features": (4,), "kernel_init": "glorot"}, "choose one of he_normal"),
  )
  def test_bad_attributes(self, attributes, message):
    with self.assertRaisesRegex(ValueError, message):
      models.MLP(**attributes)


class RegistryTest(parameterized.TestCase):
  @parameterized.parameters(
    ("mlpnet", (400, 200, 100)),
    ("mlplarge", (800, 400, 200)),
    ("mlphuge", (1024, 512, 256)),
  )
  def test_parameter_counts(self, name, features):
    for size in (784, 3072):
      widths = (size, *features, 10)
      kernels = sum(a * b for a, b in itertools.pairwise(widths))
      biases = sum(widths[1:])
      for use_bias in (False, True):
        model = models.get(name, use_bias=use_bias)
        shapes = jax.eval_shape(
          model.init, jax.random.key(0), jnp.zeros((1, size))
        )
        expected = kernels + biases if use_bias else kernels
        self.assertEqual(_num_params(shapes["params"]), expected)

  def test_options(self):
    model = models.get("mlpnet", num_classes=4, kernel_init="torch")
    self.assertEqual(model.num_classes, 4)
    self.assertEqual(model.kernel_init, "torch")
    self.assertFalse(model.use_bias)

  def test_names(self):
    self.assertEqual(
      models.names(models.MLP), ("mlpnet", "mlplarge", "mlphuge", "mlp512")
    )
    self.assertContainsSubset(
      ("cnn", "vgg11", "resnet20", "vit-tiny"), models.names()
    )

  def test_unknown_name_lists_the_known(self):
    with self.assertRaisesRegex(
      ValueError, "unknown model 'resnet'; choose one of mlpnet, mlplarge"
    ):
      models.get("resnet")


if __name__ == "__main__":
  absltest.main()
