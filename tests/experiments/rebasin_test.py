"""Tests of the barrier study, on the embedded digits."""

from __future__ import annotations

import json
import pathlib
import tempfile
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from experiments import _rebasin_methods, _rebasin_report, rebasin
from experiments.configs import rebasin as rebasin_config
from jaxmerge import models
from jaxmerge.models import _registry

# Networks of the same names that take seconds.
_SMALL = {
  "mlp512": (models.MLP, {"features": (64, 64, 64), "use_bias": True}),
  "cnn": (models.CNN, {"widths": (8, 8, 16)}),
}


def _config(variant="digits-mlp512-smoke", **changes):
  config = rebasin_config.get_config(variant)
  config.devices = 1
  config.update_from_flattened_dict(changes)
  return config


def _figures(results):
  """What a run found, without its times."""
  rows = results["rows"]["lr-0.1"]
  return {
    method: {name: row[name] for name in row if name != "seconds"}
    for method, row in rows.items()
  }


class RebasinTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(mock.patch.dict(_registry._NETWORKS, _SMALL))
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name)

  def test_methods_and_going_on(self):
    config = _config(methods=("naive", "weights", "ot_activations"))
    results = rebasin.run(config, str(self.folder / "run"), progress=False)
    rows = results["rows"]["lr-0.1"]
    self.assertEqual(list(rows), list(config.methods))
    for row in rows.values():
      losses = np.array(row["profile"]["test_loss"])
      self.assertEqual(losses.shape, (2, config.profile_points))
      # The midpoint of the profile is the average that is judged apart.
      np.testing.assert_allclose(
        losses[:, 1], row["midpoint_test_loss"], rtol=1e-4
      )
      excess = losses[:, 1] - losses[:, [0, -1]].mean(axis=1)
      np.testing.assert_allclose(
        row["barrier_test_loss"], np.maximum(excess, 0), rtol=1e-4, atol=1e-6
      )
      # Alignment permutes: the ends keep their losses.
      np.testing.assert_allclose(
        row["ends_test_loss"], rows["naive"]["ends_test_loss"], rtol=1e-4
      )
    self.assertLess(
      np.mean(rows["weights"]["barrier_test_loss"]),
      np.mean(rows["naive"]["barrier_test_loss"]),
    )
    self.assertLess(
      np.mean(rows["naive"]["repaired_test_loss"]),
      np.mean(rows["naive"]["midpoint_test_loss"]),
    )
    for name in ("config.json", "results.json", "table.md", "profiles.png"):
      self.assertTrue((self.folder / "run" / name).exists(), name)
    # A method that is missing is measured again, and nothing else.
    kept = self.folder / "run" / "rows" / "lr-0.1"
    (kept / "weights.json").unlink()
    before = (kept / "naive.json").stat().st_mtime_ns
    again = rebasin.run(config, str(self.folder / "run"), progress=False)
    self.assertEqual((kept / "naive.json").stat().st_mtime_ns, before)
    self.assertEqual(_figures(again), _figures(results))
    # The page holds the run.
    _rebasin_report.publish(results, self.folder / "run", self.folder)
    kept = json.loads(
      (self.folder / "experiments/results/rebasin.json").read_text()
    )
    self.assertIn("digits-mlp512", kept)
    page = (self.folder / "docs/results/rebasin.md").read_text()
    self.assertIn("weight matching", page)
    picture = self.folder / "docs/images/rebasin-digits-mlp512.png"
    self.assertTrue(picture.exists())

  def test_batch_norm(self):
    config = _config(
      "digits-cnn-smoke",
      methods=("naive", "weights", "activations"),
      seeds=(0,),
    )
    results = rebasin.run(config, str(self.folder / "run"), progress=False)
    for row in results["rows"]["lr-0.1"].values():
      for before, name in (("", "midpoint"), ("repaired_", "repaired")):
        np.testing.assert_allclose(
          np.array(row[f"{before}profile"]["test_loss"])[:, 1],
          row[f"{name}_test_loss"],
          rtol=1e-3,
        )
      # The average of the ends' statistics is far from the middle's.
      self.assertLess(
        row["repaired_test_loss"][0], row["midpoint_test_loss"][0]
      )
      self.assertTrue(np.isfinite(row["midpoint_test_loss"]).all())

  @parameterized.parameters(
    ({"network": "perceptron"}, "Unknown network 'perceptron'"),
    ({"methods": ("git",)}, "methods names git"),
    ({"methods": ()}, "methods names nothing"),
    ({"seeds": (1, 1)}, "seeds must be distinct"),
    ({"learning_rates": (0.0,)}, "learning_rates must be positive"),
    ({"profile_points": 4}, "profile_points must be odd"),
    ({"epochs": 0}, "epochs must be at least 1"),
    ({"batch_size": 100_000}, "batch_size=100000 is larger than the data"),
  )
  def test_bad_configs(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      rebasin.run(_config(**changes), str(self.folder / "run"))
    self.assertFalse((self.folder / "run").exists())

  def test_bad_variants(self):
    for variant in ("mnist", "-mlp512"):
      with self.assertRaisesRegex(ValueError, "Unknown variant"):
        rebasin_config.get_config(variant)

  def test_names_with_hyphens(self):
    config = rebasin_config.get_config("cifar10-vit-tiny-smoke")
    self.assertEqual((config.dataset, config.network), ("cifar10", "vit-tiny"))
    self.assertLen(config.seeds, 2)

  def test_every_method_is_there(self):
    self.assertEqual(
      set(_rebasin_methods._METHODS), set(rebasin_config.METHODS)
    )
    self.assertEqual(set(_rebasin_report.LABELS), set(rebasin_config.METHODS))


if __name__ == "__main__":
  absltest.main()
