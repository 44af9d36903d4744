"""Tests of runs that carry a state, such as batch normalisation's."""

from __future__ import annotations

import functools
import tempfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from jaxmerge import checkpoints, models, training, tree

_DECAY = 0.75


def _data(examples=40, features=5, seed=0):
  generator = np.random.default_rng(seed)
  x = generator.normal(size=(examples, features)).astype(np.float32)
  return {"x": x, "y": generator.normal(size=examples).astype(np.float32)}


def _params(features=5):
  return {"w": jnp.linspace(-1, 1, features)}


def _state(features=5):
  return {"mean": jnp.zeros(features), "count": jnp.zeros((), jnp.int32)}


def _loss(params, state, batch, key):
  """Least squares on features that are centred by a running mean."""
  del key
  mean = _DECAY * state["mean"] + (1 - _DECAY) * batch["x"].mean(0)
  prediction = (batch["x"] - state["mean"][None]) @ params["w"]
  new = {"mean": mean, "count": state["count"] + 1}
  return (prediction - batch["y"]) ** 2, {"seen": batch["y"]}, new


def _descend(data, w, rate, steps):
  """What `_loss` does with one batch an epoch, in float64."""
  x, y = np.float64(data["x"]), np.float64(data["y"])
  w, mean = np.float64(w), np.zeros(x.shape[1])
  for _ in range(steps):
    z = x - mean
    w = w - rate * 2 * z.T @ (z @ w - y) / len(y)
    mean = _DECAY * mean + (1 - _DECAY) * x.mean(0)
  return w, mean


_OPTIMIZER = training.Optimizer(optax.sgd(0.02), lambda step: 0.02)


class StateTest(parameterized.TestCase):
  @parameterized.parameters(1, 4)
  def test_matches_numpy(self, devices):
    data = _data()
    result = training.fit(
      _loss,
      _params(),
      data,
      key=jax.random.key(0),
      optimizer=_OPTIMIZER,
      epochs=6,
      batch_size=40,
      state=_state(),
      devices=devices,
    )
    w, mean = _descend(data, _params()["w"], 0.02, 6)
    np.testing.assert_allclose(result.params["w"], w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.state["mean"], mean, rtol=1e-5, atol=1e-6)
    self.assertEqual(int(result.state["count"]), 6)
    chex.assert_trees_all_equal_shapes_and_dtypes(result.state, _state())
    np.testing.assert_allclose(
      result.history[0]["seen"][0], data["y"].mean(), rtol=1e-5
    )

  def test_no_state_gives_none(self):
    result = training.fit(
      lambda params, batch, key: (batch["x"] @ params["w"]) ** 2,
      _params(),
      _data(),
      key=jax.random.key(0),
      batch_size=8,
      epochs=1,
    )
    self.assertIsNone(result.state)

  def test_seeds_equal_runs_of_their_own(self):
    keys = jax.random.split(jax.random.key(5), 2)
    w = jax.random.normal(jax.random.key(1), (2, 5))
    state = {
      "mean": jnp.array([[0.0] * 5, [1.0] * 5]),
      "count": jnp.array([0, 7], jnp.int32),
    }
    run = functools.partial(
      training.fit,
      _loss,
      data=_data(),
      optimizer=_OPTIMIZER,
      epochs=2,
      batch_size=8,
      devices=1,
    )
    together = run({"w": w}, key=keys, state=state, seed_axis=True)
    for seed in range(2):
      pick = functools.partial(jax.tree.map, lambda leaf: leaf[seed])  # noqa: B023
      alone = run({"w": w[seed]}, key=keys[seed], state=pick(state))
      chex.assert_trees_all_close(
        pick((together.params, together.state)),
        (alone.params, alone.state),
        rtol=1e-5,
      )

  @parameterized.parameters(1, 3)
  def test_resumed_equals_unbroken(self, stop_after):
    def run(folder, stop=None):
      def on_epoch(record):
        if record["epoch"] == stop:
          raise KeyboardInterrupt

      with checkpoints.Store(folder) as store:
        return training.fit(
          _loss,
          _params(),
          _data(39),
          key=jax.random.key(4),
          optimizer=_OPTIMIZER,
          epochs=4,
          batch_size=8,
          state=_state(),
          devices=1,
          checkpoints=store,
          checkpoint_every=2,
          on_epoch=on_epoch,
        )

    with tempfile.TemporaryDirectory() as folder:
      whole = run(f"{folder}/whole")
      with self.assertRaises(KeyboardInterrupt):
        run(f"{folder}/broken", stop_after)
      resumed = run(f"{folder}/broken")
    chex.assert_trees_all_equal(
      (resumed.params, resumed.state), (whole.params, whole.state)
    )
    self.assertEqual(int(whole.state["count"]), 4 * 5)

  def test_state_that_overflows(self):
    def loss(params, state, batch, key):
      del key
      return batch["x"] @ params["w"] ** 2, {}, {"s": state["s"] * 1e30}

    with self.assertRaisesRegex(training.NonFiniteLossError, "at step"):
      training.fit(
        loss,
        _params(),
        _data(),
        key=jax.random.key(0),
        epochs=1,
        batch_size=8,
        state={"s": jnp.ones(())},
        devices=1,
      )


class ErrorsTest(parameterized.TestCase):
  def _fit(self, loss, **options):
    options = {"batch_size": 8, "epochs": 1, "devices": 1} | options
    training.fit(loss, _params(), _data(39), key=jax.random.key(0), **options)

  @parameterized.parameters(
    (lambda params, state, batch, key: batch["x"] @ params["w"], "1 of 3"),
    (
      lambda params, state, batch, key: (batch["x"] @ params["w"], state),
      "2 of 3",
    ),
  )
  def test_loss_without_the_new_state(self, loss, message):
    with self.assertRaisesRegex(ValueError, message):
      self._fit(loss, state=_state())

  def test_new_state_without_a_state(self):
    with self.assertRaisesRegex(ValueError, "the run has no state"):
      self._fit(lambda params, batch, key: (batch["x"] @ params["w"], {}, {}))

  def test_new_state_of_another_shape(self):
    def loss(params, state, batch, key):
      new = {**state, "mean": state["mean"][:2]}
      return batch["x"] @ params["w"], {}, new

    with self.assertRaisesRegex(
      tree.TreeMismatchError, r"leaf 'mean' has shape \(5,\) in state"
    ):
      self._fit(loss, state=_state())

  def test_padded_tail(self):
    with self.assertRaisesRegex(ValueError, "does not divide over the devices"):
      self._fit(_loss, state=_state(), devices=4)


class BatchNormTest(parameterized.TestCase):
  """A network with batch normalisation gives the same on any devices."""

  def _run(self, devices, examples, batch_size):
    model = models.CNN(
      widths=(4,), num_classes=3, axis_name=training.DEVICE_AXIS
    )
    generator = np.random.default_rng(0)
    data = {
      "x": generator.normal(size=(examples, 4, 4, 1)).astype(np.float32),
      "y": generator.integers(0, 3, examples).astype(np.int32),
    }

    def loss(params, context):
      batch = context.batch
      logits, new = model.apply(
        {"params": params, "batch_stats": context.state},
        batch["x"],
        train=True,
        mask=context.weights,
        mutable="batch_stats",
      )
      losses = optax.softmax_cross_entropy_with_integer_labels(
        logits, batch["y"]
      )
      return losses, {}, new["batch_stats"]

    variables = jax.tree.map(
      lambda leaf: leaf[None],
      model.init(jax.random.key(0), data["x"][:1]),
    )
    return training.train(
      loss,
      variables["params"],
      data,
      optimizer=training.sgd(0.1, 0.1, 2, 4),
      epochs=2,
      batch_size=batch_size,
      keys=jax.random.split(jax.random.key(1), 1),
      state=variables["batch_stats"],
      devices=devices,
    )

  @parameterized.parameters(
    (29, 8),  # A tail of 5: on 4 devices one holds padding only.
    (32, 8),
  )
  def test_devices_agree(self, examples, batch_size):
    one = self._run(1, examples, batch_size)
    four = self._run(4, examples, batch_size)
    chex.assert_trees_all_close(
      (four.params, four.state), (one.params, one.state), rtol=1e-4, atol=1e-5
    )
    stats = one.state["Norm_0"]
    self.assertGreater(float(jnp.abs(stats["mean"]).max()), 1e-3)
    np.testing.assert_allclose(
      [record["loss"] for record in four.history],
      [record["loss"] for record in one.history],
      rtol=1e-5,
    )


if __name__ == "__main__":
  absltest.main()
