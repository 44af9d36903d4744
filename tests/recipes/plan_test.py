"""Tests of what a recipe makes each tensor of."""

from __future__ import annotations

import json

import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import checkpoints, recipes
from tests.recipes import _merging, _on_disk


class ParametersTest(_merging.MergingTest):
  def setUp(self):
    super().setUp()
    for name in "abc":
      self.model(name, layers=3)

  def _weights(self, text):
    return {name: one.call.weights for name, one in self.plan(text).items()}

  def test_gradients(self):
    found = self._weights("""\
      merge_method: linear
      models:
        - model: $a
          parameters: {weight: [0, 0.3, 0.5, 1, 2]}
        - model: $b
          parameters: {weight: 3}
    """)
    for layer, weight in enumerate((0, 0.5, 2)):
      name = f"model.layers.{layer}.mlp.up_proj.weight"
      self.assertEqual(found[name], (weight, 3))
    # What is in no layer is as if in the first.
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
      self.assertEqual(found[name], (0, 3))

  def test_filters(self):
    found = self._weights("""\
      merge_method: linear
      models: [{model: $a}, {model: $b}]
      parameters:
        weight:
          - filter: self_attn
            value: [0, 1]
          - filter: embed_tokens
            value: 7
          - filter: layers.1.
            value: 5
          - value: 9
    """)
    for name, weight in {
      "model.embed_tokens.weight": 7,
      "model.layers.0.self_attn.q_proj.weight": 0,
      "model.layers.1.self_attn.q_proj.weight": 0.5,
      "model.layers.2.self_attn.q_proj.weight": 1,
      "model.layers.0.mlp.up_proj.weight": 9,
      "model.layers.1.mlp.up_proj.weight": 5,
      "model.layers.2.mlp.up_proj.weight": 9,
      "model.norm.weight": 9,
      "lm_head.weight": 9,
    }.items():
      self.assertEqual(found[name], (weight, weight), name)

  def test_precedence(self):
    found = self.plan("""\
      merge_method: ties
      base_model: $c
      modules:
        model.layers:
          parameters: {weight: 2, density: 0.2, normalize: false}
          slices:
            - parameters: {weight: 3, density: 0.3}
              sources:
                - model: $a
                  layer_range: [0, 1]
                  parameters:
                    weight: 4
                    density: [{filter: mlp, value: 0.9}]
                - model: $b
                  layer_range: [0, 1]
            - sources: [{model: $a, layer_range: [1, 3]},
                {model: $b, layer_range: [1, 3]}]
      parameters: {weight: 1, density: 0.1, lambda: 0.5, normalize: true}
    """)
    for name, weights, density in (
      ("model.layers.0.mlp.up_proj.weight", (4, 3), [0.9, 0.3]),
      ("model.layers.0.self_attn.q_proj.weight", (4, 3), [0.3, 0.3]),
      ("model.layers.1.mlp.up_proj.weight", (2, 2), [0.2, 0.2]),
      # Before the layers as the first slice, behind them as the last.
      ("model.embed_tokens.weight", (4, 3), [0.3, 0.3]),
      ("model.norm.weight", (2, 2), [0.2, 0.2]),
      ("lm_head.weight", (2, 2), [0.2, 0.2]),
    ):
      call = found[name].call
      self.assertEqual(call.weights, weights, name)
      self.assertEqual(call.method.options["density"], density, name)
      self.assertEqual(call.method.options["scale"], 0.5)
      self.assertEqual(call.method.options["merge"], "sum")

  def test_precedence_without_slices(self):
    found = self._weights("""\
      merge_method: linear
      models:
        - model: $a
          parameters: {weight: [{filter: mlp, value: 4}]}
        - model: $b
      parameters: {weight: 1}
    """)
    self.assertEqual(found["model.layers.0.mlp.up_proj.weight"], (4, 1))
    self.assertEqual(found["model.norm.weight"], (1, 1))

  def test_gradients_run_along_a_slice(self):
    found = self._weights("""\
      merge_method: linear
      slices:
        - sources: [{model: $a, layer_range: [0, 3]}]
          parameters: {weight: [0, 1]}
        - sources: [{model: $b, layer_range: [1, 2]}]
          parameters: {weight: [0, 1]}
    """)
    weights = [found[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(4)]
    self.assertEqual(weights, [(0,), (0.5,), (1,), (1,)])

  def test_what_is_missing(self):
    self.assert_refused(
      self.of("linear"), r"\(parameters\): linear needs weight of .*a for"
    )
    self.assert_refused(self.of("slerp", base="a"), "slerp needs t for")
    self.assert_refused(
      """\
      merge_method: linear
      models:
        - model: $a
          parameters: {weight: 1}
        - model: $b
          parameters: {weight: [{filter: mlp, value: 1}]}
      """,
      "needs weight of .*b for 'lm_head.weight'",
    )

  @parameterized.parameters(
    ("ties", {"density": 0}, "density"),
    ("ties", {"density": 1.5}, "density"),
    ("ties", {"scope": "leaf"}, "scope"),
    ("ties", {"zero_sign": "x"}, "zero_sign"),
    ("breadcrumbs", {"density": 0.5, "gamma": -0.1}, "gamma"),
    ("della", {"density": 0.1, "epsilon": 0.5}, "epsilon"),
    ("linear", {"weight": 10**400}, "weight"),
  )
  def test_values_out_of_their_range(self, method, parameters, message):
    base = None if method == "linear" else "c"
    recipe = self.of(method, base=base, **{"weight": 1, **parameters})
    # Before anything is read.
    with self.assertRaisesRegex(recipes.RecipeError, message):
      recipes.plan_merge(recipe)

  @parameterized.parameters(
    ("ties", {"density": float("nan")}),
    ("breadcrumbs", {"gamma": float("nan")}),
  )
  def test_values_that_are_no_numbers(self, method, parameters):
    recipe = self.of(method, base="c", weight=1, **parameters)
    with self.assertRaises(recipes.RecipeError):
      recipes.plan_merge(recipe)


class StructureTest(_merging.MergingTest):
  def _names(self, text):
    return {
      name: (one.models, [tensor.name for tensor in one.tensors])
      for name, one in self.plan(text).items()
    }

  def test_stacking(self):
    a = self.model("a", layers=3)
    b = self.model("b", layers=2)
    text = """\
      merge_method: passthrough
      slices:
        - sources: [{model: $a, layer_range: [0, 2]}]
        - sources: [{model: $b, layer_range: [0, 1]}]
        - sources: [{model: $a, layer_range: [1, 3]}]
        - sources: [{model: $b, layer_range: [1, 2]}]
    """
    taken = [(a, 0), (a, 1), (b, 0), (a, 1), (a, 2), (b, 1)]
    found = self.merge(text)
    wanted = {
      name: a[name] for name in a if name == "model.embed_tokens.weight"
    }
    for number, (model, layer) in enumerate(taken):
      for part in ("self_attn.q_proj", "mlp.up_proj"):
        wanted[f"model.layers.{number}.{part}.weight"] = model[
          f"model.layers.{layer}.{part}.weight"
        ]
    wanted |= {
      name: b[name] for name in ("model.norm.weight", "lm_head.weight")
    }
    np.testing.assert_equal(found, wanted)
    config = json.loads((self.root / "out/config.json").read_text())
    self.assertEqual(config, _merging.config(6))

  def test_scaled_layers(self):
    a = self.model("a", layers=2)
    found = self.merge("""\
      merge_method: passthrough
      slices:
        - sources:
          - model: $a
            layer_range: [0, 2]
            parameters:
              scale: [{filter: q_proj, value: 0.5}, {value: 1}]
    """)
    for name, array in a.items():
      factor = np.float32(0.5 if "q_proj" in name else 1)
      np.testing.assert_array_equal(found[name], array * factor)

  def test_layers_of_different_places(self):
    a, b = self.model("a", layers=4), self.model("b", layers=3)
    found = self.merge("""\
      merge_method: linear
      slices:
        - sources:
          - {model: $a, layer_range: [2, 4]}
          - {model: $b, layer_range: [0, 2]}
      parameters: {weight: 1, normalize: false}
    """)
    for layer in range(2):
      name = "model.layers.{}.mlp.up_proj.weight"
      np.testing.assert_allclose(
        found[name.format(layer)],
        a[name.format(2 + layer)] + b[name.format(layer)],
        rtol=1e-6,
        atol=1e-7,
      )
    self.assertLen(found, 7)

  def test_the_base_of_a_slice(self):
    a, b = self.model("a", layers=3), self.model("b", layers=3)
    c = self.model("c", layers=3)
    found = self.merge("""\
      merge_method: task_arithmetic
      base_model: $b
      slices:
        - sources: [{model: $a, layer_range: [1, 2]},
            {model: $b, layer_range: [2, 3]}]
        - base_model: $c
          sources: [{model: $a, layer_range: [0, 1]}]
      parameters: {weight: 0.5}
    """)
    name = "model.layers.{}.mlp.up_proj.weight"
    # The base is one of the sources: its layer is the one that is named there.
    base = b[name.format(2)]
    np.testing.assert_allclose(
      found[name.format(0)],
      base + 0.5 * (a[name.format(1)] - base),
      rtol=1e-6,
      atol=1e-6,
    )
    base = c[name.format(0)]
    np.testing.assert_allclose(
      found[name.format(1)],
      base + 0.5 * (a[name.format(0)] - base),
      rtol=1e-6,
      atol=1e-6,
    )

  def test_modules(self):
    def tensors(seed):
      draws = np.random.default_rng(seed)
      return {
        f"{stack}.layers.{layer}.w": draws.normal(size=3).astype(np.float32)
        for stack in ("encoder", "decoder")
        for layer in range(2)
      }

    a, b = tensors(0), tensors(1)
    self.model("a", a)
    self.model("b", b)
    found = self.merge("""\
      merge_method: linear
      modules:
        encoder:
          parameters: {weight: 1}
          models: [{model: $a}, {model: $b}]
        decoder:
          slices:
            - sources: [{model: $b, layer_range: [1, 2]}]
            - sources: [{model: $a, layer_range: [0, 2]}]
      parameters: {weight: 3}
    """)
    wanted = {
      f"encoder.layers.{i}.w": (a[f"encoder.layers.{i}.w"] / 2)
      + b[f"encoder.layers.{i}.w"] / 2
      for i in range(2)
    }
    for number, (model, layer) in enumerate(((b, 1), (a, 0), (a, 1))):
      wanted[f"decoder.layers.{number}.w"] = model[f"decoder.layers.{layer}.w"]
    self.assertCountEqual(found, wanted)
    for name, array in wanted.items():
      np.testing.assert_allclose(found[name], array, rtol=1e-6, atol=1e-7)

  @parameterized.parameters(
    ("encoder: {models: [{model: $a}]}", "no module is for .*decoder.layers"),
    ("coder: {models: [{model: $a}]}", "'coder' names 2 stacks"),
    ("default: {models: [{model: $a}]}", "'default' names 0 stacks"),
    ("x: {models: [{model: $a}]}", r"line 3 .*'x' names 0 stacks"),
  )
  def test_wrong_modules(self, text, message):
    self.model("a", {f"{x}coder.layers.0.w": np.ones(2) for x in ("en", "de")})
    self.assert_refused(
      f"merge_method: linear\nmodules:\n  {text}\nparameters: {{weight: 1}}",
      message,
    )

  def test_slices_of_several_stacks(self):
    self.model("a", {f"{x}coder.layers.0.w": np.ones(2) for x in ("en", "de")})
    self.model("b", {"w": np.ones(2)})
    text = """\
      merge_method: passthrough
      slices: [{sources: [{model: $%s, layer_range: [0, 1]}]}]
    """
    self.assert_refused(text % "a", "line 2.*2 stacks of layers.*modules")
    self.assert_refused(text % "b", "line 2.*0 stacks of layers")

  @parameterized.parameters(
    ("a", 0, 4), ("a", 3, 4), ("b", 2, 3), ("a", 0, 10**9)
  )
  def test_layers_out_of_bounds(self, model, first, stop):
    self.model("a", layers=3)
    self.model("b", layers=2)
    self.assert_refused(
      f"""\
      merge_method: passthrough
      slices:
        - sources: [{{model: $a, layer_range: [0, 3]}}]
        - sources: [{{model: ${model}, layer_range: [{first}, {stop}]}}]
      """,
      rf"line 2.*{model} has {3 if model == 'a' else 2} layers model.layers;"
      f" those from {first} to {stop}",
    )

  def test_wrong_numbers_of_models(self):
    for name in "abcd":
      self.model(name)
    for method, names, base, parameters, message in (
      ("slerp", "abc", "a", {"t": 0.5}, "slerp merges 2 models; there are 3"),
      ("slerp", "a", "a", {"t": 0.5}, "slerp merges 2 models; there are 1"),
      (
        "nearswap",
        "bc",
        "a",
        {"t": 0.5},
        "merges 1 models beside the base; there are 2",
      ),
      ("model_stock", "ab", "a", {}, "merges 2 or more models.*there are 1"),
      ("nuslerp", "a", None, {"weight": 1}, "nuslerp merges 2 models"),
      ("passthrough", "ab", None, {}, "passthrough merges 1 models"),
      ("ties", "a", "a", {"weight": 1}, "1 or more models beside.* are 0"),
      ("slerp", "ab", None, {"t": 0.5}, "slerp leads from the base"),
      ("ties", "ab", None, {"weight": 1}, "line .*give base_model"),
      ("sce", "ab", None, {}, "line .*give base_model"),
    ):
      self.assert_refused(self.of(method, names, base, **parameters), message)

  def test_models_that_are_not_there(self):
    self.model("a")
    for recipe in (
      self.of("linear", "ax", weight=1),
      self.of("ties", "a", "x", weight=1),
    ):
      with self.assertRaisesRegex(checkpoints.CheckpointError, "/x"):
        self.merge(recipe)
    self.assert_nothing_left("a")

  @parameterized.parameters(
    (
      "model.norm.weight",
      (5,),
      r"\(5,\) in .*b and \(4,\) in .*a. ",
    ),
    ("model.embed_tokens.weight", (7, 4), "vocabularies.*tokenizer_source"),
    ("model.layers.1.mlp.up_proj.weight", (4, 5), r"\(4, 5\) in .*b"),
    ("model.layers.1.mlp.up_proj.weight", (16,), r"\(16,\) in .*b"),
  )
  def test_shapes(self, name, shape, message):
    a = self.model("a")
    self.model("b", {**a, name: np.ones(shape, np.float32)})
    self.assert_refused(self.of("linear", weight=1), message)

  @parameterized.parameters(
    "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
  )
  def test_a_tensor_that_one_lacks(self, name):
    tensors = self.model("a")
    self.model("b", {k: v for k, v in tensors.items() if k != name})
    self.assert_refused(
      self.of("linear", weight=1), rf"b has no tensor '{name}', which .*a has"
    )
    self.assert_refused(
      self.of("task_arithmetic", "a", "b", weight=1), f"b has no .*'{name}'"
    )

  @parameterized.parameters(
    "model.extra.weight",
    "model.layers.0.mlp.extra.weight",
    "model.layers.2.mlp.up_proj.weight",
  )
  def test_a_tensor_too_many(self, name):
    tensors = self.model("a")
    self.model("b", {**tensors, name: np.ones((4, 4), np.float32)})
    # Whichever has it, nothing of it is lost without a word.
    for recipe in (
      self.of("linear", "ab", weight=1),
      self.of("task_arithmetic", "a", "b", weight=1),
      self.of("task_arithmetic", "b", "a", weight=1),
    ):
      try:
        self.assertIn(name, self.plan(recipe))
      except recipes.RecipeError as error:
        self.assertIn(name.partition(".mlp")[0], str(error))

  def test_select_and_exclude(self):
    a, b = self.model("a"), self.model("b")
    recipe = self.of("linear", weight=1)
    recipe |= {"select": r"layers\.\d", "exclude": "q_proj|layers.1"}
    found = self.plan(recipe)
    self.assertCountEqual(found, a)
    merged = [name for name, one in found.items() if one.call is not None]
    self.assertEqual(merged, ["model.layers.0.mlp.up_proj.weight"])
    result = self.merge(recipe)
    for name in a:
      wanted = (a[name] + b[name]) / 2 if name in merged else a[name]
      np.testing.assert_allclose(result[name], wanted, rtol=1e-6, atol=1e-7)

  def test_what_is_not_merged_is_that_of_the_base(self):
    self.model("a")
    base = self.model("b")
    recipe = self.of("task_arithmetic", "a", "b", weight=1)
    recipe["exclude"] = "norm"
    found = self.merge(recipe)
    np.testing.assert_array_equal(
      found["model.norm.weight"], base["model.norm.weight"]
    )

  @parameterized.parameters("select", "exclude")
  def test_patterns_that_are_none(self, key):
    self.model("a")
    recipe = {**self.of("linear", "a", weight=1), key: "(x"}
    self.assert_refused(recipe, rf"line \d+ \({key}\): .*regular expression")

  def test_dtypes(self):
    a = self.model("a", _merging.network(dtype=_on_disk.BFLOAT16))
    self.model("b", _merging.network(seed=1, dtype=np.float16))
    for dtype, out, wanted, written in (
      (None, None, "bfloat16", None),
      ("float32", None, "float32", "float32"),
      (None, "float16", "float16", "float16"),
      ("float32", "float64", "float64", "float64"),
    ):
      recipe = self.of("linear", weight=1)
      recipe |= {} if dtype is None else {"dtype": dtype}
      recipe |= {} if out is None else {"out_dtype": out}
      self.assertEqual(
        {str(one.dtype) for one in self.plan(recipe).values()}, {wanted}
      )
      found = recipes.plan_merge(recipe)
      self.assertEqual({one["dtype"] for one in found.tensors}, {wanted})
      size = sum(array.size for array in a.values())
      self.assertEqual(
        found.bytes_to_write,
        size * np.dtype(_on_disk.BFLOAT16 if out is dtype else wanted).itemsize,
      )
      self.assertEqual(found.bytes_to_read, size * 4)
      self.merge(recipe, overwrite=True)
      config = json.loads((self.root / "out/config.json").read_text())
      self.assertEqual(config.get("dtype"), written)

  def test_torch_dtype_of_the_configuration(self):
    self.model("a", config=_merging.config(torch_dtype="float32"))
    self.merge({**self.of("linear", "a", weight=1), "dtype": "bfloat16"})
    config = json.loads((self.root / "out/config.json").read_text())
    self.assertEqual(config, _merging.config(torch_dtype="bfloat16"))

  def test_tied_tensors(self):
    # One ties its head to its embedding and does not save it.
    a = self.model("a")
    b = self.model("b")
    del b["lm_head.weight"]
    self.model("c", b)
    found = self.merge(self.of("linear", "ac", weight=1))
    for name, other in (
      ("lm_head.weight", "model.embed_tokens.weight"),
      ("model.embed_tokens.weight", "model.embed_tokens.weight"),
    ):
      np.testing.assert_allclose(
        found[name], (a[name] + b[other]) / 2, rtol=1e-6, atol=1e-7
      )

  def test_two_models_that_tie(self):
    b = self.model("b")
    del b["lm_head.weight"]
    self.model("a", b)
    self.model("c", b)
    self.assertCountEqual(self.merge(self.of("linear", "ac", weight=1)), b)

  def test_buffers_that_some_lack(self):
    tensors = self.model("a")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    self.model("b", {**tensors, name: np.ones(3, np.float32)})
    found = self.plan(self.of("linear", weight=1))
    self.assertContainsSubset(tensors, found)

  def test_the_plan_in_numbers(self):
    a = self.model("a")
    self.model("b")
    plan = recipes.plan_merge(
      self.of("task_arithmetic", "a", "b", weight=1), max_shard_bytes=100
    )
    first = plan.tensors[0]
    self.assertEqual(first["name"], "lm_head.weight")
    self.assertEqual(first["method"], "task_arithmetic")
    self.assertEqual(first["models"], [str(self.root / "a")])
    sizes = [array.nbytes for array in a.values()]
    self.assertEqual(plan.bytes_to_write, sum(sizes))
    self.assertEqual(plan.bytes_to_read, 2 * sum(sizes))
    self.assertGreater(plan.peak_bytes, 0)
    self.assertEqual(
      plan.files[0], f"model-00001-of-{len(plan.files):05}.safetensors"
    )
    self.assertGreaterEqual(len(plan.files), len(sizes) // 2)
    self.assert_nothing_left("a", "b")


if __name__ == "__main__":
  absltest.main()
