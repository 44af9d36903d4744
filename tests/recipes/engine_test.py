"""Tests of every merge method on disk, against trees in memory."""

from __future__ import annotations

from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import merging, recipes
from jaxmerge.recipes import _engine
from tests.recipes import _merging, _on_disk

_SHAPES = {"mlp.weight": (8, 9), "norm.weight": (8,)}


def _tensors(seed, base=None, scale=1.0):
  draws = np.random.default_rng(seed)
  return {
    name: (
      (0 if base is None else base[name]) + scale * draws.normal(size=shape)
    ).astype(np.float32)
    for name, shape in _SHAPES.items()
  }


# Name in recipes, its parameters, those of models, the rule in memory, its
# options; whether there is a base; number of models.
_CASES = (
  ("linear", {}, {}, "weighted_average", {}, False, 3),
  ("slerp", {"t": 0.3}, None, "slerp", {"t": 0.3}, False, 2),
  ("nuslerp", {}, {}, "nuslerp", {}, False, 2),
  ("nuslerp", {}, {}, "nuslerp", {"task_vectors": True}, True, 2),
  (
    "nuslerp",
    {"nuslerp_flatten": False},
    {},
    "nuslerp",
    {"flatten": False},
    False,
    2,
  ),
  (
    "nuslerp",
    {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    {},
    "nuslerp",
    {"flatten": False, "axis": 0},
    False,
    2,
  ),
  ("multislerp", {}, {}, "multislerp", {"eps": 1e-8}, False, 3),
  (
    "multislerp",
    {"normalize_weights": False},
    {},
    "multislerp",
    {"task_vectors": True, "normalize_weights": False, "eps": 1e-8},
    True,
    3,
  ),
  ("karcher", {}, None, "karcher_mean", {}, False, 3),
  ("model_stock", {}, None, "model_stock", {}, True, 3),
  (
    "model_stock",
    {"filter_wise": True},
    None,
    "model_stock",
    {"filter_wise": True},
    True,
    3,
  ),
  ("nearswap", {"t": 0.4}, None, "nearswap", {"t": 0.4}, True, 1),
  ("arcee_fusion", {}, None, "arcee_fusion", {}, True, 1),
  ("sce", {"select_topk": 0.4}, None, "sce", {"select_topk": 0.4}, True, 3),
  (
    "task_arithmetic",
    {"lambda": 0.3},
    {},
    "task_arithmetic",
    {"scale": 0.3},
    True,
    3,
  ),
  (
    "task_arithmetic",
    {"normalize": True},
    {},
    "task_arithmetic",
    {"normalize": True},
    True,
    3,
  ),
  (
    "ties",
    {},
    {"density": 0.4},
    "ties",
    {"density": 0.4, "scope": "leaf", "zero_sign": "positive"},
    True,
    3,
  ),
  (
    "ties",
    {"normalize": False, "elect": "count", "lambda": 0.5},
    {"density": 0.4},
    "ties",
    {
      "density": 0.4,
      "scope": "leaf",
      "merge": "sum",
      "elect": "count",
      "scale": 0.5,
      "zero_sign": "positive",
    },
    True,
    3,
  ),
  (
    "ties",
    {"scope": "vector"},
    {"density": 0.4},
    "ties",
    {"density": 0.4, "zero_sign": "positive"},
    True,
    3,
  ),
  (
    "breadcrumbs",
    {},
    {"density": 0.6, "gamma": 0.1},
    "breadcrumbs",
    {"density": 0.6, "gamma": 0.1},
    True,
    3,
  ),
  (
    "breadcrumbs_ties",
    {"rescale": True, "normalize": True},
    {"density": 0.6, "gamma": 0.1},
    "breadcrumbs",
    {
      "density": 0.6,
      "gamma": 0.1,
      "variant": "ties",
      "rescale": "l1",
      "normalize": True,
    },
    True,
    3,
  ),
  (
    "della",
    {},
    {"density": 0.5, "epsilon": 0.1},
    "della",
    {"density": 0.5, "epsilon": 0.2, "axis": 1, "rescale": "l1"},
    True,
    3,
  ),
  (
    "della_linear",
    {"rescale": False},
    {"density": 0.5, "epsilon": 0.1},
    "della",
    {
      "density": 0.5,
      "epsilon": 0.2,
      "axis": 1,
      "rescale": None,
      "variant": "linear",
      "normalize": False,
    },
    True,
    3,
  ),
  ("consensus", {}, {}, "consensus", {}, True, 3),
  ("ema", {"decay": 0.5}, {}, "ema", {"decay": 0.5}, True, 3),
  ("emr_unified", {}, {}, "emr_unified", {}, True, 3),
  ("iso_c", {"scale": 0.5}, {}, "iso_c", {"scale": 0.5}, True, 3),
  ("iso_cts", {}, {}, "iso_cts", {}, True, 3),
  ("magmax", {"scale": 0.7}, {}, "magmax", {"scale": 0.7}, True, 3),
  ("max_abs", {}, {}, "max_abs", {}, True, 3),
  ("tsv_merge", {}, {}, "tsv_merge", {}, True, 3),
)
# Drawn block by block, copied, or without weights of its own: below.
_OTHERS = (
  *("dare_linear", "dare_ties", "passthrough", "random_mix"),
  "tunable_magmax",
)
_WEIGHTS = (0.5, 1.5, 0.7)


class EngineTest(_merging.MergingTest):
  def _models(self, count, scale=1.0):
    """Writes "base", "a", "b", ..., and returns their tensors."""
    base = _tensors(0)
    models = [_tensors(i + 1, base, scale) for i in range(count)]
    self.model("base", base)
    for name, tensors in zip("abcdef", models, strict=False):
      self.model(name, tensors)
    return base, models

  def _recipe(self, method, count, base, parameters, own):
    recipe = self.of(method, "abcdef"[:count], base, **parameters)
    if own is not None:
      for model, weight in zip(recipe["models"], _WEIGHTS, strict=False):
        model["parameters"] = {"weight": weight, **own}
    return recipe

  def test_all_methods_are_tried(self):
    tried = {case[0] for case in _CASES} | set(_OTHERS)
    self.assertEqual(tried, set(recipes.methods()))

  @parameterized.named_parameters(
    (f"{case[0]}_{number}", *case) for number, case in enumerate(_CASES)
  )
  def test_as_in_memory(
    self, name, parameters, own, rule, options, has_base, count
  ):
    base, models = self._models(count)
    if name == "slerp":
      # From the base to the other.
      recipe = self._recipe(name, 2, "a", parameters, own)
      recipe["models"].reverse()
    else:
      recipe = self._recipe(
        name, count, "base" if has_base else None, parameters, own
      )
    method = merging.get(rule, **options)
    given = {}
    if own is not None:
      given["weights"] = list(_WEIGHTS[:count])
    if method.info.needs_key:
      given["key"] = jax.random.key(0)
    # Not compiled: that takes longer than all the rest.
    with jax.disable_jit():
      wanted = method(base if has_base else None, models, **given)
    found = self.merge(recipe)
    self.assertCountEqual(found, base)
    for tensor, array in found.items():
      self.assertEqual(array.dtype, np.float32)
      np.testing.assert_allclose(
        array, wanted[tensor], rtol=1e-5, atol=1e-5, err_msg=tensor
      )

  def test_sum(self):
    _, models = self._models(3)
    recipe = self._recipe("linear", 3, None, {"normalize": False}, {})
    for name, array in self.merge(recipe).items():
      wanted = sum(
        w * model[name].astype(np.float64)
        for w, model in zip(_WEIGHTS, models, strict=True)
      )
      np.testing.assert_allclose(array, wanted, rtol=1e-5, atol=1e-5)

  # Larger than a block.

  @parameterized.parameters(
    ("linear", {}, {}, 3),
    ("karcher", {}, None, 3),
    ("task_arithmetic", {"lambda": 0.3}, {}, 3),
    ("ties", {}, {"density": 0.3}, 3),
    ("ties", {"scope": "vector", "zero_sign": "majority"}, {"density": 0.3}, 3),
    ("breadcrumbs", {"rescale": True}, {"density": 0.5, "gamma": 0.1}, 2),
  )
  def test_blocks_make_no_difference(self, method, parameters, own, count):
    self._models(count)
    has_base = recipes.methods()[method].base == "needed"
    recipe = self._recipe(
      method, count, "base" if has_base else None, parameters, own
    )
    whole = self.merge(recipe, "whole")
    init = _engine.Engine.__init__

    def in_blocks(engine, *args):
      init(engine, *args, block=16)

    with mock.patch.object(_engine.Engine, "__init__", in_blocks):
      found = self.merge(recipe, "blocks")
    for name, array in whole.items():
      np.testing.assert_allclose(found[name], array, rtol=1e-6, atol=1e-6)

  # Drawn at random.

  @parameterized.parameters("dare_linear", "dare_ties")
  def test_dare(self, method):
    base = {"w": np.zeros((300, 40), np.float32)}
    self.model("base", base)
    self.model("a", {"w": np.ones((300, 40), np.float32)})
    self.model("b", {"w": np.full((300, 40), 10, np.float32)})
    recipe = self.of(method, "ab", "base", weight=1, density=0.25)
    found = self.merge({**recipe, "seed": 3}, "x")["w"]
    # Divided by the density, or so that the sum of magnitudes stays.
    values = np.unique(np.round(found, 2))
    self.assertLen(values, 4)
    np.testing.assert_allclose(values, [0, 4, 40, 44], rtol=0.1)
    np.testing.assert_allclose((found > 20).mean(), 0.25, atol=0.02)
    both = np.isclose(found, values[3], rtol=1e-3).mean()
    np.testing.assert_allclose(both, 0.25**2, atol=0.02)
    # The same again, and another with another seed.
    again = self.merge({**recipe, "seed": 3}, "y")["w"]
    np.testing.assert_array_equal(found, again)
    other = self.merge({**recipe, "seed": 4}, "z")["w"]
    self.assertGreater((found != other).mean(), 0.2)
    plain = self.merge({**recipe, "seed": 3}, "s", max_shard_bytes=1)["w"]
    np.testing.assert_array_equal(found, plain)

  def test_tensors_and_models_are_drawn_apart(self):
    shape = (64, 64)
    self.model("base", {n: np.zeros(shape, np.float32) for n in "uv"})
    self.model("a", {n: np.ones(shape, np.float32) for n in "uv"})
    recipe = self.of("dare_linear", "a", "base", weight=1, density=0.5)
    found = self.merge(recipe)
    self.assertGreater(((found["u"] > 0) != (found["v"] > 0)).mean(), 0.3)

  def test_without_rescaling(self):
    self.model("base", {"w": np.zeros(5000, np.float32)})
    self.model("a", {"w": np.ones(5000, np.float32)})
    recipe = self.of(
      "dare_linear", "a", "base", weight=0.5, density=0.3, rescale=False
    )
    found = self.merge(recipe)["w"]
    np.testing.assert_array_equal(np.unique(found), np.float32([0, 0.5]))

  def test_random_mix(self):
    self.model("base", {"w": np.zeros(9000, np.float32)})
    for value, name in enumerate("abc", 1):
      self.model(name, {"w": np.full(9000, value, np.float32)})
    recipe = self.of("random_mix", "abc", "base")
    found = self.merge(recipe)["w"]
    for value in (1, 2, 3):
      self.assertAlmostEqual((found == value).mean(), 1 / 3, delta=0.03)

  def test_weights_of_tunable_magmax_are_preferences(self):
    base, models = self._models(3)
    recipe = self._recipe("tunable_magmax", 3, "base", {"scale": 0.7}, {})
    found = self.merge({**recipe, "seed": 3})
    wanted = merging.tunable_magmax(
      base, models, jax.random.key(3), preferences=_WEIGHTS, scale=0.7
    )
    for name, array in found.items():
      np.testing.assert_allclose(array, wanted[name], rtol=1e-6, err_msg=name)

  @parameterized.parameters((-1, "not negative; got -1"), (0, "all zero"))
  def test_wrong_preferences(self, weight, message):
    self._models(2)
    recipe = self.of("tunable_magmax", "ab", "base", weight=weight)
    self.assert_refused(recipe, f"preferences .*{message}")

  # Dtypes and shapes.

  def test_what_holds_no_floats_is_that_of_the_first(self):
    a = {
      "w": np.ones(3, np.float32),
      "ids": np.array([2**62, -1]),
      "mask": np.array([True, False]),
      "bytes": np.arange(3, dtype=np.uint8),
    }
    self.model("a", a)
    self.model("b", {k: np.zeros_like(v) for k, v in a.items()})
    recipe = self.of("linear", weight=1)
    found = self.merge({**recipe, "dtype": "float16"})
    for name in ("ids", "mask", "bytes"):
      np.testing.assert_array_equal(found[name], a[name], strict=True)
    np.testing.assert_array_equal(
      found["w"], np.full(3, 0.5, np.float16), strict=True
    )
    # With a base those of the base.
    recipe = self.of("task_arithmetic", "a", "b", weight=1)
    found = self.merge(recipe, "again")
    np.testing.assert_array_equal(found["ids"], [0, 0])

  def test_double_precision(self):
    a = {"w": np.array([1.0, 1 / 3, 1e-200]), "x": np.array([1 / 7, 2.0])}
    self.model("a", a)
    self.model("b", {"w": np.array([3.0, 1 / 3, 0.0]), "x": np.zeros(2)})
    recipe = {**self.of("linear", weight=1), "exclude": "x"}
    found = self.merge(recipe)
    # Reckoned in single precision, and kept in double.
    self.assertEqual(found["w"].dtype, np.float64)
    np.testing.assert_allclose(found["w"], [2, 1 / 3, 0], rtol=1e-7)
    np.testing.assert_array_equal(found["x"], a["x"], strict=True)

  def test_copies_in_double_precision(self):
    a = self.model("a", {"w": np.array([1 / 3, 1e300, -1e-300])})
    recipe = self.of("passthrough", "a")
    np.testing.assert_array_equal(self.merge(recipe)["w"], a["w"], strict=True)
    found = self.merge({**recipe, "out_dtype": "float64"}, "again")["w"]
    np.testing.assert_array_equal(found, a["w"], strict=True)

  def test_copies_keep_every_bit(self):
    draws = np.random.default_rng(0)
    bits = draws.integers(0, 2**16, 1000).astype(np.uint16)
    a = {"w": bits.view(_on_disk.BFLOAT16), "h": bits.view(np.float16)}
    self.model("a", a)
    found = self.merge(self.of("passthrough", "a"))
    for name in a:
      self.assertEqual(found[name].tobytes(), a[name].tobytes())

  @parameterized.parameters("linear", "karcher", "ties", "iso_c", "dare_ties")
  def test_scalars_and_empty_tensors(self, method):
    base = {
      "scalar": np.array(1.0, np.float32),
      "one": np.ones(1, np.float32),
      "empty": np.zeros((0, 3), np.float32),
      "w": np.ones((2, 3), np.float32),
    }
    self.model("base", base)
    for name, value in (("a", 3), ("b", 5)):
      self.model(name, {k: v * np.float32(value) for k, v in base.items()})
    has_base = recipes.methods()[method].base == "needed"
    parameters = {"weight": 1} if method != "karcher" else {}
    recipe = self.of(method, base="base" if has_base else None, **parameters)
    found = self.merge(recipe)
    self.assertEqual(
      {name: array.shape for name, array in found.items()},
      {name: array.shape for name, array in base.items()},
    )
    if method in ("linear", "karcher", "ties"):
      np.testing.assert_allclose(found["scalar"], 4, rtol=1e-6)
      np.testing.assert_allclose(found["w"], 4, rtol=1e-6)

  @parameterized.parameters(
    ("float32", 0), ("bfloat16", 2**-8), ("float16", 2**-11)
  )
  def test_dtypes(self, dtype, eps):
    base, models = self._models(2)
    recipe = self._recipe("linear", 2, None, {}, {})
    found = self.merge({**recipe, "out_dtype": dtype})
    for name in base:
      wanted = (0.5 * models[0][name] + 1.5 * models[1][name]) / 2
      self.assertEqual(str(found[name].dtype), dtype)
      np.testing.assert_allclose(
        found[name].astype(np.float32), wanted, rtol=eps + 1e-6, atol=1e-6
      )

  def test_inputs_are_rounded_to_dtype(self):
    self.model("a", {"w": np.array([1 + 2**-10, 3.0], np.float32)})
    recipe = {**self.of("passthrough", "a"), "dtype": "bfloat16"}
    found = self.merge({**recipe, "out_dtype": "float32"})["w"]
    np.testing.assert_array_equal(found, np.array([1, 3], np.float32))

  def test_mixed_dtypes(self):
    self.model("a", {"w": np.ones(4, np.float16)})
    self.model("b", {"w": np.full(4, 2.0)})
    self.model("c", {"w": np.full(4, 6, _on_disk.BFLOAT16)})
    found = self.merge(self.of("linear", "abc", weight=1))["w"]
    np.testing.assert_array_equal(found, np.full(4, 3, np.float16), strict=True)

  # Not finite.

  @parameterized.parameters(
    ("linear", None),
    ("ties", "base"),
    ("magmax", "base"),
    ("iso_c", "base"),
    ("karcher", None),
    ("sce", "base"),
  )
  def test_nan_in_an_input(self, method, base):
    self._models(2)
    broken = _tensors(2)
    broken["mlp.weight"][3, 4] = np.nan
    self.model("b", broken)
    parameters = {} if method in ("karcher", "sce") else {"weight": 1}
    self.assert_refused(
      self.of(method, "ab", base, **parameters),
      "'mlp.weight' of .*b holds NaN or infinity.*exclude",
    )

  @parameterized.parameters("dare_linear", "random_mix")
  def test_nan_where_it_may_be_dropped(self, method):
    self.model("base", {"w": np.zeros(4096, np.float32)})
    self.model("a", {"w": np.ones(4096, np.float32)})
    parameters = {"density": 0.5} if method == "dare_linear" else {}
    recipe = self.of(method, "aab", "base", weight=1, **parameters)
    for place in range(0, 4096, 512):
      broken = np.ones(4096, np.float32)
      broken[place] = np.nan
      self.model("b", {"w": broken})
      self.assert_refused(recipe, "'w' of .*b holds NaN")

  def test_nan_of_the_base_of_a_slice(self):
    own = {name: _merging.network(layers=1) for name in ("a", "base", "own")}
    name = "model.layers.0.mlp.up_proj.weight"
    own["own"][name][2, 1] = np.nan
    for model, tensors in own.items():
      self.model(model, tensors, layers=1)
    text = """\
      merge_method: task_arithmetic
      base_model: $base
      slices:
        - sources: [{model: $a, layer_range: [0, 1]}]
        - base_model: $own
          sources: [{model: $a, layer_range: [0, 1]}]
      parameters: {weight: 1}
    """
    self.assert_refused(
      text, r"'model.layers.1.mlp[\w.]*' of \S*own holds NaN or infinity"
    )

  def test_nan_of_the_base(self):
    base, _ = self._models(1)
    base["norm.weight"][0] = np.inf
    self.model("base", base)
    self.assert_refused(
      self.of("task_arithmetic", "a", "base", weight=1),
      "'norm.weight' of .*base holds NaN or infinity",
    )

  def test_nan_in_what_is_copied(self):
    a = self.model("a", {"w": np.array([1, np.nan], np.float32)})
    found = self.merge(self.of("passthrough", "a"))
    np.testing.assert_array_equal(found["w"], a["w"])

  def test_overflow(self):
    self.model("a", {"w": np.full(3, 6e4, np.float32)})
    self.model("b", {"w": np.full(3, 6e4, np.float32)})
    recipe = self.of("linear", weight=1, normalize=False)
    self.assert_refused(
      {**recipe, "out_dtype": "float16"}, "too large for float16.*out_dtype"
    )
    found = self.merge(recipe)
    np.testing.assert_array_equal(found["w"], np.full(3, 12e4, np.float32))

  def test_overflow_of_a_copy(self):
    self.model("a", {"w": np.full(3, 1e5, np.float32)})
    for key in ("dtype", "out_dtype"):
      self.assert_refused(
        {**self.of("passthrough", "a"), key: "float16"}, "too large for float16"
      )

  def test_vector_scope_has_one_density(self):
    self._models(2)
    recipe = self.of(
      "ties",
      base="base",
      weight=1,
      scope="vector",
      density=[{"filter": "mlp", "value": 0.5}, {"value": 0.25}],
    )
    self.assert_refused(recipe, "With scope: vector a model has one density")


if __name__ == "__main__":
  absltest.main()
