"""Tests of packing several texts into a row."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import models
from jaxmerge.models import _packing


def _mask(lengths, n):
  return np.arange(n) < np.array(lengths)[:, None]


class PackTextsTest(parameterized.TestCase):
  @parameterized.parameters(0, 1, 2, 3)
  def test_every_token_has_a_place_of_its_own(self, seed):
    draws = np.random.default_rng(seed)
    count, n, rows = 20, 12, 11
    mask = _mask(draws.integers(1, n + 1, count), n)
    found = jax.tree.map(np.asarray, models.pack_texts(jnp.asarray(mask), rows))
    # 20 texts of 6.5 tokens fill 130 of 132 places: they need not fit.
    fits = bool(found.fits)
    placed = found.target < rows * n
    if fits:
      np.testing.assert_array_equal(placed, mask)
      places = found.target[mask]
      self.assertLen(set(places.tolist()), int(mask.sum()))
      # There and back.
      flat = found.source.reshape(-1)
      np.testing.assert_array_equal(
        flat[places], np.flatnonzero(mask.reshape(-1))
      )
      text = found.text.reshape(-1)[places]
      np.testing.assert_array_equal(text, np.nonzero(mask)[0])
      position = found.position.reshape(-1)[places]
      np.testing.assert_array_equal(position, np.nonzero(mask)[1])
      # The tokens of a text are in one row.
      row = found.target // n
      for one, real in zip(row, mask, strict=True):
        self.assertLen(set(one[real].tolist()), 1)
      self.assertEqual(int((found.text >= 0).sum()), int(mask.sum()))
    else:
      self.assertGreater(mask.sum(), rows * n - n)

  def test_fills_rows_to_the_brim(self):
    mask = _mask([6, 4, 3, 3, 5, 3], 8)
    self.assertTrue(bool(models.pack_texts(jnp.asarray(mask), 4).fits))
    exact = _mask([5, 3, 6, 2, 4, 4], 8)
    self.assertTrue(bool(models.pack_texts(jnp.asarray(exact), 3).fits))
    self.assertFalse(bool(models.pack_texts(jnp.asarray(exact), 2).fits))

  def test_compiled_and_over_an_axis(self):
    masks = jnp.stack(
      [jnp.asarray(_mask(lengths, 6)) for lengths in ([2, 4, 6], [1, 1, 1])]
    )
    found = jax.jit(jax.vmap(lambda mask: models.pack_texts(mask, 2)))(masks)
    for i in range(2):
      chex.assert_trees_all_equal(
        jax.tree.map(lambda leaf, i=i: leaf[i], found),
        models.pack_texts(masks[i], 2),
      )

  def test_attention_stays_within_a_text(self):
    packing = models.pack_texts(jnp.asarray(_mask([2, 3, 1], 4)), 2)
    seen = np.asarray(_packing.attention_mask(packing))
    text = np.asarray(packing.text)
    for row, a, b in np.ndindex(seen.shape):
      self.assertEqual(seen[row, a, b], text[row, a] == text[row, b])
    self.assertTrue(seen.any(axis=-1).all())

  def test_number_of_rows(self):
    mask = jnp.asarray(_mask([1, 2], 4))
    for rows in (0, 3):
      with self.assertRaisesRegex(ValueError, r"rows must lie in 1\.\.2"):
        models.pack_texts(mask, rows)


if __name__ == "__main__":
  absltest.main()
