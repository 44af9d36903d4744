"""Tests of reading YAML with its lines."""

from __future__ import annotations

import pathlib
import tempfile

from absl.testing import absltest, parameterized

from jaxmerge.recipes import RecipeError, _yaml

_TEXT = """\
# A comment.
models:
  - model: a
    parameters:
      weight: [0.5,
        1]
  - model: "b"

merge_method: linear
nothing: ~
yes: true
"""


class YamlTest(parameterized.TestCase):
  def _refused(self, text, message):
    with self.assertRaisesRegex(RecipeError, message) as caught:
      _yaml.Document(text, "here.yml")
    self.assertStartsWith(str(caught.exception), "here.yml")

  def test_values(self):
    document = _yaml.Document(_TEXT, "x")
    self.assertEqual(
      document.value,
      {
        "models": [
          {"model": "a", "parameters": {"weight": [0.5, 1]}},
          {"model": "b"},
        ],
        "merge_method": "linear",
        "nothing": None,
        # YAML 1.1 has a boolean here.
        "True": True,
      },
    )
    self.assertEqual(document.text, _TEXT)

  @parameterized.parameters(
    ((), 2),
    (("models",), 2),
    (("models", 0), 3),
    (("models", 0, "model"), 3),
    (("models", 0, "parameters"), 4),
    (("models", 0, "parameters", "weight"), 5),
    (("models", 0, "parameters", "weight", 1), 6),
    (("models", 1, "model"), 7),
    (("merge_method",), 9),
    # The nearest one that is there.
    (("models", 1, "parameters", "weight"), 7),
    (("models", 7), 2),
    (("other",), 2),
  )
  def test_lines(self, place, line):
    document = _yaml.Document(_TEXT, "x")
    self.assertEqual(document.line(place), line)
    error = document.error(place, "what is wrong")
    self.assertIsInstance(error, RecipeError)
    self.assertStartsWith(str(error), f"x, line {line}")
    self.assertEndsWith(str(error), ": what is wrong")

  @parameterized.parameters("", "# nothing\n", "---\n", "~")
  def test_nothing(self, text):
    self.assertIsNone(_yaml.Document(text, "x").value)

  def test_references(self):
    document = _yaml.Document("a: &x [1, 2]\nb: *x\nc: {d: *x}\n", "x")
    self.assertEqual(
      document.value, {"a": [1, 2], "b": [1, 2], "c": {"d": [1, 2]}}
    )

  @parameterized.parameters(
    ("a: [1,\nb: 2\n", "line 3"),
    ("a: 1\n b: 2\n", "line 2"),
    ("a: 1\n\tb: 2\n", "line 2"),
    ("a: *x\n", "line 1.*undefined alias"),
    ("a: 1\n---\nb: 1\n", "line 2.*another document"),
    ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n", "line 5: 'c' stands twice"),
    ("a: 1\n'a': 3\n", "line 2: 'a' stands twice"),
    ("1: 1\n'1': 3\n", "line 2: '1' stands twice"),
    ("a: !mine 1\n", "line 1.*!mine"),
    ("a: 2001-13-01\n", "no YAML"),
    ("a: \x00\n", "no YAML"),
    ("a: 9" + "9" * 5000, "no YAML"),
    ("%YAML 7.0\n---\na: 1\n", "no YAML"),
  )
  def test_no_yaml(self, text, message):
    self._refused(text, message)

  @parameterized.parameters(
    "a: !!python/object/apply:os.system ['true']",
    "a: !!python/object/apply:builtins.print ['x']",
    "a: !!python/name:os.system ''",
    "!!python/object:builtins.dict {a: 1}",
  )
  def test_no_objects(self, text):
    try:
      value = _yaml.Document(text, "x").value
    except RecipeError:
      return
    # At most the data that was to be given to it.
    self.assertIn(value, ({"a": ["true"]}, {"a": ["x"]}, {"a": 1}))

  def test_a_bomb(self):
    # Ten levels of ten references: ten thousand million values.
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [
      f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 11)
    ]
    self._refused("\n".join(lines), r"line \d+: stands for more than 100000")

  def test_a_wide_bomb(self):
    # Few levels, many references.
    text = f"a: &a [{', '.join('x' * 1000)}]\nb: [{', '.join(['*a'] * 1000)}]"
    self._refused(text, "stands for more than 100000")

  @parameterized.parameters("a: &a [*a]", "a: &a {b: *a}", "&a [1, [*a]]")
  def test_what_holds_itself(self, text):
    self._refused(text, "line 1: .* nested deeper than 40")

  @parameterized.parameters("[", "{a: ", "- ", "? ")
  def test_deep_nesting(self, part):
    for count in (5000, 900_000 // len(part)):
      self._refused(part * count, "nest|no YAML")

  @parameterized.parameters(("[", "]"), ("{a: ", "}"), ("- ", ""))
  def test_deeper_than_allowed(self, begin, end):
    self._refused(begin * 42 + "x" + end * 42, "nested deeper than 40")

  def test_as_deep_as_allowed(self):
    value = _yaml.Document("[" * 40 + "]" * 40, "x").value
    for _ in range(39):
      (value,) = value
    self.assertEqual(value, [])

  def test_large(self):
    most = _yaml.MOST_BYTES
    self.assertLen(_yaml.Document("a" * most, "x").value, most)
    self._refused("a" * (most + 1), f"larger than {most} bytes")
    self._refused("é" * (most // 2 + 1), f"larger than {most} bytes")

  # Texts that the YAML library's own constructors stumble over.

  @parameterized.parameters(
    '!!int ""', '!!int "-"', '!!float ""', "!!bool x", "!!timestamp x"
  )
  def test_tags_that_do_not_fit(self, text):
    self._refused(f"a: {text}", "line 1|it")

  def test_tags_of_keys_that_do_not_fit(self):
    self._refused("? !!timestamp foo\n: 1", "line 1|it")

  def test_half_of_a_surrogate_pair(self):
    self._refused("a: \ud800", "no YAML|UTF-8")


class LoadTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.path = pathlib.Path(folder.name) / "recipe.yml"

  def _refused(self, message):
    with self.assertRaisesRegex(RecipeError, message) as caught:
      _yaml.load(self.path)
    self.assertIn(str(self.path), str(caught.exception))

  def test_a_file(self):
    self.path.write_text("a: é\n", encoding="utf-8")
    for path in (self.path, str(self.path)):
      self.assertEqual(_yaml.load(path).value, {"a": "é"})

  def test_files_that_are_none(self):
    self._refused("cannot be read .*No such file")
    self.path.mkdir()
    self._refused("cannot be read .*directory")

  def test_no_text(self):
    self.path.write_bytes(b"a: \xff\n")
    self._refused("no text in UTF-8")

  def test_large(self):
    # Sparse, of many gigabytes: no more than a megabyte of it is read.
    with self.path.open("wb") as file:
      file.truncate(1 << 40)
    self._refused("larger than 1000000 bytes")


if __name__ == "__main__":
  absltest.main()
