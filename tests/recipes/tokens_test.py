"""Tests of merging vocabularies."""

import json
import pathlib
import tempfile

import numpy as np
import tokenizers
from absl.testing import absltest, parameterized

from jaxmerge import checkpoints, recipes

_BASE = ["a", "b", "c", "d"]
_FIRST = ["c", "x", "a", "b", "d"]
_SECOND = ["y", "x", "d", "a", "b", "c", "z"]


def _rows(words, number, extra=0):
  """Rows that tell which model and token they are of."""
  values = [[number, ord(word), 1.0] for word in words]
  values += [[number, -1.0, 0.0]] * extra
  return np.array(values, np.float32)


class TokensTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.root = pathlib.Path(folder.name)
    for number, (name, words) in enumerate(
      (("base", _BASE), ("first", _FIRST), ("second", _SECOND))
    ):
      self._write(name, words, number)

  def _write(self, name, words, number, *, tokens=None, special=()):
    folder = self.root / name
    checkpoints.hugging_face.save(
      folder,
      {
        "model.embed_tokens.weight": _rows(words, number, 2),
        "model.norm.weight": np.full(3, number, np.float32),
      },
    )
    vocabulary = {word: i for i, word in enumerate(tokens or words)}
    tokenizer = tokenizers.Tokenizer(
      tokenizers.models.BPE(vocab=vocabulary, merges=[])
    )
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"vocab_size": len(words) + 2, "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text("{}")

  def _merge(self, *, weights=(0.0, 1.0, 0.0), **more):
    names = ("base", "first", "second")
    recipe = {
      "merge_method": "linear",
      "base_model": str(self.root / "base"),
      "models": [
        {"model": str(self.root / name), "parameters": {"weight": weight}}
        for name, weight in zip(names, weights, strict=True)
      ],
      **more,
    }
    out = self.root / "out"
    report = recipes.merge_checkpoints(recipe, out, overwrite=True)
    tokenizer = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    rows = np.asarray(checkpoints.open(out)["model.embed_tokens.weight"])
    return report, tokenizer.get_vocab(), rows

  def test_union(self):
    report, vocabulary, rows = self._merge(tokenizer_source="union")
    self.assertEqual(set(vocabulary), set("abcdxyz"))
    # The base's tokens keep their numbers.
    self.assertEqual([vocabulary[word] for word in _BASE], [0, 1, 2, 3])
    self.assertLen(rows, 7)
    for word in "abcdx":
      np.testing.assert_array_equal(rows[vocabulary[word]], [1, ord(word), 1])
    # Only the second model has them.
    for word in "yz":
      np.testing.assert_array_equal(rows[vocabulary[word]], [2, ord(word), 1])
    missing = {
      pathlib.Path(name).name: number
      for name, number in report.missing_tokens.items()
    }
    self.assertEqual(missing, {"base": 3, "first": 2, "second": 0})
    config = json.loads((self.root / "out" / "config.json").read_text())
    self.assertEqual(config["vocab_size"], 7)

  def test_a_token_that_the_base_lacks_is_the_mean_of_the_others(self):
    _, vocabulary, rows = self._merge(
      weights=(1.0, 0.0, 0.0), tokenizer_source="union"
    )
    np.testing.assert_array_equal(rows[vocabulary["x"]], [1.5, ord("x"), 1])
    np.testing.assert_array_equal(rows[vocabulary["y"]], [2, ord("y"), 1])

  def test_base(self):
    _, vocabulary, rows = self._merge(
      weights=(0.0, 0.5, 0.5), tokenizer_source="base"
    )
    self.assertEqual(vocabulary, {word: i for i, word in enumerate(_BASE)})
    np.testing.assert_array_equal(rows, [[1.5, ord(word), 1] for word in _BASE])

  def test_the_tokenizer_of_a_model(self):
    _, vocabulary, rows = self._merge(tokenizer_source=str(self.root / "first"))
    self.assertEqual(vocabulary, {word: i for i, word in enumerate(_FIRST)})
    np.testing.assert_array_equal(rows, _rows(_FIRST, 1))

  def test_given_tokens_and_padding(self):
    second = str(self.root / "second")
    _, vocabulary, rows = self._merge(
      tokenizer={
        "source": "base",
        "pad_to_multiple_of": 8,
        "tokens": {
          "new": {
            "source": {"kind": "model_token", "model": second, "token": "z"}
          },
          "none": {"source": {"kind": "zero"}},
          "a": {"source": second, "force": True},
        },
      }
    )
    self.assertLen(rows, 8)
    np.testing.assert_array_equal(rows[vocabulary["new"]], [2, ord("z"), 1])
    np.testing.assert_array_equal(rows[vocabulary["none"]], [0, 0, 0])
    np.testing.assert_array_equal(rows[vocabulary["a"]], [2, ord("a"), 1])
    np.testing.assert_array_equal(rows[vocabulary["b"]], [1, ord("b"), 1])
    np.testing.assert_allclose(rows[6:], [rows[:6].mean(axis=0)] * 2, rtol=1e-6)

  def test_special_tokens_stay_special(self):
    words = [*_SECOND, "<"]
    self._write("second", words, 2, tokens=_SECOND, special=["<"])
    self._merge(tokenizer_source="union")
    tokenizer = tokenizers.Tokenizer.from_file(
      str(self.root / "out" / "tokenizer.json")
    )
    added = {
      one.content: one.special
      for one in tokenizer.get_added_tokens_decoder().values()
    }
    self.assertTrue(added["<"])
    self.assertFalse(added["x"])

  def test_different_sizes_need_it(self):
    with self.assertRaisesRegex(
      recipes.RecipeError,
      r"embed_tokens.weight' has the shape \(7, 3\) in .*first and \(6, 3\) in"
      r" .*base.*tokenizer_source: union",
    ):
      self._merge()

  def test_a_tokenizer_that_does_not_match(self):
    self._write("first", _FIRST, 1, tokens=[*_FIRST, *"fghijkl"])
    report, vocabulary, _ = self._merge(tokenizer_source="union")
    # Tokens beyond the embeddings have no row, and are left out.
    self.assertNotIn("l", vocabulary)
    self.assertGreater(sum(report.missing_tokens.values()), 0)

  @parameterized.parameters(
    ("no token 'q'", {"token": "q"}),
    ("no row 40", {"token_id": 40}),
  )
  def test_sources_that_are_not_there(self, message, wanted):
    source = {
      "kind": "model_token",
      "model": str(self.root / "first"),
      **wanted,
    }
    with self.assertRaisesRegex(recipes.RecipeError, message):
      self._merge(
        tokenizer={"source": "base", "tokens": {"new": {"source": source}}}
      )

  def test_no_tokenizer(self):
    (self.root / "second" / "tokenizer.json").unlink()
    with self.assertRaisesRegex(
      recipes.RecipeError, "second/tokenizer.json is missing"
    ):
      self._merge(tokenizer_source="union")

  def test_chat_templates(self):
    for name in ("first", "second"):
      (self.root / name / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": " {{ x }} "})
      )
    (self.root / "base" / "chat_template.jinja").write_text("{{ base }}")
    same = dict(tokenizer_source="base")
    for wanted, expected in (("auto", "{{ x }}"), ("{{ y }}", "{{ y }}")):
      self._merge(chat_template=wanted, **same)
      config = json.loads(
        (self.root / "out" / "tokenizer_config.json").read_text()
      )
      self.assertEqual(config["chat_template"], expected)
      self.assertFalse((self.root / "out" / "chat_template.jinja").exists())
    self._merge(**same)
    self.assertTrue((self.root / "out" / "chat_template.jinja").exists())
    with self.assertRaisesRegex(recipes.RecipeError, "'chatml' is no template"):
      self._merge(chat_template="chatml", **same)


if __name__ == "__main__":
  absltest.main()
