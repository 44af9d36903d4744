"""Tests of examples that the host makes for every epoch."""

from __future__ import annotations

import tempfile
import threading
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import checkpoints, training


def _loss(params, context):
  batch = context.batch
  return (batch["x"] @ params["w"] - batch["y"]) ** 2


def _examples(seed):
  draws = np.random.default_rng(seed)
  return {
    "x": draws.normal(size=(12, 3)).astype(np.float32),
    "y": draws.normal(size=12).astype(np.float32),
  }


def _train(data, epochs=3, **options):
  return training.train(
    _loss,
    {"w": jnp.ones((1, 3))},
    data,
    optimizer=training.sgd(0.1, 0.1, 3, 3),
    epochs=epochs,
    batch_size=4,
    keys=jax.random.key(0)[None],
    **{"devices": 1, **options},
  )


class HostDataTest(parameterized.TestCase):
  @parameterized.parameters(1, 2)
  def test_the_same_examples_give_the_same_run(self, devices):
    fixed = _examples(0)
    host = training.HostData(lambda epoch: fixed, 12)
    chex.assert_trees_all_equal(
      _train(host, devices=devices).params,
      _train(fixed, devices=devices).params,
    )

  def test_every_epoch_has_its_own(self):
    # Full batches: gradient descent on the examples of each epoch.
    asked = []

    def make(epoch):
      asked.append(epoch)
      return _examples(epoch)

    result = training.train(
      _loss,
      {"w": jnp.ones((1, 3))},
      training.HostData(make, 12),
      optimizer=training.sgd(0.1, 0.1, 3, 1, momentum=0.0),
      epochs=3,
      batch_size=12,
      keys=jax.random.key(0)[None],
      devices=1,
    )
    w = np.ones(3)
    for epoch in range(3):
      data = _examples(epoch)
      x, y = np.float64(data["x"]), np.float64(data["y"])
      w = w - 0.1 * 2 * x.T @ (x @ w - y) / 12
    np.testing.assert_allclose(result.params["w"][0], w, rtol=1e-5)
    self.assertEqual(asked, [0, 1, 2])

  def test_a_resumed_run_asks_for_the_rest_and_ends_alike(self):
    asked = []

    def make(epoch):
      asked.append(epoch)
      return _examples(epoch)

    host = training.HostData(make, 12)
    whole = _train(host)
    with tempfile.TemporaryDirectory() as folder:
      with checkpoints.Store(folder) as store:
        _train(host, epochs=2, checkpoints=store)
      asked.clear()
      with checkpoints.Store(folder) as store:
        rest = _train(host, checkpoints=store)
    self.assertEqual(asked, [2])
    chex.assert_trees_all_equal(rest.params, whole.params)

  def test_the_next_epoch_is_made_meanwhile(self):
    main = threading.get_ident()
    events = []

    def make(epoch):
      self.assertNotEqual(threading.get_ident(), main)
      events.append(f"make {epoch}")
      return _examples(epoch)

    def on_epoch(record):
      time.sleep(0.05)
      events.append(f"done {record['epoch']}")

    _train(training.HostData(make, 12), on_epoch=on_epoch)
    self.assertLess(events.index("make 1"), events.index("done 1"))
    self.assertLess(events.index("make 2"), events.index("done 2"))

  def test_errors_of_the_thread_are_raised(self):
    def broken(epoch):
      raise OSError(f"no disk in epoch {epoch}")

    with self.assertRaisesRegex(OSError, "no disk in epoch 0"):
      _train(training.HostData(broken, 12))

  def test_fit_takes_none(self):
    with self.assertRaisesRegex(ValueError, "give it to training.train"):
      training.fit(
        lambda params, batch, key: params["w"].sum(),
        {"w": jnp.ones(3)},
        training.HostData(_examples, 12),
        key=jax.random.key(0),
      )

  def test_another_number_of_examples(self):
    host = training.HostData(lambda epoch: _examples(0), 11)
    with self.assertRaisesRegex(
      ValueError, r"returned 12 examples, not the 11"
    ):
      _train(host)


if __name__ == "__main__":
  absltest.main()
