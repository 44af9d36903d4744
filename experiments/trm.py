"""Merging without storage: trajectory regularised merging and its neighbours.

    python -m experiments.trm --workdir=runs/trm-10 \
      --config=experiments/configs/trm.py:clinc150-10

Sends strategies that store no examples through a stream of tasks, in several
class orders, from a pre-trained network, and prints accuracy, forgetting, and
how each task begins: the loss and the norm of its gradient, and the steps until
the task is learned. Killed at any moment and started again with the same
workdir, it goes on after the last finished task and ends with the same figures.
With --publish finished variants go into experiments/results/trm.json, of which
docs/results/trm.md is made. See experiments/configs/trm.py for the variants.

TRM is jaxmerge's own construction from the abstract of Trajectory Regularized
Merging, whose equations are not public.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
import tqdm
from absl import flags

from experiments import (
  _cli,
  _hardware,
  _programs,
  _publish,
  _trm_report,
  _trm_study,
  _workdir,
  mpf,
)
from jaxmerge import checkpoints, continual

_ROOT = pathlib.Path(__file__).parent.parent

# The flags are those of experiments.mpf, and --publish.

# Steps that the accuracy in training is averaged over.
_WINDOW = 5
# A task is learned when it has this part of its final accuracy.
_PART = 0.9


def steps_to_learn(accuracy: np.ndarray) -> int:
  """Steps until a task is learned, by its batches in training.

  Args:
    accuracy: of the batch of every step, `[steps]`.

  Returns:
    The first step at which the mean over the last `_WINDOW` ones is at least
    `_PART` of that at the end.

  >>> steps_to_learn(np.array([0.0] * 10 + [1.0] * 10))
  15
  """
  window = min(_WINDOW, len(accuracy))
  sums = np.convolve(accuracy, np.ones(window) / window, "valid")
  if sums[-1] <= 0:
    return len(accuracy)  # Never.
  # Rounding of equal means must not decide.
  return int(np.argmax(sums >= _PART * sums[-1] - 1e-9)) + window


def _plain(value: Any) -> Any:
  """Values that JSON can hold, those of the one seed."""
  if isinstance(value, np.ndarray):
    return value[0].tolist()
  return value


class _Journal:
  """Keeps what a strategy reports of its tasks."""

  def __init__(self, tasks: list[dict[str, Any]]) -> None:
    self.tasks = tasks

  def __call__(self, what: str, task: int, values: dict[str, Any]) -> None:
    """Takes what is reported; a trace is kept as the steps until learned."""
    while len(self.tasks) <= task:
      self.tasks.append({})
    kept = {name: _plain(value) for name, value in values.items()}
    if what == "training":
      accuracy = np.array(kept["accuracy"])
      kept = {"steps": len(accuracy), "learned": steps_to_learn(accuracy)}
    self.tasks[task].setdefault(what, {}).update(kept)


def _row(
  setting: _trm_study.Setting,
  name: str,
  strategy: continual.Strategy,
  folder: pathlib.Path,
  bar: Any,
) -> dict[str, Any]:
  """Runs a strategy through the stream, or goes on with it."""
  total = setting.problem.num_tasks
  journal = _Journal([])
  problem = dataclasses.replace(setting.problem, report=journal)
  state = strategy.init(problem)
  matrices: dict[str, np.ndarray] = {}
  done = 0
  with checkpoints.Store(folder / "states" / name, max_to_keep=1) as kept:
    found = kept.restore(state)
    if found is not None:
      done, state, record = found
      journal.tasks[:] = record.pop("tasks")
      for measure, lines in record.items():
        matrices[measure] = np.full((total, total), np.nan)
        matrices[measure][:done] = np.array(lines, np.float64)
    bar.update(done)
    for task in range(done, total):
      state = strategy.observe(problem, state, task)
      problem.memo.clear()
      if strategy.measured(problem, task):
        # Of the tasks so far: nothing that is reported needs the later ones.
        seen = task + 1
        params = strategy.params(problem, state)
        for measure, values in setting.measure(params, seen).items():
          empty = np.full((total, total), np.nan)
          matrices.setdefault(measure, empty)[task, :seen] = values
      kept.save(
        task + 1,
        state,
        {"tasks": journal.tasks} | _listed(matrices, task + 1),
      )
      bar.update(1)
    kept.wait()
  return {
    **_listed(matrices, total),
    "tasks": journal.tasks,
    "memory": strategy.memory(problem, state, total),
  }


def _listed(
  matrices: dict[str, np.ndarray], count: int
) -> dict[str, list[list[float | None]]]:
  """So many rows of each; None for what JSON cannot say, not measured."""
  return {
    name: [
      [None if np.isnan(value) else float(value) for value in line]
      for line in matrix[:count]
    ]
    for name, matrix in matrices.items()
  }


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
    data_dir: folder of the set.
    progress: whether to show a progress bar.

  Returns:
    What results.json holds.

  Raises:
    ValueError: bad input; one line says what and how to mend it.
    FloatingPointError: a loss became NaN or infinite.
  """
  # The study first: a bad configuration must leave no workdir behind.
  study = _trm_study.build(config, data_dir)
  rows: dict[str, list[dict[str, Any]]] = {name: [] for name in config.rows}
  before = []
  with (
    _workdir.open_workdir(workdir, config) as folder,
    tqdm.tqdm(
      total=len(config.orders) * len(rows) * config.num_tasks,
      disable=not progress,
      unit="task",
    ) as bar,
  ):
    setting = None
    for number in range(len(config.orders)):
      place = folder / f"order-{number}"
      setting = study.make(number, folder)
      zero_shot = place / "zero_shot.json"
      if not zero_shot.exists():
        found = setting.measure(setting.problem.params, config.num_tasks)
        _workdir.write_json(
          zero_shot, {name: values.tolist() for name, values in found.items()}
        )
      baseline = json.loads(zero_shot.read_text())
      before.append(_trm_report.metrics_before(baseline, setting.sizes))
      for name, strategy in study.strategies.items():
        bar.set_description(f"order {number} {name:18}")
        file = place / f"{name}.json"
        if not file.exists():
          row = _row(setting, name, strategy, place, bar)
          _workdir.write_json(file, row)
          _programs.bound()
        else:
          bar.update(config.num_tasks)
        shutil.rmtree(place / "states" / name, ignore_errors=True)
        row = json.loads(file.read_text())
        row["metrics"] = _trm_report.metrics_of(
          row, setting.sizes, np.array(baseline["accuracy"])
        )
        rows[name].append(row)
    assert setting is not None
    results = {
      "config": _workdir.as_json(config),
      "zero_shot": before,
      "rows": rows,
      "num_parameters": study.num_parameters,
      "versions": _hardware.versions(),
      "hardware": _hardware.hardware(len(setting.problem.train.devices)),
    }
    _workdir.write_json(folder / "results.json", results)
    _workdir.write_text(folder / "table.md", _trm_report.table(results))
    _trm_report.plot(results, folder)
  return results


def main(argv: Sequence[str]) -> None:
  """Runs the study that the flags describe, and prints its table."""
  if len(argv) > 1:
    raise ValueError(f"Unknown arguments: {' '.join(argv[1:])}")
  mpf.require_flags("config", "workdir")
  flag = flags.FLAGS
  results = run(flag.config, str(flag.workdir), flag.data_dir, flag.progress)
  print(_trm_report.table(results))
  print(f"Files and pictures: {flag.workdir}")
  if _publish.PUBLISH.value:
    _trm_report.publish(results, pathlib.Path(flag.workdir), _ROOT)


if __name__ == "__main__":
  _cli.run(main)
