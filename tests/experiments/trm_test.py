"""Tests of experiments.trm on the embedded digits and a small set of texts."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import tempfile
from unittest import mock

import ml_collections
import numpy as np
from absl.testing import absltest, parameterized

from experiments import _trm_report, _trm_study, trm
from experiments.configs import trm as configs
from jaxmerge import continual
from tests.experiments import _magmax

BRIEF = {"learning_rate": 0.05, "epochs": 1, "batch_size": 32}
FEW = {
  "learning_rate": 0.1,
  "optimizer": "adam",
  "iterations": 3,
  "batch_size": 16,
}


def _rows(head, **training):
  mine = {"training": {**BRIEF, **training}, "head": head}
  return {
    "joint": {"strategy": "joint", "training": mine["training"]},
    "naive": {"strategy": "naive", **mine},
    "avg_half": {"strategy": "avg", "weight": 0.5, "start": "merged", **mine},
    "avg_1_t": {"strategy": "avg", "start": "merged", **mine},
    "trm": {
      "strategy": "trm",
      "path": {"snapshots": 2},
      "coefficients": FEW,
      **mine,
    },
  }


def _config(**fields):
  """The digits variant, cut down to seconds."""
  config = configs.get_config("digits")
  config.orders = (0, 1)
  config.network_options.features = (16,)
  config.pretraining.epochs = 5
  with config.unlocked():
    config.rows = ml_collections.ConfigDict(_rows("seen"), sort_keys=False)
  for name, value in fields.items():
    config[name] = value
  return config


class _KilledError(Exception):
  """Stands in for a kill between two tasks."""


class DigitsTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    directory = tempfile.TemporaryDirectory()
    cls.addClassCleanup(directory.cleanup)
    cls.root = pathlib.Path(directory.name)
    cls.folder = cls.root / "run"
    cls.config = _config()
    cls.results = trm.run(cls.config, str(cls.folder), progress=False)

  def test_rows(self):
    rows = self.results["rows"]
    self.assertEqual(list(rows), list(_rows("seen")))
    for name, entries in rows.items():
      self.assertLen(entries, 2)
      for entry in entries:
        matrix = np.array(entry["accuracy"], np.float64)
        self.assertEqual(matrix.shape, (5, 5))
        self.assertEqual(np.isnan(matrix[:-1]).all(), name == "joint")
        self.assertTrue(((matrix[-1] >= 0) & (matrix[-1] <= 1)).all())
        within = np.array(entry["accuracy_within"], np.float64)
        np.testing.assert_array_equal(np.isnan(within), np.isnan(matrix))
        self.assertTrue((within >= matrix)[~np.isnan(matrix)].all())
        self.assertGreater(entry["metrics"]["within"], 0.5)
        # A later task is not measured.
        self.assertTrue(np.isnan(matrix[np.triu_indices(5, 1)]).all())
    self.assertGreater(
      np.mean([one["metrics"]["final_accuracy"] for one in rows["joint"]]), 0.5
    )

  def test_what_strategies_report(self):
    for entry in self.results["rows"]["trm"]:
      self.assertLen(entry["tasks"], 5)
      for number, task in enumerate(entry["tasks"]):
        self.assertGreater(task["start"]["gradient_norm"], 0)
        self.assertBetween(
          task["training"]["learned"], 1, task["training"]["steps"]
        )
        self.assertEqual(set(task["seconds"]), {"training", "merging"})
        self.assertEqual("trm" in task, number > 0)
      merged = entry["tasks"][1]["trm"]
      self.assertLen(merged["step/alignment"], 3)
      self.assertLen(merged["cosines"], 2)
      self.assertEqual(
        merged["directions"],
        ["task vector", "negative gradient", "snapshot 2", "snapshot 1"],
      )
    self.assertEqual(
      self.results["rows"]["trm"][0]["memory"],
      {"networks": 4 * self.results["num_parameters"], "examples": 0},
    )

  def test_metrics(self):
    entry = self.results["rows"]["avg_half"][1]
    matrix = np.array(entry["accuracy"])
    np.testing.assert_allclose(
      entry["metrics"]["forgetting"],
      np.mean([matrix[t:, t].max() - matrix[-1, t] for t in range(4)]),
    )
    np.testing.assert_allclose(
      entry["metrics"]["start_gradient"],
      np.mean([task["start"]["gradient_norm"] for task in entry["tasks"][1:]]),
    )

  def test_pretraining_is_on_half_of_the_classes(self):
    for number in range(2):
      place = self.folder / f"order-{number}/zero_shot.json"
      found = json.loads(place.read_text())
      accuracy = found["accuracy"]
      # Two and a half of five tasks are known.
      self.assertGreater(np.mean(accuracy[:2]), 0.5)
      self.assertEqual(accuracy[3:], [0, 0])
      within = np.array(found["accuracy_within"])
      self.assertTrue((within >= accuracy).all())
      self.assertTrue((within[3:] > 0).all())
      # Tasks of the digits are not quite of the same size.
      before = self.results["zero_shot"][number]
      self.assertAlmostEqual(
        before["final_accuracy"], np.mean(accuracy), delta=0.01
      )
      self.assertAlmostEqual(before["within"], within.mean(), delta=0.01)

  def test_measure(self):
    setting = _trm_study.build(self.config, None).make(0, self.folder)
    params = setting.problem.params
    stream = setting.problem.stream._replace(scenario="task-incremental")
    known = dataclasses.replace(setting.problem, stream=stream)
    for count in (2, 5):
      found = setting.measure(params, count)
      np.testing.assert_array_equal(
        found["accuracy"],
        continual.accuracies(setting.problem, params)[0, :count],
      )
      np.testing.assert_array_equal(
        found["accuracy_within"],
        continual.accuracies(known, params)[0, :count],
      )

  def test_killed_and_started_again(self):
    folder = self.root / "killed"
    calls = []

    class Killed:
      """A journal that ends the process within a task."""

      def __init__(self, tasks):
        self.journal = _JOURNAL(tasks)
        self.tasks = self.journal.tasks

      def __call__(self, what, task, values):
        calls.append(what)
        if len(calls) == 40:
          raise _KilledError
        self.journal(what, task, values)

    with (
      mock.patch.object(trm, "_Journal", Killed),
      self.assertRaises(_KilledError),
    ):
      trm.run(self.config, str(folder), progress=False)
    self.assertLess(len(list(folder.glob("order-*/*.json"))), 12)
    found = trm.run(self.config, str(folder), progress=False)
    for name, entries in found["rows"].items():
      for one, other in zip(entries, self.results["rows"][name], strict=True):
        self.assertEqual(one["accuracy"], other["accuracy"])
        for mine, theirs in zip(one["tasks"], other["tasks"], strict=True):
          self.assertEqual(mine.get("start"), theirs.get("start"))
          self.assertEqual(mine.get("training"), theirs.get("training"))

  def test_table_and_page(self):
    table = (self.folder / "table.md").read_text()
    self.assertIn("| trm |", table)
    self.assertIn("| zero-shot |", table)
    self.assertIn("| within tasks % |", table)
    self.assertIn("1.00 (", table)
    _trm_report.publish(self.results, self.folder, self.root)
    _trm_report.publish(
      {
        **self.results,
        "config": {**self.results["config"], "variant": "cifar10"},
      },
      self.folder,
      self.root,
    )
    page = (self.root / "docs/results/trm.md").read_text()
    self.assertIn("jaxmerge's own construction", page)
    self.assertIn("| cifar10 | naive |", page)
    self.assertIn("the best merge beside it, `avg_", page)
    self.assertIn("of 2 |", page)
    self.assertIn("(../images/trm-digits.png)", page)
    kept = json.loads((self.root / "experiments/results/trm.json").read_text())
    self.assertEqual(set(kept), {"digits", "cifar10"})
    self.assertNotIn("step/loss", json.dumps(kept))

  def test_order_on_the_page(self):
    names = ("clinc150-10", "clinc150-5", "digits", "cifar10-ablations")
    rows = dict(self.results["rows"])
    rows = {"snapshots_8": rows["trm"], **dict(sorted(rows.items()))}
    kept = {name: {**self.results, "rows": rows} for name in names}
    lines = _trm_report.render(kept).splitlines()
    self.assertEqual(
      [line[3:] for line in lines if line.startswith("## ")][1:],
      ["clinc150-5", "clinc150-10", "cifar10-ablations", "digits"],
    )
    self.assertEqual(
      [line.split(" | ")[0][2:] for line in lines if line[:2] == "| "][1:7],
      ["joint", "naive", "avg_half", "avg_1_t", "trm", "snapshots_8"],
    )

  def test_claims(self):
    def entry(forgetting, gradient):
      return {"metrics": {"forgetting": forgetting, "start_gradient": gradient}}

    rows = {
      "trm": [entry(0.1, 2.0), entry(0.2, 3.0)],
      "naive": [entry(0.3, 1.0), entry(0.1, 1.0)],
      "avg_half": [entry(0.1, 4.0), entry(0.2, 6.0)],
      "avg_1_t": [entry(0.0, 2.0), entry(0.0, 1.0)],
    }
    page = _trm_report.claims({"cifar10": {"rows": rows}})
    self.assertIn(
      "| cifar10 | naive | 5.00 ± 21.21 | 1 of 2 | 2.50 ± 0.71 | 2 of 2 |", page
    )
    self.assertIn(
      "| cifar10 | avg_half | 0.00 ± 0.00 | 0 of 2 | 0.50 ± 0.00 | 0 of 2 |",
      page,
    )

  @parameterized.parameters(
    ({"kind": "sounds"}, "kind 'sounds'"),
    ({"judge": "train"}, "judge 'train'"),
    ({"orders": ()}, "rows and orders"),
    ({"orders": (0, 0)}, "orders must be distinct"),
    ({"rows": {"er": {"strategy": "er"}}}, "Row er stores examples"),
    (
      {"rows": {"x": {"strategy": "trm", "path": {"steps": 2}}}},
      "x.path.*snapshots, by",
    ),
    ({"rows": {"x": {"strategy": "trm", "path": {"snapshots": 0}}}}, "Row x: "),
    (
      {"rows": {"x": {"strategy": "pam", "adapter": {"targets": "query"}}}},
      "Row x: No kernel",
    ),
    ({"num_tasks": 3}, "num_tasks 3 does not divide"),
  )
  def test_bad_configurations(self, fields, message):
    config = _config()
    with config.unlocked():
      for name, value in fields.items():
        config[name] = value
    folder = self.root / "bad"
    with self.assertRaisesRegex(ValueError, message):
      trm.run(config, str(folder), progress=False)
    self.assertFalse(folder.exists())


_JOURNAL = trm._Journal


class TextsTest(_magmax.Folders):
  def test_pretrained_encoder(self):
    config = configs.get_config("clinc150-5")
    config.num_tasks, config.orders, config.per_class = 2, (0,), 8
    config.model.source = str(self.model)
    config.length, config.buckets = 8, (4, 8)
    config.judge = "validation"
    training = {"optimizer": "adamw", "schedule": "cosine", "batch_size": 4}
    rows = _rows("task", learning_rate=1e-2, **training)
    rows = {name: rows[name] for name in ("naive", "trm")}
    rows["became"] = {
      "strategy": "became",
      "labels": "empirical",
      "samples": 4,
      **{key: rows["naive"][key] for key in ("training", "head")},
    }
    rows["pam"] = {
      "strategy": "pam",
      "adapter": {"rank": 2, "alpha": 4.0},
      **{key: rows["naive"][key] for key in ("training", "head")},
    }
    with config.unlocked():
      config.rows = rows
    results = trm.run(
      config, str(self.root / "run"), str(self.root), progress=False
    )
    for name, (entry,) in results["rows"].items():
      self.assertEqual(np.array(entry["accuracy"]).shape, (2, 2), name)
      # 8 of 20 texts of each class are trained on.
      self.assertEqual(entry["tasks"][0]["training"]["steps"], 4)
    table = _trm_report.table(results)
    self.assertIn("| zero-shot |", table)
    self.assertNotIn("within", table)


class ConfigTest(parameterized.TestCase):
  def test_variants(self):
    for variant in configs.VARIANTS:
      config = configs.get_config(variant)
      self.assertEqual(config.variant, variant)
      self.assertContainsSubset(
        {"joint", "naive", "ewc", "lwf", *_trm_report.MERGES, "trm"},
        set(config.rows),
      )
    ablations = configs.get_config("clinc150-10-ablations")
    self.assertLen(ablations.rows, 11)
    self.assertEqual(ablations.rows.no_alignment.alignment, 0)
    smoke = configs.get_config("cifar10-smoke")
    self.assertEqual(smoke.orders, (0,))
    for bad in ("clinc150", "mnist", "clinc150-7", "digits-more"):
      with self.assertRaisesRegex(ValueError, f"variant '{bad}'"):
        configs.get_config(bad)

  def test_steps_to_learn(self):
    rising = np.array([0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0, 1.0])
    # Means of five: 0.4, 0.6, 0.76, 0.88, 0.96, 1.
    self.assertEqual(trm.steps_to_learn(rising), 9)
    self.assertEqual(trm.steps_to_learn(np.ones(3)), 3)
    self.assertEqual(trm.steps_to_learn(np.zeros(50)), 50)


if __name__ == "__main__":
  absltest.main()
