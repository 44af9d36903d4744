"""Tests of experiments.continual on the embedded digits."""

import copy
import json
import pathlib
import re
import tempfile
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from experiments import _continual_report, _continual_study, continual
from experiments.configs import continual as configs
from jaxmerge.continual import metrics


def _config(**fields):
  """The digits variant, cut down to seconds."""
  config = configs.get_config("digits")
  brief = {
    "learning_rate": 0.02,
    "epochs": 1,
    "batch_size": 32,
  }
  config.network, config.features = "mlp", (16,)
  config.seeds = (0, 1)
  config.buffer.sizes = (8, 16)
  with config.unlocked():
    config.rows = {
      "joint": {"strategy": "joint", "training": brief},
      "avg": {"strategy": "avg", "training": brief},
      "buffer_only": {
        "strategy": "buffer_only",
        "training": brief,
        "by_size": {"16": {"training": {"epochs": 2}}},
      },
      "regmean_replay": {
        "strategy": "regmean_replay",
        "training": brief,
        "finetune": {"training": brief, "soup": 2},
      },
    }
    for name, value in fields.items():
      config[name] = value
  return config


def _figures(results):
  return {
    (label, size): row["accuracy"]
    for label, sizes in results["rows"].items()
    for size, row in sizes.items()
  }


class _KilledError(Exception):
  """Stands in for a kill between two tasks."""


class ContinualTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    directory = tempfile.TemporaryDirectory()
    cls.addClassCleanup(directory.cleanup)
    cls.folder = pathlib.Path(directory.name) / "run"
    cls.results = continual.run(_config(), str(cls.folder), progress=False)

  def setUp(self):
    super().setUp()
    directory = tempfile.TemporaryDirectory()
    self.addCleanup(directory.cleanup)
    self.empty = pathlib.Path(directory.name)

  def test_rows(self):
    rows = self.results["rows"]
    self.assertEqual(set(rows["joint"]), {"0"})
    self.assertEqual(set(rows["buffer_only"]), {"8", "16"})
    matrix = np.array(rows["avg"]["0"]["accuracy"], np.float64)
    self.assertEqual(matrix.shape, (2, 5, 5))
    self.assertTrue(((matrix >= 0) & (matrix <= 1)).all())
    joint = np.array(rows["joint"]["0"]["accuracy"], np.float64)
    self.assertTrue(np.isnan(joint[:, :-1]).all())
    self.assertGreater(joint[:, -1].mean(), 0.5)

  def test_metrics_of_the_full_test_set(self):
    sizes = [task["sizes"]["test"] for task in self.results["stream"]["tasks"]]
    row = self.results["rows"]["avg"]["0"]
    matrix = 100 * np.array(row["accuracy"], np.float64)
    wanted = (matrix[:, -1] * sizes).sum(axis=-1) / sum(sizes)
    found = row["metrics"]["final_accuracy"]
    np.testing.assert_allclose(found["seeds"], wanted, rtol=1e-12)
    np.testing.assert_allclose(found["std"], wanted.std(ddof=1), rtol=1e-9)
    np.testing.assert_allclose(
      row["metrics"]["forgetting"]["seeds"], metrics.forgetting(matrix)
    )

  def test_files(self):
    for name in ("config.json", "stream.json", "results.json", "table.md"):
      self.assertTrue((self.folder / name).exists(), name)
    for name in ("matrices.png", "tasks.png", "sizes.png"):
      self.assertGreater((self.folder / name).stat().st_size, 1000)
    self.assertEqual(
      json.loads((self.folder / "results.json").read_text()), self.results
    )
    table = (self.folder / "table.md").read_text()
    self.assertIn("| regmean_replay | 16 |", table)
    self.assertEqual(list((self.folder / "states").iterdir()), [])

  def test_memory(self):
    rows = self.results["rows"]
    image, label, task = 64, 4, 4
    self.assertEqual(
      rows["buffer_only"]["8"]["memory"]["examples"],
      5 * 8 * (image + label + task),
    )
    self.assertEqual(rows["avg"]["0"]["memory"]["examples"], 0)

  @parameterized.parameters(3, 17)
  def test_resume_equals_an_unbroken_run(self, calls):
    folder = str(self.empty / "run")
    left = [calls]
    original = _continual_study.strategy

    def killed(*args):
      made = original(*args)

      def observe(problem, state, task):
        left[0] -= 1
        if left[0] < 0:
          raise _KilledError
        return made.observe(problem, state, task)

      return made._replace(observe=observe)

    with mock.patch.object(_continual_study, "strategy", killed):
      with self.assertRaises(_KilledError):
        continual.run(_config(), folder, progress=False)
    results = continual.run(_config(), folder, progress=False)
    self.assertEqual(_figures(results), _figures(self.results))

  def test_other_config_is_refused(self):
    config = _config(seeds=(0, 2))
    with self.assertRaisesRegex(ValueError, "made with another config.*seeds"):
      continual.run(config, str(self.folder), progress=False)

  def test_publish(self):
    root = self.empty
    _continual_report.publish(self.results, self.folder, root)
    page = (root / "docs/results/continual.md").read_text()
    self.assertIn("## digits", page)
    kept = json.loads((root / "experiments/results/continual.json").read_text())
    self.assertEqual(set(kept), {"digits"})

  @parameterized.parameters(
    ({"seeds": ()}, "seeds must be distinct"),
    ({"rows": {}}, "rows names no strategy"),
    ({"judge": "train"}, "Unknown judge 'train'"),
    ({"judge": "validation"}, "needs held-out data"),
    ({"network": "resnet20"}, "Unknown network 'resnet20'"),
    ({"rows": {"x": {"weight": 1}}}, "Row x names no strategy"),
    ({"rows": {"x": {"strategy": "avgg"}}}, "Row x: .*did you mean 'avg'"),
    (
      {"rows": {"x": {"strategy": "avg", "scale": 1}}},
      "Row x: Unknown option 'scale'",
    ),
    (
      {"rows": {"x": {"strategy": "avg", "training": {"rate": 1}}}},
      "x.training: .*rate",
    ),
    (
      {"rows": {"x": {"strategy": "avg", "finetune": {"soups": 1}}}},
      "x.finetune: .*soups",
    ),
    ({"dataset": "digit"}, "digit"),
  )
  def test_bad_input_leaves_no_workdir(self, fields, message):
    folder = self.empty / "run"
    with self.assertRaisesRegex(ValueError, message):
      continual.run(_config(**fields), str(folder), progress=False)
    self.assertFalse(folder.exists())

  @parameterized.parameters("class", "task", "data", "permuted", "rotated")
  def test_scenarios(self, scenario):
    config = _config()
    config.stream.scenario = scenario
    config.stream.num_tasks = 5
    with config.unlocked():
      config.rows = {"avg": config.rows.avg}
    runs = _continual_study.build(config, None)
    self.assertEqual(runs[0].problem.num_tasks, 5)

  def test_unknown_scenario(self):
    config = _config()
    config.stream.scenario = "online"
    with self.assertRaisesRegex(ValueError, "Unknown scenario 'online'"):
      _continual_study.build(config, None)


class ConfigTest(parameterized.TestCase):
  @parameterized.parameters(*configs.VARIANTS)
  def test_every_row_of_every_variant_is_a_strategy(self, variant):
    config = configs.get_config(variant)
    _continual_study.check_config(config)
    for label, row in config.rows.items():
      for size in (None, *config.buffer.sizes):
        made = _continual_study.strategy(label, row.to_dict(), size)
        self.assertTrue(made.name)

  def test_rows_keep_their_order(self):
    rows = list(configs.get_config("digits").rows)
    self.assertEqual(rows[:3], ["joint", "naive", "avg"])

  def test_by_size_changes_what_it_names(self):
    row = {
      "strategy": "avg",
      "by_size": {"8": {"training": {"epochs": 0}}},
    }
    before = copy.deepcopy(row)
    _continual_study.strategy("x", row, 16)
    with self.assertRaisesRegex(ValueError, "epochs must be at least 1"):
      problem = _continual_study.build(_config(), None)[0].problem
      _continual_study.strategy("x", row, 8).init(problem)
    self.assertEqual(row, before)

  def test_unknown_variant(self):
    with self.assertRaisesRegex(ValueError, re.escape("'splitmnist'")):
      configs.get_config("splitmnist")


if __name__ == "__main__":
  absltest.main()
