"""Tests of curve fitting and Mode Path Fusion."""

from __future__ import annotations

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from absl.testing import absltest, parameterized
from flax import nnx

from jaxmerge import curves, training, tree
from jaxmerge.curves import _sampling

_W1 = np.array([1.0, -2.0, 0.5], np.float32)
_W2 = np.array([-1.0, 0.0, 2.0], np.float32)
_TARGET = np.array([0.3, 1.0, -1.0], np.float32)
_ONES = {"x": np.ones(64, np.float32)}


def _quadratic(params, batch, key):
  del key
  distance = params["w"] - _TARGET
  return 0.5 * (distance @ distance) * batch["x"]


def _fit(**options):
  defaults = {
    "key": jax.random.key(0),
    "epochs": 150,
    "batch_size": 4,
    # Small: the bend averages over some hundred draws of t.
    "learning_rate": 0.03,
    "final_learning_rate": 0.001,
    "weight_decay": 0.0,
  }
  return curves.fit_curve(
    options.pop("loss_fn", _quadratic),
    {"w": _W1},
    {"w": _W2},
    _ONES,
    **(defaults | options),
  )


class ClosedFormTest(parameterized.TestCase):
  """The curve's optimum for |phi(t) - c|^2 / 2 follows from moments of t.

  With b_i the weights, the condition on the bend is
  E[b1 (b0 W1 + b1 theta + b2 W2 - c)] + decay theta = 0.
  """

  @parameterized.named_parameters(
    ("uniform", "uniform", 1.0),
    ("stratified", "stratified", 1.0),
    ("beta", "beta", 3.0),
  )
  def test_bend(self, sampling, a):
    t = np.linspace(0, 1, 20001)[1:-1]
    density = scipy.stats.beta.pdf(t, a, a)
    density /= density.sum()
    b0, b1, b2 = (1 - t) ** 2, 2 * t * (1 - t), t**2

    def mean(value):
      return (value * density).sum()

    want = (mean(b1) * _TARGET - mean(b0 * b1) * _W1 - mean(b1 * b2) * _W2) / (
      mean(b1 * b1)
    )
    result = _fit(t_sampling=sampling, concentration=a, momentum=0.5)
    np.testing.assert_allclose(result.curve.point(1)["w"], want, atol=0.1)

  def test_weight_decay_on_the_bend(self):
    # Uniform t: E[b1] = 1/3, E[b0 b1] = E[b1 b2] = 1/10, E[b1^2] = 2/15.
    want = (_TARGET / 3 - (_W1 + _W2) / 10) / (2 / 15 + 0.1)
    bend = _fit(weight_decay=0.1, momentum=0.5).curve.point(1)["w"]
    np.testing.assert_allclose(bend, want, atol=0.1)

  def test_weight_decay_on_phi(self):
    # (1 + d) E[b1 phi] = E[b1] c.
    want = (_TARGET / 3 / 1.5 - (_W1 + _W2) / 10) / (2 / 15)
    result = _fit(phi_weight_decay=0.5, momentum=0.5)
    np.testing.assert_allclose(result.curve.point(1)["w"], want, atol=0.1)

  def test_chain(self):
    # Uniform t: E[h1] = 1/2, E[h0 h1] = E[h1 h2] = 1/12, E[h1^2] = 1/3.
    want = (_TARGET / 2 - (_W1 + _W2) / 12) / (1 / 3)
    result = _fit(kind="polychain", momentum=0.5, t_sampling="stratified")
    self.assertIsInstance(result.curve, curves.PolyChain)
    np.testing.assert_allclose(result.curve.point(1)["w"], want, atol=0.1)


class OptionsTest(parameterized.TestCase):
  def test_frozen_ends(self):
    curve = _fit(epochs=2).curve
    np.testing.assert_array_equal(curve.point(0)["w"], _W1)
    np.testing.assert_array_equal(curve.point(-1)["w"], _W2)

  def test_free_ends(self):
    curve = _fit(train_ends=True, momentum=0.5).curve
    for t in (0.0, 0.5, 1.0):
      np.testing.assert_allclose(curve(t)["w"], _TARGET, atol=0.02)
    two = _fit(train_ends=True, num_points=2, epochs=2).curve
    self.assertEqual(two.num_points, 2)

  @parameterized.parameters(3, 4, 6)
  def test_starts_on_the_line(self, num_points):
    """With a vanishing step the curve stays where it starts."""
    curve = _fit(
      num_points=num_points,
      epochs=1,
      learning_rate=1e-12,
      final_learning_rate=0.0,
    ).curve
    for index, share in enumerate(np.linspace(0, 1, num_points)):
      want = (1 - share) * _W1 + share * _W2
      np.testing.assert_allclose(curve.point(index)["w"], want, atol=1e-6)

  def test_random_start(self):
    start = {"kernel": jnp.zeros((100, 50)), "bias": jnp.ones(50)}
    end = {"kernel": jnp.zeros((100, 50)), "bias": jnp.full(50, 3.0)}
    result = curves.fit_curve(
      lambda params, batch, key: batch["x"] * 0 * params["bias"].sum(),
      start,
      end,
      _ONES,
      key=jax.random.key(0),
      init="random",
      epochs=1,
      batch_size=64,
      weight_decay=0.0,
    )
    bend = result.curve.point(1)
    statistic = scipy.stats.kstest(
      np.ravel(bend["kernel"]), scipy.stats.uniform(-0.1, 0.2).cdf
    )
    self.assertGreater(statistic.pvalue, 1e-3)
    np.testing.assert_array_equal(bend["bias"], np.full(50, 2.0))

  def test_given_start(self):
    given = {"w": np.array([9.0, 9.0, 9.0], np.float32)}
    curve = _fit(
      init=[given], epochs=1, learning_rate=1e-12, final_learning_rate=0.0
    ).curve
    np.testing.assert_allclose(curve.point(1)["w"], given["w"])

  def test_seeds_at_once(self):
    keys = jax.random.split(jax.random.key(0))

    def stack(a):
      return {"w": jnp.stack([a, 2 * a])}

    options = {"epochs": 3, "batch_size": 8, "learning_rate": 0.1}
    together = curves.fit_curve(
      _quadratic,
      stack(_W1),
      stack(_W2),
      _ONES,
      key=keys,
      seed_axis=True,
      **options,
    )
    for seed in range(2):
      alone = curves.fit_curve(
        _quadratic,
        {"w": (seed + 1) * _W1},
        {"w": (seed + 1) * _W2},
        _ONES,
        key=keys[seed],
        **options,
      )
      np.testing.assert_allclose(
        together.curve.point(1)["w"][seed],
        alone.curve.point(1)["w"],
        rtol=1e-5,
        atol=1e-6,
      )

  @parameterized.parameters("uniform", "stratified", "beta")
  def test_shared_t_on_any_number_of_devices(self, sampling):
    found = [
      _fit(epochs=4, batch_size=4, t_sampling=sampling, devices=devices).curve
      for devices in (1, 2, 4)
    ]
    for other in found[1:]:
      chex.assert_trees_all_close(other, found[0], atol=1e-5)

  def test_own_t_on_each_device(self):
    shared, own = (
      _fit(epochs=1, batch_size=4, devices=4, t_shared=choice).curve
      for choice in (True, False)
    )
    gap = np.abs(shared.point(1)["w"] - own.point(1)["w"]).max()
    self.assertGreater(gap, 1e-3)

  @parameterized.parameters(
    ({"kind": "circle"}, "Unknown kind 'circle'"),
    ({"num_points": 2}, "at least 3"),
    ({"num_points": 1, "train_ends": True}, "at least 2"),
    ({"init": "zero"}, "Unknown init 'zero'"),
    ({"init": [{"w": _W1}] * 2}, "init holds 2 points"),
    ({"t_sampling": "normal"}, "Unknown t_sampling 'normal'"),
    ({"t_sampling": "beta", "concentration": 0.0}, "must be positive"),
    ({"batch_size": 65}, "larger than the data"),
  )
  def test_errors(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      _fit(**options)

  @parameterized.parameters(
    ({"v": _W1},), ({"w": _W1[:2]},), ({"w": np.float16(_W1)},)
  )
  def test_mismatch(self, end):
    with self.assertRaises(tree.TreeMismatchError):
      curves.fit_curve(
        _quadratic, {"w": _W1}, end, _ONES, key=jax.random.key(0)
      )

  def test_nothing_to_train(self):
    ends = ({"n": np.arange(3)},) * 2
    with self.assertRaisesRegex(ValueError, "nothing to train"):
      curves.fit_curve(_quadratic, *ends, _ONES, key=jax.random.key(0))

  def test_nan(self):
    with self.assertRaisesRegex(training.NonFiniteLossError, "learning rate"):
      _fit(learning_rate=1e20, final_learning_rate=1e20)


class SamplingTest(parameterized.TestCase):
  @parameterized.parameters(
    ("uniform", 1.0), ("stratified", 1.0), ("beta", 0.5), ("beta", 4.0)
  )
  def test_distribution(self, name, a):
    sampler = _sampling.get_sampler(name, a)
    draws = jax.vmap(sampler, (None, 0))(jax.random.key(1), jnp.arange(3000))
    result = scipy.stats.kstest(draws, scipy.stats.beta(a, a).cdf)
    self.assertGreater(result.pvalue, 1e-3)

  def test_strata(self):
    sampler = _sampling.get_sampler("stratified", 1.0)
    draws = jax.vmap(sampler, (None, 0))(jax.random.key(1), jnp.arange(160))
    strata = np.floor(np.asarray(draws) * 16).reshape(10, 16)
    np.testing.assert_array_equal(
      np.sort(strata), np.tile(np.arange(16), (10, 1))
    )
    self.assertLen({tuple(order) for order in strata}, 10)


class _Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(2)(nn.relu(nn.Dense(8)(x)))[:, 0]


class _NnxNet(nnx.Module):
  def __init__(self, rngs):
    self.hidden = nnx.Linear(4, 8, rngs=rngs)
    self.out = nnx.Linear(8, 1, rngs=rngs)

  def __call__(self, x):
    return self.out(nnx.relu(self.hidden(x)))[:, 0]


def _regression():
  generator = np.random.default_rng(0)
  x = generator.normal(size=(64, 4)).astype(np.float32)
  return {"x": x, "y": np.abs(x[:, 0])}


class AnyPytreeTest(absltest.TestCase):
  """Linen parameters, nnx.State and plain dictionaries."""

  def _merge(self, loss_fn, start, end):
    data = _regression()
    merged, info = curves.mode_path_fusion(
      loss_fn, start, end, data, key=jax.random.key(2), batch_size=8, epochs=20
    )
    chex.assert_trees_all_equal_structs(merged, start)
    middle = jax.tree.map(lambda a, b: (a + b) / 2, start, end)
    before = loss_fn(middle, data, None).mean()
    self.assertLess(loss_fn(merged, data, None).mean(), before / 2)
    # The middle of the grid is the merged network.
    np.testing.assert_allclose(
      info.losses[10], loss_fn(merged, data, None).mean(), rtol=1e-4
    )
    self.assertEqual(info.best_t, info.grid[np.argmin(info.losses)])
    self.assertEqual(info.steps, 20 * 8)
    self.assertLen(info.history, 20)
    self.assertGreater(info.seconds, 0)

  def test_linen(self):
    net, x = _Net(), jnp.zeros((1, 4))
    start, end = (net.init(jax.random.key(i), x) for i in range(2))
    self._merge(
      lambda params, batch, key: (
        (net.apply(params, batch["x"]) - batch["y"]) ** 2
      ),
      start,
      end,
    )

  def test_nnx(self):
    graph, start = nnx.split(_NnxNet(nnx.Rngs(0)))
    _, end = nnx.split(_NnxNet(nnx.Rngs(1)))

    def loss(params, batch, key):
      del key
      return (nnx.merge(graph, params)(batch["x"]) - batch["y"]) ** 2

    self._merge(loss, start, end)

  def test_plain_dictionary(self):
    keys = jax.random.split(jax.random.key(0), 4)
    start, end = (
      {
        "in": jax.random.normal(keys[2 * i], (4, 8)) / 2,
        "out": jax.random.normal(keys[2 * i + 1], (8,)) / 3,
      }
      for i in range(2)
    )
    self._merge(
      lambda params, batch, key: (
        (jax.nn.relu(batch["x"] @ params["in"]) @ params["out"] - batch["y"])
        ** 2
      ),
      start,
      end,
    )


class FusionTest(parameterized.TestCase):
  def test_integer_leaves(self):
    start, end = ({"w": w, "n": np.arange(2)} for w in (_W1, _W2))
    merged, _ = curves.mode_path_fusion(
      _quadratic,
      start,
      end,
      _ONES,
      key=jax.random.key(0),
      epochs=1,
      batch_size=8,
    )
    np.testing.assert_array_equal(merged["n"], np.arange(2))

  def test_t(self):
    options = {"key": jax.random.key(0), "epochs": 1, "batch_size": 8}
    merged, info = curves.mode_path_fusion(
      _quadratic, {"w": _W1}, {"w": _W2}, _ONES, t=0.25, **options
    )
    np.testing.assert_allclose(merged["w"], info.curve(0.25)["w"])

  def test_loss_is_measured_on_the_rows_of_the_fit(self):
    data = {"x": np.repeat(np.float32([1, 50]), 32)}
    _, info = curves.mode_path_fusion(
      _quadratic,
      {"w": _W1},
      {"w": _W2},
      data,
      key=jax.random.key(0),
      indices=np.arange(32)[None],
      epochs=1,
      batch_size=8,
    )
    distance = _W1 - _TARGET
    np.testing.assert_allclose(
      info.losses[0], 0.5 * distance @ distance, rtol=1e-5
    )

  def test_scalar_loss(self):
    """The losses along the curve of a mean are those of its parts."""
    options = {"key": jax.random.key(0), "epochs": 2, "batch_size": 8}
    data = {"x": np.linspace(0, 1, 64, dtype=np.float32)}
    infos = [
      curves.mode_path_fusion(loss, {"w": _W1}, {"w": _W2}, data, **options)[1]
      for loss in (_quadratic, lambda *args: _quadratic(*args).mean())
    ]
    np.testing.assert_allclose(infos[0].losses, infos[1].losses, rtol=1e-5)

  @parameterized.parameters(
    ({"t": 1.5}, r"t must lie in \[0, 1\]"),
    ({"grid": 1}, "grid must be at least 2"),
    ({"grid_examples": 0}, "at least 1"),
  )
  def test_errors(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      curves.mode_path_fusion(
        _quadratic,
        {"w": _W1},
        {"w": _W2},
        _ONES,
        key=jax.random.key(0),
        **options,
      )


if __name__ == "__main__":
  absltest.main()
