"""Barriers between networks trained apart, before and after alignment.

    python -m experiments.rebasin --workdir=runs/rebasin-mnist \
      --config=experiments/configs/rebasin.py:mnist-mlp512

Trains two networks a seed and learning rate, brings the second into the order
of the first by every method, and measures loss and accuracy along the straight
line between them, and in its middle after REPAIR. Killed at any moment and
started again with the same workdir, it goes on. Finished variants go into
experiments/results/rebasin.json, of which docs/results/rebasin.md is made,
with --publish. See experiments/configs/rebasin.py for the variants.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from absl import flags

from experiments import (
  _cli,
  _hardware,
  _publish,
  _rebasin_methods,
  _rebasin_report,
  _rebasin_study,
  _stage,
  _workdir,
  mpf,
)

_ROOT = pathlib.Path(__file__).parent.parent

# The flags are those of experiments.mpf, and --publish.


def run(
  config: ml_collections.ConfigDict,
  workdir: str,
  data_dir: str | None = None,
  progress: bool = True,
) -> dict[str, Any]:
  """Runs the study, or goes on with it.

  Args:
    config: the configuration.
    workdir: folder of the run.
    data_dir: folder of prepared TFDS sets, None for the default one.
    progress: whether to show progress bars.

  Returns:
    What results.json holds.

  Raises:
    ValueError: bad input; one line says what and how to mend it.
    FloatingPointError: a loss became NaN or infinite.
  """
  # The study first: a bad configuration must leave no workdir behind.
  study = _rebasin_study.build(config, data_dir)
  with _workdir.open_workdir(workdir, config) as folder:
    rows: dict[str, Any] = {}
    seconds = {}
    for rate in config.learning_rates:
      name = f"lr-{rate:g}"
      networks, meta = _stage.run(
        name,
        functools.partial(_rebasin_study.train_pairs, study, rate),
        study.init(_rebasin_study.network_keys(study)),
        folder,
        checkpoint_every=config.checkpoint_every,
        progress=progress,
      )
      seconds[name] = meta["seconds"]
      rows[name] = _measure_all(study, networks, folder / "rows" / name)
    results = {
      "config": _workdir.as_json(config),
      "rows": rows,
      "seconds": seconds,
      "versions": _hardware.versions(),
      "hardware": _hardware.hardware(study.num_devices),
    }
    _workdir.write_json(folder / "results.json", results)
    _workdir.write_text(folder / "table.md", _rebasin_report.table(results))
    _rebasin_report.plot(results, folder)
  return results


def _measure_all(
  study: _rebasin_study.Study, networks: Any, folder: pathlib.Path
) -> dict[str, Any]:
  """Every method's figures; those that are in the folder are not redone."""
  count = len(study.config.seeds)
  first, second = (
    jax.tree.map(lambda leaf, part=part: jnp.asarray(leaf[part]), networks)
    for part in (slice(0, count), slice(count, None))
  )
  rows = {}
  for method in study.config.methods:
    file = folder / f"{method}.json"
    if not file.exists():
      _workdir.write_json(
        file, _rebasin_methods.measure(study, method, first, second)
      )
    rows[method] = json.loads(file.read_text())
  return rows


def main(argv: Sequence[str]) -> None:
  """Runs the study that the flags describe, and prints its table."""
  if len(argv) > 1:
    raise ValueError(f"Unknown arguments: {' '.join(argv[1:])}")
  mpf.require_flags("config", "workdir")
  flag = flags.FLAGS
  results = run(flag.config, str(flag.workdir), flag.data_dir, flag.progress)
  print(_rebasin_report.table(results))
  print(f"Files and pictures: {flag.workdir}")
  if _publish.PUBLISH.value:
    _rebasin_report.publish(results, pathlib.Path(flag.workdir), _ROOT)


if __name__ == "__main__":
  _cli.run(main)
