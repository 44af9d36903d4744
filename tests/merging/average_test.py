"""Tests of the averages and of the rules that every method follows."""

from __future__ import annotations

import functools

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

from jaxmerge import merging, tree


def make(seed, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  return {
    "w": jnp.asarray(rng.normal(size=(5, 3)), dtype),
    "scalar": jnp.asarray(rng.normal(), dtype),
    "one": [jnp.asarray(rng.normal(size=1), dtype), None],
    "empty": jnp.zeros((0, 2), dtype),
    "steps": jnp.asarray(seed),
    "mask": jnp.asarray([seed % 2 == 0]),
    "key": jax.random.key(seed),
  }


def expect(models, weights, name):
  weights = np.asarray(weights, np.float64)
  leaves = np.stack([np.asarray(m[name], np.float64) for m in models])
  return np.tensordot(weights / weights.sum(), leaves, 1)


class AverageTest(parameterized.TestCase):
  @parameterized.product(
    dtype=[jnp.float32, jnp.bfloat16, jnp.float16],
    weights=[None, [1, 2, 3], [0.2, 0.0, 0.7], [2.0, -0.5, 1.0]],
    jit=[False, True],
  )
  def test_against_numpy(self, dtype, weights, jit):
    models = [make(seed, dtype) for seed in range(1, 4)]
    copies = jax.tree.map(lambda x: x, models)
    fn = merging.average
    if weights is not None:
      fn = functools.partial(merging.weighted_average, weights=weights)
    got = (jax.jit(fn) if jit else fn)(models)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, models[0])
    tolerance = float(jnp.finfo(dtype).eps)
    for name in ("w", "scalar"):
      np.testing.assert_allclose(
        np.asarray(got[name], np.float64),
        expect(models, weights or [1, 1, 1], name),
        rtol=tolerance,
        atol=1e-6,
      )
    np.testing.assert_array_equal(got["steps"], 1)
    np.testing.assert_array_equal(got["mask"], [False])
    self.assertTrue(got["key"] == models[0]["key"])
    chex.assert_trees_all_equal(models, copies)

  @parameterized.parameters(jnp.bfloat16, jnp.float16)
  def test_a_thousand_equal_half_models_are_exact(self, dtype):
    params = {"w": jnp.asarray([0.1, -3.3, 1e-3, 77.0], dtype)}
    got = merging.average([params] * 1000)
    np.testing.assert_array_equal(got["w"], params["w"])

  @parameterized.parameters(1, 2, 3, 7, 10)
  def test_equal_models_are_a_fixed_point(self, n):
    params = make(3)
    for got in (
      merging.average([params] * n),
      merging.weighted_average([params] * n, np.linspace(0.1, 1, n)),
    ):
      np.testing.assert_allclose(got["w"], params["w"], rtol=1e-6)

  def test_one_model_is_itself(self):
    params = make(3)
    chex.assert_trees_all_equal(merging.average([params]), params)

  def test_numpy_leaves_and_python_scalars(self):
    got = merging.average(
      [
        {"a": np.ones(2, np.float32), "b": 1.0, "n": 3},
        {"a": np.zeros(2), "b": 2.0, "n": 4},
      ]
    )
    np.testing.assert_array_equal(got["a"], [0.5, 0.5])
    self.assertEqual(float(got["b"]), 1.5)
    self.assertEqual(got["n"], 3)

  def test_nnx_state(self):
    a, b = (nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(i))) for i in range(2))
    got = merging.average([a, b])
    self.assertEqual(jax.tree.structure(got), jax.tree.structure(a))
    np.testing.assert_allclose(
      got["kernel"][...], (a["kernel"][...] + b["kernel"][...]) / 2, rtol=1e-6
    )

  def test_equinox_module(self):
    keys = jax.random.split(jax.random.key(0))
    a, b = (eqx.nn.MLP(2, 2, 3, 1, key=key) for key in keys)
    got = merging.average([a, b])
    np.testing.assert_allclose(
      got.layers[0].weight,
      (a.layers[0].weight + b.layers[0].weight) / 2,
      rtol=1e-6,
    )
    self.assertIs(got.activation, a.activation)

  def test_traced_once_with_traced_weights(self):
    models = [make(1), make(2)]
    fn = jax.jit(chex.assert_max_traces(merging.weighted_average, n=1))
    for weights in ([1.0, 3.0], [2.0, 5.0]):
      got = fn(models, jnp.asarray(weights))
      np.testing.assert_allclose(
        got["w"], expect(models, weights, "w"), rtol=1e-5
      )

  def test_vmap_over_seeds(self):
    a, b = {"w": jnp.arange(6.0).reshape(3, 2)}, {"w": jnp.ones((3, 2))}
    got = jax.vmap(lambda a, b: merging.average([a, b]))(a, b)
    np.testing.assert_allclose(got["w"], (a["w"] + b["w"]) / 2)

  def test_sharded_input_stays_sharded(self):
    mesh = jax.make_mesh(
      (len(jax.devices()),), ("x",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    sharding = jax.NamedSharding(mesh, jax.P("x"))
    a = {"w": jax.device_put(jnp.arange(8.0), sharding)}
    for fn in (merging.average, jax.jit(merging.average)):
      got = fn([a, a])
      self.assertTrue(got["w"].sharding.is_equivalent_to(sharding, 1))

  def test_gradient(self):
    b = {"w": jnp.ones(2)}
    grad = jax.grad(
      lambda w: merging.weighted_average([{"w": w}, b], [3, 1])["w"].sum()
    )(jnp.ones(2))
    np.testing.assert_allclose(grad, [0.75, 0.75])


class ErrorTest(parameterized.TestCase):
  @parameterized.parameters(
    (
      {"w": jnp.ones(3)},
      r"'w' has shape \(2,\) in model 0 but \(3,\) in model 1",
    ),
    ({"w": jnp.ones(2, jnp.float16)}, "'w' has dtype float32 in model 0 but"),
    ({"v": jnp.ones(2)}, "'w' is in model 0 but missing from model 1"),
  )
  def test_mismatch(self, other, message):
    params = {"w": jnp.ones(2)}
    with self.assertRaisesRegex(tree.TreeMismatchError, message):
      merging.average([params, other])
    with self.assertRaisesRegex(tree.TreeMismatchError, message):
      merging.weighted_average([params, other], [1, 1])
    method = merging.average_method()
    with self.assertRaises(tree.TreeMismatchError):
      method.update(method.init(params), other)

  @parameterized.parameters([[]], [()])
  def test_no_models(self, models):
    with self.assertRaisesRegex(ValueError, "models is empty"):
      merging.average(models)
    with self.assertRaisesRegex(ValueError, "models is empty"):
      merging.weighted_average(models, [])

  def test_one_tree_instead_of_a_list(self):
    with self.assertRaisesRegex(ValueError, "must be a sequence .* got dict"):
      merging.average({"w": jnp.ones(2)})

  @parameterized.parameters(
    ([1.0], "got 1 weights for 2 models"),
    ([1.0, 2.0, 3.0], "got 3 weights for 2 models"),
    ([1.0, np.nan], "weight 1 is nan for leaf 'w'; values must be"),
    (np.array([np.inf, 1.0]), "weight 0 is inf"),
    ([1.0, -1.0], "weights sum to 0 for leaf 'w' and cannot be"),
    ([0.0, 0.0], "weights sum to 0 for leaf 'w' and cannot be"),
    ([0.1 + 0.2, -0.3], "cannot be normalised"),
    (np.ones((2, 1)), r"weights must have shape \(2,\)"),
    ([np.ones(1), 1.0], "weight 0 must be a scalar for leaf 'w'"),
  )
  def test_weights(self, weights, message):
    params = {"w": jnp.ones(2)}
    with self.assertRaisesRegex(ValueError, message):
      merging.weighted_average([params, params], weights)


class MethodTest(absltest.TestCase):
  def test_streaming_in_a_scan_is_the_average(self):
    method = merging.average_method()
    models = [make(seed) for seed in range(4)]
    expected = merging.average(models)
    state = method.init(models[0])
    update = jax.jit(chex.assert_max_traces(method.update, n=1))
    for params in models:
      state = update(state, params)
    chex.assert_trees_all_close(
      tree.partition(method.finalize(state))[0],
      tree.partition(expected)[0],
      rtol=1e-6,
    )
    floats = [tree.partition(params)[0] for params in models]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *floats)
    state, _ = jax.lax.scan(
      lambda state, params: (method.update(state, params), None),
      method.init(floats[0]),
      stacked,
    )
    chex.assert_trees_all_close(
      method.finalize(state), tree.partition(expected)[0], rtol=1e-6
    )

  def test_merge_after_every_model(self):
    method = merging.average_method()
    state = method.init({"w": jnp.full(2, 9.0)})
    self.assertEqual(float(method.finalize(state)["w"][0]), 9.0)
    for i, expected in enumerate([0.0, 0.5, 1.0]):
      state = method.update(state, {"w": jnp.full(2, float(i))})
      self.assertEqual(float(method.finalize(state)["w"][0]), expected)

  def test_fold_starts_from_the_base(self):
    base = {"w": jnp.full(2, 9.0), "n": jnp.asarray(7)}
    models = [{"w": jnp.full(2, x), "n": jnp.asarray(0)} for x in (1.0, 2.0)]
    got = merging.fold(merging.average_method(), base, models, [1, 3])
    np.testing.assert_allclose(got["w"], [1.75, 1.75])
    self.assertEqual(int(got["n"]), 7)

  def test_weights_of_zero(self):
    got = merging.weighted_average([{"w": 1.0}, {"w": 3.0}], [0, 2])
    self.assertEqual(float(got["w"]), 3.0)
    traced = jax.jit(merging.weighted_average)(
      [{"w": 1.0}, {"w": 3.0}], jnp.zeros(2)
    )
    self.assertEqual(float(traced["w"]), 1.0)


if __name__ == "__main__":
  absltest.main()
