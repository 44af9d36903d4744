"""Tests of low-rank adapters."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import models
from jaxmerge import tree as tree_lib

Lora = models.Lora


def _network():
  model = models.ViT(num_classes=3, dim=8, depth=1, heads=2, patch=4)
  images = jnp.linspace(0, 1, 2 * 8 * 8 * 3).reshape(2, 8, 8, 3)
  return model, model.init(jax.random.key(0), images)["params"], images


class LoraTest(parameterized.TestCase):
  def test_new_adapters_change_nothing(self):
    model, params, images = _network()
    lora = Lora(rank=2)
    adapters = models.lora_init(lora, jax.random.key(1), params)
    self.assertNotEmpty(adapters)
    changed = models.lora_apply(lora, params, adapters)
    chex.assert_trees_all_equal(changed, params)
    chex.assert_trees_all_equal(
      model.apply({"params": changed}, images),
      model.apply({"params": params}, images),
    )

  @parameterized.parameters(
    ("Dense_0/kernel", (6, 4), (6, 4)),
    ("Attention/query/kernel", (6, 2, 3), (6, 6)),
    ("Attention/out/kernel", (2, 3, 6), (6, 6)),
    ("Conv_0/kernel", (3, 3, 2, 5), (18, 5)),
    ("Conv_1/kernel", (3, 2, 5), (6, 5)),
  )
  def test_product(self, name, shape, sizes):
    draws = np.random.default_rng(0)
    params = {}
    place = params
    *parents, last = name.split("/")
    for part in parents:
      place = place.setdefault(part, {})
    place[last] = jnp.asarray(draws.normal(size=shape), jnp.float32)
    lora = Lora(rank=3, alpha=6.0, targets="kernel")
    adapters = models.lora_init(lora, jax.random.key(0), params)
    self.assertEqual(list(adapters), [name])
    a, b = adapters[name]["a"], adapters[name]["b"]
    self.assertEqual(a.shape, (sizes[0], 3))
    self.assertEqual(b.shape, (3, sizes[1]))
    bound = sizes[0] ** -0.5
    self.assertLessEqual(float(jnp.abs(a).max()), bound)
    self.assertGreater(float(jnp.abs(a).max()), 0.5 * bound)
    b = jnp.asarray(draws.normal(size=b.shape), jnp.float32)
    found = models.lora_apply(lora, params, {name: {"a": a, "b": b}})
    expected = np.asarray(a, float) @ np.asarray(b, float)
    np.testing.assert_allclose(
      jax.tree.leaves(found)[0],
      np.asarray(place[last]) + 2 * expected.reshape(shape),
      rtol=1e-5,
      atol=1e-6,
    )

  def test_default_targets_of_the_transformers(self):
    _, params, _ = _network()
    adapters = models.lora_init(Lora(1), jax.random.key(0), params)
    self.assertEqual(
      sorted(name.split("/")[-2] for name in adapters),
      ["key", "out", "query", "value"],
    )
    bert = models.Bert(vocab_size=10, dim=8, depth=1, heads=2, mlp_dim=8)
    shapes = jax.eval_shape(
      bert.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32)
    )["params"]
    found = jax.eval_shape(
      lambda key, params: models.lora_init(Lora(1), key, params),
      jax.random.key(0),
      shapes,
    )
    self.assertLen(found, 4)
    for name in found:
      self.assertIn("attention", name)

  def test_only_adapters_have_gradients(self):
    model, params, images = _network()
    lora = Lora(rank=2, targets="Dense_0/kernel")
    adapters = models.lora_init(lora, jax.random.key(1), params)

    def loss(adapters):
      changed = models.lora_apply(lora, params, adapters)
      return (model.apply({"params": changed}, images) ** 2).sum()

    gradient = jax.grad(loss)(adapters)
    for one in gradient.values():
      # B is zero, so A has no gradient yet.
      self.assertGreater(float(jnp.abs(one["b"]).max()), 0)
      self.assertEqual(float(jnp.abs(one["a"]).max()), 0)

  def test_half_types(self):
    params = {"kernel": jnp.ones((4, 4), jnp.bfloat16)}
    lora = Lora(rank=1, targets="kernel")
    adapters = models.lora_init(lora, jax.random.key(0), params)
    found = models.lora_apply(lora, params, adapters)
    chex.assert_trees_all_equal_dtypes(found, params)
    chex.assert_trees_all_equal_dtypes(
      adapters["kernel"], {"a": params["kernel"], "b": params["kernel"]}
    )

  def test_errors(self):
    params = {"Dense_0": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
    key = jax.random.key(0)
    with self.assertRaisesRegex(ValueError, "targets 'query'.*Dense_0/bias"):
      models.lora_init(Lora(targets="query"), key, params)
    with self.assertRaisesRegex(ValueError, "targets 'bias'"):
      models.lora_init(Lora(targets="bias"), key, params)
    with self.assertRaisesRegex(ValueError, "no regular expression"):
      models.lora_init(Lora(targets="("), key, params)
    for rank in (0, 1.5):
      with self.assertRaisesRegex(ValueError, "rank must be a whole number"):
        models.lora_init(Lora(rank=rank, targets="kernel"), key, params)
    with self.assertRaisesRegex(ValueError, "alpha positive"):
      models.lora_init(Lora(alpha=0.0, targets="kernel"), key, params)
    lora = Lora(rank=1, targets="kernel")
    adapters = models.lora_init(lora, key, params)
    with self.assertRaisesRegex(ValueError, "'Dense_0/kernel', which is no"):
      models.lora_apply(lora, {"other": jnp.ones((4, 3))}, adapters)
    with self.assertRaisesRegex(
      ValueError, "has the rank 1, the settings have 2"
    ):
      models.lora_apply(lora._replace(rank=2), params, adapters)
    wider = {"Dense_0": {"kernel": jnp.ones((4, 5))}}
    with self.assertRaisesRegex(ValueError, r"\[4, 3\].*\[4, 5\]"):
      models.lora_apply(lora, wider, adapters)

  def test_names_are_those_of_the_leaves(self):
    _, params, _ = _network()
    adapters = models.lora_init(
      Lora(1, targets="kernel"), jax.random.key(0), params
    )
    self.assertContainsSubset(adapters, tree_lib.leaf_names(params))


if __name__ == "__main__":
  absltest.main()
