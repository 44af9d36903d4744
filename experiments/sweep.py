"""Chooses settings of experiments.mpf on held-out training data.

    python -m experiments.sweep --workdir=runs/sweep \
      --config=experiments/configs/mpf.py:mnist-mlpnet --config.holdout=0.1 \
      --grid=curve.learning_rate=0.07,0.2 --grid=curve.concentration=5,20

Runs every combination of the values in a folder of its own, resumable, and
prints the accuracies on the held-out part. The test set is never looked at:
`holdout` must be above 0. Networks that no swept field can change (A, B and
what is made of them, where only the curve or the fine-tuning is swept) are
trained once.
"""

from __future__ import annotations

import ast
import itertools
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import ml_collections
from absl import flags

from experiments import _cli, _mpf_report, mpf

# config, workdir, data_dir and progress are the flags of experiments.mpf.
_GRID = flags.DEFINE_multi_string(
  "grid", [], "Field and values: name=value,value,... May be repeated."
)
_BASE_STAGES = ("joint", "model_a", "model_b", "avg", "aligned", "ot")


def parse_grid(
  grid: Sequence[str], config: ml_collections.ConfigDict
) -> dict[str, list[Any]]:
  """Reads the values of every swept field.

  Args:
    grid: entries of the form name=value,value,...
    config: the configuration that has the fields.

  Returns:
    Field name to values.

  Raises:
    ValueError: an entry is not of that form, or names no field.
  """
  fields = {}
  for entry in grid:
    name, _, values = entry.partition("=")
    try:
      _get(config, name)
    except (AttributeError, KeyError, TypeError) as error:
      raise ValueError(f"--grid names no field: {name!r}.") from error
    if not values:
      raise ValueError(f"--grid={entry} must be of the form name=value,value.")
    fields[name] = [_literal(value) for value in values.split(",")]
    for value in fields[name]:
      try:
        ml_collections.ConfigDict(config).update_from_flattened_dict(
          {name: value}
        )
      except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
          f"--grid={entry}: {value!r} does not fit the field."
        ) from error
  if not fields:
    raise ValueError("--grid is missing: name=value,value,...")
  return fields


def _get(config: ml_collections.ConfigDict, name: str) -> Any:
  for part in name.split("."):
    config = config[part]
  return config


def _literal(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (SyntaxError, ValueError):
    return text


def sweep(
  config: ml_collections.ConfigDict,
  fields: dict[str, list[Any]],
  workdir: str,
  data_dir: str | None = None,
  progress: bool = True,
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
  """Runs every combination.

  Args:
    config: the configuration; its holdout must be above 0.
    fields: field name to values.
    workdir: folder of the sweep, one sub-folder a combination.
    data_dir: folder of prepared TFDS sets, None for the default one.
    progress: whether to show progress bars.

  Returns:
    Pairs of the swept values and the results.

  Raises:
    ValueError: the configuration holds nothing out, or is bad.
  """
  if not config.holdout:
    raise ValueError(
      "A sweep needs --config.holdout above 0, for instance 0.1: settings are "
      "not chosen on the test set."
    )
  shared = all(name.startswith(("curve.", "finetune.")) for name in fields)
  found = []
  first: pathlib.Path | None = None
  for values in itertools.product(*fields.values()):
    chosen = dict(zip(fields, values, strict=True))
    one = ml_collections.ConfigDict(config)
    one.update_from_flattened_dict(chosen)
    label = ",".join(f"{name}={value}" for name, value in chosen.items())
    folder = pathlib.Path(workdir) / label
    if shared and first is not None and not folder.exists():
      for stage in _BASE_STAGES:
        source = first / "networks" / stage
        if source.is_dir():
          # Renamed when whole: a half-copied network would be taken for one.
          whole = folder / "networks" / stage
          half = folder / f"copying-{stage}"
          shutil.copytree(source, half)
          whole.parent.mkdir(exist_ok=True)
          half.rename(whole)
    first = first or folder
    found.append((chosen, mpf.run(one, str(folder), data_dir, progress)))
    print(f"{label}: {_line(found[-1][1])}", flush=True)
  return found


def _line(results: dict[str, Any]) -> str:
  accuracies = {name: row["accuracy"] for name, row in results["rows"].items()}
  return ", ".join(
    f"{name} {_mpf_report.cell(accuracy['mean'], accuracy['std'])}"
    for name, accuracy in accuracies.items()
  )


def main(argv: Sequence[str]) -> None:
  """Sweeps as the flags say."""
  if len(argv) > 1:
    raise ValueError(f"Unknown arguments: {' '.join(argv[1:])}")
  mpf.require_flags("config", "workdir")
  flag = flags.FLAGS
  sweep(
    flag.config,
    parse_grid(_GRID.value, flag.config),
    flag.workdir,
    flag.data_dir,
    flag.progress,
  )


if __name__ == "__main__":
  _cli.run(main)
