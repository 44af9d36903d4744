"""Random texts and structures for the reader of recipes: only our errors."""

from __future__ import annotations

import pathlib
import tempfile

import hypothesis
import yaml
from absl.testing import absltest
from hypothesis import strategies as st

from jaxmerge import recipes
from jaxmerge.recipes import _schema, _yaml

_SETTINGS = hypothesis.settings(
  max_examples=150,
  deadline=None,
  derandomize=True,
  database=None,
  suppress_health_check=list(hypothesis.HealthCheck),
)
_PARTS = st.sampled_from(
  [
    *("a", "b: ", "- ", "? ", ": ", "[", "]", "{", "}", ",", "\n", "  ", "\t"),
    *("&x ", "*x", "!!str ", "!t ", "|\n", ">\n", '"', "'", "#", "---\n"),
    *("...\n", "%YAML 1.1\n", "<<: ", "~", "1.5", "0x1f", "2001-01-01", "=\n"),
    *("merge_method: linear\n", "models:\n", "model: x\n", "\x00", "é", "\\u"),
    "\U0001f600",
  ]
)
_SCALARS = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(-(2**70), 2**70),
  st.floats(),
  st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
  st.sampled_from(["linear", "ties", "a+b", "a@b", "base", "float16", "x"]),
)
_KEYS = st.sampled_from(
  [
    *_schema.Recipe.model_fields,
    *_schema.Source.model_fields,
    *_schema.Conditional.model_fields,
    *("sources", "weight", "density", "normalize", "tokens", "kind", "x"),
  ]
)
_VALUES = st.recursive(
  _SCALARS,
  lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(_KEYS, inner, max_size=4)
  ),
  max_leaves=15,
)
_SETTING = st.one_of(_SCALARS, st.lists(_SCALARS, max_size=3), _VALUES)
_PARAMETERS = st.dictionaries(_KEYS, _SETTING, max_size=3)
_NEARLY = st.fixed_dictionaries(
  {
    "merge_method": st.sampled_from([*sorted(recipes.methods()), "x", None, 3]),
    "models": st.lists(
      st.one_of(
        st.fixed_dictionaries(
          {"model": st.one_of(st.just("a"), _VALUES)},
          optional={"parameters": _PARAMETERS},
        ),
        _VALUES,
      ),
      max_size=3,
    ),
  },
  optional={
    "parameters": _PARAMETERS,
    "slices": _VALUES,
    "modules": _VALUES,
    "tokenizer": _VALUES,
    "base_model": st.one_of(st.just("a"), _VALUES),
    "dtype": _SCALARS,
    "seed": _SCALARS,
    "select": _SCALARS,
  },
)


class YamlFuzzTest(absltest.TestCase):
  def _load(self, source):
    try:
      recipes.load(source)
    except recipes.RecipeError as error:
      self.assertTrue(str(error))

  @_SETTINGS
  @hypothesis.given(st.text(st.characters(exclude_categories=["Cs"])))
  def test_characters(self, text):
    try:
      _yaml.Document(text, "x")
    except recipes.RecipeError:
      pass

  @_SETTINGS
  @hypothesis.given(st.lists(_PARTS, max_size=25).map("".join))
  def test_pieces_of_yaml(self, text):
    try:
      document = _yaml.Document(text, "x")
    except recipes.RecipeError as error:
      self.assertStartsWith(str(error), "x")
      return
    document.line(("a", 0, "b"))

  @_SETTINGS
  @hypothesis.given(st.binary(max_size=60))
  def test_files(self, data):
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / "recipe.yml"
      path.write_bytes(data)
      self._load(path)

  @_SETTINGS
  @hypothesis.given(st.one_of(_NEARLY, st.dictionaries(_KEYS, _VALUES)))
  def test_structures(self, value):
    self._load(value)

  @_SETTINGS
  @hypothesis.given(_VALUES)
  def test_round_trip(self, value):
    text = yaml.safe_dump(value, allow_unicode=True)
    document = _yaml.Document(text, "x")
    # As YAML has it: compared by what is written of it again.
    self.assertEqual(
      yaml.safe_dump(document.value), yaml.safe_dump(yaml.safe_load(text))
    )


if __name__ == "__main__":
  absltest.main()
