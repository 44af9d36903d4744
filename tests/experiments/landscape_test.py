"""Tests of the landscape study, on networks of the embedded digits."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized

from experiments import _landscape_report, _mpf_study, _workdir, landscape
from experiments.configs import landscape as landscape_config
from experiments.configs import mpf as mpf_config
from jaxmerge import checkpoints, curves

_ROOT = pathlib.Path(__file__).parents[2]
_CONFIG = "experiments/configs/landscape.py:"
_ENVIRONMENT = os.environ | {
  "JAX_NUM_CPU_DEVICES": "1",
  "TF_CPP_MIN_LOG_LEVEL": "3",
}


def _config(**changes):
  config = landscape_config.get_config("digits-mlpnet-smoke")
  config.update(changes)
  return config


class RunTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    cls.addClassCleanup(folder.cleanup)
    cls.networks = pathlib.Path(folder.name) / "mpf"
    cls.mpf_config = mpf_config.get_config("digits-mlpnet-smoke")
    cls.mpf_config.devices = 1
    cls.study = _mpf_study.build(cls.mpf_config, None)
    # What a run of experiments.mpf leaves, but for the training.
    _workdir.write_json(
      cls.networks / "config.json", _workdir.as_json(cls.mpf_config)
    )
    a, b, bend, aligned = map(cls.study.init, map(cls.study.keys, range(4)))
    points = curves.BezierCurve.through(a, bend, b)
    cls.trees = {
      "model_a": {"params": a},
      "model_b": {"params": b},
      "aligned": {"params": aligned, "a": a},
      "mpf": {"params": points(0.5), "points": points.points},
    }
    for name, tree in cls.trees.items():
      with checkpoints.Store(cls.networks / "networks" / name) as store:
        store.save(0, tree, {})
        store.wait()

  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name)

  def _run(self, config=None, networks=None):
    return landscape.run(
      config or _config(),
      str(self.folder / "run"),
      str(networks or self.networks),
      progress=False,
    )

  def test_figures_and_files(self):
    results = self._run()
    run = self.folder / "run"
    for name in ("table.md", "plane.png", "plane.svg", "profile.png"):
      self.assertGreater((run / name).stat().st_size, 100)
    self.assertEqual(
      json.loads((run / "results.json").read_text())["summary"],
      json.loads(json.dumps(results["summary"])),
    )
    self._check_by_hand(results)
    self._check_resumed(results)
    landscape.publish(results, run, self.folder / "root")
    page = (self.folder / "root/docs/results/landscape.md").read_text()
    kept = self.folder / "root/experiments/results/landscape.json"
    self.assertEqual(page, _landscape_report.page(json.loads(kept.read_text())))
    self.assertIn("straight line, B aligned by OT", page)
    self.assertTrue((self.folder / "root/docs/images/landscape.png").exists())

  def _net(self, name, part, seed, *place):
    return jax.tree.map(
      lambda leaf: np.asarray(leaf[(*place, seed)]), self.trees[name][part]
    )

  def _check_by_hand(self, results):
    """Figures from the networks and the formulas."""
    seed, k, t = 1, 1, 0.25
    batches = {
      part: jax.tree.map(lambda leaf: leaf[0], getattr(self.study, part).value)
      for part in ("train", "test")
    }
    nets = [
      *(self._net("mpf", "points", seed, i) for i in range(3)),
      self._net("aligned", "params", seed),
    ]
    for name, weights in (
      ("curve", ((1 - t) ** 2, 2 * t * (1 - t), t**2, 0)),
      ("line", (1 - t, 0, t, 0)),
      ("line_aligned", (1 - t, 0, 0, t)),
    ):
      params = jax.tree.map(
        lambda *leaves, weights=weights: np.float32(
          np.tensordot(weights, np.stack(leaves), 1)
        ),
        *nets,
      )
      path = results["paths"][name]
      for part, batch in batches.items():
        found = self.study.metric_fn(params, batch)
        np.testing.assert_allclose(
          path[part]["loss"][seed][k], found["loss"].mean(), rtol=1e-4
        )
        np.testing.assert_allclose(
          path[part]["accuracy"][seed][k],
          100 * found["accuracy"].mean(),
          atol=0.3,
        )
      square = sum((leaf**2).sum() for leaf in jax.tree.leaves(params))
      np.testing.assert_allclose(
        path["norm"][seed][k], np.sqrt(square), rtol=1e-4
      )
    summary, paths = results["summary"], results["paths"]
    line, curve = (
      np.array(paths[name]["train"]["loss"]) for name in ("line", "curve")
    )
    np.testing.assert_allclose(
      summary["ratio"]["whole"]["seeds"], line.max(1) / curve.max(1)
    )
    np.testing.assert_allclose(
      summary["ratio"]["interior"]["seeds"],
      line[:, 1:4].max(1) / curve[:, 1:4].max(1),
    )
    excess = line - np.linspace(line[:, 0], line[:, -1], 5).T
    np.testing.assert_allclose(
      summary["paths"]["line"]["train_loss_barrier"]["mean"],
      excess.max(1).mean(),
    )
    # The plane's picture: the merged network is the curve's middle.
    with np.load(self.folder / "run" / "plane.npz") as kept:
      self.assertEqual(kept["train/loss"].shape, (4, 4))
      np.testing.assert_allclose(kept["merged"], kept["curve"][2], rtol=1e-5)
      np.testing.assert_allclose(kept["ends"][0], 0, atol=1e-5)
      np.testing.assert_allclose(
        kept["ends"][1], [results["plane"]["width"], 0], atol=1e-4
      )
      self.assertLessEqual(kept["test/error"].max(), 100)

  def _check_resumed(self, results):
    """Nothing that is in the workdir is measured again."""
    run = self.folder / "run"
    kept = json.loads((run / "profiles.json").read_text())
    del kept["line"]["test"]
    (run / "profiles.json").write_text(json.dumps(kept))
    (run / "results.json").unlink()
    with mock.patch.object(
      curves, "profile", side_effect=curves.profile
    ) as profile:
      again = self._run()
    self.assertEqual(profile.call_count, 1)
    self.assertEqual(again["summary"], results["summary"])
    self.assertEqual(again["plane"], results["plane"])
    with self.assertRaisesRegex(ValueError, "plane_points is 4 there and 3"):
      self._run(_config(plane_points=3))

  def test_missing_stage(self):
    copy = self.folder / "copy"
    shutil.copytree(self.networks, copy)
    shutil.rmtree(copy / "networks" / "mpf")
    with self.assertRaisesRegex(
      ValueError,
      "no finished network mpf. Make it with: python -m experiments.mpf "
      "--config=experiments/configs/mpf.py:digits-mlpnet --workdir=.*copy",
    ):
      self._run(networks=copy)
    (copy / "networks" / "mpf").mkdir()
    with self.assertRaisesRegex(ValueError, "no good checkpoint.*experiments"):
      self._run(networks=copy)
    (copy / "config.json").write_text("[1]")
    with self.assertRaisesRegex(ValueError, "config.json is damaged"):
      self._run(networks=copy)

  def test_no_workdir_of_mpf(self):
    with self.assertRaisesRegex(ValueError, "no workdir of experiments.mpf"):
      self._run(networks=self.folder / "nowhere")

  def test_other_networks(self):
    config = landscape_config.get_config("digits-mlplarge-smoke")
    with self.assertRaisesRegex(ValueError, "networks of digits-mlpnet, not"):
      self._run(config)

  @parameterized.parameters(
    ({"profile_points": 1}, "profile_points must be at least 2"),
    ({"plane_points": 1}, "plane_points must be at least 2"),
    ({"chunk": 0}, "chunk must be at least 1"),
    ({"eval_batch_size": 0}, "eval_batch_size must be at least 1"),
    ({"margin": -0.1}, "margin must not be negative"),
    ({"plane_seed": 2}, "plane_seed is 2, but the networks have 2 seeds"),
  )
  def test_message(self, changes, message):
    with self.assertRaisesRegex(ValueError, message) as caught:
      self._run(_config(**changes))
    self.assertNotIn("\n", str(caught.exception))
    self.assertFalse((self.folder / "run").exists())

  @parameterized.parameters("digits", "digits-mlpnet-fast", "a-b-c-d")
  def test_variant(self, variant):
    with self.assertRaisesRegex(ValueError, "Unknown variant"):
      landscape_config.get_config(variant)

  def test_command(self):
    """Missing flags end the command with one line and status 2."""
    command = [sys.executable, "-m", "experiments.landscape"]
    command += [f"--config={_CONFIG}digits-mlpnet", "--workdir=unused"]
    run = subprocess.run(
      command, cwd=_ROOT, env=_ENVIRONMENT, capture_output=True, text=True
    )
    self.assertEqual(run.returncode, 2, run.stderr)
    self.assertStartsWith(run.stderr, "error: --mpf_workdir is missing")


if __name__ == "__main__":
  absltest.main()
