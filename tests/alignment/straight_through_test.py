"""Tests of learned permutations."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized
from scipy import optimize

from jaxmerge import alignment, tree
from tests.alignment import _networks

KEY = jax.random.key(0)
RATE = 3.0


def problem(sizes=(5, 8, 7, 3)):
  """Two unlike networks, and the loss of fitting the first one's function."""
  (reference, spec, apply_fn), (model, _, _) = (
    _networks.mlp(sizes, seed) for seed in (0, 1)
  )
  x = _networks.draw(np.random.default_rng(3), 4, 32, 5)
  batches = {"x": x, "y": jax.vmap(apply_fn, (None, 0))(reference, x)}

  def loss_fn(params, batch):
    return jnp.mean(jnp.square(apply_fn(params, batch["x"]) - batch["y"]))

  return reference, model, loss_fn, batches, spec


def midpoint_loss(reference, model, loss_fn, batches):
  point = jax.tree.map(lambda a, b: (a + b) / 2, reference, model)
  return float(np.mean(jax.vmap(loss_fn, (None, 0))(point, batches)))


class StraightThroughTest(parameterized.TestCase):
  def test_loss_falls(self):
    reference, model, loss_fn, batches, spec = problem()
    aligned, info = alignment.straight_through(
      reference,
      model,
      loss_fn,
      batches,
      optax.adam(0.02),
      spec,
      key=KEY,
      steps=60,
    )
    found = midpoint_loss(reference, aligned, loss_fn, batches)
    self.assertLess(found, 0.9 * info.losses[0])
    self.assertLess(found, midpoint_loss(reference, model, loss_fn, batches))
    np.testing.assert_allclose(found, info.losses.min(), rtol=1e-4)
    self.assertEqual(info.best_step, int(np.argmin(info.losses)))
    self.assertEqual(info.losses.shape, (61,))
    self.assertEqual(info.objectives.shape, (61,))
    chex.assert_trees_all_equal(
      aligned, alignment.apply_permutations(spec, model, info.permutations)
    )
    # The start is weight matching.
    matched, start = alignment.weight_matching(
      reference, model, spec, key=KEY, restarts=0
    )
    self.assertGreaterEqual(start.objectives[-1], info.objectives[0] - 1.0)
    self.assertLess(
      found, midpoint_loss(reference, matched, loss_fn, batches) + 1e-6
    )

  def test_a_step_against_the_gradient(self):
    # With one hidden layer the next permutation is SciPy's for the copy after
    # a step of SGD along half of the midpoint's gradient.
    reference, model, loss_fn, batches, spec = problem((5, 9, 3))
    run = functools.partial(
      alignment.straight_through,
      reference,
      model,
      loss_fn,
      batches,
      spec=spec,
      key=KEY,
    )
    _, start = run(optax.sgd(0.0), steps=1)
    self.assertEqual((start.best_step, start.losses[0]), (0, start.losses[1]))
    aligned = alignment.apply_permutations(spec, model, start.permutations)
    point = jax.tree.map(lambda a, b: (a + b) / 2, reference, aligned)
    copy = jax.tree.map(np.asarray, reference)
    tried = 0
    for step in range(2):
      batch = {name: values[step] for name, values in batches.items()}
      gradient = jax.grad(loss_fn)(point, batch)
      copy = jax.tree.map(
        lambda a, g: a - RATE * 0.5 * np.asarray(g), copy, gradient
      )
      similarity = (
        copy["Dense_0"]["kernel"].T @ np.asarray(model["Dense_0"]["kernel"])
        + np.outer(copy["Dense_0"]["bias"], model["Dense_0"]["bias"])
        + copy["Dense_1"]["kernel"] @ np.asarray(model["Dense_1"]["kernel"]).T
      )
      rows, found = optimize.linear_sum_assignment(similarity, maximize=True)
      _, info = run(optax.sgd(RATE), steps=step + 1)
      rest = np.sum(
        copy["Dense_1"]["bias"] * np.asarray(model["Dense_1"]["bias"])
      )
      np.testing.assert_allclose(
        info.objectives[-1], similarity[rows, found].sum() + rest, rtol=1e-5
      )
      tried += not np.array_equal(found, start.permutations["hidden_0"])
      aligned = alignment.apply_permutations(spec, model, {"hidden_0": found})
      point = jax.tree.map(lambda a, b: (a + b) / 2, reference, aligned)
      np.testing.assert_allclose(
        info.losses[-1],
        midpoint_loss(reference, aligned, loss_fn, batches),
        rtol=1e-4,
      )
    self.assertGreater(tried, 0)

  def test_project_every(self):
    reference, model, loss_fn, batches, spec = problem()
    _, info = alignment.straight_through(
      reference,
      model,
      loss_fn,
      batches,
      optax.adam(0.02),
      spec,
      key=KEY,
      steps=9,
      project_every=4,
    )
    changes = np.flatnonzero(np.diff(info.objectives)) + 1
    self.assertEqual(changes.tolist(), [4, 8])

  def test_running_statistics_and_half_types(self):
    reference, spec, apply_fn = _networks.cnn()
    model, _, _ = _networks.cnn(1)
    half = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)  # noqa: E731
    x = _networks.draw(np.random.default_rng(0), 2, 3, 32)

    def loss_fn(params, batch):
      return jnp.mean(jnp.square(apply_fn(params, batch)))

    aligned, info = alignment.straight_through(
      half(reference),
      half(model),
      loss_fn,
      x,
      optax.adam(0.01),
      spec,
      key=KEY,
      steps=3,
    )
    chex.assert_trees_all_equal_dtypes(aligned, half(model))
    self.assertTrue(np.isfinite(info.losses).all())

  def test_errors(self):
    reference, model, loss_fn, batches, spec = problem()

    def run(model=model, loss_fn=loss_fn, batches=batches, rate=0.1, **options):
      return alignment.straight_through(
        reference,
        model,
        loss_fn,
        batches,
        optax.sgd(rate),
        spec,
        key=KEY,
        **options,
      )

    for options, message in (
      ({"steps": 0}, "steps must be"),
      ({"project_every": 0}, "project_every must be"),
      ({"batches": {}}, "leading axis"),
      ({"batches": {"x": jnp.ones((2, 3)), "y": jnp.ones(3)}}, "leading axis"),
      ({"loss_fn": lambda p, b: b["x"]}, "must return a scalar"),
      ({"loss_fn": lambda p, b: jnp.nan * b["x"].sum()}, "halfway is nan"),
      ({"rate": float("inf"), "steps": 1}, "trained copy, step 1, has entries"),
      ({"model": jax.tree.map(lambda x: x * jnp.nan, model)}, "of model has"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        run(**options)
    with self.assertRaises(tree.TreeMismatchError):
      run(model={"other": model})


if __name__ == "__main__":
  absltest.main()
