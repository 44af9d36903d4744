"""Random draws are uniform, independent and reproducible."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from scipy import stats

from jaxmerge.merging import _draws

SHAPE = (130, 257)


class DrawsTest(parameterized.TestCase):
  @parameterized.parameters("threefry2x32", "rbg")
  def test_every_bit_is_fair(self, impl):
    words = np.asarray(_draws.words(jax.random.key(3, impl=impl), SHAPE))
    bits = np.unpackbits(words.view(np.uint8)).reshape(-1, 32)
    # Five standard deviations of a fair coin.
    self.assertLess(
      np.abs(bits.mean(axis=0) - 0.5).max(), 2.5 / np.sqrt(len(bits))
    )

  def test_uniform_is_uniform(self):
    drawn = np.asarray(_draws.uniform(jax.random.key(0), SHAPE))
    self.assertEqual(drawn.dtype, np.float32)
    self.assertGreaterEqual(drawn.min(), 0)
    self.assertLess(drawn.max(), 1)
    self.assertGreater(stats.kstest(drawn.ravel(), "uniform").pvalue, 1e-3)

  def test_entries_that_share_a_word_are_independent(self):
    """Quarters of the axis share the words; no two of them move together."""
    drawn = np.asarray(_draws.uniform(jax.random.key(1), (400, 300)))
    quarters = drawn.reshape(4, -1)
    correlation = np.corrcoef(quarters) - np.eye(4)
    self.assertLess(np.abs(correlation).max(), 5 / np.sqrt(quarters.shape[1]))
    # And as coins, together as well as apart.
    coins = quarters < 0.3
    for i in range(4):
      for j in range(i):
        both = (coins[i] & coins[j]).mean()
        deviation = np.sqrt(0.09 * 0.91 / quarters.shape[1])
        self.assertLess(abs(both - 0.09), 5 * deviation)

  @parameterized.parameters(1.0, 0.5, 0.2, 0.013)
  def test_frequency(self, probability):
    drawn = np.asarray(
      _draws.bernoulli(jax.random.key(2), SHAPE, jnp.float32(probability))
    )
    deviation = np.sqrt(probability * (1 - probability) / drawn.size)
    self.assertLessEqual(abs(drawn.mean() - probability), 5 * deviation)

  def test_tiny_probabilities_and_whole_numbers(self):
    never = _draws.bernoulli(jax.random.key(2), SHAPE, jnp.float32(1e-30))
    self.assertEqual(int(never.sum()), 0)
    always = _draws.bernoulli(jax.random.key(2), (7,), jnp.asarray(1))
    self.assertTrue(bool(always.all()))

  @parameterized.parameters(
    ((),), ((1,),), ((3,),), ((5, 1),), ((0, 4),), ((2, 70, 3),)
  )
  def test_shapes(self, shape):
    key = jax.random.key(0)
    words = _draws.words(key, shape)
    self.assertEqual((words.shape, words.dtype), (shape, jnp.uint32))
    np.testing.assert_array_equal(
      words, jax.jit(_draws.words, static_argnums=1)(key, shape)
    )
    other = _draws.words(jax.random.key(1), shape)
    self.assertFalse(words.size and bool((words == other).all()))

  def test_keys_without_a_type(self):
    raw = jax.random.key_data(jax.random.key(5))
    np.testing.assert_array_equal(
      _draws.words(raw, (70, 2)), _draws.words(jax.random.key(5), (70, 2))
    )


if __name__ == "__main__":
  absltest.main()
