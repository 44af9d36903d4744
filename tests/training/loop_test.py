"""Tests of the training loop."""

from __future__ import annotations

import tempfile
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from jaxmerge import checkpoints, training
from jaxmerge.training import _compile


def _data(examples=40, features=5, seed=0):
  generator = np.random.default_rng(seed)
  x = generator.normal(size=(examples, features)).astype(np.float32)
  y = generator.normal(size=examples).astype(np.float32)
  return {"x": x, "y": y}


def _loss(params, batch, key):
  del key
  return (batch["x"] @ params["w"] - batch["y"]) ** 2


def _params(features=5):
  return {"w": jnp.linspace(-1, 1, features)}


def _descend(data, w, schedule, momentum, decay, steps, reset_every=None):
  """Full-batch gradient descent on the squared error, in float64."""
  x, y = np.float64(data["x"]), np.float64(data["y"])
  w, velocity = np.float64(w), 0.0
  for step in range(steps):
    if reset_every and step % reset_every == 0:
      velocity = 0.0
    gradient = 2 * x.T @ (x @ w - y) / len(y) + decay * w
    velocity = momentum * velocity + gradient
    w = w - schedule(step) * velocity
  return w


class PlanTest(parameterized.TestCase):
  @parameterized.parameters(
    (60000, 128, 1, 468, 96), (10, 5, 1, 2, 0), (7, 7, 1, 1, 0), (9, 4, 4, 2, 1)
  )
  def test_steps(self, examples, batch, devices, full, tail):
    plan = training.plan_epoch(examples, batch, devices)
    self.assertEqual((plan.full_steps, plan.tail), (full, tail))
    self.assertEqual(plan.steps, -(-examples // batch))

  @parameterized.parameters(
    (10, 0, 1, "at least 1"),
    (10, 11, 1, "larger than the data"),
    (10, 6, 4, "not divisible by the 4 devices"),
  )
  def test_errors(self, examples, batch, devices, message):
    with self.assertRaisesRegex(ValueError, message):
      training.plan_epoch(examples, batch, devices)


class DevicesTest(absltest.TestCase):
  def test_replicate(self):
    tree = {"x": np.arange(3.0, dtype=np.float32), "k": jax.random.key(1)}
    placed = training.replicate(tree, 2)
    self.assertEqual(placed.value["x"].shape, (2, 3))
    self.assertLen(placed.value["x"].sharding.device_set, 2)
    np.testing.assert_array_equal(
      jax.random.key_data(placed.value["k"][1]),
      jax.random.key_data(tree["k"]),
    )
    chex.assert_trees_all_equal(
      training.first_replica({"x": placed.value["x"]}), {"x": tree["x"]}
    )

  def test_too_many(self):
    with self.assertRaisesRegex(ValueError, "99 devices were asked for"):
      training.resolve_devices(99)
    with self.assertRaisesRegex(ValueError, "empty"):
      training.resolve_devices([])


class DescentTest(parameterized.TestCase):
  """One batch an epoch is gradient descent, with its closed form."""

  @parameterized.parameters((0.0, 0.0), (0.9, 0.0), (0.9, 0.1))
  def test_matches_gradient_descent(self, momentum, decay):
    data = _data()
    result = training.fit(
      _loss,
      _params(),
      data,
      key=jax.random.key(0),
      learning_rate=0.02,
      final_learning_rate=0.001,
      momentum=momentum,
      weight_decay=decay,
      epochs=10,
      batch_size=40,
    )

    def schedule(step):
      return np.interp(step, [5, 9], [0.02, 0.001])

    want = _descend(data, _params()["w"], schedule, momentum, decay, 10)
    np.testing.assert_allclose(result.params["w"], want, rtol=1e-5, atol=1e-6)
    self.assertEqual(result.steps, 10)

  def test_reset_optimizer(self):
    data = _data()
    optimizer = training.Optimizer(
      optax.sgd(0.02, momentum=0.9), lambda step: 0.02
    )
    fit = {"key": jax.random.key(0), "optimizer": optimizer, "epochs": 6}
    result = training.fit(
      _loss, _params(), data, batch_size=40, reset_optimizer=True, **fit
    )
    want = _descend(data, _params()["w"], lambda _: 0.02, 0.9, 0.0, 6, 1)
    np.testing.assert_allclose(result.params["w"], want, rtol=1e-5, atol=1e-6)

  def test_any_optimizer(self):
    optimizer = training.Optimizer(optax.adam(0.1), lambda step: 0.1)
    # optax.adam itself mixes float32 and int32.
    with jax.numpy_dtype_promotion("standard"):
      result = training.fit(
        _loss,
        _params(),
        _data(),
        key=jax.random.key(0),
        optimizer=optimizer,
        epochs=20,
        batch_size=8,
      )
    losses = [record["loss"][0] for record in result.history]
    self.assertLess(losses[-1], losses[0] / 2)


class EpochTest(parameterized.TestCase):
  @parameterized.parameters(
    (1, 40, 8), (1, 10, 4), (4, 10, 4), (4, 11, 8), (2, 13, 2), (1, 5, 5)
  )
  def test_every_example_counts_once(self, devices, examples, batch_size):
    """The epoch's mean of a metric is that of the data, tail included."""
    data = _data(examples)

    def loss(params, batch, key):
      del key
      return 0 * params["w"].sum() + batch["y"], {"square": batch["y"] ** 2}

    result = training.fit(
      loss,
      _params(),
      data,
      key=jax.random.key(3),
      epochs=2,
      batch_size=batch_size,
      devices=devices,
    )
    for record in result.history:
      np.testing.assert_allclose(
        record["loss"][0], data["y"].mean(), rtol=1e-5, atol=1e-6
      )
      np.testing.assert_allclose(
        record["square"][0], (data["y"] ** 2).mean(), rtol=1e-5
      )

  def test_order_changes_between_epochs_and_seeds(self):
    data = {"i": np.arange(12, dtype=np.float32)}
    optimizer = training.sgd(0.1, 0.1, 2, 12, momentum=0.0)

    def loss(params, batch, key):
      del key
      return params["w"] * 0 + batch["i"]

    plan = training.plan_epoch(12, 1, 1)
    epoch = training.compile_epoch(
      lambda params, context: loss(params, context.batch, None),
      optimizer.transformation,
      plan,
      training.resolve_devices(1),
    )
    params = {"w": jnp.zeros(2)}
    state = training.TrainState(
      params,
      jax.vmap(optimizer.transformation.init)(params),
      jnp.zeros(2, jnp.int32),
    )
    rows = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))
    keys = jax.random.split(jax.random.key(0))

    def put(tree):
      return training.replicate(tree, 1).value

    state, rows, keys, data = map(put, (state, rows, keys, data))
    orders = []
    for _ in range(2):
      state, metrics = epoch(state, None, rows, keys, data)
      orders.extend(np.asarray(metrics["loss"])[0])
    for order in orders:
      np.testing.assert_array_equal(np.sort(order), np.arange(12))
    self.assertLen({tuple(order) for order in orders}, 4)

  def test_indices_choose_the_rows(self):
    data = {"i": np.arange(10, dtype=np.float32)}

    def loss(params, batch, key):
      del key
      return params["w"] * 0 + batch["i"]

    result = training.fit(
      loss,
      {"w": jnp.zeros(2)},
      data,
      key=jax.random.split(jax.random.key(0)),
      indices=[[1, 2, 3], [7, 8, 9]],
      epochs=1,
      batch_size=2,
      seed_axis=True,
      devices=1,
    )
    np.testing.assert_allclose(result.history[0]["loss"], [2, 8], rtol=1e-6)

  def test_seeds_equal_runs_of_their_own(self):
    keys = jax.random.split(jax.random.key(5), 3)
    params = {"w": jax.random.normal(jax.random.key(1), (3, 5))}
    options = {"epochs": 3, "batch_size": 8, "learning_rate": 0.01}
    together = training.fit(
      _loss, params, _data(), key=keys, seed_axis=True, **options
    )
    for seed in range(3):
      alone = training.fit(
        _loss, {"w": params["w"][seed]}, _data(), key=keys[seed], **options
      )
      np.testing.assert_allclose(
        together.params["w"][seed], alone.params["w"], rtol=1e-5, atol=1e-6
      )

  @parameterized.parameters(1, 4)
  def test_vmapped_seeds_equal_seeds_in_turn(self, devices):
    keys = jax.random.split(jax.random.key(5), 3)
    params = {"w": jax.random.normal(jax.random.key(1), (3, 5))}

    def run():
      # A function of its own, since equal arguments share a compilation.
      def loss(params, batch, key):
        return _loss(params, batch, key)

      return training.fit(
        loss,
        params,
        _data(),
        key=keys,
        seed_axis=True,
        epochs=3,
        batch_size=8,
        learning_rate=0.01,
        devices=devices,
      ).params

    in_turn = run()
    with mock.patch.object(_compile, "IN_TURN", frozenset()):
      vmapped = run()
    chex.assert_trees_all_close(in_turn, vmapped, rtol=1e-5)

  def test_devices_agree_after_50_steps(self):
    """50 steps with a partial batch that does not divide over 4 devices."""

    def transform(key, example):
      noise = jax.random.normal(key, example["x"].shape)
      return {**example, "x": example["x"] + 0.1 * noise}

    found = [
      training.fit(
        _loss,
        _params(),
        _data(39),
        key=jax.random.key(2),
        epochs=10,
        batch_size=8,
        learning_rate=0.02,
        transform=transform,
        devices=devices,
      )
      for devices in (1, 2, 4)
    ]
    self.assertEqual(found[0].steps, 50)
    for other in found[1:]:
      chex.assert_trees_all_close(other.params, found[0].params, atol=1e-5)

  def test_integer_leaves_pass_through(self):
    params = {**_params(), "table": jnp.arange(3), "flag": jnp.array(True)}
    result = training.fit(
      _loss, params, _data(), key=jax.random.key(0), epochs=1, batch_size=8
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(result.params, params)
    np.testing.assert_array_equal(result.params["table"], np.arange(3))

  def test_scalar_loss(self):
    options = {
      "key": jax.random.key(0),
      "epochs": 3,
      "batch_size": 8,
      "learning_rate": 0.01,
    }
    per_example = training.fit(_loss, _params(), _data(38), **options)
    mean = training.fit(
      lambda *args: _loss(*args).mean(),
      _params(),
      _data(38),
      devices=1,
      **options,
    )
    chex.assert_trees_all_close(mean.params, per_example.params, atol=1e-5)
    with self.assertRaisesRegex(ValueError, "Return one loss an example"):
      training.fit(
        lambda *args: _loss(*args).mean(),
        _params(),
        _data(38),
        devices=4,
        **options,
      )

  def test_key_differs_by_step(self):
    def loss(params, batch, key):
      return params["w"].sum() * 0 + jax.random.uniform(key, batch["y"].shape)

    result = training.fit(
      loss,
      _params(),
      _data(),
      key=jax.random.key(0),
      epochs=2,
      batch_size=8,
      devices=1,
    )
    self.assertNotEqual(result.history[0]["loss"], result.history[1]["loss"])


class CompilationTest(absltest.TestCase):
  def test_compiles_without_an_unknown_option(self):
    def loss(params, batch, key):
      return _loss(params, batch, key)

    with mock.patch.dict(_compile.OPTIONS, {"cpu": {"xla_no_such": True}}):
      result = training.fit(
        loss, _params(), _data(), key=jax.random.key(0), batch_size=8
      )
    self.assertEqual(result.steps, 50)

  def test_traced_once_and_no_transfer(self):
    """One trace serves all epochs and later runs of the same shape."""
    chex.clear_trace_counter()

    @chex.assert_max_traces(n=1)
    def loss(params, batch, key):
      return _loss(params, batch, key)

    data = training.replicate(_data(), 4)
    optimizer = training.sgd(0.01, 0.001, 3, 5)
    transfers = []
    for seed in range(2):
      training.fit(
        loss,
        _params(),
        data,
        key=jax.random.key(seed),
        optimizer=optimizer,
        epochs=3,
        batch_size=8,
        # `fit` itself forbids implicit transfers around every epoch.
        on_epoch=lambda record: transfers.append(record["epoch"]),
      )
    self.assertEqual(transfers, [1, 2, 3] * 2)

  def test_transfer_guard_is_on(self):
    """Data on the host would be refused by the guard around an epoch."""
    data = training.Replicated(
      jax.tree.map(lambda leaf: leaf[None], _data()),
      training.resolve_devices(1),
    )
    with self.assertRaisesRegex(Exception, "[Dd]isallowed"):
      training.fit(
        _loss,
        _params(),
        data,
        key=jax.random.key(0),
        epochs=1,
        batch_size=8,
      )


class ResumeTest(parameterized.TestCase):
  def _fit(self, folder, stop_after=None, epochs=5):
    def on_epoch(record):
      if record["epoch"] == stop_after:
        raise KeyboardInterrupt

    with checkpoints.Store(folder) as store:
      return training.fit(
        _loss,
        _params(),
        _data(39),
        key=jax.random.key(4),
        epochs=epochs,
        batch_size=8,
        learning_rate=0.01,
        checkpoints=store,
        checkpoint_every=2,
        on_epoch=on_epoch,
      )

  @parameterized.parameters(1, 2, 3, 4)
  def test_equals_an_unbroken_run(self, stop_after):
    with tempfile.TemporaryDirectory() as folder:
      whole = self._fit(f"{folder}/whole")
      with self.assertRaises(KeyboardInterrupt):
        self._fit(f"{folder}/broken", stop_after)
      resumed = self._fit(f"{folder}/broken")
    chex.assert_trees_all_equal(resumed.params, whole.params)
    self.assertEqual(
      [record["loss"] for record in resumed.history],
      [record["loss"] for record in whole.history],
    )

  def test_checkpoints_of_another_run(self):
    with tempfile.TemporaryDirectory() as folder:
      self._fit(folder, epochs=4)
      with self.assertRaisesRegex(ValueError, "are of another run"):
        self._fit(folder, epochs=2)

  def test_nan_keeps_the_last_good_checkpoint(self):
    # Momentum and a growing loss: finite at first, then not.
    optimizer = training.Optimizer(optax.sgd(1e8), lambda step: 1e8)
    with tempfile.TemporaryDirectory() as folder:
      with checkpoints.Store(folder) as store:
        with self.assertRaisesRegex(
          training.NonFiniteLossError, r"at step \d+ \(learning rate 1e\+08"
        ):
          training.fit(
            _loss,
            _params(),
            _data(),
            key=jax.random.key(0),
            optimizer=optimizer,
            epochs=50,
            batch_size=40,
            checkpoints=store,
          )
        store.wait()
        kept = store.steps()
        self.assertNotEmpty(kept)
        state = training.TrainState(
          {"w": jnp.zeros((1, 5))},
          jax.vmap(optimizer.transformation.init)({"w": jnp.zeros((1, 5))}),
          jnp.zeros(1, jnp.int32),
        )
        step, tree, _ = store.restore(state)
    self.assertEqual(step, kept[-1])
    self.assertTrue(np.isfinite(tree.params["w"]).all())


class ErrorsTest(parameterized.TestCase):
  @parameterized.parameters(
    ({"epochs": 0}, "must be at least 1"),
    ({"checkpoint_every": 0}, "must be at least 1"),
    ({"batch_size": 41}, "larger than the data"),
    ({"batch_size": 6, "devices": 4}, "not divisible"),
    ({"indices": [[0, 40]]}, r"must lie in \[0, 40\)"),
    ({"indices": [0, 1]}, r"shape \[1, n\]"),
    ({"learning_rate": 0.0}, "positive"),
    ({"momentum": 1.0}, r"momentum must lie in \[0, 1\)"),
    ({"weight_decay": -1.0}, "not be negative"),
  )
  def test_message(self, options, message):
    options = {"epochs": 2, "batch_size": 2, "devices": 1} | options
    with self.assertRaisesRegex(ValueError, message):
      training.fit(_loss, _params(), _data(), key=jax.random.key(0), **options)

  def test_ragged_data(self):
    data = {"x": np.zeros((3, 5), np.float32), "y": np.zeros(4, np.float32)}
    with self.assertRaisesRegex(ValueError, "same number of examples"):
      training.fit(_loss, _params(), data, key=jax.random.key(0))

  @parameterized.parameters(({},), ({"n": np.arange(3)},))
  def test_nothing_to_train(self, params):
    with self.assertRaisesRegex(ValueError, "nothing to train"):
      training.fit(_loss, params, _data(), key=jax.random.key(0))

  def test_metric_named_loss(self):
    with self.assertRaisesRegex(ValueError, 'must not be named "loss"'):
      training.fit(
        lambda *args: (_loss(*args), {"loss": _loss(*args)}),
        _params(),
        _data(),
        key=jax.random.key(0),
        batch_size=8,
      )

  def test_metric_of_wrong_shape(self):
    with self.assertRaisesRegex(ValueError, r"got shape \(8, 5\)"):
      training.fit(
        lambda params, batch, key: params["w"][None] * batch["x"],
        _params(),
        _data(),
        key=jax.random.key(0),
        batch_size=8,
        devices=1,
      )


class TransformationTest(parameterized.TestCase):
  def test_frozen_leaves_reach_the_optimizer(self):
    """A transformation that scales each seed's steps by what is frozen."""

    def update(updates, state, params=None, *, frozen):
      del params
      scaled = jax.tree.map(lambda leaf: leaf * frozen["speed"], updates)
      return scaled, state + 1

    last = optax.GradientTransformationExtraArgs(
      lambda params: jnp.zeros((), jnp.int32), update
    )
    data = _data(examples=8)
    schedule = lambda step: 0.1 + 0 * step  # noqa: E731

    def loss(params, context):
      return _loss(params, context.batch, context.key)

    start = _params()
    result = training.train(
      loss,
      jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), start),
      data,
      optimizer=training.Optimizer(optax.chain(optax.sgd(0.1), last), schedule),
      epochs=3,
      batch_size=8,
      keys=jax.random.split(jax.random.key(0)),
      frozen={"speed": jnp.array([1.0, 0.5])},
    )
    for seed, rate in enumerate((0.1, 0.05)):
      expected = _descend(
        data, start["w"], lambda step, rate=rate: rate, 0.0, 0.0, 3
      )
      np.testing.assert_allclose(result.params["w"][seed], expected, rtol=1e-4)
    np.testing.assert_array_equal(result.opt_state[-1], [3, 3])
    self.assertEqual(result.trace["loss"].shape, (2, 3))
    for number, record in enumerate(result.history):
      np.testing.assert_allclose(
        result.trace["loss"][:, number], record["loss"], rtol=1e-6
      )


if __name__ == "__main__":
  absltest.main()
