"""Tests of the arithmetic against NumPy in float64."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

from jaxmerge import tree


def make(seed, dtype=np.float32):
  rng = np.random.default_rng(seed)
  return {
    "w": jnp.asarray(rng.normal(size=(4, 3)), dtype),
    "inner": [jnp.asarray(rng.normal(size=()), dtype), None],
    "empty": jnp.zeros((0, 2), dtype),
    "n": jnp.asarray(rng.integers(0, 9, 3)),
    "flag": jnp.asarray([bool(seed % 2)]),
    "key": jax.random.key(seed),
  }


def floats(params):
  return [
    np.asarray(x, np.float64)
    for x in (params["w"], params["inner"][0], params["empty"])
  ]


OPERATIONS = {
  "add": (tree.add, lambda x, y: x + y),
  "sub": (tree.sub, lambda x, y: x - y),
  "scale": (lambda a, b: tree.scale(a, 0.3), lambda x, y: 0.3 * x),
  "lerp": (lambda a, b: tree.lerp(a, b, 0.3), lambda x, y: 0.7 * x + 0.3 * y),
  "weighted_sum": (
    lambda a, b: tree.weighted_sum([a, b, a], [0.2, -0.5, 1]),
    lambda x, y: 1.2 * x - 0.5 * y,
  ),
}
CASES = [
  (f"_{name}_{np.dtype(dtype).name}", name, dtype)
  for name in OPERATIONS
  for dtype in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64)
]


class ArithmeticTest(parameterized.TestCase):
  @parameterized.named_parameters(*CASES)
  def test_value_dtype_and_pass_through(self, name, dtype):
    operation, oracle = OPERATIONS[name]
    if dtype == jnp.complex64:
      a, b = {"w": jnp.asarray([1 + 2j])}, {"w": jnp.asarray([3 - 1j])}
      expected = oracle(np.asarray([1 + 2j]), np.asarray([3 - 1j]))
      np.testing.assert_allclose(operation(a, b)["w"], expected, rtol=1e-6)
      return
    a, b = make(1, dtype), make(2, dtype)
    copy = jax.tree.map(lambda x: x, a)
    for fn in (operation, jax.jit(operation)):
      got = fn(a, b)
      chex.assert_trees_all_equal_shapes_and_dtypes(got, a)
      tolerance = float(jnp.finfo(dtype).eps)
      for x, y, z in zip(floats(got), floats(a), floats(b), strict=True):
        np.testing.assert_allclose(x, oracle(y, z), rtol=tolerance, atol=1e-6)
      np.testing.assert_array_equal(got["n"], a["n"])
      np.testing.assert_array_equal(got["flag"], a["flag"])
      self.assertTrue(jnp.all(got["key"] == a["key"]))
    chex.assert_trees_all_equal(a, copy)

  @parameterized.named_parameters(
    *((name, *pair) for name, pair in OPERATIONS.items())
  )
  def test_python_scalars_and_nnx(self, operation, oracle):
    np.testing.assert_allclose(
      operation({"x": 1.5}, {"x": -2.0})["x"], oracle(1.5, -2.0), rtol=1e-6
    )
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    got = operation(state, state)
    self.assertEqual(jax.tree.structure(got), jax.tree.structure(state))

  @parameterized.named_parameters(
    ("add", tree.add),
    ("sub", tree.sub),
    ("lerp", lambda a, b: tree.lerp(a, b, 0.5)),
    ("dot", tree.dot),
    ("weighted_sum", lambda a, b: tree.weighted_sum([a, b], [1.0, 1.0])),
  )
  def test_mismatch(self, operation):
    with self.assertRaisesRegex(tree.TreeMismatchError, "leaf 'w' has shape"):
      operation({"w": jnp.ones(2)}, {"w": jnp.ones(3)})

  def test_lerp_ends_are_exact(self):
    a, b = make(1), make(2)
    np.testing.assert_array_equal(tree.lerp(a, b, 0.0)["w"], a["w"])
    np.testing.assert_array_equal(tree.lerp(a, b, 1)["w"], b["w"])

  def test_traced_scalars(self):
    a, b = make(1), make(2)
    traced = chex.assert_max_traces(n=1)(lambda t: tree.lerp(a, b, t))
    compiled = jax.jit(traced)
    for t in (0.25, 0.75):
      chex.assert_trees_all_close(
        floats(compiled(t)), floats(tree.lerp(a, b, t)), rtol=1e-6
      )
    got = jax.jit(lambda w: tree.weighted_sum([a, b], w))(jnp.array([0.5, 2]))
    np.testing.assert_allclose(got["w"], 0.5 * a["w"] + 2 * b["w"], rtol=1e-6)
    got = jax.jit(lambda c: tree.scale(a, c))(np.float64(3))
    np.testing.assert_allclose(got["w"], 3 * a["w"], rtol=1e-6)

  def test_gradient_through_lerp(self):
    a, b = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([4.0, 8.0])}
    slope = jax.grad(lambda t: tree.lerp(a, b, t)["w"].sum())(0.3)
    np.testing.assert_allclose(slope, 9.0, rtol=1e-6)

  @parameterized.parameters(
    (lambda x: tree.scale(x, jnp.ones(1)), "factor must be a scalar"),
    (lambda x: tree.lerp(x, x, jnp.ones(1)), "t must be a scalar"),
    (lambda x: tree.weighted_sum([], []), "at least one tree"),
    (lambda x: tree.weighted_sum([x], [1.0, 2.0]), "2 weights for 1 trees"),
    (lambda x: tree.weighted_sum([x], [jnp.ones(1)]), "weight 0 must be a"),
    (lambda x: tree.weighted_sum([x], jnp.ones((1, 1))), r"shape \(1,\)"),
  )
  def test_bad_scalars(self, call, message):
    with self.assertRaisesRegex(ValueError, message):
      call({"w": jnp.ones(1)})


class AccumulationDtypeTest(parameterized.TestCase):
  @parameterized.parameters(
    (jnp.bfloat16, jnp.float32),
    (jnp.float16, jnp.float32),
    (jnp.float8_e4m3fn, jnp.float32),
    (jnp.float32, jnp.float32),
    (jnp.complex64, jnp.complex64),
  )
  def test_dtype(self, dtype, expected):
    leaf = jax.ShapeDtypeStruct((2,), dtype)
    self.assertEqual(tree.accumulation_dtype(leaf), expected)

  @parameterized.parameters(1, "text")
  def test_not_floating_point(self, leaf):
    with self.assertRaisesRegex(ValueError, "is not floating-point"):
      tree.accumulation_dtype(leaf)


class WeightedSumTest(absltest.TestCase):
  def test_half_types_are_accumulated_in_float32(self):
    x = {"w": jnp.asarray([0.1, 3.0, -7.5], jnp.bfloat16)}
    got = tree.weighted_sum([x] * 256, [1 / 256] * 256)
    np.testing.assert_array_equal(got["w"], x["w"])

  def test_one_fused_expression_a_leaf(self):
    trees = [{"w": jnp.full((64, 64), float(i))} for i in range(5)]
    jaxpr = jax.make_jaxpr(lambda *x: tree.weighted_sum(x, [0.1] * 5))(*trees)
    self.assertNotIn("concatenate", str(jaxpr))
    compiled = (
      jax.jit(lambda *x: tree.weighted_sum(x, [0.1] * 5))
      .lower(*trees)
      .compile()
    )
    entry = compiled.as_text().split("ENTRY")[1]
    self.assertEqual(entry.count(" fusion("), 1)
    # No buffer besides the inputs and the output.
    self.assertLess(compiled.memory_analysis().temp_size_in_bytes, 64 * 64)

  def test_sharded_input_stays_sharded(self):
    mesh = jax.make_mesh(
      (len(jax.devices()),),
      ("x",),
      axis_types=(jax.sharding.AxisType.Auto,),
    )
    sharding = jax.NamedSharding(mesh, jax.P("x"))
    a = {"w": jax.device_put(jnp.arange(8.0), sharding)}
    got = tree.weighted_sum([a, a], [0.5, 0.5])
    self.assertTrue(got["w"].sharding.is_equivalent_to(sharding, 1))


class DotTest(parameterized.TestCase):
  def test_against_numpy(self):
    a, b = make(1), make(2)
    expected = sum(
      (x * y).sum() for x, y in zip(floats(a), floats(b), strict=True)
    )
    np.testing.assert_allclose(tree.dot(a, b), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(tree.dot)(a, b), expected, rtol=1e-6)
    squares = sum((x * x).sum() for x in floats(a))
    np.testing.assert_allclose(tree.norm(a), squares**0.5, rtol=1e-6)

  @parameterized.parameters(jnp.bfloat16, jnp.float16)
  def test_half_types_in_float32(self, dtype):
    a = {"w": jnp.full(5000, 0.125, dtype)}
    got = tree.dot(a, a)
    self.assertEqual(got.dtype, jnp.float32)
    self.assertEqual(float(got), 5000 / 64)

  def test_complex(self):
    a, b = {"w": jnp.asarray([1 + 2j])}, {"w": jnp.asarray([3 - 1j])}
    np.testing.assert_allclose(tree.dot(a, b), np.vdot(1 + 2j, 3 - 1j))
    np.testing.assert_allclose(tree.norm(a), 5**0.5, rtol=1e-6)

  def test_mixed_dtypes_and_empty(self):
    a = {"w": jnp.ones(2), "h": jnp.ones(3, jnp.float16), "n": jnp.arange(4)}
    self.assertEqual(float(tree.dot(a, a)), 5.0)
    self.assertEqual(float(tree.norm({"n": jnp.arange(4)})), 0.0)


if __name__ == "__main__":
  absltest.main()
