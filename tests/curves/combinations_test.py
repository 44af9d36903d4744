"""Tests of functions of many weighted sums of trees."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import tree
from jaxmerge.curves import _combinations

_POINTS, _SUMS = 3, 6


def _weights():
  weights = np.random.default_rng(1).uniform(-1, 1, (_SUMS, _POINTS))
  return weights.astype(np.float32)


def _loop(fn, points, weights, batch):
  """One sum after the other, each tree formed in NumPy first."""

  def at(row):
    def leaf(stack):
      if not np.issubdtype(stack.dtype, np.inexact):
        return jnp.asarray(stack[0])
      total = np.tensordot(row, np.asarray(stack, np.float64), 1)
      return jnp.asarray(total, stack.dtype)

    return fn(jax.tree.map(leaf, points), batch)

  found = [at(row) for row in weights]
  return jax.tree.map(lambda *values: np.stack(values), *found)


def _points(shapes, dtype=np.float32):
  generator = np.random.default_rng(0)
  return {
    name: generator.normal(size=(_POINTS, *shape)).astype(dtype)
    for name, shape in shapes.items()
  }


def _batch():
  return np.random.default_rng(2).normal(size=(5, 7)).astype(np.float32)


def _products(fn, points, weights, batch):
  """How many products the loop over sums contains."""
  jaxpr = jax.make_jaxpr(lambda *args: _combinations.map_sums(fn, *args))(
    points, weights, batch
  )
  loops = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
  return str(loops[-1]).count("dot_general")


class MapSumsTest(parameterized.TestCase):
  def _check(self, fn, points, batch=None, **tolerance):
    batch = _batch() if batch is None else batch
    got = jax.jit(lambda *args: _combinations.map_sums(fn, *args))(
      points, _weights(), batch
    )
    want = _loop(fn, points, _weights(), batch)
    tolerance = {"rtol": 2e-5, "atol": 2e-5} | tolerance
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, want
    )

  @parameterized.named_parameters(
    ("layer", lambda p, x: jax.nn.relu(x @ p["w"] + p["b"][None]) @ p["v"], 1),
    ("scaled", lambda p, x: jax.nn.relu((2 * x) @ p["w"] / 3 * x[:, :1]), 0),
    ("transposed", lambda p, x: jnp.tanh((p["w"].T @ x.T).T), 0),
    ("leaf_twice", lambda p, x: (x @ p["w"]) * p["w"].sum(), 0),
    ("leaf_on_both_sides", lambda p, x: x @ p["w"] @ p["w"].T, 1),
    ("not_linear_before", lambda p, x: x @ jnp.exp(p["w"]), 1),
    ("bias_alone", lambda p, x: x[:, :4] + p["b"][None], 0),
    ("difference", lambda p, x: jnp.abs(x @ p["w"] - p["b"][None]), 0),
    ("inverse", lambda p, x: x[:, :4] / (3 + p["b"][None] ** 2), 0),
    ("reciprocal", lambda p, x: 1 / (9 + (x @ p["w"]) ** 2), 0),
    ("call", lambda p, x: jax.jit(lambda w: jax.nn.relu(x @ w))(p["w"]), 0),
    ("loop", lambda p, x: jax.lax.map(lambda r: r @ p["w"], x), 1),
    ("batch_alone", lambda p, x: x @ x.T, 0),
    ("tree", lambda p, x: {"a": x @ p["w"], "b": (p["b"], x.sum())}, 0),
  )
  def test_against_a_loop(self, fn, products):
    points = _points({"w": (7, 4), "b": (4,), "v": (4, 2)})
    self._check(fn, points)
    self.assertEqual(_products(fn, points, _weights(), _batch()), products)

  def test_flax_layers(self):
    """Of two layers with biases one product is left in the loop."""
    net = nn.Sequential([nn.Dense(6), nn.relu, nn.Dense(2)])
    keys = jax.random.split(jax.random.key(0), _POINTS)
    points = jax.vmap(lambda key: net.init(key, _batch()))(keys)
    points = jax.tree.map(lambda leaf: leaf + 0.1, points)
    self._check(net.apply, points)
    self.assertEqual(_products(net.apply, points, _weights(), _batch()), 1)

  def test_shared_program(self):
    """One inner program, called with two leaves, is two programs."""
    layer = jax.jit(lambda x, w: jax.nn.relu(x @ w))
    points = _points({"w": (7, 4), "v": (7, 4)})
    self._check(lambda p, x: layer(x, p["w"]) - layer(x, p["v"]), points)

  def test_few_sums(self):
    """With as many sums as trees nothing would be gained."""
    points = _points({"w": (7, 4)})
    found = _products(
      lambda p, x: x @ p["w"], points, _weights()[:_POINTS], _batch()
    )
    self.assertEqual(found, 1)

  def test_half_types_are_summed_first(self):
    points = _points({"w": (7, 4)}, jnp.bfloat16)
    batch = _batch().astype(jnp.bfloat16)
    got = _combinations.map_sums(
      lambda p, x: x @ p["w"], points, _weights(), batch
    )
    self.assertEqual(got.dtype, jnp.bfloat16)
    trees = [{"w": leaf} for leaf in points["w"]]
    for row, value in zip(_weights(), got, strict=True):
      want = batch @ tree.weighted_sum(trees, jnp.asarray(row))["w"]
      np.testing.assert_array_equal(value, want)

  def test_integers_are_those_of_the_first_tree(self):
    points = _points({"w": (7, 4)}) | {"n": np.arange(2, 2 + _POINTS)}
    points["n"] = points["n"].astype(np.int32)
    self._check(lambda p, x: x @ p["w"] * p["n"].astype(jnp.float32), points)

  def test_several_at_once(self):
    points = _points({"w": (7, 4)})
    one, many = (
      _combinations.map_sums(
        lambda p, x: jax.nn.relu(x @ p["w"]), points, _weights(), _batch(), n
      )
      for n in (1, 4)
    )
    np.testing.assert_allclose(one, many, rtol=1e-6, atol=1e-6)


if __name__ == "__main__":
  absltest.main()
