"""Tests of the transformations that come last in an optimizer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized

from jaxmerge.continual import _path, _updates

Path = _path.Path


def _run(transformation, steps, frozen=None):
  """The parameters after each of some given steps, and the last state."""
  steps = jnp.asarray(steps, jnp.float32)
  params = {"w": jnp.zeros(steps.shape[1:])}
  state = transformation.init(params)

  @jax.jit
  def scan(params, state):
    def body(carry, update):
      params, state = carry
      updates, state = transformation.update(
        {"w": update}, state, params, frozen=frozen
      )
      params = optax.apply_updates(params, updates)
      return (params, state), params["w"]

    return jax.lax.scan(body, (params, state), steps)

  (_, state), found = scan(params, state)
  return np.asarray(found), state


def _one_seed(state):
  return jax.tree.map(lambda leaf: leaf[None], state)


class PathTest(parameterized.TestCase):
  @parameterized.parameters(
    (1, 2, [1]),
    (1, 9, [4]),
    (3, 12, [3, 6, 9]),
    (4, 5, [1, 2, 3, 4]),
    (2, 10, [3, 7]),
  )
  def test_by_step(self, snapshots, steps, expected):
    draws = np.random.default_rng(0).normal(size=(steps, 3))
    path = Path(snapshots)
    found, state = _run(_path.transformation(path, steps), draws)
    kept = _path.taken(path, _one_seed(state))["w"]
    self.assertEqual(kept.shape, (1, snapshots, 3))
    np.testing.assert_array_equal(kept[0], found[np.array(expected) - 1])

  @parameterized.parameters(1, 2, 3, 5)
  def test_by_distance(self, snapshots):
    # A warm-up, long steps, then a decay.
    sizes = np.concatenate(
      [np.linspace(0.01, 1, 10), np.ones(30), np.geomspace(1, 1e-3, 60)]
    )
    directions = np.random.default_rng(1).normal(size=(100, 4))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    steps = sizes[:, None] * directions
    path = Path(snapshots, "distance")
    found, state = _run(_path.transformation(path, 100), steps)
    kept = np.asarray(_path.taken(path, _one_seed(state))["w"])[0]
    way = sizes.cumsum()
    np.testing.assert_allclose(state.length, way[-1], rtol=1e-5)
    places = [int(np.abs(found - one).sum(axis=1).argmin()) for one in kept]
    for one, place in zip(kept, places, strict=True):
      np.testing.assert_array_equal(one, found[place])
    # Within half of the spacing that so many slots allow, and a step.
    wanted = way[-1] * np.arange(1, snapshots + 1) / (snapshots + 1)
    # At worst pieces are twice as long as half of the slots need.
    room = 2 * way[-1] / (3 * snapshots) + 1.0
    np.testing.assert_array_less(np.abs(way[places] - wanted), room)
    self.assertEqual(len(set(places)), snapshots)

  def test_distances_of_each_seed(self):
    path = Path(1, "distance")
    states = []
    for sizes in ([1.0] * 8, [4.0] + [0.5] * 7):
      steps = np.array(sizes)[:, None]
      found, state = _run(_path.transformation(path, 8), steps)
      states.append(state)
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    kept = _path.taken(path, both)["w"]
    np.testing.assert_allclose(kept[0, 0], [4.0], atol=1.0)
    # The first step is half of the way.
    np.testing.assert_allclose(kept[1, 0], [4.0], atol=0.6)

  def test_bad_settings(self):
    with self.assertRaisesRegex(ValueError, "without snapshots has no length"):
      _path.check(Path(0))
    with self.assertRaisesRegex(ValueError, "by 'epoch'. Choose step or"):
      _path.check(Path(1, "epoch"))
    with self.assertRaisesRegex(ValueError, "4 snapshots need at least 5"):
      _path.transformation(Path(4), 4)


class ProjectTest(parameterized.TestCase):
  @parameterized.parameters(((4, 3), 0.0), ((2, 2, 3), 1.0))
  def test_projection(self, shape, free):
    draws = np.random.default_rng(2)
    basis, _ = np.linalg.qr(draws.normal(size=(4, 2)))
    projector = basis @ basis.T
    updates = {
      "layer": {
        "bias": jnp.asarray(draws.normal(size=3), jnp.float32),
        "kernel": jnp.asarray(draws.normal(size=shape), jnp.float32),
      }
    }
    frozen = {
      "projection": {
        "projectors": {"layer/kernel": jnp.asarray(projector, jnp.float32)},
        "free": jnp.float32(free),
      },
      "labels": None,
    }
    one = _updates.project()
    found, _ = one.update(updates, one.init(updates), None, frozen=frozen)
    rows = np.asarray(updates["layer"]["kernel"]).reshape(4, 3)
    np.testing.assert_allclose(
      np.asarray(found["layer"]["kernel"]).reshape(4, 3),
      rows - projector @ rows,
      atol=1e-6,
    )
    # What the earlier tasks' inputs see does not move.
    inputs = draws.normal(size=(5, 2)) @ basis.T
    np.testing.assert_allclose(
      inputs @ np.asarray(found["layer"]["kernel"]).reshape(4, 3),
      0,
      atol=1e-5,
    )
    np.testing.assert_array_equal(
      found["layer"]["bias"], free * updates["layer"]["bias"]
    )


class SignsTest(parameterized.TestCase):
  @parameterized.parameters(1, 3)
  def test_reset(self, period):
    draws = np.random.default_rng(3)
    steps = draws.normal(size=(7, 6))
    sign = np.array([1, -1, 0, 1, -1, 0])
    origin = np.array([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    value = draws.normal(size=6)
    frozen = {
      "signs": {
        name: {"w": jnp.asarray(one, dtype)}
        for name, one, dtype in (
          ("sign", sign, jnp.int8),
          ("origin", origin, jnp.float32),
          ("value", value, jnp.float32),
        )
      }
    }
    found, state = _run(_updates.align_signs(period), steps, frozen)
    self.assertEqual(int(state), 7)
    point = np.zeros(6)
    for number, step in enumerate(steps, 1):
      point = point + step
      if number % period == 0:
        other = (sign != 0) & (np.sign(point - origin) != sign)
        point = np.where(other, value, point)
      np.testing.assert_allclose(found[number - 1], point, atol=1e-5)


if __name__ == "__main__":
  absltest.main()
