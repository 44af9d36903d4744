"""Tests of tokens and buckets."""

from __future__ import annotations

import pathlib
import tempfile

import numpy as np
import tokenizers
from absl.testing import absltest, parameterized
from tokenizers import models, pre_tokenizers, processors

from jaxmerge import data

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "pay", "my", "bill", "now")


def tokenizer(pad_id=None):
  made = tokenizers.Tokenizer(
    models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]")
  )
  made.pre_tokenizer = pre_tokenizers.Whitespace()
  made.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
  )
  if pad_id is not None:
    made.enable_padding(pad_id=pad_id, length=50)
  made.enable_truncation(5)
  return made


class TokensTest(parameterized.TestCase):
  def _saved(self, **options):
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    tokenizer(**options).save(f"{folder.name}/tokenizer.json")
    return pathlib.Path(folder.name)

  def test_rows_are_padded_or_cut_and_end_as_they_should(self):
    loaded = data.load_tokenizer(self._saved(pad_id=0), vocab_size=8, pad_id=0)
    rows = data.tokenize(loaded, ["pay bill", "pay my bill now pay"], length=5)
    np.testing.assert_array_equal(rows, [[2, 4, 6, 3, 0], [2, 4, 5, 6, 3]])
    self.assertEqual(rows.dtype, np.int32)
    # Nothing of one call is left for the next.
    rows = data.tokenize(loaded, ["pay my bill now pay"], length=8, pad_id=9)
    np.testing.assert_array_equal(rows, [[2, 4, 5, 6, 7, 4, 3, 9]])

  def test_a_tokenizer_of_another_model(self):
    with self.assertRaisesRegex(data.DataError, "has 8 tokens.*has 7 rows"):
      data.load_tokenizer(self._saved(), vocab_size=7)
    with self.assertRaisesRegex(data.DataError, "token 0, but .* says 1"):
      data.load_tokenizer(self._saved(pad_id=0), vocab_size=8, pad_id=1)
    # An embedding may have rows to spare.
    data.load_tokenizer(self._saved(pad_id=0), vocab_size=64, pad_id=0)

  def test_no_tokenizer(self):
    folder = self._saved()
    (folder / "tokenizer.json").write_text("{}")
    with self.assertRaisesRegex(data.DataError, "is no tokenizer"):
      data.load_tokenizer(folder, vocab_size=8)
    (folder / "tokenizer.json").unlink()
    with self.assertRaisesRegex(data.DataError, "there is no .*tokenizer.json"):
      data.load_tokenizer(folder, vocab_size=8)

  def test_no_room(self):
    with self.assertRaisesRegex(data.DataError, "length 2 has no room"):
      data.tokenize(tokenizer(), ["pay"], length=2)

  def test_buckets_hold_every_text_once_and_tightly(self):
    draws = np.random.default_rng(0)
    lengths = draws.integers(1, 21, 300)
    sizes = (3, 8, 15, 20)
    found = data.length_buckets(lengths, sizes)
    rows = np.concatenate([rows for _, rows in found])
    np.testing.assert_array_equal(np.sort(rows), np.arange(300))
    for size, mine in found:
      smaller = [one for one in (0, *sizes) if one < size][-1]
      self.assertTrue((lengths[mine] <= size).all())
      self.assertTrue((lengths[mine] > smaller).all())

  @parameterized.parameters(
    ((8, 4), "must increase"), ((), "must increase"), ((4, 8), "has 9 tokens")
  )
  def test_bad_buckets(self, sizes, message):
    with self.assertRaisesRegex(data.DataError, message):
      data.length_buckets(np.array([9, 1]), sizes)


if __name__ == "__main__":
  absltest.main()
