"""Merges two networks that were trained on different classes.

    python -m experiments.mpf --workdir=runs/digits \
      --config=experiments/configs/mpf.py:digits-mlpnet

Trains A, B and the joint network, merges A and B by average, optimal
transport and Mode Path Fusion, and prints the table beside the paper's
figures and the controls that the paper lacks. Killed at any moment and
started again with the same workdir, it goes on and ends with the same
figures. See experiments/configs/mpf.py for the variants.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from experiments import _cli, _mpf_report, _mpf_stages, _mpf_study, _workdir

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Configuration file and variant, path:variant."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_DATA_DIR = flags.DEFINE_string(
  "data_dir", None, "Folder of prepared TFDS data sets."
)
_PROGRESS = flags.DEFINE_bool("progress", True, "Show progress bars.")


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
  study = _mpf_study.build(config, data_dir)
  with _workdir.open_workdir(workdir, config) as folder:
    networks: dict[str, Any] = {}
    metas: dict[str, Any] = {}
    for name, stage in _mpf_stages.stages_of(config).items():
      networks[name], metas[name] = _mpf_stages.run_stage(
        name, stage, study, networks, folder, progress
      )
    results = _mpf_report.write_results(
      study,
      _mpf_report.evaluate_rows(study, networks),
      _mpf_report.evaluate_paths(study, networks),
      metas,
      folder,
    )
    _workdir.write_text(folder / "table.md", _mpf_report.table(results))
    _mpf_report.plot(results, folder)
  return results


def require_flags(*names: str) -> None:
  """Raises ValueError for a flag that was not given."""
  examples = {
    "config": "experiments/configs/mpf.py:digits-mlpnet",
    "workdir": "runs/digits",
  }
  for name in names:
    if flags.FLAGS[name].value is None:
      raise ValueError(
        f"--{name} is missing, for instance --{name}={examples[name]}."
      )


def main(argv: Sequence[str]) -> None:
  """Runs the study that the flags describe, and prints its table."""
  if len(argv) > 1:
    raise ValueError(f"Unknown arguments: {' '.join(argv[1:])}")
  require_flags("config", "workdir")
  results = run(
    _CONFIG.value, str(_WORKDIR.value), _DATA_DIR.value, _PROGRESS.value
  )
  print(_mpf_report.table(results))
  print(f"Files and pictures: {_WORKDIR.value}")


if __name__ == "__main__":
  _cli.run(main)
