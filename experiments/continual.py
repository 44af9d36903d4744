"""Continual learning by merging, beside its rivals.

    python -m experiments.continual --workdir=runs/continual \
      --config=experiments/configs/continual.py:digits

Runs every strategy of the configuration on a stream of tasks, for all seeds at
once and for every size of the replay buffer, and prints final accuracy,
forgetting and transfer beside the published figures. Killed at any moment and
started again with the same workdir, it goes on after the last finished task and
ends with the same figures. With --publish finished variants go into
experiments/results/continual.json, of which docs/results/continual.md is made.
See experiments/configs/continual.py for the variants.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import time
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
import tqdm
from absl import flags

from experiments import (
  _cli,
  _continual_report,
  _continual_study,
  _hardware,
  _programs,
  _publish,
  _workdir,
  mpf,
)
from jaxmerge import checkpoints, continual
from jaxmerge.continual import metrics, streams

_ROOT = pathlib.Path(__file__).parent.parent

# The flags are those of experiments.mpf, and --publish.


def _row(
  one: _continual_study.Run, folder: pathlib.Path, judge: str, bar: Any
) -> dict[str, Any]:
  """Runs a strategy through the stream, or goes on with it."""
  problem, strategy = one.problem, one.strategy
  state = strategy.init(problem)
  tasks = problem.num_tasks
  matrix = np.full((problem.num_seeds, tasks, tasks), np.nan)
  seconds = 0.0
  with checkpoints.Store(folder / "states" / one.name, max_to_keep=1) as kept:
    found = kept.restore(state)
    done = 0
    if found is not None:
      done, state, record = found
      matrix[:, :done] = np.array(record["accuracy"], np.float64)
      seconds = record["seconds"]
    bar.update(done)
    for task in range(done, tasks):
      begin = time.perf_counter()
      state = strategy.observe(problem, state, task)
      seconds += time.perf_counter() - begin
      if strategy.measured(problem, task):
        matrix[:, task] = _measure(one, state, judge)
      kept.save(
        task + 1,
        state,
        {"accuracy": _listed(matrix[:, : task + 1]), "seconds": seconds},
      )
      bar.update(1)
    kept.wait()
  return {
    "accuracy": _listed(matrix),
    "memory": strategy.memory(problem, state, tasks),
    "buffer": problem.replay.description if problem.replay else None,
    "seconds": seconds,
  }


def _listed(values: np.ndarray) -> Any:
  """Nested lists; None for what was not measured, which JSON cannot say."""
  if values.ndim == 0:
    return None if np.isnan(values) else float(values)
  return [_listed(value) for value in values]


def _measure(one: _continual_study.Run, state: Any, judge: str) -> np.ndarray:
  """Accuracy on every task, `[seeds, tasks]`."""
  problem, strategy = one.problem, one.strategy
  if not strategy.by_task:
    params = strategy.params(problem, state)
    return continual.accuracies(problem, params, split=judge)
  columns = [
    continual.accuracies(
      problem, strategy.params(problem, state, task), split=judge
    )[:, task]
    for task in range(problem.num_tasks)
  ]
  return np.stack(columns, axis=1)


def _summary(
  row: dict[str, Any], sizes: np.ndarray, baseline: np.ndarray, joint: Any
) -> dict[str, Any]:
  """Each metric of a row: per seed, mean, and sample standard deviation."""
  matrix = 100 * np.array(row["accuracy"], np.float64)
  values = metrics.summarize(
    matrix, sizes=sizes, baseline=baseline, joint=joint
  )
  found = {}
  for name, value in values.items():
    value = np.asarray(value, np.float64)
    found[name] = {
      "seeds": value.tolist(),
      "mean": value.mean(axis=0).tolist(),
      "std": value.std(axis=0, ddof=1).tolist() if len(value) > 1 else None,
    }
  return found


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
    progress: whether to show a progress bar.

  Returns:
    What results.json holds.

  Raises:
    ValueError: bad input; one line says what and how to mend it.
    FloatingPointError: a loss became NaN or infinite.
  """
  # The study first: a bad configuration must leave no workdir behind.
  runs = _continual_study.build(config, data_dir)
  problem = runs[0].problem
  stream = problem.stream
  with _workdir.open_workdir(workdir, config) as folder:
    _workdir.write_json(folder / "stream.json", streams.as_json(stream))
    rows: dict[str, dict[str, Any]] = {}
    total = len(runs) * problem.num_tasks
    with tqdm.tqdm(total=total, disable=not progress, unit="task") as bar:
      for one in runs:
        bar.set_description(f"{one.name:26}")
        file = folder / "rows" / f"{one.name}.json"
        if not file.exists():
          kept = _continual_study.keeping(one.problem, folder)
          row = _row(
            _continual_study.Run(one.label, one.size, one.strategy, kept),
            folder,
            config.judge,
            bar,
          )
          _workdir.write_json(file, row)
          _programs.bound()
        else:
          bar.update(problem.num_tasks)
        shutil.rmtree(folder / "states" / one.name, ignore_errors=True)
        size = "0" if one.size is None else str(one.size)
        rows.setdefault(one.label, {})[size] = json.loads(file.read_text())
    sizes = np.array(
      [len(getattr(task, config.judge)) for task in stream.tasks]
    )
    baseline = 100 * continual.accuracies(
      problem, problem.params, split=config.judge
    )
    joint = None
    if "joint" in rows:
      joint = np.array(rows["joint"]["0"]["accuracy"], np.float64)
      joint = 100 * joint[:, -1]
    for entries in rows.values():
      for row in entries.values():
        row["metrics"] = _summary(row, sizes, baseline, joint)
    results = {
      "config": _workdir.as_json(config),
      "stream": streams.describe(stream),
      "rows": rows,
      "order": list(rows),
      "versions": _hardware.versions(),
      "hardware": _hardware.hardware(len(problem.train.devices)),
      "seconds": sum(
        row["seconds"] for entries in rows.values() for row in entries.values()
      ),
    }
    _workdir.write_json(folder / "results.json", results)
    _workdir.write_text(folder / "table.md", _continual_report.table(results))
    _continual_report.plot(results, folder)
  return results


def main(argv: Sequence[str]) -> None:
  """Runs the study that the flags describe, and prints its table."""
  if len(argv) > 1:
    raise ValueError(f"Unknown arguments: {' '.join(argv[1:])}")
  mpf.require_flags("config", "workdir")
  flag = flags.FLAGS
  results = run(flag.config, str(flag.workdir), flag.data_dir, flag.progress)
  print(_continual_report.table(results))
  print(f"Files and pictures: {flag.workdir}")
  if _publish.PUBLISH.value:
    _continual_report.publish(results, pathlib.Path(flag.workdir), _ROOT)


if __name__ == "__main__":
  _cli.run(main)
