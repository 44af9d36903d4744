"""Tests of merges from inner products alone."""

from __future__ import annotations

import jax
import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import merging
from jaxmerge.merging import _block_gram
from tests.merging import _in_blocks


def _merge(method, base, models, weights=None):
  """Merges block by block: float32 [size]."""
  arrays = models if base is None else [base, *models]
  blocks = _in_blocks.InBlocks(arrays, 16)
  products = _block_gram.gram(blocks, len(arrays))
  surplus, found = _block_gram.coefficients(
    method, products, base is not None, weights
  )
  merged, odd = _in_blocks.merge(
    _block_gram.combination_rule(),
    blocks,
    found,
    {"surplus": np.asarray(surplus, np.float32)},
  )
  assert not odd and not blocks.held
  return merged


def _slerp(first, second, t):
  """The formula, in float64."""
  first, second = first.astype(np.float64), second.astype(np.float64)
  cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
  omega = np.arccos(cosine)
  return (
    np.sin((1 - t) * omega) * first + np.sin(t * omega) * second
  ) / np.sin(omega)


def _leaf(count, spread=1.0, size=100, seed=0):
  draws = np.random.default_rng(seed)
  base = draws.normal(size=size).astype(np.float32)
  return base, [
    (base + spread * draws.normal(size=size)).astype(np.float32)
    for _ in range(count)
  ]


class BlockGramTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 5)
  def test_products(self, count):
    base, models = _leaf(count - 1)
    blocks = _in_blocks.InBlocks([base, *models])
    basis = np.stack([base, *(model - base for model in models)])
    found = _block_gram.gram(blocks, count)
    wanted = basis.astype(np.float64) @ basis.T.astype(np.float64)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found, found.T)

  @parameterized.parameters(0, 0.25, 0.5, 1, -0.5, 1.5)
  def test_slerp(self, t):
    _, (first, second) = _leaf(2)
    found = _merge(merging.get("slerp", t=t), None, [first, second])
    np.testing.assert_allclose(
      found, _slerp(first, second, t), rtol=1e-5, atol=1e-5
    )

  @parameterized.parameters(1e-2, 1e-3, 1e-5)
  def test_slerp_of_models_that_are_near(self, spread):
    _, (first, second) = _leaf(2, spread)
    found = _merge(
      merging.get("slerp", t=0.3, threshold=1.0), None, [first, second]
    )
    wanted = 0.7 * first.astype(np.float64) + 0.3 * second.astype(np.float64)
    # What is between them is small, and so is the error.
    moved = np.abs(second - first).max()
    np.testing.assert_allclose(found, wanted, atol=0.2 * moved**2 + 2e-7)

  @parameterized.parameters((1, 1), (3, 1), (0.2, 0.6))
  def test_nuslerp_with_a_base(self, *weights):
    base, models = _leaf(2)
    taus = [model - base for model in models]
    found = _merge(
      merging.get("nuslerp", task_vectors=True), base, models, list(weights)
    )
    wanted = base + _slerp(*taus, weights[1] / sum(weights))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)

  def test_multislerp(self):
    base, models = _leaf(3)
    weights = np.array([1, 2, 3]) / 6
    taus = [(model - base).astype(np.float64) for model in models]
    lengths = [np.linalg.norm(tau) for tau in taus]
    mean = sum(
      w * tau / size
      for w, tau, size in zip(weights, taus, lengths, strict=True)
    )
    wanted = base + weights @ lengths * mean / np.linalg.norm(mean)
    found = _merge(
      merging.get("multislerp", task_vectors=True), base, models, [1, 2, 3]
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)

  def test_model_stock(self):
    base, models = _leaf(3, 0.1)
    taus = np.stack([model - base for model in models]).astype(np.float64)
    units = taus / np.linalg.norm(taus, axis=1, keepdims=True)
    cosine = np.mean((units @ units.T)[np.triu_indices(3, 1)])
    t = 3 * cosine / (1 + 2 * cosine)
    found = _merge(merging.get("model_stock"), base, models)
    np.testing.assert_allclose(
      found, base + t * taus.mean(axis=0), rtol=1e-5, atol=1e-6
    )

  @parameterized.named_parameters(
    ("slerp", "slerp", {"t": 0.3}, None, False, 2),
    ("nuslerp", "nuslerp", {}, [1, 3], False, 2),
    ("nuslerp_tasks", "nuslerp", {"task_vectors": True}, [1, 3], True, 2),
    ("multislerp", "multislerp", {}, [1, 3, 2], False, 3),
    (
      "multislerp_tasks",
      "multislerp",
      {"task_vectors": True, "normalize_weights": False},
      [0.5, 0.3, 1.0],
      True,
      3,
    ),
    ("karcher", "karcher_mean", {}, [1, 1, 1], False, 3),
    ("karcher_one", "karcher_mean", {}, [1], False, 1),
    ("model_stock", "model_stock", {}, None, True, 3),
  )
  def test_as_in_memory(self, name, options, weights, has_base, count):
    method = merging.get(name, **options)
    given = {} if weights is None else {"weights": weights}
    for spread in (1.0, 0.01):
      base, models = _leaf(count, spread, seed=7)
      with jax.disable_jit():
        wanted = method(
          {"w": base} if has_base else None,
          [{"w": model} for model in models],
          **given,
        )["w"]
      found = _merge(method, base if has_base else None, models, weights)
      np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)

  @parameterized.parameters(
    ("slerp", {"t": 0.3}),
    ("nuslerp", {}),
    ("multislerp", {}),
    ("karcher_mean", {}),
  )
  def test_vectors_that_depend_on_each_other(self, name, options):
    method = merging.get(name, **options)
    _, (one, two) = _leaf(2)
    zero = np.zeros_like(one)
    for models in (
      [one, one],
      [one, 2 * one],
      [one, -one],
      [one, zero],
      [zero, one],
      [zero, zero],
      [one, one + np.float32(1e-6) * two],
    ):
      with jax.disable_jit():
        wanted = method(None, [{"w": model} for model in models])["w"]
      found = _merge(method, None, models)
      np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)

  def test_task_vectors_that_depend_on_each_other(self):
    base, (model, _) = _leaf(2)
    for name in ("model_stock", "multislerp", "nuslerp"):
      options = {} if name == "model_stock" else {"task_vectors": True}
      method = merging.get(name, **options)
      for models in ([model, model], [base, base], [base, model]):
        with jax.disable_jit():
          wanted = method({"w": base}, [{"w": one} for one in models])["w"]
        found = _merge(method, base, models)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
  absltest.main()
