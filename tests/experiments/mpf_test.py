"""Tests of the Mode Path Fusion study, on the embedded digits."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized

from experiments import (
  _classify,
  _cli,
  _mpf_report,
  _mpf_stages,
  _mpf_study,
  _workdir,
  mpf,
)
from experiments.configs import mpf as mpf_config
from jaxmerge import checkpoints

_ROOT = pathlib.Path(__file__).parents[2]
_CONFIG = "experiments/configs/mpf.py:"


def _config(variant="digits-mlpnet-smoke", **changes):
  config = mpf_config.get_config(variant)
  config.devices = 1
  config.update_from_flattened_dict(changes)
  return config


def _figures(workdir):
  """What a run found, without its times."""
  results = json.loads((pathlib.Path(workdir) / "results.json").read_text())
  for name in ("seconds", "versions", "hardware"):
    del results[name]
  return results


def _environment(**more):
  return os.environ | {
    "JAX_NUM_CPU_DEVICES": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    **more,
  }


def _command(*arguments):
  return [sys.executable, "-m", "experiments.mpf", "--noprogress", *arguments]


class _Workdir(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name)


class RunTest(_Workdir):
  def test_every_row_and_file(self):
    config = _config()
    results = mpf.run(config, self.folder / "run", progress=False)
    self.assertEqual(list(results["rows"]), list(mpf_config.ROWS))
    for row in results["rows"].values():
      accuracy = row["accuracy"]
      self.assertLen(accuracy["seeds"], 2)
      np.testing.assert_allclose(accuracy["mean"], np.mean(accuracy["seeds"]))
      np.testing.assert_allclose(
        accuracy["std"], np.std(accuracy["seeds"], ddof=1)
      )
    for name in ("config.json", "table.md", "rows.png", "curve.png"):
      self.assertGreater((self.folder / "run" / name).stat().st_size, 100)
    lines = (self.folder / "run" / "metrics.jsonl").read_text().splitlines()
    stages = [json.loads(line)["stage"] for line in lines]
    # Eight trained networks, two epochs each.
    self.assertLen(stages, 16)
    # Two thirds of the digits are right after two epochs; chance is 10 %.
    self.assertGreater(results["rows"]["joint"]["accuracy"]["mean"], 60)
    self._check_networks(config, results)
    self._check_another_config()
    self._check_done_is_not_done_again(results)

  def _check_networks(self, config, results):
    """The checkpoints hold the networks that the table is about."""
    study = _mpf_study.build(config, None)
    networks = {}
    for name in _mpf_stages.stages_of(config):
      if name == "ensemble":
        continue
      with checkpoints.Store(self.folder / "run" / "networks" / name) as store:
        networks[name] = store.restore(_mpf_stages.like(name, study))[1]
    a, b, average = (
      jax.tree.leaves(networks[name]["params"])
      for name in ("model_a", "model_b", "avg")
    )
    for one, other, mean in zip(a, b, average, strict=True):
      np.testing.assert_allclose(mean, (one + other) / 2, atol=1e-6)
    # MPF = A/4 + bend/2 + B/4.
    for points, merged in zip(
      jax.tree.leaves(networks["mpf"]["points"]),
      jax.tree.leaves(networks["mpf"]["params"]),
      strict=True,
    ):
      want = points[0] / 4 + points[1] / 2 + points[2] / 4
      np.testing.assert_allclose(merged, want, atol=1e-6)
    # The accuracy of one row, by hand.
    batch = jax.tree.map(lambda leaf: leaf[0], study.test.value)
    params = jax.tree.map(lambda leaf: leaf[1], networks["mpf"]["params"])
    hits = study.metric_fn(params, batch)["accuracy"]
    np.testing.assert_allclose(
      results["rows"]["mpf"]["accuracy"]["seeds"][1],
      100 * np.mean(hits),
      rtol=1e-5,
    )
    middle = results["paths"]["curve"]["accuracy"][2]
    first = results["rows"]["mpf"]["accuracy"]["seeds"][0]
    np.testing.assert_allclose(middle, first, rtol=1e-5)

  def _check_another_config(self):
    with self.assertRaisesRegex(
      ValueError, "batch_size is 64 there and 16 here. Choose another workdir"
    ):
      mpf.run(_config(batch_size=16), self.folder / "run", progress=False)

  def _check_done_is_not_done_again(self, results):
    with mock.patch("jaxmerge.training.train", side_effect=AssertionError):
      again = mpf.run(_config(), self.folder / "run", progress=False)
    self.assertEqual(again["rows"], results["rows"])

  def test_paper_recipe(self):
    config = _config(
      "digits-mlpnet-paper",
      **{"base.epochs": 2, "curve.epochs": 2, "seeds": (0,)},
    )
    results = mpf.run(config, self.folder / "run", progress=False)
    self.assertEqual(list(results["rows"]), list(mpf_config.PAPER_ROWS))
    study = _mpf_study.build(config, None)
    points, average = None, None
    for name in ("mpf", "avg"):
      with checkpoints.Store(self.folder / "run" / "networks" / name) as store:
        tree = store.restore(_mpf_stages.like(name, study))[1]
      points = tree.get("points", points)
      average = tree["params"]
    # The curve begins at the average: it was taken in place.
    start = jax.tree.map(lambda leaf: leaf[0], points)
    jax.tree.map(np.testing.assert_array_equal, start, average)


class AugmentationTest(_Workdir):
  def test_flip_and_crop(self):
    config = _config(flip=True, crop_padding=1)
    transform = _classify.augmentation(config.crop_padding, config.flip)
    image = np.arange(1, 65, dtype=np.uint8).reshape(8, 8, 1)
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    crops = [
      padded[i : i + 8, j : j + 8][:, ::step]
      for i in range(3)
      for j in range(3)
      for step in (1, -1)
    ]
    seen = set()
    for key in jax.random.split(jax.random.key(0), 200):
      got = np.asarray(transform(key, {"input": image})["input"])
      matches = [i for i, crop in enumerate(crops) if np.array_equal(crop, got)]
      self.assertLen(matches, 1)
      seen.update(matches)
    self.assertLen(seen, 18)

  def test_none(self):
    self.assertIsNone(_classify.augmentation(0, False))


class ResumeTest(_Workdir):
  def test_sigkill_at_random_moments(self):
    """Killed again and again, the run ends as an unbroken one."""
    arguments = (
      f"--config={_CONFIG}digits-mlpnet-smoke",
      "--config.rows=('model_a','model_b','mpf')",
      "--config.base.epochs=12",
      "--config.curve.epochs=12",
    )
    # All compile the same programs; the first process, which nothing kills,
    # fills the cache of the others.
    environment = _environment(
      JAX_COMPILATION_CACHE_DIR=str(self.folder / "programs"),
      JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    )
    whole = self.folder / "whole"
    subprocess.run(
      _command(*arguments, f"--workdir={whole}"),
      cwd=_ROOT,
      env=environment,
      check=True,
      capture_output=True,
    )
    epochs = len((whole / "metrics.jsonl").read_text().splitlines())
    self.assertEqual(epochs, 36)
    broken = self.folder / "broken"
    # Fixed, so that a failure can be seen again.
    generator = random.Random(7)
    kills = sorted(generator.sample(range(1, epochs), 3))
    for kill in kills:
      with subprocess.Popen(
        _command(*arguments, f"--workdir={broken}"),
        cwd=_ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
      ) as process:
        log = broken / "metrics.jsonl"
        while process.poll() is None:
          if log.exists() and log.read_text().count("\n") >= kill:
            # Somewhere within the next epoch or the writing of a checkpoint.
            time.sleep(generator.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
            break
          time.sleep(0.002)
        self.assertEqual(process.wait(), -signal.SIGKILL)
      self.assertFalse((broken / "results.json").exists())
    subprocess.run(
      _command(*arguments, f"--workdir={broken}"),
      cwd=_ROOT,
      env=environment,
      check=True,
      capture_output=True,
    )
    self.assertEqual(_figures(broken), _figures(whole))

    def losses(folder):
      lines = (folder / "metrics.jsonl").read_text().splitlines()
      records = [json.loads(line) for line in lines]
      return [(r["stage"], r["epoch"], r["loss"]) for r in records]

    self.assertEqual(losses(broken), losses(whole))

  def test_damaged_network_is_trained_again(self):
    config = _config(rows=("model_a",))
    run = self.folder / "run"
    first = mpf.run(config, run, progress=False)
    for path in (run / "networks" / "model_a" / "0").rglob("*"):
      if path.is_file() and path.stat().st_size > 1000:
        path.write_bytes(b"damaged")
    with self.assertLogs(level="WARNING") as logs:
      second = mpf.run(config, run, progress=False)
    self.assertIn("is damaged", " ".join(logs.output))
    self.assertEqual(first["rows"], second["rows"])

  def test_half_a_line_of_metrics(self):
    log = _workdir.MetricsLog(self.folder)
    log.add("a", {"epoch": 1})
    log.add("b", {"epoch": 1})
    with (self.folder / "metrics.jsonl").open("a") as file:
      file.write('{"stage": "b", "epo')
    log.begin("b")
    log.add("b", {"epoch": 1})
    text = (self.folder / "metrics.jsonl").read_text()
    self.assertEqual(
      [json.loads(line)["stage"] for line in text.splitlines()], ["a", "b"]
    )


class BadInputTest(_Workdir):
  @parameterized.parameters(
    ({"network": "resnet"}, "Unknown network 'resnet'.*mlpnet"),
    ({"recipe": "paper"}, "Choose it by the variant"),
    ({"rows": (1, 2)}, "rows names 1, 2"),
    ({"seeds": ("a",)}, "seeds must be distinct integers"),
    ({"seeds": (10**30,)}, "seeds must be distinct integers"),
    ({"profile_points": 1}, "profile_points must be at least 2"),
    ({"curve.kind": "spline"}, "Unknown kind 'spline'"),
    ({"curve.init": "zero"}, "Unknown curve.init 'zero'"),
    ({"curve.t_sampling": "normal"}, "Unknown t_sampling 'normal'"),
    ({"curve.num_points": 2}, "num_points must be at least 3"),
    ({"curve.learning_rate": 0.0}, "must be positive"),
    ({"finetune.momentum": 1.0}, "momentum must lie in"),
    ({"base.epochs": 0}, "must be at least 1"),
    ({"recipe": "secret"}, "Unknown recipe 'secret'.*corrected, paper"),
    ({"split": "none"}, "Unknown split 'none'"),
    ({"rows": ("magic",)}, "rows names magic"),
    ({"rows": ()}, "rows names nothing"),
    ({"seeds": (1, 1)}, "seeds must be distinct"),
    ({"fraction": 0.0}, r"fraction must lie in \(0, 1\)"),
    ({"fraction": 1.0}, r"fraction must lie in \(0, 1\)"),
    ({"holdout": 1.0}, r"holdout must lie in \[0, 1\)"),
    ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
    ({"crop_padding": -1}, "crop_padding"),
    ({"special_class": 10}, "special_class 10"),
    ({"special_class": -1}, "special_class -1"),
    ({"batch_size": 2000}, "Part a: batch_size=2000 is larger than the data"),
    ({"batch_size": 30, "devices": 4}, "not divisible by the 4 devices"),
    ({"devices": 99}, "99 devices were asked for"),
    ({"dataset": "digit"}, "digits"),
  )
  def test_message(self, changes, message):
    config = _config(**changes)
    with self.assertRaisesRegex(ValueError, message) as caught:
      mpf.run(config, self.folder / "run", progress=False)
    self.assertNotIn("\n", str(caught.exception))
    # Nothing is left that would refuse the corrected configuration.
    self.assertFalse((self.folder / "run").exists())

  @parameterized.parameters("digits", "digits-mlpnet-fast", "a-b-c-d")
  def test_variant(self, variant):
    with self.assertRaisesRegex(ValueError, "Unknown variant"):
      mpf_config.get_config(variant)

  def test_set_that_is_not_there(self):
    empty = self.folder / "empty"
    empty.mkdir()
    with self.assertRaisesRegex(ValueError, "mnist.*empty"):
      mpf.run(
        _config("mnist-mlpnet-smoke"),
        self.folder / "run",
        str(empty),
        progress=False,
      )

  def test_workdir_that_cannot_be_made(self):
    (self.folder / "file").write_text("not a folder")
    with self.assertRaisesRegex(ValueError, "is not writable.*--workdir"):
      mpf.run(_config(), self.folder / "file" / "run", progress=False)

  def test_workdir_in_use(self):
    with _workdir.open_workdir(self.folder / "run", _config()):
      with self.assertRaisesRegex(ValueError, "in use by another process"):
        mpf.run(_config(), self.folder / "run", progress=False)

  @parameterized.parameters("", "{", "[1, 2]")
  def test_damaged_config(self, text):
    (self.folder / "config.json").write_text(text)
    with self.assertRaisesRegex(ValueError, "config.json is damaged"):
      with _workdir.open_workdir(self.folder, _config()):
        pass

  def test_nan(self):
    config = _config(
      **{"base.learning_rate": 1e20, "base.final_learning_rate": 1e20}
    )
    with self.assertRaisesRegex(
      FloatingPointError, r"at step \d+ \(learning rate 1e\+20"
    ):
      mpf.run(config, self.folder / "run", progress=False)

  def test_status_and_one_line(self):
    """Bad flags and bad fields end the command with status 2."""
    for arguments, message in (
      ((f"--config={_CONFIG}digits-mlpnet", "--config.colour=1"), "colour"),
      ((f"--config={_CONFIG}digits-mlpnet",), "--workdir is missing"),
      ((f"--config={_CONFIG}digits-mlpnet-quick",), "error: Unknown variant"),
      (("surplus",), "Unknown arguments: surplus"),
    ):
      run = subprocess.run(
        _command(*arguments),
        cwd=_ROOT,
        env=_environment(),
        capture_output=True,
        text=True,
      )
      self.assertEqual(run.returncode, 2, run.stderr)
      self.assertLen(run.stderr.splitlines(), 1)
      self.assertStartsWith(run.stderr, "error: ")
      self.assertIn(message, run.stderr)
      self.assertNotIn("Traceback", run.stderr)

  @parameterized.parameters(
    ValueError("bad\n  value"),
    OSError("bad value"),
    FloatingPointError("bad value"),
  )
  def test_errors_of_main(self, error):
    output = io.StringIO()

    def main(argv):
      del argv
      raise error

    with (
      contextlib.redirect_stderr(output),
      mock.patch.object(sys, "argv", ["program"]),
      self.assertRaises(SystemExit) as caught,
    ):
      _cli.run(main)
    self.assertEqual(caught.exception.code, 2)
    self.assertEqual(output.getvalue(), "error: bad value\n")


class TableTest(absltest.TestCase):
  def test_summary(self):
    self.assertEqual(
      _mpf_report.summary([1.0, 3.0]),
      {"seeds": [1.0, 3.0], "mean": 2.0, "std": np.sqrt(2)},
    )
    self.assertIsNone(_mpf_report.summary([1.0])["std"])

  def test_cell(self):
    self.assertEqual(_mpf_report.cell(98.125, 0.5), "98.12 ± 0.50")
    self.assertEqual(_mpf_report.cell(98.0, None), "98.00")


if __name__ == "__main__":
  absltest.main()
