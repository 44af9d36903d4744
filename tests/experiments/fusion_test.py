"""Tests of the fusion study, on the embedded digits."""

from __future__ import annotations

import json
import pathlib
import tempfile
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized

from experiments import _fusion_report, _mpf_stages, _mpf_study, fusion
from experiments.configs import fusion as fusion_config
from jaxmerge import models
from jaxmerge.models import _registry


def _config(**changes):
  config = fusion_config.get_config("digits-mlpnet-smoke")
  config.mpf.devices = 1
  config.proportions = (0.5,)
  config.update_from_flattened_dict(changes)
  return config


def _tiny():
  """Networks of the same names, whose layers share their shapes."""
  small = {
    name: (models.MLP, {"features": features})
    for name, features in (("mlpnet", (8, 8, 8)), ("mlplarge", (16, 16, 16)))
  }
  return mock.patch.dict(_registry._NETWORKS, small)


def _built_once():
  """Runs share their studies, so that their programs are compiled once."""
  build, made = _mpf_study.build, {}

  def kept(config, data_dir):
    if config.network not in made:
      made[config.network] = build(config, data_dir)
    return made[config.network]

  return mock.patch.object(_mpf_study, "build", kept)


def _figures(results):
  return {name: results[name] for name in ("config", "sizes", "parts")}


class RunTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(_tiny())
    self.enter_context(_built_once())

  def test_run_and_go_on(self):
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
      folder = pathlib.Path(name)
      results = fusion.run(_config(), name, progress=False)
      self.assertEqual(
        [list(part["methods"]) for part in results["parts"]],
        [list(part.methods) for part in fusion.PARTS],
      )
      for part in results["parts"]:
        for entries in part["methods"].values():
          self.assertLen(entries, 1)
          self.assertLen(entries[0]["seeds"], 2)
      for file in ("config.json", "table.md", "sweep.png"):
        self.assertTrue((folder / file).exists(), file)
      kept = json.loads((folder / "results.json").read_text())
      self.assertEqual(kept, json.loads(json.dumps(results)))
      fusion.publish(kept, folder)
      self.assertTrue((folder / "docs/images/fusion.png").exists())
      page = (folder / "docs/results/fusion.md").read_text()
      self.assertIn("fusion.py:digits-mlpnet\n", page)
      self.assertIn("| OT, weights |", page)
      # The networks are found again; the same figures come out.
      with mock.patch.object(_mpf_stages.training, "fit") as fit:
        again = fusion.run(_config(), name, progress=False)
      fit.assert_not_called()
      self.assertEqual(_figures(again), _figures(results))
      with self.assertRaisesRegex(ValueError, "proportions is"):
        fusion.run(_config(proportions=(0.25,)), name, progress=False)

  def test_activations(self):
    study = _mpf_study.build(_config().mpf, None)
    params = jax.tree.map(lambda x: x[0], study.init(study.keys(0)))
    images = fusion._examples(study, 7)
    self.assertEqual(images.dtype, study.train.value["input"].dtype)
    got = fusion.activations(study, params, images)
    x = np.asarray(study.normalize(images), np.float64).reshape(7, -1)
    self.assertEqual(list(got), ["Dense_0", "Dense_1", "Dense_2"])
    for group, values in got.items():
      x = x @ np.asarray(params[group]["kernel"], np.float64)
      np.testing.assert_allclose(values, x, atol=1e-4)
      x = np.maximum(x, 0)
    with self.assertRaisesRegex(ValueError, "examples is 100000, but there"):
      fusion._examples(study, 100_000)


class ReportTest(absltest.TestCase):
  def results(self, ot):
    summary = lambda mean: {"seeds": [mean], "mean": mean, "std": None}  # noqa: E731
    return {
      "config": {"proportions": [0.3, 0.7]},
      "parts": [
        {
          "title": "Equal",
          "model": summary(50.0),
          "methods": {
            "avg": [summary(60.0), summary(40.0)],
            "ot_weights": [summary(value) for value in ot],
            "random": [summary(10.0), summary(90.0)],
          },
        }
      ],
    }

  def test_verdicts(self):
    avg, ot, random = _fusion_report.verdicts(self.results([65.0, 45.0]))[2:]
    self.assertEqual(avg, "| Equal | AVG | 60.00 at 0.3 |  | 1/2 | 1/2 |")
    self.assertEqual(
      ot, "| Equal | OT, weights | 65.00 at 0.3 | 2/2 | 1/2 | 1/2 |"
    )
    self.assertIn("| 90.00 at 0.7 | 1/2 |  | 1/2 |", random)
    ot = _fusion_report.verdicts(self.results([5.0, 30.0]))[3]
    self.assertEqual(
      ot, "| Equal | OT, weights | 30.00 at 0.7 | 0/2 | 0/2 | 0/2 |"
    )


class ConfigTest(parameterized.TestCase):
  @parameterized.parameters("mnist", "mnist-mlphuge", "mnist-mlpnet-paper")
  def test_variants(self, variant):
    with self.assertRaisesRegex(ValueError, "Unknown variant"):
      fusion_config.get_config(variant)

  @parameterized.parameters(
    ({"proportions": (0.5, 1.0)}, "proportions must lie in"),
    ({"examples": 0}, "examples must be at least 1"),
    ({"larger": "resnet"}, "Unknown network 'resnet'"),
  )
  def test_bad_values(self, changes, message):
    with tempfile.TemporaryDirectory() as name:
      workdir = pathlib.Path(name) / "run"
      with self.assertRaisesRegex(ValueError, message):
        fusion.run(_config(**changes), str(workdir))
      self.assertFalse(workdir.exists())


if __name__ == "__main__":
  absltest.main()
