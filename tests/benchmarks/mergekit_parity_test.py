"""The comparisons of the benchmark against mergekit, and its page."""

from __future__ import annotations

import os
import pathlib
import sys
import tempfile

import ml_dtypes
import numpy as np
import yaml
from absl.testing import absltest

from benchmarks import (
  _mergekit_compare,
  _mergekit_files,
  _mergekit_page,
  _mergekit_process,
  _mergekit_recipes,
  _mergekit_rows,
  _mergekit_times,
)

BF16 = ml_dtypes.bfloat16


def _record(rule, side, seconds, *, inputs=3, cache="warm", anon=1e9):
  return {
    "rule": rule,
    "inputs": inputs,
    "cache": cache,
    "side": side,
    "turn": 0,
    "seconds": seconds,
    "anon": anon,
    "file": 5e9,
    "max_rss": 6e9,
    "available": 12e9,
    "cached": 1.0,
  }


def _difference(**values):
  return {
    "relative": 2e-7,
    "tensor": "a",
    "beyond": 0,
    "total": 200,
    "ulps": 0,
    "problems": [],
  } | values


class ComparisonTest(absltest.TestCase):
  def test_units_in_the_last_place(self):
    # bfloat16 has 8 bits of mantissa, the first of them implicit.
    step = 2.0**-7
    x = np.array([1, 1, 1, 2, 0.0, -1, 2.0**-133], BF16)
    y = np.array([1, 1 + step, 1 + 3 * step, 2 - step, -0.0, -1 - step, 0])
    np.testing.assert_array_equal(
      _mergekit_compare.ulps(x, y.astype(BF16)), [0, 1, 3, 1, 0, 1, 1]
    )
    # Across zero: the smallest numbers of both signs are two apart.
    tiny = np.array([2.0**-133], BF16)
    np.testing.assert_array_equal(_mergekit_compare.ulps(tiny, -tiny), [2])

  def test_units_in_float16(self):
    x = np.array([1, 1], np.float16)
    y = np.array([1 + 2.0**-10, 1 - 2.0**-11], np.float16)
    np.testing.assert_array_equal(_mergekit_compare.ulps(x, y), [1, 1])

  def test_float32_is_held_against_the_largest_magnitude(self):
    theirs = {"a": np.array([4, 1, 0, -2], np.float32), "b": np.ones(1)}
    ours = {"a": theirs["a"] + np.array([0, 2e-5, 1e-4, 0]), "b": np.ones(1)}
    ours["a"] = ours["a"].astype(np.float32)
    found = _mergekit_compare.compare(ours, theirs)
    # 2e-5 is half of 1e-5 of 4; 1e-4 is beyond.
    self.assertEqual(found["beyond"], 1)
    self.assertEqual(found["total"], 5)
    self.assertEqual(found["tensor"], "a")
    self.assertAlmostEqual(found["relative"], 1e-4 / 4, places=9)
    self.assertEqual(found["ulps"], 0)
    self.assertEmpty(found["problems"])

  def test_bfloat16_is_counted_in_units(self):
    step = 2.0**-7
    theirs = {"a": np.array([1, 1, 1, 8], BF16)}
    ours = {"a": np.array([1, 1 + step, 1 + 2 * step, 8], BF16)}
    found = _mergekit_compare.compare(ours, theirs)
    self.assertEqual((found["beyond"], found["ulps"]), (1, 2))
    self.assertEqual(found["relative"], 2 * step / 8)

  def test_names_shapes_and_dtypes_are_problems(self):
    one, two = np.ones(2, np.float32), np.ones(3, np.float32)
    found = _mergekit_compare.compare(
      {"a": one, "b": one, "c": one.astype(BF16)},
      {"b": two, "c": one, "d": two},
    )
    self.assertEqual(
      found["problems"],
      [
        "a: only in ours",
        "d: only in mergekit's",
        "b: float32[2] and float32[3]",
        "c: bfloat16[2] and float32[2]",
      ],
    )

  def test_what_is_no_number_counts(self):
    x = np.array([np.nan, 1, np.nan, np.inf], np.float32)
    y = np.array([np.nan, 1, 1, np.inf], np.float32)
    found = _mergekit_compare.compare({"a": x}, {"a": y})
    self.assertEqual(found["beyond"], 1)
    self.assertEqual(found["relative"], np.inf)

  def test_moments(self):
    base = {"a": np.zeros(4)}
    ours, theirs = {"a": np.array([1.0, 2, 3, 4])}, {"a": np.ones(4)}
    found = _mergekit_compare.moments(base, ours, theirs)
    (row,) = found["tensors"]
    self.assertEqual(row["mean"], [2.5, 1.0])
    self.assertEqual(row["std"], [np.sqrt(1.25), 0.0])
    # Differences 0, 1, 2, 3: mean 1.5, variance 5 / 3, four of them.
    self.assertAlmostEqual(row["mean_errors"], 1.5 / np.sqrt(5 / 12))
    # Of squares 0, 3, 8, 15: mean 6.5, variance 43.
    self.assertAlmostEqual(row["square_errors"], 6.5 / np.sqrt(43 / 4))
    self.assertEqual(found["largest"], row["mean_errors"])
    # Two deviations, one of a hundred, two-sided.
    self.assertAlmostEqual(found["limit"], 2.807, places=3)

  def test_moments_of_one_distribution_stay_within_the_limit(self):
    draws = np.random.default_rng(0)
    base = {str(i): draws.normal(size=2000) for i in range(20)}
    delta = {name: draws.normal(size=2000) for name in base}

    def dare():
      return {
        name: base[name] + 2 * delta[name] * (draws.random(2000) < 0.5)
        for name in base
      }

    ours, theirs = dare(), dare()
    found = _mergekit_compare.moments(base, ours, theirs)
    self.assertLess(found["largest"], found["limit"])
    half = {
      name: base[name] + 0.9 * (theirs[name] - base[name]) for name in base
    }
    found = _mergekit_compare.moments(base, ours, half)
    self.assertGreater(found["largest"], found["limit"])

  def test_same_results_have_no_deviation(self):
    found = _mergekit_compare.moments(
      {"a": np.ones(3), "b": np.ones(1)},
      {"a": np.zeros(3), "b": np.zeros(1)},
      {"a": np.zeros(3), "b": np.ones(1)},
    )
    self.assertEqual(found["largest"], 0.0)


class RecipesTest(absltest.TestCase):
  def test_ours_are_valid(self):
    from jaxmerge import recipes

    root = pathlib.Path("models")
    made = [
      *_mergekit_recipes.recipes(root, 4).values(),
      *_mergekit_recipes.examples(root, 4).values(),
      *_mergekit_recipes.raw_recipes(root).values(),
      *_mergekit_recipes.speed_recipes(root, 8).values(),
    ]
    with tempfile.TemporaryDirectory() as folder:
      file = pathlib.Path(folder) / "recipe.yml"
      for recipe in made:
        file.write_text(yaml.safe_dump(recipe))
        recipes.load(file)
    methods = {recipe["merge_method"] for recipe in made}
    self.assertGreaterEqual(len(methods), 18)

  def test_recipes_without_layers(self):
    made = _mergekit_recipes.raw_recipes(pathlib.Path("models"))
    self.assertContainsSubset(["linear", "slerp", "ties", "dare_ties"], made)
    self.assertNotIn("slices", str(made))
    for recipe in made.values():
      for one in [recipe, *recipe["models"]]:
        # A list is a gradient over layers.
        self.assertNotIn("[", str(one.get("parameters")))
    found = _mergekit_recipes.of_files(made["slerp"])
    self.assertEqual(found["base_model"], "models/base/model.safetensors")
    self.assertEqual(
      found["models"],
      [
        {"model": "models/base/model.safetensors"},
        {"model": "models/m1/model.safetensors"},
      ],
    )
    self.assertEqual(found["parameters"], {"t": 0.4})
    self.assertEqual(made["slerp"]["base_model"], "models/base")

  def test_more_models_are_linked(self):
    with tempfile.TemporaryDirectory() as folder:
      root = pathlib.Path(folder) / "bfloat16"
      for name in _mergekit_files.MODELS:
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text(name)
      _mergekit_recipes.link(root, 8)
      _mergekit_recipes.link(root, 8)
      recipe = _mergekit_recipes.speed_recipes(root, 8)["ties"]
      found = [
        (pathlib.Path(one["model"]) / "config.json").read_text()
        for one in recipe["models"]
      ]
      self.assertEqual(found, ["m1", "m2", "m3"] * 2 + ["m1", "m2"])
      self.assertLen(set(_mergekit_recipes.input_folders(recipe)), 9)
    two = _mergekit_recipes.speed_recipes(pathlib.Path("x"), 2)["linear"]
    self.assertEqual(_mergekit_recipes.input_folders(two), ["x/m1", "x/m2"])


class ProcessTest(absltest.TestCase):
  def test_status(self):
    text = "Name:\tx\nVmRSS:\t    30 kB\nRssAnon:\t  10 kB\nRssFile:\t  20 kB\n"
    self.assertEqual(
      _mergekit_process.memory_of(text),
      {"anon": 10240, "file": 20480, "rss": 30720},
    )
    self.assertEqual(_mergekit_process.memory_of("")["anon"], 0)

  def test_busy_seconds(self):
    text = "cpu  1 2 3 1000 2000 4 5 6 7 8\ncpu0 1 1 1 1 1 1 1 1 1 1\n"
    ticks = os.sysconf("SC_CLK_TCK")
    self.assertEqual(_mergekit_process.busy_seconds(text), 21 / ticks)

  def test_a_process_is_measured(self):
    if not pathlib.Path("/proc/self/status").exists():
      self.skipTest("There is no /proc.")
    code = "import time; x = b'1' * 50_000_000; time.sleep(0.3)"
    found = _mergekit_process.run_measured([sys.executable, "-c", code])
    self.assertBetween(found["seconds"], 0.3, 60)
    self.assertGreater(found["anon"], 50e6)
    self.assertGreater(found["max_rss"], 50e6)

  def test_a_failure_shows_its_output(self):
    with self.assertRaisesRegex(SystemExit, "(?s)ended with 1.*No luck"):
      _mergekit_process.run_measured([sys.executable, "-c", "exit('No luck')"])

  def test_last_line(self):
    found = _mergekit_rows.last_line(
      "Traceback\n  File\nOSError: /some/w/models is no\n\n", {"/some/w": "DIR"}
    )
    self.assertEqual(found, "OSError: DIR/models is no")
    self.assertEqual(_mergekit_rows.last_line("", {}), "no message")


class PageTest(absltest.TestCase):
  def _results(self):
    row = {"kind": "gpt2", "mode": "float32", "name": "linear"}
    narrow = row | {"mode": "bfloat16", "name": "ties"}
    draws = np.random.default_rng(0)
    one, other = ({"w": draws.normal(size=50)} for _ in range(2))
    return {
      "hardware": "2 cores",
      "versions": {"mergekit": "0.1.5"},
      "parity": [
        row | {"difference": _difference()},
        row
        | {
          "name": "dare_ties",
          "moments": _mergekit_compare.moments({"w": np.zeros(50)}, one, other),
        },
        narrow
        | {
          "difference": _difference(beyond=4, ulps=9),
          "against_wide": _difference(ulps=1),
          "mergekit_itself": _difference(beyond=1, ulps=3),
        },
        row | {"kind": "clip", "mergekit_error": "TypeError: a | b"},
      ],
      "speed": [
        _record("linear", "jaxmerge", 2.0, anon=0.5e9),
        _record("linear", "jaxmerge", 4.0, anon=0.5e9),
        _record("linear", "jaxmerge", 3.0, anon=0.5e9),
        _record("linear", "first", 6.0),
        _record("linear", "mergekit", 15.0, anon=4e9),
        _record("linear", "copy", 1.0),
        _record("linear", "jaxmerge", 2.0, inputs=2, anon=0.5e9),
        _record("linear", "jaxmerge", 8.0, inputs=8, anon=0.6e9),
        _record("ties", "jaxmerge", 10.0),
        _record("ties", "mergekit", 90.0),
        _record("task_arithmetic", "mergekit", 30.0),
        _record("magmax", "jaxmerge", 5.0),
      ],
    }

  def test_goals(self):
    rows = _mergekit_times.goals(self._results()["speed"])
    found = {text: cells for text, *cells in rows}
    self.assertEqual(found["linear: at least 4x faster, warm"], ["5.0x", "yes"])
    self.assertEqual(
      found["linear: at most 2.5x the copy's time, warm"], ["3.0x", "no"]
    )
    self.assertEqual(found["ties: at least 10x faster, warm"], ["9.0x", "no"])
    # Against mergekit's task arithmetic.
    self.assertEqual(found["magmax: at least 6x faster, warm"], ["6.0x", "yes"])
    self.assertEqual(
      found["slerp: at least 6x faster, cold"], ["not measured", ""]
    )
    self.assertEqual(
      found["linear: peak anonymous memory under 1.5 GB"], ["0.60 GB", "yes"]
    )
    self.assertEqual(
      found["linear: flat from 2 to 8 inputs (at most 1.1x)"], ["1.20x", "no"]
    )

  def test_page(self):
    text = _mergekit_page.page(self._results())
    self.assertIn("Hardware: 2 cores.\nVersions: mergekit 0.1.5.", text)
    self.assertIn(
      "| linear | 3.0 (2.0 - 4.0) | 15.0 | 5.0x | 1.0 | 3.0x | 0.50 | 5.00 |"
      " 6.00 | 4.00 | 5.00 | 6.00 | 6.0 |",
      text,
    )
    self.assertIn("| magmax, mergekit's task_arithmetic | 5.0 | 30.0 |", text)
    self.assertIn("| linear, jaxmerge | 8 | 0.60 | 5.00 | 6.00 | 8.0 |", text)
    self.assertIn("### gpt2, float32", text)
    self.assertIn("| linear | 2.0e-07 | 0 |", text)
    self.assertIn(
      "| ties | 2.0e-07 | 4 (2%) | 9 | 2.0e-07 | 0 | 1 | 2.0e-07 | 1 (0.5%) |"
      " 3 |",
      text,
    )
    self.assertIn("standard errors at most, of 2 (limit 2.8): w, mean", text)
    self.assertIn("mergekit fails: TypeError: a \\| b", text)
    self.assertNotIn("Page cache cold", text)
    self.assertEqual(text, text.rstrip() + "\n")

  def test_page_of_nothing(self):
    text = _mergekit_page.page(
      {"hardware": "x", "versions": {}, "parity": [], "speed": []}
    )
    self.assertNotIn("## Goals", text)
    self.assertNotIn("## The same numbers", text)


if __name__ == "__main__":
  absltest.main()
