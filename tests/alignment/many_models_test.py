"""Tests of MergeMany and of cycle-consistent matching."""

from __future__ import annotations

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import alignment, tree
from tests.alignment import _networks

KEY = jax.random.key(0)


def merge_many(models, spec, **options):
  _, aligned, info = alignment.merge_many(models, spec, key=KEY, **options)
  return aligned, info


def cycle_consistent(models, spec, **options):
  return alignment.cycle_consistent_matching(models, spec, key=KEY, **options)


def published(models, spec):
  return cycle_consistent(models, spec, refine=False)


def pairwise(models, skip=()):
  """The sum of the inner products of all pairs."""
  vectors = [
    np.concatenate(
      [
        np.asarray(leaf, np.float64).ravel()
        for name, leaf in zip(
          tree.leaf_names(model), jax.tree.leaves(model), strict=True
        )
        if name not in skip
      ]
    )
    for model in models
  ]
  return sum(a @ b for a, b in itertools.combinations(vectors, 2))


def shuffled(spec, params, number, noise=0.03):
  """Noisy permuted copies, and their permutations."""
  drawn = [
    alignment.random_permutations(spec, params, jax.random.key(10 + i))
    for i in range(number)
  ]
  models = [
    alignment.apply_permutations(
      spec, _networks.noisy(params, noise, seed=i), one
    )
    for i, one in enumerate(drawn)
  ]
  return models, drawn


class ManyModelsTest(parameterized.TestCase):
  @parameterized.product(
    match=(merge_many, cycle_consistent, published),
    name=("mlp", "transformer"),
  )
  def test_known_permutations(self, match, name):
    params, spec, apply_fn = _networks.NETWORKS[name]()
    models, drawn = shuffled(spec, params, 3)
    aligned, info = match(models, spec)
    self.assertLen(aligned, 3)
    # From model to model, whatever the common order is.
    for i, j in itertools.combinations(range(3), 2):
      found = alignment.relative_permutations(
        info.permutations[i], info.permutations[j]
      )
      for group in spec:
        expected = np.argsort(drawn[j][group])[np.asarray(drawn[i][group])]
        np.testing.assert_array_equal(found[group], expected)
    x = _networks.inputs(name)
    for model, moved in zip(models, aligned, strict=True):
      chex.assert_trees_all_close(
        apply_fn(moved, x), apply_fn(model, x), atol=1e-5
      )
    np.testing.assert_allclose(
      info.objectives[-1], pairwise(aligned), rtol=1e-4
    )
    np.testing.assert_allclose(info.objectives[0], pairwise(models), rtol=1e-3)

  def test_few_sweeps(self):
    """A model whose ascent was cut short is taken up again."""
    params, spec, _ = _networks.mlp((5, 9, 9, 9, 9, 3))
    move = alignment.random_permutations(spec, params, jax.random.key(3))
    moved = alignment.apply_permutations(spec, params, move)
    # The others are alike and large, so that they never move.
    large = jax.tree.map(lambda leaf: 10 * leaf, params)
    aligned, info = merge_many([moved, large, large], spec, max_sweeps=1)
    self.assertTrue(info.converged)
    chex.assert_trees_all_close(aligned[0], params)

  @parameterized.parameters(merge_many, cycle_consistent, published)
  def test_unlike_networks(self, match):
    spec = _networks.cnn()[1]
    models = [_networks.cnn(seed)[0] for seed in range(4)]
    before = jax.tree.map(np.array, models)
    aligned, info = match(models, spec)
    chex.assert_trees_all_equal(before, models)
    skip = {"batch_stats/Norm_0/mean"}
    np.testing.assert_allclose(
      info.objectives[-1], pairwise(aligned, skip), rtol=1e-4
    )
    last = -1 if match is merge_many else -2
    self.assertTrue((np.diff(info.objectives[: last or None]) >= 0).all())
    self.assertEqual(info.objectives.shape, (info.n_iters + 1,))
    self.assertGreater(info.objectives[-1], 2 * abs(info.objectives[0]))
    for i, j, k in itertools.permutations(range(4), 3):
      first, second, both = (
        alignment.relative_permutations(
          info.permutations[a], info.permutations[b]
        )
        for a, b in ((i, j), (j, k), (i, k))
      )
      for group in spec:
        np.testing.assert_array_equal(
          np.asarray(second[group])[np.asarray(first[group])], both[group]
        )

  def test_mean(self):
    params, spec, _ = _networks.mlp()
    models, _ = shuffled(spec, params, 3)
    merged, aligned, info = alignment.merge_many(models, spec, key=KEY)
    self.assertTrue(info.converged)
    chex.assert_trees_all_close(
      merged, jax.tree.map(lambda *x: sum(x) / 3, *aligned), atol=1e-6
    )

  def test_two_models_equal_weight_matching(self):
    spec = _networks.mlp((4, 9, 3))[1]
    models = [_networks.mlp((4, 9, 3), seed)[0] for seed in range(2)]
    _, expected = alignment.weight_matching(*models, spec, key=KEY)
    for match in (merge_many, published):
      _, info = match(models, spec)
      found = alignment.relative_permutations(*info.permutations)
      chex.assert_trees_all_equal(found, expected.permutations)

  def test_brute_force(self):
    spec = _networks.mlp((3, 4, 2))[1]
    models = [_networks.mlp((3, 4, 2), seed)[0] for seed in range(3)]
    _, info = cycle_consistent(models, spec)
    orders = np.array(list(itertools.permutations(range(4))))
    kernels = [
      [np.asarray(model[f"Dense_{i}"]["kernel"]) for i in range(2)]
      for model in models
    ]
    biases = [
      [np.asarray(model[f"Dense_{i}"]["bias"]) for i in range(2)]
      for model in models
    ]
    moved = [
      [
        np.concatenate(
          [k[0][:, p].ravel(), k[1][p].ravel(), b[0][p], b[1]], dtype=np.float64
        )
        for p in orders
      ]
      for k, b in zip(kernels, biases, strict=True)
    ]
    values = sorted(
      moved[0][0] @ a + moved[0][0] @ b + a @ b
      for a in moved[1]
      for b in moved[2]
    )
    # Of 576; a local search may miss the first.
    self.assertGreaterEqual(info.objectives[-1], values[-6] - 1e-4)

  def test_refined_is_no_worse(self):
    spec = _networks.mlp()[1]
    models = [_networks.mlp(seed=seed)[0] for seed in range(4)]
    (_, plain), (_, refined) = (
      published(models, spec),
      cycle_consistent(models, spec),
    )
    self.assertGreaterEqual(refined.objectives[-1], plain.objectives[-1] - 1e-5)
    # The first model holds the order.
    for order in plain.permutations[0].values():
      np.testing.assert_array_equal(order, np.arange(len(order)))

  @parameterized.parameters(merge_many, cycle_consistent, published)
  def test_one_model(self, match):
    params, spec, _ = _networks.mlp()
    (aligned,), info = match([params], spec)
    chex.assert_trees_all_equal(aligned, params)
    self.assertTrue(info.converged)

  @parameterized.parameters(merge_many, cycle_consistent)
  def test_half_types(self, match):
    params, spec, _ = _networks.mlp()
    models, _ = shuffled(spec, params, 2)
    models = jax.tree.map(lambda x: x.astype(jnp.bfloat16), models)
    aligned, _ = match(models, spec)
    chex.assert_trees_all_equal_dtypes(aligned[1], models[1])

  @parameterized.parameters(merge_many, cycle_consistent)
  def test_errors(self, match):
    params, spec, _ = _networks.mlp()
    with self.assertRaisesRegex(ValueError, "no models"):
      match([], spec)
    with self.assertRaisesRegex(
      tree.TreeMismatchError, "leaf 'Dense_1/bias' .* model 1"
    ):
      match([params, _networks.mlp((5, 8, 6, 3))[0]], spec)
    bad = jax.tree.map(lambda x: x * jnp.inf, params)
    with self.assertRaisesRegex(ValueError, "leaf 'Dense_0/bias' of model 1"):
      match([params, bad], spec)
    with self.assertRaisesRegex(ValueError, "tolerance must be"):
      match([params], spec, tolerance=-1.0)
    with self.assertRaisesRegex(TypeError, "model 0 is traced"):
      jax.jit(lambda model: match([model, params], spec))(params)
    with self.assertRaisesRegex(ValueError, "only one has h"):
      alignment.relative_permutations({"g": [0]}, {"g": [0], "h": [0]})


if __name__ == "__main__":
  absltest.main()
