"""Tests of checking recipes before any model is opened."""

from __future__ import annotations

import pathlib
import tempfile
import textwrap

from absl.testing import absltest, parameterized

from jaxmerge import recipes
from jaxmerge.recipes import _methods

_MODELS = "models: [{model: a}, {model: b}]\n"
_LINEAR = "merge_method: linear\nparameters: {weight: 1}\n"


class SchemaTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.path = pathlib.Path(folder.name) / "recipe.yml"

  def _load(self, text):
    self.path.write_text(textwrap.dedent(text))
    return recipes.load(self.path)[1]

  def _refused(self, text, line, *parts):
    """Asserts that the message names the file and the line."""
    with self.assertRaises(recipes.RecipeError) as caught:
      self._load(text)
    message = str(caught.exception)
    self.assertStartsWith(message, f"{self.path}, line {line}")
    self.assertNotRegex(message, f"line {line}[0-9]")
    for part in parts:
      self.assertIn(part, message)

  # The examples of mergekit's documentation.

  def test_gradient_slerp(self):
    recipe = self._load("""\
      slices:
        - sources:
            - model: psmathur/orca_mini_v3_13b
              layer_range: [0, 40]
            - model: garage-bAInd/Platypus2-13B
              layer_range: [0, 40]
      merge_method: slerp
      base_model: psmathur/orca_mini_v3_13b
      parameters:
        t:
          - filter: self_attn
            value: [0, 0.5, 0.3, 0.7, 1]
          - filter: mlp
            value: [1, 0.5, 0.7, 0.3, 0]
          - value: 0.5 # fallback for rest of tensors
      dtype: float16
    """)
    self.assertEqual(recipe.parameters["t"][1].value, [1, 0.5, 0.7, 0.3, 0])
    self.assertIsNone(recipe.parameters["t"][2].filter)
    self.assertEqual(recipe.slices[0].sources[1].layer_range, (0, 40))
    self.assertEqual(str(recipe.base_model), "psmathur/orca_mini_v3_13b")
    self.assertEqual(recipe.dtype, "float16")

  def test_ties(self):
    recipe = self._load("""\
      models:
        - model: psmathur/orca_mini_v3_13b
          parameters:
            density: [1, 0.7, 0.1] # density gradient
            weight: 1.0
        - model: garage-bAInd/Platypus2-13B@main
          parameters:
            density: 0.5
            weight: [0, 0.3, 0.7, 1] # weight gradient
        - model: WizardLM/WizardMath-13B-V1.0+some/adapter
          parameters:
            density: 0.33
            weight:
              - filter: mlp
                value: 0.5
              - value: 0
      merge_method: ties
      base_model: {model: {path: TheBloke/Llama-2-13B-fp16}}
      parameters:
        normalize: true
        int8_mask: true
      dtype: float16
      tokenizer_source: union
    """)
    self.assertEqual(recipe.models[1].model.model.revision, "main")
    self.assertEqual(recipe.models[2].model.lora.path, "some/adapter")
    self.assertEqual(
      [str(one.model) for one in recipe.models],
      [
        "psmathur/orca_mini_v3_13b",
        "garage-bAInd/Platypus2-13B@main",
        "WizardLM/WizardMath-13B-V1.0+some/adapter",
      ],
    )

  def test_mappings_in_place_of_files(self):
    document, recipe = recipes.load(
      {
        "models": [{"model": "a"}],
        "merge_method": "linear",
        "parameters": {"weight": 1},
        "select": "mlp",
        "seed": 3,
      }
    )
    self.assertEqual((recipe.select, recipe.seed), ("mlp", 3))
    self.assertIn("merge_method: linear", document.text)
    with self.assertRaisesRegex(recipes.RecipeError, "^the recipe, line"):
      recipes.load({"merge_method": "linear"})

  # Bad input.

  @parameterized.parameters(
    ("", 1, "no mapping"),
    ("[1, 2]", 1, "no mapping"),
    ("text", 1, "no mapping"),
    (_MODELS, 1, "'merge_method' is missing"),
    (_LINEAR, 1, "exactly one of models, slices and modules"),
    (_LINEAR + "models: []", 1, "exactly one of"),
    (
      _LINEAR + _MODELS + "slices: [{sources: [{model: a, "
      "layer_range: [0, 1]}]}]",
      1,
      "not models and slices",
    ),
    (_MODELS + "merge_method: tis", 2, "'tis'", "Did you mean ties?"),
    (_MODELS + "merge_method: xyz", 2, "'xyz'", "linear, ", "ties"),
    (_MODELS + "merge_method: [linear]", 2, "merge_method"),
    (
      _MODELS + "merge_method: linear\nmerge_methd: 1",
      3,
      "no key 'merge_methd'",
      "Did you mean merge_method?",
    ),
    (
      _LINEAR + "models:\n  - model: a\n    paramters: {}",
      5,
      "no key 'paramters'",
      "Did you mean parameters?",
    ),
    (
      _LINEAR + "models:\n  - model: a\n  - model: b\n    foo: 1",
      6,
      "no key 'foo'",
      "Choose one of model, parameters.",
    ),
    (_LINEAR + "models:\n  - parameters: {}", 4, "'model' is missing"),
    (_LINEAR + "models:\n  - model: 3", 4, "model"),
    (_LINEAR + "models: {model: a}", 3, "list"),
    (_LINEAR + "models:\n  - model: a@b@c", 4, "'a@b@c'"),
    (_LINEAR + "models:\n  - model: a@", 4, "'a@'"),
    (_LINEAR + "models:\n  - model: a+", 4, "'a+'"),
    (_LINEAR + "models:\n  - model: ''", 4),
    (_LINEAR + _MODELS + "dtype: int8", 4, "'bfloat16'"),
    (_LINEAR + _MODELS + "seed: x", 4, "integer"),
    (_LINEAR + _MODELS + "lora_rank: 0", 4, "1"),
    (
      _LINEAR + _MODELS + "tokenizer: {source: base}\ntokenizer_source: base",
      1,
      "either tokenizer or tokenizer_source",
    ),
    (_LINEAR + "modules:\n  x: {}", 4, "either slices or models"),
  )
  def test_wrong_recipes(self, text, line, *parts):
    self._refused(text, line, *parts)

  @parameterized.parameters(
    ("[2, 2]", "holds no layer"),
    ("[3, 1]", "holds no layer"),
    ("[-1, 1]", "holds no layer"),
    ("[0]", "layer_range"),
    ("[0, 1, 2]", "layer_range"),
    ("[a, b]", "integer"),
    ("4", "layer_range"),
  )
  def test_wrong_layer_ranges(self, value, message):
    self._refused(
      _LINEAR
      + f"slices:\n  - sources:\n    - model: a\n      layer_range: {value}",
      6,
      message,
    )

  def test_slices_of_different_length(self):
    self._refused(
      _LINEAR
      + "slices:\n"
      + "  - sources: [{model: a, layer_range: [0, 2]}]\n"
      + "  - sources:\n"
      + "    - {model: a, layer_range: [0, 2]}\n"
      + "    - {model: b, layer_range: [0, 3]}\n",
      5,
      "different numbers of layers: [2, 3]",
    )
    self._refused(_LINEAR + "slices:\n  - sources: []", 4, "at least 1")

  @parameterized.parameters(
    ("parameters:\n  wieght: 1", 4, "'wieght'", "Did you mean weight?"),
    ("parameters: {density: 1}", 3, "linear has no parameter 'density'"),
    ("parameters:\n  weight: []", 4, "an empty list"),
    ("parameters:\n  weight: much", 4, "must be a number; got 'much'"),
    ("parameters:\n  weight: [1, much]", 4, "must be a number; got 'much'"),
    ("parameters: [1]", 3, "dict"),
  )
  def test_wrong_parameters(self, text, line, *parts):
    self._refused(_MODELS + "merge_method: linear\n" + text, line, *parts)

  @parameterized.parameters("models", "slices", "module", "source", "inner")
  def test_unknown_parameters_on_every_level(self, level):
    bad = "{foo: 1}"
    model = "[{model: a, layer_range: [0, 1]}]"
    text, line = {
      "models": (f"models:\n  - model: a\n    parameters: {bad}", 4),
      "slices": (f"slices:\n  - sources: {model}\n    parameters: {bad}", 4),
      "source": (
        "slices:\n  - sources:\n    - model: a\n      layer_range: [0, 1]\n"
        f"      parameters: {bad}",
        6,
      ),
      "module": (
        f"modules:\n  x:\n    models: [{{model: a}}]\n    parameters: {bad}",
        5,
      ),
      "inner": (
        f"modules:\n  x:\n    models:\n    - model: a\n      parameters: {bad}",
        6,
      ),
    }[level]
    self._refused("merge_method: linear\n" + text, line, "'foo'")

  def test_parameters_that_are_words(self):
    recipe = self._load(
      _MODELS + "merge_method: ties\nbase_model: c\n"
      "parameters: {weight: 1, scope: vector, zero_sign: majority}"
    )
    self.assertEqual(recipe.parameters["scope"], "vector")

  def test_a_bomb_in_a_file(self):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [
      f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)
    ]
    with self.assertRaisesRegex(recipes.RecipeError, "more than 100000 values"):
      self._load("\n".join(lines))

  @parameterized.parameters(
    ("{value: []}", 4, "an empty list"),
    ("\n  - value: []", 5, "an empty list"),
    ("\n  - filter: x", 5, "'value' is missing"),
    ("\n  - value: 1\n    filtre: x", 6, "no key 'filtre'"),
  )
  def test_wrong_conditions(self, value, line, *parts):
    self._refused(
      _MODELS + f"merge_method: linear\nparameters:\n  weight: {value}",
      line,
      *parts,
    )

  def test_a_parameter_without_a_value(self):
    self._refused(
      _MODELS + "merge_method: linear\nparameters:\n  weight:", 4, "weight"
    )


class MethodsTest(parameterized.TestCase):
  def test_names(self):
    # Those that mergekit documents.
    self.assertContainsSubset(
      (
        *("linear", "slerp", "nuslerp", "multislerp", "karcher"),
        *("task_arithmetic", "ties", "dare_ties", "dare_linear"),
        *("breadcrumbs", "breadcrumbs_ties", "model_stock", "nearswap"),
        *("arcee_fusion", "della", "della_linear", "sce", "passthrough"),
      ),
      recipes.methods(),
    )
    self.assertContainsSubset(("magmax", "iso_c", "tsv_merge"), _names())
    # Statistics of data are no part of a checkpoint.
    self.assertNoCommonElements(("fisher_average", "regmean"), _names())
    self.assertEqual(list(recipes.methods()), sorted(recipes.methods()))

  @parameterized.named_parameters(
    (name, name) for name in sorted(recipes.methods())
  )
  def test_tables_are_whole(self, name):
    method = recipes.methods()[name]
    self.assertEqual(method.name, name)
    self.assertTrue(method.summary)
    self.assertIn(method.base, ("needed", "optional", "model"))
    self.assertGreaterEqual(method.least, 1)
    self.assertGreaterEqual(method.most or 99, method.least)
    self.assertNoCommonElements(method.parameters, method.of_models)

  @parameterized.parameters(
    ("ties", ["dare_ties", "slerp", "ties"], "Did you mean ties?"),
    ("slrep", ["slerp", "ties"], "Did you mean slerp?"),
    ("xyz", ["slerp", "ties"], "Choose one of slerp, ties."),
    ("xyz", [], "Choose one of none."),
  )
  def test_near(self, name, choices, wanted):
    self.assertEqual(_methods.near(name, choices), wanted)

  @parameterized.parameters(
    # mergekit's epsilon is half of the width.
    ("della", {"density": 0.5, "epsilon": 0.1}, {"epsilon": [0.2, 0.2]}),
    ("ties", {"density": 0.5}, {"scope": "leaf", "merge": "mean"}),
    ("dare_ties", {"density": 0.5}, {"variant": "ties", "rescale": "l1"}),
    ("dare_linear", {"density": 0.5}, {"variant": "linear"}),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.2}, {"gamma": [0.2, 0.2]}),
  )
  def test_calls(self, name, own, options):
    method = recipes.methods()[name]
    values = {**method.parameters}
    of_models = [{"weight": weight, **own} for weight in (0.25, 2)]
    call = method.build(values, of_models, True)
    self.assertEqual(call.weights, (0.25, 2.0))
    self.assertEqual(call.method.options["density"], [0.5, 0.5])
    self.assertContainsSubset(options, call.method.options)
    for key, value in options.items():
      self.assertEqual(call.method.options[key], value)


def _names():
  return set(recipes.methods())


if __name__ == "__main__":
  absltest.main()
