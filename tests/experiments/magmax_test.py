"""Tests of experiments.magmax on a small encoder and a small set of texts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import tempfile
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from experiments import _magmax_report, _magmax_study, magmax
from experiments.configs import magmax as configs
from jaxmerge import merging, models
from jaxmerge.checkpoints import hugging_face
from tests.experiments import _magmax


class _KilledError(Exception):
  """Stands in for a kill."""


class MagmaxTest(_magmax.Folders):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = cls.root / "run"
    cls.results = magmax.run(
      _magmax.config(cls.model), str(cls.folder), str(cls.root), False
    )

  def test_rows(self):
    rows = self.results["rows"]
    self.assertEqual(
      set(rows),
      {"sequential", "independent", "avg", "random_mix", "magmax"},
    )
    for name, row in rows.items():
      for variant in ("fixed", "chosen"):
        self.assertLen(row[variant], 2)
        for entry in row[variant]:
          self.assertBetween(entry["accuracy"], 0, 1)
      for fixed, chosen in zip(row["fixed"], row["chosen"], strict=True):
        self.assertGreaterEqual(chosen["validation"], fixed["validation"])
        if name in ("avg", "magmax"):
          self.assertEqual(fixed["scale"], {"avg": 1.0, "magmax": 0.5}[name])
      recipes = {entry["recipe"] for entry in row["chosen"]}
      self.assertLen(recipes, 1)
    self.assertGreater(
      rows["sequential"]["chosen"][0]["accuracy"], self.results["zero_shot"]
    )

  def test_a_grid_grows_where_its_end_is_best(self):
    for file in self.folder.glob("order-*/validation/*.json"):
      for name, table in json.loads(file.read_text()).items():
        scales = sorted(float(scale) for scale in table)
        if len(scales) in (1, 16):  # No merge, or as long as it may be.
          continue
        best = max(table.values())
        where = [s for s in scales if table[str(s)] == best]
        self.assertNotIn(where, ([scales[0]], [scales[-1]]), (name, table))

  def test_curves(self):
    for name in ("sequential", "magmax", "avg"):
      for entry in self.results["rows"][name]["chosen"]:
        matrix = np.array(entry["matrix"], np.float64)
        self.assertEqual(np.isnan(matrix[0, 0]), name == "avg")
        self.assertTrue(np.isnan(matrix[0, 1]))
        self.assertFalse(np.isnan(matrix[1]).any())
        np.testing.assert_allclose(matrix[1].mean(), entry["accuracy"])
        self.assertEqual("forgetting" in entry["metrics"], name != "avg")

  def test_files(self):
    self.assertEqual(
      json.loads((self.folder / "results.json").read_text()), self.results
    )
    table = (self.folder / "table.md").read_text()
    self.assertRegex(table, r"\| magmax \| 0.5 \| (slow|fast) \|")
    self.assertGreater((self.folder / "tasks.png").stat().st_size, 1000)
    # The networks of the tasks are gone, the merged one is whole.
    self.assertFalse(list(self.folder.glob("order-*/networks/*")))
    merged = self.folder / "merged" / "magmax"
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
      self.assertTrue((merged / name).exists(), name)
    self.assertIn(
      "pooler.dense.weight", hugging_face._safetensors.tensors(merged)
    )

  @parameterized.parameters((1, 0.0), (5, 0.0), (5, 60.0))
  def test_resume_equals_an_unbroken_run(self, calls, seconds):
    left = [calls]
    original = _magmax_study.strategy

    def killed(*args):
      made = original(*args)

      def observe(problem, state, task):
        left[0] -= 1
        if left[0] < 0:
          raise _KilledError
        return made.observe(problem, state, task)

      return made._replace(observe=observe)

    with contextlib.ExitStack() as stack:
      stack.enter_context(
        mock.patch.object(_magmax_study, "_SAVE_SECONDS", seconds)
      )
      stack.enter_context(mock.patch.object(_magmax_study, "strategy", killed))
      stack.enter_context(self.assertRaises(_KilledError))
      self.run_study(self.empty / "run")
    results = self.run_study(self.empty / "run")
    self.assertEqual(results["rows"], self.results["rows"])

  def test_a_finished_run_trains_nothing(self):
    with mock.patch.object(_magmax_study, "train", side_effect=AssertionError):
      self.assertEqual(self.run_study(self.folder), self.results)

  def test_running_magmax_is_that_of_all_checkpoints(self):
    study = self.build()
    one = _magmax_study.problem(study, 0)
    folder = self.empty / "networks"
    _magmax_study.train(study, one, "sequential", "fast", folder, str)
    networks = [
      study.backbone.load(_magmax_study.expert(folder, task))
      for task in range(2)
    ]
    merged = {}
    for task, given in _magmax_study.merges(
      study, ["magmax", "sequential"], folder, 2, jax.random.key(0)
    ):
      merged[task] = given("magmax"), given("sequential")
    base = study.backbone.params
    for task in range(2):
      chex.assert_trees_all_equal(
        merged[task][0],
        merging.magmax(base, networks[: task + 1], scale=1.0),
      )
      chex.assert_trees_all_equal(merged[task][1], networks[task])
    # A coefficient put in afterwards is that of the rule.
    chex.assert_trees_all_close(
      _magmax_study.scaled(base, merged[1][0], 0.5),
      merging.magmax(base, networks, scale=0.5),
      rtol=1e-5,
      atol=1e-7,
    )

  def test_training_sees_the_classes_of_the_task_alone(self):
    study = self.build()
    one = _magmax_study.problem(study, 0)
    chosen = _magmax_study.strategy(study, "sequential", "slow")
    first = chosen.observe(one, chosen.init(one), 0)
    # The logits of other classes have no part in it.
    others = [c for c in range(4) if c not in one.stream.tasks[0].classes]
    embed = study.backbone.logits_fn

    def logits_fn(params, ids):
      logits = embed(params, ids)
      return jnp.where(
        jnp.isin(jnp.arange(4), jnp.array(others))[None], 1e3, logits
      )

    other = dataclasses.replace(one, logits_fn=logits_fn, memo={})
    second = chosen.observe(other, chosen.init(other), 0)
    chex.assert_trees_all_close(
      first.current, second.current, rtol=1e-5, atol=1e-6
    )

  def test_validation_examples_are_not_trained_on(self):
    study = self.build()
    for order in range(2):
      for task in _magmax_study.stream(study, order).tasks:
        self.assertLen(task.train, 40)
        self.assertLen(task.validation, 16)
        self.assertTrue((task.train < 80).all())
        self.assertTrue((task.validation >= 80).all())
        self.assertLen(task.test, 20)

  def test_some_examples_of_each_class(self):
    study, whole = self.build(per_class=3), self.build()
    labels = study.backbone.pool.labels
    for some, task in zip(
      _magmax_study.stream(study, 0).tasks,
      _magmax_study.stream(whole, 0).tasks,
      strict=True,
    ):
      expected = [
        row
        for label in task.classes
        for row in [row for row in task.train if labels[row] == label][:3]
      ]
      self.assertEqual(some.train.tolist(), sorted(expected))
      self.assertEqual(some.validation.tolist(), task.validation.tolist())

  def test_later_orders_take_the_choices_of_the_first(self):
    for name, row in self.results["rows"].items():
      for variant, entries in row.items():
        for field in ("recipe", "scale", "validation"):
          values = {entry[field] for entry in entries}
          self.assertLen(values, 1, (name, variant, field))
    self.assertFalse(list(self.folder.glob("order-1/validation/*")))

  def test_class_orders(self):
    config_orders = (-1, (3, 1, 0, 2), 5)
    study = self.build(orders=config_orders)
    classes = [
      [task.classes for task in _magmax_study.stream(study, order).tasks]
      for order in range(3)
    ]
    self.assertEqual(classes[0], [(0, 1), (2, 3)])
    self.assertEqual(classes[1], [(3, 1), (0, 2)])
    self.assertEqual(set(sum(classes[2], ())), {0, 1, 2, 3})

  @parameterized.parameters(
    ({"orders": ((0, 1),)}, "order"),
    ({"num_tasks": 3}, "does not divide the 4 classes"),
    ({"curves": ("nothing",)}, "curves names 'nothing'"),
    ({"export": ("nothing",)}, "export names 'nothing'"),
    ({"orders": ()}, "must name at least one"),
    ({"grow": 1.0}, "grow must be above 1"),
    ({"export": ("sequential",)}, "export names 'sequential', which is no"),
    ({"learners": {"sequential": {}}}, "unknown learner 'independent'"),
    (
      {"learners": {"sequential": {"rate": 1}, "independent": {}}},
      "Learner sequential: ",
    ),
    (
      {"recipes": {"a": {"learning_rate": -1.0}}},
      "learning rates must be positive",
    ),
    ({"per_class": -1}, "per_class must be at least 0, got -1"),
    ({"curve_orders": -1}, "curve_orders must be at least 0, got -1"),
  )
  def test_bad_configurations(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      self.run_study(self.empty / "run", **fields)
    self.assertFalse((self.empty / "run").exists())

  def test_bad_rows(self):
    rows = _magmax.config(self.model).rows.to_dict()
    rows["magmax"]["rule"] = "maxmag"
    with self.assertRaisesRegex(ValueError, "Row magmax: unknown merge method"):
      self.run_study(self.empty / "run", rows=rows)
    rows["magmax"]["rule"], rows["magmax"]["options"] = "ties", {"density": 2.0}
    with self.assertRaisesRegex(ValueError, "Row magmax: density"):
      self.run_study(self.empty / "run", rows=rows)
    rows["magmax"]["options"] = {"scale": 2.0}
    with self.assertRaisesRegex(ValueError, "Row magmax: .*scale"):
      self.run_study(self.empty / "run", rows=rows)
    rows["magmax"]["options"], rows["magmax"]["fix"] = {}, 1.0
    with self.assertRaisesRegex(ValueError, "Row magmax: .*fix.*The fields"):
      self.run_study(self.empty / "run", rows=rows)
    del rows["magmax"]["fix"]
    rows["magmax"]["rule"] = "fisher_average"
    with self.assertRaisesRegex(ValueError, "does not take one network after"):
      self.run_study(self.empty / "run", rows=rows)

  def test_variants(self):
    for variant in ("clinc150", "clinc150-x", "cifar10-5", "clinc150-5-tiny"):
      with self.assertRaisesRegex(ValueError, "Unknown variant"):
        configs.get_config(variant)
    self.assertEqual(list(configs.get_config("clinc150-1").rows), ["joint"])
    for name, count in (
      ("cifar100", 100),
      ("imagenet_r", 200),
      ("cub200", 200),
    ):
      (order,) = configs.get_config(f"{name}-10").orders
      self.assertEqual(sorted(order), list(range(count)))
    self.assertEqual(configs.get_config("cars-10").orders, (-1,))
    paper = configs.get_config("cars-10")
    self.assertEqual(paper.training.epochs, 30)
    self.assertEqual(paper.training.batch_size, 128)
    self.assertEqual(paper.recipes["lr-1e-5"].learning_rate, 1e-5)

  def test_page(self):
    kept = {"clinc150-2": self.results, "clinc150-2-smoke": self.results}
    page = _magmax_report.render(kept)
    self.assertIn("## clinc150-2", page)
    mean = 100 * np.mean(
      [e["accuracy"] for e in self.results["rows"]["magmax"]["chosen"]]
    )
    summary = _magmax_report.summary(kept)
    line = next(
      one for one in summary.splitlines() if one.startswith("| magmax |")
    )
    self.assertIn(f"| {mean:.2f} ± ", line)

  def test_publish(self):
    _magmax_report.publish(self.results, self.folder, self.empty)
    kept = json.loads(
      (self.empty / "experiments/results/magmax.json").read_text()
    )
    found = kept["clinc150-2-smoke"]
    for name, curve in (("avg", False), ("magmax", True)):
      matrix = self.results["rows"][name]["chosen"][0]["matrix"]
      self.assertEqual(
        found["rows"][name]["chosen"][0]["matrix"],
        [matrix[0][:1] if curve else [], matrix[1]],
      )
    self.assertEqual({**found, "rows": None}, {**self.results, "rows": None})
    self.assertTrue(
      (self.empty / "docs/images/magmax-clinc150-2-smoke.png").exists()
    )
    self.assertIn(
      "clinc150-2-smoke", (self.empty / "docs/results/magmax.md").read_text()
    )


class AllLearnersTest(_magmax.Folders):
  def test_table_two(self):
    rows = configs.get_config("generated-2-smoke").rows
    fields = {
      name: rows[name].to_dict()
      for name in ("joint", "lwf", "ewc", "lwf_magmax", "ewc_magmax")
    }
    results = self.run_study(
      self.empty / "run",
      rows=fields,
      orders=(0,),
      curves=("lwf_magmax",),
      export=(),
      recipes={"one": {"learning_rate": 1e-2}},
      learners={
        # By another name.
        "joint": {"learner": "joint"},
        "lwf": {"weight": 0.3, "temperature": 2.0},
        "ewc": {
          "samples": 5,
          "labels": "empirical",
          "chunk_size": 2,
          "recipes": {
            "loose": {"learning_rate": 1e-2, "weight": 1e-3},
            "tight": {"learning_rate": 1e-2, "weight": 1e9},
          },
        },
      },
    )
    self.assertEqual(list(results["rows"]), list(fields))
    self.assertGreater(results["rows"]["joint"]["chosen"][0]["accuracy"], 0.3)
    self.assertIn(
      results["rows"]["ewc"]["chosen"][0]["recipe"], ("loose", "tight")
    )


class ImagesTest(absltest.TestCase):
  def test_the_whole_path_of_images(self):
    config = configs.get_config("generated-2-smoke")
    with config.unlocked():
      config.rows = {
        name: config.rows[name].to_dict() for name in ("sequential", "magmax")
      }
    config.curves, config.devices = ("sequential",), 1
    with tempfile.TemporaryDirectory() as folder:
      root = pathlib.Path(folder)
      magmax.run(config, str(root / "run"), None, False)
      merged = root / "run" / "merged" / "magmax"
      model = models.clip_from_config(hugging_face.read_config(merged))
      like = jax.eval_shape(
        model.init,
        jax.random.key(0),
        jnp.zeros((1, 32, 32, 3)),
        jnp.zeros((1, 4), jnp.int32),
      )["params"]
      params = hugging_face.load(merged, like)
      back = _magmax_study.build(config, None).backbone
      changed = np.abs(
        params["visual_projection"]["kernel"]
        - np.asarray(back.params["visual_projection"]["kernel"])
      ).max()
      self.assertGreater(changed, 0)


if __name__ == "__main__":
  absltest.main()
