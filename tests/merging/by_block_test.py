"""Tests of merging a leaf block by block, against leaves in memory."""

from __future__ import annotations

import jax
import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import merging
from jaxmerge.merging import _block_select, _by_block
from tests.merging import _in_blocks

_WEIGHTS = (0.7, -0.4, 1.3)


def _leaf(count=3, size=37, seed=0):
  """A base and models as float32 [size]."""
  draws = np.random.default_rng(seed)
  base = draws.normal(size=size).astype(np.float32)
  models = [
    (base + draws.normal(size=size)).astype(np.float32) for _ in range(count)
  ]
  return base, models


def _told(rule, method, blocks, weights, masks=None, rescale=None):
  """What a rule is told, found as its parts say."""
  values = _by_block.numbers(method)
  none = _by_block.Masks(None, np.zeros(0)) if masks is None else masks
  if rule.sparsifier is None:
    return values
  options = {**method.info.options, **method.options}
  density = np.broadcast_to(options["density"], len(weights)).astype(float)
  values["density"] = density.astype(np.float32)
  if rule.selects == "magnitude":
    values |= _block_select.largest(blocks, density)
  elif rule.selects == "middle":
    gamma = np.broadcast_to(options["gamma"], len(weights)).astype(float)
    values |= _block_select.middle(blocks, density, gamma)
  values["factor"] = _by_block.rescaling(
    rule, rescale or options.get("rescale"), blocks, values, none
  )
  votes = _by_block.majority(
    rule.rule, blocks, np.asarray(weights, np.float32), values, none
  )
  values["majority"] = np.int32(np.sign(votes))
  return values


class ByBlockTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("average", "average", {}),
    ("weighted_average", "weighted_average", {}),
    ("task_arithmetic", "task_arithmetic", {"scale": 0.3}),
    ("task_mean", "task_arithmetic", {"normalize": True}),
    ("magmax", "magmax", {"scale": 0.5}),
    ("max_abs", "max_abs", {}),
    ("ties", "ties", {"density": 0.4, "scope": "leaf"}),
    (
      "ties_sum",
      "ties",
      {"density": 0.4, "scope": "leaf", "merge": "sum", "elect": "count"},
    ),
    ("ties_max", "ties", {"density": 0.6, "scope": "leaf", "merge": "max"}),
    (
      "ties_each",
      "ties",
      {
        "density": [0.2, 0.5, 1.0],
        "scope": "leaf",
        "zero_sign": "positive",
        "scale": 0.6,
      },
    ),
    ("breadcrumbs", "breadcrumbs", {"density": 0.6, "gamma": 0.1}),
    (
      "breadcrumbs_each",
      "breadcrumbs",
      {"density": [0.6, 0.9, 0.1], "gamma": [0.1, 0.0, 0.3], "scale": 2.0},
    ),
    (
      "breadcrumbs_ties",
      "breadcrumbs",
      {
        "density": 0.6,
        "gamma": 0.1,
        "variant": "ties",
        "rescale": "l1",
        "normalize": True,
      },
    ),
  )
  def test_as_in_memory(self, name, options):
    base, models = _leaf()
    method = merging.get(name, **options)
    weights = _WEIGHTS if method.info.takes_weights else None
    if name == "weighted_average":
      weights = (0.7, 0.4, 1.3)
    # Not compiled: that takes longer than all the rest.
    with jax.disable_jit():
      wanted = method(
        {"w": base} if method.info.needs_base else None,
        [{"w": model} for model in models],
        **({} if weights is None else {"weights": list(weights)}),
      )["w"]
    rule = _by_block.block_rule(method)
    weights = weights or (1.0, 1.0, 1.0)
    blocks = _in_blocks.InBlocks([base, *models])
    told = _told(rule, method, blocks, weights)
    found, odd = _in_blocks.merge(rule.rule, blocks, weights, told)
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6)
    self.assertEqual((odd, blocks.held), (0, 0))

  def test_nearswap(self):
    base, models = _leaf(1)
    method = merging.get("nearswap", t=0.5)
    rule = _by_block.block_rule(method)
    blocks = _in_blocks.InBlocks([base, *models])
    found, _ = _in_blocks.merge(
      rule.rule, blocks, [1.0], _told(rule, method, blocks, [1.0])
    )
    step = models[0] - base
    near = np.abs(step) <= 0.5
    wanted = np.where(near, models[0], base + 0.5 * np.sign(step))
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)

  @parameterized.parameters("positive", "majority")
  def test_votes_that_are_tied(self, zero_sign):
    # Entries of two models that cancel: the sign is that of the others.
    base = np.zeros(20, np.float32)
    first = np.r_[np.full(7, -1), np.full(3, 1), np.ones(10)]
    second = np.r_[np.full(7, -2), np.full(3, 2), -np.ones(10)]
    method = merging.get(
      "ties", density=1.0, scope="leaf", merge="sum", zero_sign=zero_sign
    )
    rule = _by_block.block_rule(method)
    blocks = _in_blocks.InBlocks([base, first, second])
    told = _told(rule, method, blocks, (1.0, 1.0))
    if zero_sign == "majority":
      self.assertEqual(
        _by_block.majority(
          rule.rule,
          blocks,
          np.ones(2, np.float32),
          told,
          _by_block.Masks(None, np.zeros(0)),
        ),
        3 - 7,
      )
    found, _ = _in_blocks.merge(rule.rule, blocks, (1.0, 1.0), told)
    sign = 1 if zero_sign == "positive" else -1
    wanted = np.r_[np.full(7, -3), np.full(3, 3), np.full(10, sign)]
    np.testing.assert_array_equal(found, wanted)

  def test_rescaling_by_the_sum_of_magnitudes(self):
    base, models = _leaf()
    models[1] = base
    method = merging.get("breadcrumbs", density=0.5, gamma=0.1, rescale="l1")
    rule = _by_block.block_rule(method)
    blocks = _in_blocks.InBlocks([base, *models])
    told = _told(rule, method, blocks, _WEIGHTS)
    for i, model in enumerate(models):
      tau = np.abs((model - base).astype(np.float64))
      order = np.argsort(tau, kind="stable")
      kept = tau[order[37 - 3 - 18 : 37 - 3]].sum()
      wanted = tau.sum() / kept if kept else 1
      self.assertAlmostEqual(told["factor"][i] / wanted, 1, places=5)
    self.assertEqual(told["factor"][1], 1)

  def test_what_is_not_finite_is_counted(self):
    base, models = _leaf()
    models[0][[3, 20]] = np.nan
    models[1][36] = np.inf
    rule = _by_block.block_rule(merging.get("average"))
    blocks = _in_blocks.InBlocks([base, *models])
    found, odd = _in_blocks.merge(rule.rule, blocks, np.ones(3), {})
    self.assertEqual(odd, 3)
    np.testing.assert_array_equal(
      np.flatnonzero(~np.isfinite(found)), [3, 20, 36]
    )

  def test_overflow_of_the_result_is_counted(self):
    blocks = _in_blocks.InBlocks([np.full(5, 7e4), np.full(5, 7e4)])
    rule = _by_block.block_rule(merging.get("average"))
    found, odd = _in_blocks.merge(
      rule.rule, blocks, np.ones(1), {}, dtype="float16"
    )
    self.assertEqual(found.dtype, np.float16)
    self.assertEqual(odd, 5)

  @parameterized.parameters(
    ("slerp", {}, True),
    ("nuslerp", {}, True),
    ("nuslerp", {"flatten": False}, None),
    ("multislerp", {}, True),
    ("karcher_mean", {}, True),
    ("model_stock", {}, True),
    ("model_stock", {"filter_wise": True}, None),
    ("iso_c", {}, None),
    ("della", {}, None),
    ("sce", {}, None),
    ("dare", {"rescale": "l2"}, None),
    ("dare", {}, False),
  )
  def test_which_methods_have_rules(self, name, options, gram):
    rule = _by_block.block_rule(merging.get(name, **options))
    self.assertEqual(None if rule is None else rule.gram, gram)


class RandomTest(parameterized.TestCase):
  """Blocks here are of 4096 entries, from which on each is drawn anew."""

  def _leaf(self, count=2, size=3 * 4096):
    base, models = _leaf(count, size)
    return base, models, _in_blocks.InBlocks([base, *models], 4096)

  def test_masks(self):
    _, _, blocks = self._leaf()
    density = np.array([0.25, 0.8], np.float32)
    key = jax.random.key(3)
    masks = _by_block.Masks(key, density)
    none = _by_block.Masks(key, density, room=0)
    other = _by_block.Masks(jax.random.key(4), density)
    drawn = []
    for block in blocks:
      found = [np.asarray(one) for one in masks.of(block)["mask"]]
      for again in (masks.of(block), none.of(block), none.of(block)):
        np.testing.assert_array_equal(np.asarray(again["mask"]), found)
      different = np.asarray(other.of(block)["mask"])
      self.assertGreater((different != found).mean(), 0.2)
      drawn.append(found)
    shares = np.mean(drawn, axis=(0, 2))
    np.testing.assert_allclose(shares, density, atol=0.02)
    # No two blocks, and no two models, have one mask.
    for i in range(3):
      for j in range(i):
        self.assertGreater((drawn[i][0] != drawn[j][0]).mean(), 0.2)
    self.assertGreater((drawn[0][0] != drawn[0][1]).mean(), 0.2)
    self.assertEqual(_by_block.Masks(None, density).of(next(iter(blocks))), {})

  @parameterized.parameters(None, "density", "l1")
  def test_dare(self, rescale):
    base, models, blocks = self._leaf()
    density = [0.5, 0.75]
    method = merging.get("dare", density=density, rescale=rescale)
    rule = _by_block.block_rule(method)
    masks = _by_block.Masks(jax.random.key(1), np.asarray(density, np.float32))
    weights = (1.0, 10.0)
    told = _told(rule, method, blocks, weights, masks)
    found, _ = _in_blocks.merge(rule.rule, blocks, weights, told, masks=masks)
    drawn = [masks.of(block)["mask"] for block in blocks]
    wanted = base.astype(np.float64)
    for i, model in enumerate(models):
      mask = np.concatenate([np.asarray(one[i]) for one in drawn])
      tau = model.astype(np.float64) - base
      kept = tau * mask
      factor = {
        None: 1,
        "density": 1 / density[i],
        "l1": np.abs(tau).sum() / np.abs(kept).sum(),
      }[rescale]
      wanted = wanted + weights[i] * factor * kept
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)

  def test_dare_keeps_what_is_not_finite(self):
    base, models, _ = self._leaf(1)
    models[0][:100] = np.nan
    blocks = _in_blocks.InBlocks([base, *models], 4096)
    method = merging.get("dare", density=0.5)
    rule = _by_block.block_rule(method)
    masks = _by_block.Masks(jax.random.key(1), np.array([0.5], np.float32))
    told = _told(rule, method, blocks, [1.0], masks)
    _, odd = _in_blocks.merge(rule.rule, blocks, [1.0], told, masks=masks)
    self.assertEqual(odd, 100)

  def test_random_mix(self):
    base, models, blocks = self._leaf(3)
    method = merging.get("random_mix")
    rule = _by_block.block_rule(method)
    weights = np.array([1, 1, 2], np.float32)
    results = []
    for seed in (0, 0, 1):
      found, _ = _in_blocks.merge(
        rule.rule,
        blocks,
        weights,
        _by_block.numbers(method),
        jax.random.key(seed),
      )
      results.append(found)
    np.testing.assert_array_equal(results[0], results[1])
    self.assertGreater((results[0] != results[2]).mean(), 0.3)
    steps = (results[0] - base)[:, None] / np.stack(
      [model - base for model in models], axis=1
    )
    chosen = np.isclose(steps, 1, rtol=1e-4)
    self.assertTrue((chosen.sum(axis=1) >= 1).all())
    # Drawn in proportion to the weights.
    np.testing.assert_allclose(chosen.mean(axis=0), weights / 4, atol=0.02)


if __name__ == "__main__":
  absltest.main()
