"""MagMax on a pre-trained network, beside its baselines.

    python -m experiments.magmax --workdir=runs/magmax-10 \
      --config=experiments/configs/magmax.py:clinc150-10

Fine-tunes a pre-trained network on a stream of tasks, one after the other and
each on its own, merges the networks by the rules of the paper's tables, and
prints the accuracy over all classes after the last task. Recipes and merge
coefficients are chosen on validation examples, for every row alike. Killed at
any moment and started again with the same workdir, it goes on and ends with the
same figures. With --publish finished variants go into
experiments/results/magmax.json, of which docs/results/magmax.md is made. See
experiments/configs/magmax.py for the variants.

Reference: Marczak et al., MagMax, 2024 (https://arxiv.org/abs/2407.06322).
"""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
import tqdm
from absl import flags

from experiments import (
  _cli,
  _hardware,
  _magmax_report,
  _magmax_study,
  _predictions,
  _programs,
  _publish,
  _workdir,
  mpf,
)
from jaxmerge.continual import metrics

_ROOT = pathlib.Path(__file__).parent.parent
VARIANTS = ("fixed", "chosen")
# A grid of coefficients is made no longer than that.
_MOST_SCALES = 16

# The flags are those of experiments.mpf, and --publish.


def _once(path: pathlib.Path, make: Callable[[], Any]) -> Any:
  """What a file holds, made where it is not there."""
  if not path.exists():
    _workdir.write_json(path, make())
  return json.loads(path.read_text())


class _Cell:
  """One class order of a study: files, networks, figures."""

  def __init__(
    self,
    study: _magmax_study.Study,
    order: int,
    workdir: pathlib.Path,
    say: Callable[[str], None],
  ) -> None:
    self.study = study
    self.order = order
    self.folder = workdir / f"order-{order}"
    self.say = say
    self.problem = _magmax_study.problem(study, order)
    self.tests = [task.test for task in self.problem.stream.tasks]

  def _json(self, name: str, make: Callable[[], Any]) -> Any:
    """What a file of this class order holds, made where it is not there."""
    return _once(self.folder / f"{name}.json", make)

  def networks(self, learner: str, recipe: str) -> pathlib.Path:
    """The networks of a learner, trained where they are not there."""
    folder = self.folder / "networks" / f"{learner}--{recipe}"

    def make() -> dict[str, float]:
      seconds = _magmax_study.train(
        self.study,
        self.problem,
        learner,
        recipe,
        folder,
        lambda text: self.say(f"{folder.name}: {text}"),
      )
      _programs.bound()
      return {"seconds": seconds}

    self._json(f"seconds/{folder.name}", make)
    shutil.rmtree(folder / "state", ignore_errors=True)
    return folder

  def _accuracy(self, params: Any) -> float:
    back = self.study.backbone
    return _predictions.accuracy(
      back.logits_fn,
      params,
      back.pool,
      back.held_out,
      batch_size=self.study.config.eval_batch_size,
    )

  def _tests(self, params: Any, rows: list[np.ndarray]) -> list[float]:
    back = self.study.backbone
    return _predictions.task_accuracies(
      back.logits_fn,
      params,
      back.test,
      rows,
      batch_size=self.study.config.eval_batch_size,
    )

  def _last(self, learner: str, recipe: str, names: Sequence[str]) -> Any:
    """The merged networks after the last task, by a function of the row."""
    if _magmax_study.kind(self.study, learner) == "joint":
      folder = self.networks(learner, recipe)
      path = _magmax_study.expert(folder, self.problem.num_tasks - 1)
      params = self.study.backbone.load(path)
      return lambda name: params
    found = None
    for _, found in _magmax_study.merges(  # noqa: B007
      self.study,
      names,
      self.networks(learner, recipe),
      self.problem.num_tasks,
      _magmax_study.seed_key(self.order),
    ):
      pass
    return found

  def validation(self, learner: str, recipe: str) -> dict[str, Any]:
    """Validation accuracy of every row of a learner at every coefficient."""
    names = self.rows_of(learner)

    def make() -> dict[str, dict[str, float]]:
      merged = self._last(learner, recipe, names)
      found: dict[str, dict[str, float]] = {}
      for name in names:
        row = self.study.rows[name]
        if _magmax_study.by_task(self.study, name):
          found[name] = {"1.0": self._own(learner, recipe, "validation")}
          continue
        found[name] = self._by_scale(row, merged(name))
        self.say(f"{name}: validation")
      return found

    return self._json(f"validation/{learner}--{recipe}", make)

  def _by_scale(self, row: _magmax_study.Row, params: Any) -> dict[str, float]:
    """Validation accuracy at every coefficient of a row's grid.

    While the best one alone is at an end of the grid, the grid is made longer
    there, by a factor of `config.grow`: no rule suffers from where it ends.
    """
    found: dict[float, float] = {}

    def measure(scale: float) -> None:
      found[scale] = self._accuracy(self._at(params, scale))

    for scale in sorted({row.fixed, *row.grid}):
      measure(scale)
    grow = float(self.study.config.grow)
    while row.rule and len(found) < _MOST_SCALES:
      best = max(found.values())
      scales = [scale for scale, value in found.items() if value == best]
      if scales == [max(found)]:
        measure(round(scales[0] * grow, 6))
      elif scales == [min(found)]:
        measure(round(scales[0] / grow, 6))
      else:
        break
    return {str(scale): found[scale] for scale in sorted(found)}

  def _at(self, params: Any, scale: float) -> Any:
    if scale == 1.0:
      return params
    return _magmax_study.scaled(self.study.backbone.params, params, scale)

  def rows_of(self, learner: str) -> list[str]:
    """The rows that are made of a learner's networks."""
    rows = self.study.rows
    return [name for name in rows if rows[name].learner == learner]

  def _own(self, learner: str, recipe: str, split: str) -> float:
    """Mean accuracy of each task's own network on its own examples."""
    back = self.study.backbone
    folder = self.networks(learner, recipe)
    found = []
    for number, task in enumerate(self.problem.stream.tasks):
      params = back.load(_magmax_study.expert(folder, number))
      found += _predictions.task_accuracies(
        back.logits_fn,
        params,
        back.test if split == "test" else back.pool,
        [getattr(task, split)],
        batch_size=self.study.config.eval_batch_size,
      )
    return float(np.mean(found))

  def choices(
    self, learner: str, recipes: Sequence[str]
  ) -> dict[str, dict[str, dict[str, Any]]]:
    """The best recipe and coefficient of each row by validation accuracy.

    Args:
      learner: the learner.
      recipes: its recipes to choose from.

    Returns:
      Row -> "fixed" and "chosen" -> recipe, scale, validation accuracy.
    """
    tables = {recipe: self.validation(learner, recipe) for recipe in recipes}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in self.rows_of(learner):
      found[name] = {}
      for variant in VARIANTS:
        best: dict[str, Any] = {"validation": -1.0}
        for recipe, table in tables.items():
          for scale, accuracy in table[name].items():
            allowed = variant == "chosen" or (
              float(scale) == self.study.rows[name].fixed
            )
            if allowed and accuracy > best["validation"]:
              best = {
                "recipe": recipe,
                "scale": float(scale),
                "validation": accuracy,
              }
        found[name][variant] = best
    return found

  def seconds(self, learner: str) -> list[float]:
    """Seconds of training of each recipe of a learner that was trained."""
    paths = sorted((self.folder / "seconds").glob(f"{learner}--*.json"))
    return [float(json.loads(path.read_text())["seconds"]) for path in paths]

  def drop_networks(self, learner: str) -> None:
    """Removes the networks of a learner."""
    for path in (self.folder / "networks").glob(f"{learner}--*"):
      shutil.rmtree(path)

  def tests_of(
    self, learner: str, chosen: dict[str, dict[str, dict[str, Any]]]
  ) -> dict[str, Any]:
    """Test accuracies of the rows of a learner, by the choices made.

    Args:
      learner: the learner.
      chosen: what `choices` returned.

    Returns:
      Row -> variant -> the choice, and the accuracy on each task at the end;
      for rows in `curves` with the chosen coefficient also after each task,
      in the first `curve_orders`.
    """

    def make() -> dict[str, Any]:
      found: dict[str, Any] = {name: {} for name in chosen}
      wanted = {
        (name, variant): choice
        for name, variants in chosen.items()
        for variant, choice in variants.items()
      }
      for recipe in sorted({one["recipe"] for one in wanted.values()}):
        mine = {
          place: choice
          for place, choice in wanted.items()
          if choice["recipe"] == recipe
        }
        for (name, variant), entry in self._measured(
          learner, recipe, mine
        ).items():
          found[name][variant] = entry
      return found

    return self._json(f"tests/{learner}", make)

  def _export(
    self, merged: Callable[[str], Any], wanted: dict[tuple[str, str], Any]
  ) -> None:
    """Writes the networks of some rows for other libraries."""
    for name in self.study.config.export:
      if (name, "chosen") in wanted:
        scale = wanted[name, "chosen"]["scale"]
        self.study.backbone.export(
          self.folder.parent / "merged" / name, self._at(merged(name), scale)
        )

  def _measured(
    self, learner: str, recipe: str, wanted: dict[tuple[str, str], Any]
  ) -> dict[tuple[str, str], Any]:
    """Test accuracies of rows with one recipe, (row, variant) -> entry."""
    total = self.problem.num_tasks
    entries = {place: {**choice} for place, choice in wanted.items()}
    names = sorted({name for name, _ in wanted})
    ends = []
    for name in names:
      if not _magmax_study.by_task(self.study, name):
        ends.append(name)
        continue
      own = self._own(learner, recipe, "test")
      for place, entry in entries.items():
        if place[0] == name:
          entry["accuracy"] = own
    config = self.study.config
    curves = [
      name
      for name in ends
      if name in config.curves and self.order < config.curve_orders
    ]
    matrices = {
      place: np.full((total, total), np.nan)
      for place in wanted
      if place[0] in ends
    }
    # Same row, same coefficient: measured once.
    known: dict[tuple[str, float, int], list[float]] = {}

    def measure(merged: Any, name: str, task: int) -> None:
      for place, matrix in matrices.items():
        last = task == total - 1
        if place[0] != name or not (last or place[1] == "chosen"):
          continue
        scale = wanted[place]["scale"]
        if (name, scale, task) not in known:
          params = self._at(merged(name), scale)
          known[name, scale, task] = self._tests(params, self.tests[: task + 1])
        matrix[task, : task + 1] = known[name, scale, task]

    if _magmax_study.kind(self.study, learner) == "joint":
      merged = self._last(learner, recipe, names)
      for name in ends:
        measure(merged, name, total - 1)
    elif ends:
      for task, merged in _magmax_study.merges(
        self.study,
        ends,
        self.networks(learner, recipe),
        total,
        _magmax_study.seed_key(self.order),
      ):
        for name in ends if task == total - 1 else curves:
          measure(merged, name, task)
        if task == total - 1 and not self.order:
          self._export(merged, wanted)
        self.say(f"{learner}--{recipe}: test after task {task + 1}")
    for place, matrix in matrices.items():
      entries[place]["matrix"] = [
        [None if np.isnan(value) else value for value in line]
        for line in matrix.tolist()
      ]
      sizes = [len(rows) for rows in self.tests]
      entries[place]["accuracy"] = float(np.average(matrix[-1], weights=sizes))
      entries[place]["metrics"] = {
        name: np.asarray(value).tolist()
        for name, value in metrics.summarize(matrix, sizes=sizes).items()
      }
    return entries


def _learners(study: _magmax_study.Study) -> list[str]:
  """Learners that some row needs, in the order of the rows."""
  return list(dict.fromkeys(row.learner for row in study.rows.values()))


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
  study = _magmax_study.build(config, data_dir)
  back = study.backbone
  rows: dict[str, dict[str, list[Any]]] = {
    name: {variant: [] for variant in VARIANTS} for name in study.rows
  }
  seconds: list[float] = []
  with (
    _workdir.open_workdir(workdir, config) as folder,
    tqdm.tqdm(
      total=len(config.orders) * len(_learners(study)),
      disable=not progress,
      unit="learner",
    ) as bar,
  ):
    zero_shot = _once(
      folder / "zero_shot.json",
      lambda: _predictions.accuracy(
        back.logits_fn,
        back.params,
        back.test,
        batch_size=config.eval_batch_size,
      ),
    )
    # By the first class order: learner -> row -> variant -> choice.
    chosen: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for order in range(len(config.orders)):
      cell = _Cell(study, order, folder, _teller(bar, order))
      for learner in _learners(study):
        if not order:
          tried = _magmax_study.recipes(study, learner)
          chosen[learner] = cell.choices(learner, tried)
        tests = cell.tests_of(learner, chosen[learner])
        for name, variants in tests.items():
          for variant, entry in variants.items():
            rows[name][variant].append(entry)
        seconds += cell.seconds(learner)
        if not config.keep_experts:
          cell.drop_networks(learner)
        bar.update(1)
    results = {
      "config": _workdir.as_json(config),
      "zero_shot": zero_shot,
      "rows": rows,
      "order": list(rows),
      "num_parameters": sum(
        int(leaf.size) for leaf in jax.tree.leaves(back.params)
      ),
      "versions": _hardware.versions(),
      "hardware": _hardware.hardware(len(cell.problem.train.devices)),
      "seconds": sum(seconds),
    }
    _workdir.write_json(folder / "results.json", results)
    _workdir.write_text(folder / "table.md", _magmax_report.table(results))
    _magmax_report.plot(results, folder)
  return results


def _teller(bar: tqdm.tqdm, order: int) -> Callable[[str], None]:
  """Shows what is being done beside the progress bar."""
  return lambda text: bar.set_description(f"order {order} {text}")


def main(argv: Sequence[str]) -> None:
  """Runs the study that the flags describe, and prints its table."""
  if len(argv) > 1:
    raise ValueError(f"Unknown arguments: {' '.join(argv[1:])}")
  mpf.require_flags("config", "workdir")
  flag = flags.FLAGS
  results = run(flag.config, str(flag.workdir), flag.data_dir, flag.progress)
  print(_magmax_report.table(results))
  print(f"Files and pictures: {flag.workdir}")
  if _publish.PUBLISH.value:
    _magmax_report.publish(results, pathlib.Path(flag.workdir), _ROOT)


if __name__ == "__main__":
  _cli.run(main)
