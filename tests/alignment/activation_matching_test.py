"""Tests of activation matching."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from scipy import optimize

from jaxmerge import alignment
from jaxmerge.alignment import Axis
from tests.alignment import _networks


def hidden(params, x):
  """Activations of both hidden layers of an MLP of three layers."""
  found = {}
  for i in range(2):
    layer = params[f"Dense_{i}"]
    x = jnp.tanh(x @ layer["kernel"] + layer["bias"][None])
    found[f"hidden_{i}"] = x
  return found


class ActivationMatchingTest(parameterized.TestCase):
  @parameterized.parameters("correlation", "covariance", "inner_product")
  def test_known_permutation(self, similarity):
    params, spec, apply_fn = _networks.mlp()
    x = _networks.draw(np.random.default_rng(2), 64, 5)
    drawn = alignment.random_permutations(spec, params, jax.random.key(1))
    model = alignment.apply_permutations(
      spec, _networks.noisy(params, 0.02), drawn
    )
    # Alike in scale, for those similarities that see it.
    scaled = lambda acts: {  # noqa: E731
      k: v / jnp.linalg.norm(v, axis=0, keepdims=True) for k, v in acts.items()
    }
    a, b = scaled(hidden(params, x)), scaled(hidden(model, x))
    aligned, info = alignment.activation_matching(
      a, b, model, spec, similarity=similarity
    )
    for group, order in drawn.items():
      np.testing.assert_array_equal(info.permutations[group], np.argsort(order))
    chex.assert_trees_all_close(
      apply_fn(aligned, x), apply_fn(model, x), atol=1e-5
    )
    self.assertGreater(info.objectives[1], info.objectives[0])
    self.assertEqual((info.converged, info.n_iters), (True, 1))

  @parameterized.parameters("correlation", "covariance", "inner_product")
  def test_against_numpy(self, similarity):
    rng = np.random.default_rng(0)
    a, b = rng.normal(3.0, 2.0, size=(2, 4, 5, 6)).astype(np.float32)
    model = {"w": jnp.arange(6.0)}
    spec = {"g": (Axis("w", 0),)}
    _, info = alignment.activation_matching(
      {"g": a}, {"g": b}, model, spec, similarity=similarity
    )
    x, y = (v.reshape(20, 6).astype(np.float64) for v in (a, b))
    if similarity == "correlation":
      expected = np.corrcoef(x, y, rowvar=False)[:6, 6:]
    elif similarity == "covariance":
      expected = np.cov(x, y, rowvar=False, bias=True)[:6, 6:]
    else:
      expected = x.T @ y / 20
    rows, columns = optimize.linear_sum_assignment(expected, maximize=True)
    np.testing.assert_array_equal(info.permutations["g"], columns)
    np.testing.assert_allclose(
      info.objectives,
      [np.trace(expected), expected[rows, columns].sum()],
      rtol=1e-4,
    )

  def test_batches(self):
    rng = np.random.default_rng(0)
    a, b = rng.normal(100.0, 1.0, size=(2, 30, 4)).astype(np.float32)
    sizes = {"g": 4}
    whole = alignment.activation_moments({"g": a}, {"g": b}, sizes)
    moments = None
    for part in (slice(0, 5), slice(5, 17), slice(17, 30)):
      moments = alignment.activation_moments(
        {"g": a[part]}, {"g": b[part]}, sizes, moments
      )
    chex.assert_trees_all_close(moments, whole, rtol=2e-4, atol=2e-4)
    model, spec = {"w": jnp.arange(4.0)}, {"g": (Axis("w", 0),)}
    first = alignment.activation_moments({"g": a[:9]}, {"g": b[:9]}, sizes)
    _, info = alignment.activation_matching(
      {"g": a[9:]}, {"g": b[9:]}, model, spec, moments=first
    )
    _, expected = alignment.activation_matching({"g": a}, {"g": b}, model, spec)
    np.testing.assert_allclose(info.objectives, expected.objectives, rtol=1e-4)

  def test_heads(self):
    # Entries of a head are compared with the same entries of another one.
    rng = np.random.default_rng(0)
    a = rng.normal(size=(20, 3, 2)).astype(np.float32)
    order = np.array([2, 0, 1])
    model = {"w": jnp.arange(6.0)}
    spec = {"heads": (Axis("w", 0, inner=2),)}
    _, info = alignment.activation_matching(
      {"heads": a.reshape(20, 6)},
      {"heads": a[:, order].reshape(20, 6)},
      model,
      spec,
    )
    np.testing.assert_array_equal(info.permutations["heads"], np.argsort(order))
    np.testing.assert_allclose(info.objectives[1], 3.0, rtol=1e-5)

  def test_constant_neurons(self):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(20, 4)).astype(np.float32)
    a[:, 1] = 0.1
    b = a[:, [1, 0, 3, 2]]
    _, info = alignment.activation_matching(
      {"g": a}, {"g": b}, {"w": jnp.arange(4.0)}, {"g": (Axis("w", 0),)}
    )
    np.testing.assert_array_equal(info.permutations["g"], [1, 0, 3, 2])
    np.testing.assert_allclose(info.objectives[1], 3.0, rtol=1e-5)

  def test_half_types_and_groups_left_out(self):
    params, spec, _ = _networks.mlp()
    x = _networks.draw(np.random.default_rng(2), 32, 5)
    acts = {"hidden_0": hidden(params, x)["hidden_0"].astype(jnp.bfloat16)}
    flipped = {"hidden_0": acts["hidden_0"][:, ::-1]}
    _, info = alignment.activation_matching(acts, flipped, params, spec)
    np.testing.assert_array_equal(
      info.permutations["hidden_0"], np.arange(8)[::-1]
    )
    np.testing.assert_array_equal(info.permutations["hidden_1"], np.arange(7))

  @parameterized.parameters(
    (np.ones((3, 5)), np.ones((3, 5)), r"\[..., 4\].*got \(3, 5\)"),
    (np.ones((3, 4)), np.ones((2, 4)), "same examples"),
    (np.ones((0, 4)), np.ones((0, 4)), r"\(0, 4\)"),
    (np.full((3, 4), np.nan), np.ones((3, 4)), "group 'g' are not finite"),
    (np.ones((3, 4), np.int32), np.ones((3, 4)), "must be floating-point"),
  )
  def test_bad_activations(self, a, b, message):
    with self.assertRaisesRegex(ValueError, message):
      alignment.activation_matching(
        {"g": a}, {"g": b}, {"w": jnp.arange(4.0)}, {"g": (Axis("w", 0),)}
      )

  def test_errors(self):
    model, spec = {"w": jnp.arange(4.0)}, {"g": (Axis("w", 0),)}
    acts = {"g": np.eye(4, dtype=np.float32)}
    match = lambda a, b, **options: alignment.activation_matching(  # noqa: E731
      a, b, model, spec, **options
    )
    for a, b, message in (
      (acts, {}, "only one has g"),
      ({}, {}, "no activations"),
      ({"x": acts["g"]}, {"x": acts["g"]}, "group 'x', which the spec"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        match(a, b)
    with self.assertRaisesRegex(ValueError, "unknown similarity 'cosine'"):
      match(acts, acts, similarity="cosine")
    moments = alignment.activation_moments(acts, acts, {"g": 4})
    other = alignment.ActivationMoments(*({"h": v["g"]} for v in moments))
    with self.assertRaisesRegex(ValueError, "moments are of the groups h"):
      match(acts, acts, moments=other)


if __name__ == "__main__":
  absltest.main()
