"""Tests of the Table 1 runner and of the sweep, on the embedded digits."""

from __future__ import annotations

import json
import pathlib
import tempfile
from unittest import mock

from absl.testing import absltest

from experiments import mpf, sweep, table1
from experiments.configs import mpf as mpf_config


class CellsTest(absltest.TestCase):
  def test_cheapest_first(self):
    names = list(
      table1.cells(["mnist", "cifar10"], ["mlphuge", "mlpnet"], ["paper"], [3])
    )
    self.assertEqual(
      names,
      [
        "mnist-mlpnet-paper",
        "cifar10-mlpnet-paper",
        "mnist-mlphuge-paper",
        "cifar10-mlphuge-paper",
      ],
    )

  def test_unknown(self):
    for arguments, message in (
      ((["mnist"], ["mlpnet"], ["secret"]), "Unknown recipe 'secret'"),
      ((["digits"], ["mlpnet"], ["paper"]), "Unknown dataset 'digits'"),
      ((["mnist"], ["resnet"], ["paper"]), "Unknown network 'resnet'"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        table1.cells(*arguments, [0])


def _result(config):
  accuracy = {"seeds": [90.0, 92.0], "mean": 91.0, "std": 1.41}
  return {
    "config": json.loads(config.to_json()),
    "sizes": {"a": 1, "b": 2, "joint": 3, "test": 4},
    "rows": {
      name: {"accuracy": accuracy, "loss": {"mean": 0.1}}
      for name in config.rows
    },
    "steps": {},
    "versions": {"jax": "0", "jaxmerge": "0"},
    "hardware": "none",
    "seconds": {"total": 60.0},
  }


class TableTest(absltest.TestCase):
  def test_goes_on(self):
    """Finished cells are kept in the file and not run again."""
    with tempfile.TemporaryDirectory() as name:
      folder = pathlib.Path(name)
      arguments = (
        folder / "work",
        folder / "results" / "table.json",
        folder / "page.md",
      )
      wanted = table1.cells(["mnist"], ["mlpnet"], ["corrected", "paper"], [0])
      one = dict(list(wanted.items())[:1])
      with mock.patch.object(
        mpf, "run", side_effect=lambda config, *_: _result(config)
      ) as run:
        table1.run_table(one, *arguments)
        table1.run_table(wanted, *arguments)
        self.assertEqual(run.call_count, 2)
        again = table1.cells(["mnist"], ["mlpnet"], ["paper"], [0, 1])
        table1.run_table(again, *arguments)
        self.assertEqual(run.call_count, 3)
        table1.run_table(again, *arguments, rerun=True)
        self.assertEqual(run.call_count, 4)
        with self.assertRaisesRegex(ValueError, "with more seeds"):
          table1.run_table(wanted, *arguments)
      page = (folder / "page.md").read_text()
    self.assertIn("| MPF | 91.00 ± 1.41 | 97.32 ± 0.07 |", page)
    self.assertIn("| mnist-mlpnet-paper | 2 | 1.0 min |", page)

  def test_page_does_not_depend_on_the_order_in_the_file(self):
    wanted = table1.cells(
      ["mnist"], ["mlpnet", "mlphuge"], ["corrected", "paper"], [0]
    )
    kept = {name: _result(config) for name, config in wanted.items()}
    again = json.loads(json.dumps(kept, sort_keys=True))
    self.assertEqual(table1.render(kept), table1.render(again))
    self.assertIn("Not run yet: mnist-mlplarge-corrected", table1.render(kept))

  def test_damaged_results(self):
    for text in ("{", "[]", '{"cell": 3}'):
      with tempfile.TemporaryDirectory() as name:
        file = pathlib.Path(name) / "table.json"
        file.write_text(text)
        with self.assertRaisesRegex(ValueError, "table.json is damaged"):
          table1.run_table({}, pathlib.Path(name), file, file)


class SweepTest(absltest.TestCase):
  def test_shares_the_base_networks(self):
    config = mpf_config.get_config("digits-mlpnet-smoke")
    config.update(
      {"rows": ("model_a", "mpf"), "holdout": 0.2, "devices": 1, "seeds": (0,)}
    )
    fields = sweep.parse_grid(["curve.learning_rate=0.01,0.1"], config)
    self.assertEqual(fields, {"curve.learning_rate": [0.01, 0.1]})
    with tempfile.TemporaryDirectory() as folder:
      found = sweep.sweep(config, fields, folder, progress=False)
    (low, first), (high, second) = found
    self.assertEqual(low, {"curve.learning_rate": 0.01})
    self.assertEqual(high, {"curve.learning_rate": 0.1})
    self.assertEqual(first["rows"]["model_a"], second["rows"]["model_a"])
    self.assertNotEqual(first["rows"]["mpf"], second["rows"]["mpf"])
    # A fifth of 1,437 training images stands for the test set.
    self.assertEqual(first["sizes"]["test"], 287)

  def test_errors(self):
    config = mpf_config.get_config("digits-mlpnet-smoke")
    for grid, message in (
      ([], "--grid is missing"),
      (["colour=1"], "names no field: 'colour'"),
      (["curve.colour=1"], "names no field"),
      (["fraction"], "must be of the form"),
      (["curve=1"], "does not fit the field"),
      (["curve.learning_rate=abc"], "does not fit the field"),
      (["curve.learning_rate.x=1"], "names no field"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        sweep.parse_grid(grid, config)
    with self.assertRaisesRegex(ValueError, "needs --config.holdout"):
      sweep.sweep(config, {"fraction": [0.1]}, "unused")


if __name__ == "__main__":
  absltest.main()
