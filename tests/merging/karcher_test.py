"""Tests of the Karcher mean."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import merging, tree


def make(seed, dtype=jnp.float32, spread=1.0, special=False):
  """Random parameters; those of special shapes take long to compile."""
  rng, common = np.random.default_rng(seed), np.random.default_rng(99)

  def leaf(*shape):
    value = common.normal(size=shape) + spread * rng.normal(size=shape)
    return jnp.asarray(value, dtype)

  params = {"kernel": leaf(6, 5), "bias": leaf(5), "steps": jnp.asarray(seed)}
  if special:
    params |= {
      "scalar": jnp.abs(leaf()),
      "one": [jnp.abs(leaf(1)), None],
      "zeros": jnp.zeros((6, 5), dtype),
      "empty": jnp.zeros((0, 2), dtype),
    }
  return params


def unit(x):
  x = np.asarray(x).astype(np.float64).ravel()
  return x / np.linalg.norm(x)


def log(u, v):
  """The inverse exponential map of the sphere, by its definition."""
  angle = np.arccos(np.clip(u @ v, -1, 1))
  across = v - (u @ v) * u
  size = np.linalg.norm(across)
  return across * (angle / size if size > 1e-12 else 1)


def mean(vectors, weights):
  """The mean of unit vectors by many small steps."""
  u = unit(sum(w * v for w, v in zip(weights, vectors, strict=True)))
  for _ in range(2000):
    step = sum(w * log(u, v) for w, v in zip(weights, vectors, strict=True))
    u = unit(u + 0.3 * step)
  return u


class KarcherTest(parameterized.TestCase):
  @parameterized.parameters(
    ("float32", None),
    ("float32", (1.0, 2.0, 0.5, 0.0)),
    ("bfloat16", (1.0, 2.0, 0.5, 0.0)),
  )
  def test_first_order_condition_and_length(self, dtype, weights):
    models = [make(seed, dtype) for seed in range(4)]
    copies = jax.tree.map(lambda x: x, models)
    got = merging.karcher_mean(models, weights)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, models[0])
    chex.assert_trees_all_equal(models, copies)
    w = np.asarray(weights or np.ones(4)) / np.sum(weights or np.ones(4))
    tolerance = max(2e-5, 2 * float(jnp.finfo(dtype).eps))
    for name in ("kernel", "bias"):
      units = [unit(params[name]) for params in models]
      u = unit(got[name])
      tangent = sum(x * log(u, v) for x, v in zip(w, units, strict=True))
      self.assertLess(np.linalg.norm(tangent), tolerance, name)
      lengths = [np.linalg.norm(params[name]) for params in models]
      np.testing.assert_allclose(
        np.linalg.norm(got[name]), w @ lengths, rtol=tolerance
      )

  def test_special_leaves(self):
    models = [make(seed, special=True) for seed in range(4)]
    got = merging.karcher_mean(models)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, models[0])
    for find in (lambda x: x["scalar"], lambda x: x["one"][0]):
      want = np.mean([np.asarray(find(params)) for params in models], axis=0)
      np.testing.assert_allclose(find(got), want, rtol=1e-6)
    self.assertFalse(np.any(got["zeros"]))
    np.testing.assert_array_equal(got["steps"], 0)
    got = merging.karcher_mean([models[0]] * 4)
    chex.assert_trees_all_close(got, models[0], rtol=1e-6)

  @parameterized.parameters(0.01, 0.3, 1.5)
  def test_against_many_small_steps(self, spread):
    models = [{"w": make(seed, spread=spread)["kernel"]} for seed in range(4)]
    w = np.arange(1, 5) / 10
    got = merging.karcher_mean(models, w, max_iter=40, tol=1e-6)
    want = mean([unit(params["w"]) for params in models], w)
    np.testing.assert_allclose(unit(got["w"]), want, atol=3e-6)

  @parameterized.parameters(0.2, 0.5)
  def test_two_models_are_slerp(self, t):
    rng = np.random.default_rng(0)
    pair = rng.normal(size=(2, 9))
    pair /= np.linalg.norm(pair, axis=1, keepdims=True)
    models = [{"w": jnp.asarray(x, jnp.float32)} for x in pair]
    got = merging.karcher_mean(models, [1 - t, t], max_iter=40, tol=1e-6)
    want = merging.slerp(models, t, threshold=1)
    np.testing.assert_allclose(got["w"], want["w"], atol=3e-6)

  @parameterized.parameters(("float32", 1e-6), ("bfloat16", 1e-2))
  def test_equal_models_are_a_fixed_point(self, dtype, tolerance):
    model = {"w": make(1, dtype)["bias"]}
    for count in (1, 4):
      got = merging.karcher_mean([model] * count)
      chex.assert_trees_all_close(got, model, rtol=tolerance)

  def test_order_is_of_no_account(self):
    models = [make(seed) for seed in range(4)]
    chex.assert_trees_all_close(
      merging.karcher_mean(models)["kernel"],
      merging.karcher_mean(models[::-1])["kernel"],
      atol=1e-5,
    )

  def test_zero_counts_in_the_length_only(self):
    model = {"w": jnp.asarray([3.0, 4.0])}
    zero = {"w": jnp.zeros(2)}
    for models in ([model, zero], [zero, model]):
      got = merging.karcher_mean(models)["w"]
      np.testing.assert_allclose(got, [1.5, 2.0], rtol=1e-6)

  def test_complex_is_the_vector_of_its_parts(self):
    rng = np.random.default_rng(0)
    parts = rng.normal(size=(3, 2, 4)).astype(np.float32) + 1
    whole = merging.karcher_mean([{"w": jnp.asarray(x)} for x in parts])["w"]
    got = merging.karcher_mean(
      [{"w": jnp.asarray(x[0] + 1j * x[1])} for x in parts]
    )["w"]
    np.testing.assert_allclose(
      np.stack([got.real, got.imag]), whole, rtol=1e-5, atol=1e-6
    )

  def test_info(self):
    models = [make(seed) for seed in range(4)]
    for params in models:
      params["zeros"] = jnp.zeros_like(params["bias"])
      params["empty"] = jnp.zeros((0, 2))
    info = merging.karcher_info(models)
    names = {"kernel", "bias", "zeros", "empty"}
    for column in info:
      self.assertEqual(set(column), names)
    for name in names:
      self.assertTrue(info.converged[name], name)
      self.assertLess(info.residual[name], 1e-5)
    self.assertGreater(info.iterations["kernel"], 0)
    self.assertLess(info.iterations["kernel"], 10)
    self.assertEqual(info.iterations["zeros"], 0)
    self.assertEqual(info.iterations["kernel"].dtype, jnp.int32)
    # As told by the definition.
    options = {"max_iter": 1, "tol": 1e-6, "select": "kernel"}
    short = merging.karcher_info(models, **options)
    self.assertFalse(short.converged["kernel"])
    self.assertEqual(short.iterations["kernel"], 1)
    u = unit(merging.karcher_mean(models, **options)["kernel"])
    units = [unit(params["kernel"]) for params in models]
    want = np.linalg.norm(sum(log(u, v) for v in units) / 4)
    np.testing.assert_allclose(short.residual["kernel"], want, rtol=1e-2)

  def test_opposite_models_do_not_converge(self):
    models = [{"w": jnp.asarray([1.0, 2.0])}, {"w": jnp.asarray([-1.0, -2.0])}]
    got = merging.karcher_mean(models)
    chex.assert_tree_all_finite(got)
    info = merging.karcher_info(models)
    self.assertFalse(info.converged["w"])
    np.testing.assert_allclose(info.residual["w"], np.pi / 2, rtol=1e-6)

  def test_streamed_is_the_list(self):
    models = [make(seed) for seed in range(4)]
    method = merging.karcher_mean_method()
    state = method.init(models[0])
    weights = (1.0, 2.0, 3.0, 1.0)
    for params, weight in zip(models, weights, strict=True):
      state = method.update(state, params, weight)
    want = merging.karcher_mean(models, weights)
    chex.assert_trees_all_equal(method.finalize(state), want)

  def test_jit_and_map(self):
    models = [{"w": make(seed)["kernel"]} for seed in range(4)]

    def merge(weights):
      return merging.karcher_mean(models, weights)["w"]

    weights = jnp.asarray([[1.0, 1.0, 1.0, 1.0], [3.0, 1.0, 0.0, 1.0]])
    got = jax.jit(jax.vmap(merge))(weights)
    np.testing.assert_allclose(
      got, [merge(row) for row in weights], rtol=1e-5, atol=1e-5
    )

  def test_nearly_equal_models_have_no_residual(self):
    models = [{"w": make(seed, spread=1e-3)["kernel"]} for seed in range(4)]
    info = merging.karcher_info(models, tol=1e-6)
    self.assertTrue(info.converged["w"])


class GradientTest(parameterized.TestCase):
  def test_of_weights_against_differences(self):
    models = [{"w": make(seed)["kernel"]} for seed in range(4)]

    def value(weights):
      merged = merging.karcher_mean(models, weights, max_iter=40, tol=1e-6)
      return jnp.sum(merged["w"] ** 3)

    weights = jnp.asarray([0.4, 0.6, 0.3, 0.2])
    got = jax.jit(jax.grad(value))(weights)
    step = 2e-2
    want = [
      (value(weights + d) - value(weights - d)) / (2 * step)
      for d in step * jnp.eye(4)
    ]
    np.testing.assert_allclose(got, want, rtol=2e-2, atol=1e-2)
    _, forward = jax.jvp(value, (weights,), (jnp.ones(4),))
    np.testing.assert_allclose(forward, got.sum(), rtol=1e-3, atol=1e-3)

  def test_of_models_against_slerp(self):
    """The mean of two is slerp, whose gradient has a closed form."""
    rng = np.random.default_rng(3)
    pair = jnp.asarray(rng.normal(size=(2, 7)), jnp.float32)
    target = jnp.asarray(rng.normal(size=7), jnp.float32)

    def normal(x):
      return x / jnp.sqrt(jnp.sum(x**2))

    def by_mean(pair):
      models = [{"w": normal(x)} for x in pair]
      merged = merging.karcher_mean(models, [2, 1], max_iter=40, tol=1e-7)
      return merged["w"] @ target

    def by_slerp(pair):
      models = [{"w": normal(x)} for x in pair]
      return merging.slerp(models, 1 / 3, threshold=1)["w"] @ target

    np.testing.assert_allclose(
      jax.jit(jax.grad(by_mean))(pair),
      jax.jit(jax.grad(by_slerp))(pair),
      rtol=1e-4,
      atol=1e-5,
    )

  def test_finite_where_the_mean_is_not_smooth(self):
    first = {
      "same": jnp.asarray([1.0, 2.0]),
      "opposite": jnp.asarray([1.0, 2.0]),
      "zeros": jnp.zeros(2),
      "half": jnp.zeros(2),
    }
    second = {**first, "opposite": -first["same"], "half": first["same"]}

    def total(models, weights):
      merged = jax.tree.leaves(merging.karcher_mean(models, weights))
      return sum(jnp.sum(leaf * (1 + leaf)) for leaf in merged)

    gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
    gradients = gradient([first, second], jnp.ones(2))
    chex.assert_tree_all_finite(gradients)


class BadInputTest(parameterized.TestCase):
  @parameterized.parameters(
    ({"max_iter": 0}, "max_iter must be an int of at least 1; got 0"),
    ({"max_iter": 2.0}, "max_iter must be an int"),
    ({"tol": 0.0}, "tol must lie in"),
    ({"tol": np.nan}, "tol must lie in"),
    ({"weights": [1, -0.5]}, r"weights are \[1.0, -0.5\] for leaf 'bias'"),
    ({"weights": [0, 0]}, "weights sum to 0 for leaf 'bias'"),
    ({"weights": [1]}, "got 1 weights for 2 models"),
    ({"select": "nothing"}, "no leaf name matches"),
  )
  def test_options(self, options, message):
    for fn in (merging.karcher_mean, merging.karcher_info):
      with self.assertRaisesRegex(ValueError, message):
        fn([make(1)] * 2, **options)

  def test_models(self):
    model = make(1)
    with self.assertRaisesRegex(ValueError, "models is empty"):
      merging.karcher_mean([])
    with self.assertRaisesRegex(tree.TreeMismatchError, "'bias'.*model 1"):
      merging.karcher_mean([model, {**model, "bias": jnp.ones(3)}])
    with self.assertRaisesRegex(ValueError, "'bias' of model 1 holds NaN"):
      merging.karcher_mean([model, {**model, "bias": jnp.full(5, jnp.inf)}])


if __name__ == "__main__":
  absltest.main()
