"""Tests of subspaces of a parameter space."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge.continual import _subspace

PARAMS = {
  "layer_0": {"bias": np.zeros(3), "kernel": np.zeros((4, 3))},
  "head": {"kernel": np.zeros((3, 2))},
}


def _tree(draws):
  return jax.tree.map(
    lambda leaf: jnp.asarray(draws.normal(size=leaf.shape), jnp.float32), PARAMS
  )


def _flat(tree):
  return np.concatenate(
    [np.asarray(leaf, np.float64).reshape(-1) for leaf in jax.tree.leaves(tree)]
  )


def _stacked(trees):
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _span(groups, origin, directions):
  """The subspace of one seed."""
  space = _subspace.span(
    groups,
    jax.tree.map(lambda leaf: leaf[None], origin),
    jax.tree.map(lambda leaf: leaf[None], _stacked(directions)),
  )
  return jax.tree.map(lambda leaf: leaf[0], space)


def _axes(groups, space):
  """The axes of the coordinates, flat, in float64."""
  parts = []
  for group, leaf in zip(groups, jax.tree.leaves(space.vectors), strict=True):
    rows = np.asarray(leaf, np.float64).reshape(len(leaf), -1)
    parts.append(np.asarray(space.weights[group], np.float64) @ rows)
  return np.concatenate(parts, axis=1)


class SubspaceTest(parameterized.TestCase):
  def test_gram_schmidt_is_qr(self):
    vectors = np.random.default_rng(0).normal(size=(4, 9))
    found = _subspace.gram_schmidt(vectors @ vectors.T, 1e-3) @ vectors
    q, r = np.linalg.qr(vectors.T)
    np.testing.assert_allclose(found, (q * np.diag(r)).T, atol=1e-10)

  @parameterized.parameters((0.05, True), (0.2, False))
  def test_what_is_left_of_a_vector_decides(self, tolerance, kept):
    # The second one leaves a tenth of its length.
    vectors = np.array([[1.0, 0.0], [np.sqrt(0.99), 0.1]])
    found = _subspace.gram_schmidt(vectors @ vectors.T, tolerance)
    self.assertEqual(bool(np.abs(found[1]).sum() > 0), kept)

  def test_span_in_one_group(self):
    draws = np.random.default_rng(1)
    origin = _tree(draws)
    directions = [_tree(draws) for _ in range(3)]
    directions.append(
      jax.tree.map(lambda a, b: a - 2 * b, directions[0], directions[2])
    )
    groups = (0, 0, 0)
    space = _span(groups, origin, directions)
    rows = _axes(groups, space)
    _, r = np.linalg.qr(np.stack([_flat(one) for one in directions[:3]]).T)
    squares = np.append(np.diag(r) ** 2, 0)
    np.testing.assert_allclose(rows @ rows.T, np.diag(squares), atol=1e-4)
    np.testing.assert_allclose(rows[0], _flat(directions[0]), rtol=1e-5)
    np.testing.assert_array_equal(
      _subspace.kept(space), [[True, True, True, False]]
    )
    # They span what was given.
    _, residuals, _, _ = np.linalg.lstsq(rows[:3].T, _flat(directions[2]))
    np.testing.assert_allclose(residuals, 0, atol=1e-8)

  def test_nearly_parallel_directions(self):
    draws = np.random.default_rng(2)
    first = _tree(draws)
    near = jax.tree.map(lambda a, b: a + 0.05 * b, first, _tree(draws))
    groups = (0, 0, 0)
    space = _span(groups, first, [first, near])
    rows = _axes(groups, space)
    lengths = np.linalg.norm(rows, axis=1)
    self.assertLess(lengths[1], 0.1 * lengths[0])
    cosine = rows[0] @ rows[1] / lengths.prod()
    np.testing.assert_allclose(cosine, 0, atol=1e-4)

  def test_groups(self):
    names = _subspace.group_names(PARAMS, "layer")
    self.assertEqual(names, ("head", "layer_0", "layer_0"))
    self.assertEqual(_subspace.group_names(PARAMS, "global"), ("all",) * 3)
    leaves = _subspace.group_names(PARAMS, "leaf")
    self.assertEqual(leaves, ("head/kernel", "layer_0/bias", "layer_0/kernel"))
    deep = {"encoder": {"layer": {"1": {"out": {"bias": 0.0}}}, "norm": 0.0}}
    self.assertEqual(
      _subspace.group_names(deep, "layer"), ("encoder/layer/1", "encoder")
    )
    groups = _subspace.group_numbers(names)
    self.assertEqual(groups, (0, 1, 1))
    draws = np.random.default_rng(3)
    origin, *directions = (_tree(draws) for _ in range(3))
    space = _span(groups, origin, directions)
    head = _axes(groups, space)[:, :6]
    np.testing.assert_allclose(head[0] @ head[1], 0, atol=1e-5)
    coefficients = jnp.array([[1.0, 0.0], [0.0, 0.0]])
    moved = _subspace.moved(groups, space, coefficients)
    np.testing.assert_allclose(
      moved["head"]["kernel"],
      origin["head"]["kernel"] + directions[0]["head"]["kernel"],
      rtol=1e-5,
    )
    np.testing.assert_array_equal(
      moved["layer_0"]["bias"], origin["layer_0"]["bias"]
    )

  def test_lengths_and_cosines(self):
    draws = np.random.default_rng(7)
    origin = _tree(draws)
    directions = [_tree(draws) for _ in range(3)]
    flat = np.stack([_flat(one) for one in directions])
    for groups in ((0, 0, 0), (0, 1, 0)):
      space = _span(groups, origin, directions)
      np.testing.assert_allclose(
        _subspace.lengths(space), np.linalg.norm(flat, axis=1), rtol=1e-5
      )
      coefficients = draws.normal(size=(max(groups) + 1, 3)).astype(np.float32)
      moved = _subspace.moved(groups, space, jnp.asarray(coefficients))
      way = _flat(moved) - _flat(origin)
      expected = flat @ way / np.linalg.norm(flat, axis=1) / np.linalg.norm(way)
      np.testing.assert_allclose(
        _subspace.cosines(space, coefficients), expected, atol=1e-5
      )
      still = _subspace.cosines(space, 0 * coefficients)
      np.testing.assert_array_equal(still, np.zeros(3))

  def test_coordinates_are_the_gradient(self):
    draws = np.random.default_rng(4)
    groups = (0, 1, 1)
    origin, *directions = (_tree(draws) for _ in range(4))
    space = _span(groups, origin, directions)

    def value(params):
      return sum((leaf**3).sum() for leaf in jax.tree.leaves(params))

    start = jnp.asarray(draws.normal(size=(2, 3)), jnp.float32)
    expected = jax.grad(lambda a: value(_subspace.moved(groups, space, a)))(
      start
    )
    gradient = jax.grad(value)(_subspace.moved(groups, space, start))
    np.testing.assert_allclose(
      _subspace.coordinates(groups, space, gradient), expected, rtol=1e-4
    )

  def test_unknown_granularity(self):
    with self.assertRaisesRegex(ValueError, "granularity 'block'.*leaf"):
      _subspace.group_names(PARAMS, "block")


if __name__ == "__main__":
  absltest.main()
