"""Why MagMax could work: magnitudes, sign conflicts, consistent directions.

    python -m experiments.magmax_analysis --workdir=runs/magmax-analysis \
      --config=experiments/configs/magmax_analysis.py:clinc150-10

Fine-tunes a pre-trained network on a stream of tasks, one after the other and
each on its own, and measures what the paper's three figures show, each a
hypothesis that may or may not hold here: (Figure 1) the largest entries of a
task vector hold what it knows; (Figure 2) sequential fine-tuning has fewer sign
conflicts; (Figure 4) entries that moved in one direction all along are the
largest. Writes analysis.json, and each figure as PNG and SVG. With --publish
they are kept in experiments/results and docs/.

Reference: Marczak et al., MagMax, 2024 (https://arxiv.org/abs/2407.06322).
"""

from __future__ import annotations

import itertools
import json
import pathlib
import re
import shutil
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags, logging

from experiments import (
  _analysis_plots,
  _cli,
  _hardware,
  _magmax_study,
  _predictions,
  _publish,
  _workdir,
  mpf,
)
from jaxmerge import continual, merging
from jaxmerge import tree as tree_lib

_ROOT = pathlib.Path(__file__).parent.parent
LEARNERS = ("independent", "sequential")
KEPT = ("bottom", "random", "top")


def _networks(
  study: _magmax_study.Study, one: continual.Problem, folder: pathlib.Path
) -> dict[str, list[Any]]:
  """The networks of all tasks of both kinds of fine-tuning."""
  found: dict[str, list[Any]] = {}
  for learner in LEARNERS:
    place = folder / "networks" / learner
    _magmax_study.train(
      study, one, learner, study.config.recipe, place, logging.info
    )
    found[learner] = [
      study.backbone.load(_magmax_study.expert(place, task))
      for task in range(one.num_tasks)
    ]
  return found


def kept_fractions(
  study: _magmax_study.Study,
  tasks: list[np.ndarray],
  networks: list[Any],
) -> dict[str, Any]:
  """Figure 1: accuracy where a part of each task vector is kept.

  Args:
    study: the study.
    tasks: the test rows of each task.
    networks: the network of each task, fine-tuned on its own.

  Returns:
    The densities; for each choice of entries the mean over the tasks of the
    accuracy on the task's own examples, among all classes; and that of the
    whole vectors and of none.
  """
  back = study.backbone
  densities = [float(one) for one in study.config.densities]
  sums = {which: np.zeros(len(densities)) for which in KEPT}
  whole, none = [], []

  def accuracy(params: Any, rows: np.ndarray) -> float:
    return _predictions.task_accuracies(
      back.logits_fn,
      params,
      back.test,
      [rows],
      batch_size=study.config.eval_batch_size,
    )[0]

  for task, (rows, params) in enumerate(zip(tasks, networks, strict=True)):
    vector = merging.task_vector(back.params, params)
    none.append(accuracy(back.params, rows))
    whole.append(accuracy(params, rows))
    for which in KEPT:
      for place, density in enumerate(densities):
        key = jax.random.fold_in(jax.random.key(place), task)
        part = merging.keep(
          vector, density, which=which, key=key if which == "random" else None
        )
        sums[which][place] += accuracy(tree_lib.add(back.params, part), rows)
  return {
    "densities": densities,
    "accuracy": {
      which: (values / len(tasks)).tolist() for which, values in sums.items()
    },
    "whole": float(np.mean(whole)),
    "none": float(np.mean(none)),
  }


def conflicts(vectors: list[Any], top: float) -> list[float]:
  """Figure 2: the rate of sign conflicts among the first 2, 3, ... vectors."""
  return [
    float(merging.sign_conflicts(vectors[:count], density=top).rate)
    for count in range(2, len(vectors) + 1)
  ]


def consistency(
  base: Any, networks: list[Any], without: str = ""
) -> dict[str, Any]:
  """Figure 4: magnitudes by the number of updates in the same direction.

  Args:
    base: the network before the first task.
    networks: that after each task.
    without: regular expression (`re.search`) of the names of leaves that are
      left out; "" for none.

  Returns:
    The mean magnitude and the number of parameters of each count.
  """
  names = tree_lib.leaf_names(base)
  chosen = [not without or not re.search(without, name) for name in names]

  def some(tree: Any) -> list[Any]:
    return list(itertools.compress(jax.tree.leaves(tree), chosen))

  found = merging.update_consistency(
    some(base), [some(one) for one in networks]
  )
  return {
    "magnitudes": np.asarray(found.magnitudes, np.float64).tolist(),
    "numbers": np.asarray(found.numbers).tolist(),
  }


def analyse(study: _magmax_study.Study, folder: pathlib.Path) -> dict[str, Any]:
  """All measurements of a study.

  Args:
    study: the study.
    folder: receives the networks.

  Returns:
    What analysis.json holds.
  """
  one = _magmax_study.problem(study, 0)
  networks = _networks(study, one, folder)
  base = study.backbone.params
  vectors = {
    learner: [merging.task_vector(base, params) for params in found]
    for learner, found in networks.items()
  }
  tests = [task.test for task in one.stream.tasks]
  found = {
    "config": _workdir.as_json(study.config),
    "kept": kept_fractions(study, tests, networks["independent"]),
    "conflicts": {
      learner: conflicts(given, study.config.top)
      for learner, given in vectors.items()
    },
    "consistency": {
      name: consistency(base, networks["sequential"], without)
      for name, without in (("all", ""), ("without", study.config.tables))
    },
    "cosines": {
      learner: np.asarray(merging.cosine_matrix(given), np.float64).tolist()
      for learner, given in vectors.items()
    },
    "shares": {
      learner: np.asarray(
        merging.selected_shares(base, given).shares, np.float64
      ).tolist()
      for learner, given in networks.items()
    },
    "hardware": _hardware.hardware(len(one.train.devices)),
    "versions": _hardware.versions(),
  }
  found["hypotheses"] = hypotheses(found)
  return found


def hypotheses(found: dict[str, Any]) -> dict[str, bool]:
  """Whether each of the paper's hypotheses holds, strictly.

  Args:
    found: the measurements.

  Returns:
    "magnitude": at every kept fraction the largest entries do better than
    random ones, and these than the smallest. "conflicts": sequential
    fine-tuning has fewer conflicts for every number of tasks. "consistency":
    the mean magnitude rises with the number of consistent directions;
    "consistency_without": so it does without tables of embeddings.
  """

  def rises(one: dict[str, Any]) -> bool:
    there = np.array(one["numbers"]) > 0
    return bool((np.diff(np.array(one["magnitudes"])[there]) > 0).all())

  bottom, random, top = (
    np.array(found["kept"]["accuracy"][which]) for which in KEPT
  )
  apart, after = (np.array(found["conflicts"][name]) for name in LEARNERS)
  return {
    "magnitude": bool((top > random).all() and (random > bottom).all()),
    "conflicts": bool((after < apart).all()),
    "consistency": rises(found["consistency"]["all"]),
    "consistency_without": rises(found["consistency"]["without"]),
  }


def report(found: dict[str, Any]) -> str:
  """The measurements as a page of Markdown.

  Args:
    found: what `analyse` returned.

  Returns:
    The text.
  """
  kept, config = found["kept"], found["config"]
  said = {True: "holds", False: "does not hold"}
  verdict = found["hypotheses"]
  heads = [f"{100 * density:g}%" for density in kept["densities"]]
  lines = [
    f"{config['model']['source']} on {config['dataset']},"
    f" {config['num_tasks']} tasks, the first class order, recipe"
    f" {config['recipe']}. Hardware: {found['hardware']}.",
    "",
    f"Figure 1, kept entries of a task vector: {said[verdict['magnitude']]}."
    " Accuracy % on the task's own test examples among all classes, mean over"
    f" the tasks; none kept {100 * kept['none']:.2f}, all kept"
    f" {100 * kept['whole']:.2f}.",
    "",
    "| kept | " + " | ".join(heads) + " |",
    "|---" * (len(heads) + 1) + "|",
  ]
  names = {"bottom": "lowest", "random": "random", "top": "highest"}
  for which, name in names.items():
    cells = [f"{100 * one:.2f}" for one in kept["accuracy"][which]]
    lines.append(f"| {name} | " + " | ".join(cells) + " |")
  counts = list(range(2, config["num_tasks"] + 1))
  lines += [
    "",
    f"Figure 2, sign conflicts % of the top {100 * config['top']:g}%:"
    f" {said[verdict['conflicts']]}.",
    "",
    "| tasks | " + " | ".join(map(str, counts)) + " |",
    "|---" * (len(counts) + 1) + "|",
  ]
  for learner in LEARNERS:
    cells = [f"{100 * one:.1f}" for one in found["conflicts"][learner]]
    lines.append(f"| {learner} | " + " | ".join(cells) + " |")
  lines += [
    "",
    "Figure 4, mean magnitude of the task vector by the number of updates in"
    f" the direction taken most often: {said[verdict['consistency']]}; without"
    " tables of embeddings, of which weight decay moves the rows that no text"
    " needs always in the same direction, it"
    f" {said[verdict['consistency_without']]}.",
    "",
    "| updates | "
    + " | ".join(map(str, range(config["num_tasks"] + 1)))
    + " |",
    "|---" * (config["num_tasks"] + 2) + "|",
  ]
  for which, one in found["consistency"].items():
    cells = [
      f"{1e4 * size:.3f}" if number else ""
      for size, number in zip(one["magnitudes"], one["numbers"], strict=True)
    ]
    sizes = [f"{number:,}" for number in one["numbers"]]
    lines += [
      f"| {which}: magnitude, 1e-4 | " + " | ".join(cells) + " |",
      f"| {which}: parameters | " + " | ".join(sizes) + " |",
    ]
  for learner in LEARNERS:
    matrix = np.array(found["cosines"][learner])
    off = matrix[~np.eye(len(matrix), dtype=bool)]
    shares = ", ".join(f"{100 * one:.1f}" for one in found["shares"][learner])
    lines += [
      "",
      f"{learner}: cosines of task vectors {off.min():.3f} to {off.max():.3f},"
      f" mean {off.mean():.3f}; MagMax takes {shares} % of the parameters from"
      " the tasks in order.",
    ]
  return "\n".join(lines) + "\n"


def run(
  config: ml_collections.ConfigDict,
  workdir: str,
  data_dir: str | None = None,
) -> dict[str, Any]:
  """Runs the analysis, or goes on with it.

  Args:
    config: the configuration.
    workdir: folder of the run.
    data_dir: folder of the set.

  Returns:
    What analysis.json holds.

  Raises:
    ValueError: bad input; one line says what and how to mend it.
  """
  if config.num_tasks < 2:
    raise ValueError("An analysis compares tasks: choose 2 or more.")
  if config.recipe not in config.recipes:
    raise ValueError(
      f"Unknown recipe {config.recipe!r}. Choose one of "
      f"{', '.join(config.recipes)}."
    )
  if not all(0 < one <= 1 for one in (*config.densities, config.top)):
    raise ValueError("densities and top must lie in (0, 1].")
  study = _magmax_study.build(config, data_dir)
  with _workdir.open_workdir(workdir, config) as folder:
    path = folder / "analysis.json"
    if not path.exists():
      _workdir.write_json(path, analyse(study, folder))
    found = json.loads(path.read_text())
    _workdir.write_text(folder / "report.md", report(found))
    _analysis_plots.plot(found, folder)
    if not config.keep_experts:
      shutil.rmtree(folder / "networks", ignore_errors=True)
  return found


def publish(
  found: dict[str, Any], workdir: pathlib.Path, root: pathlib.Path
) -> None:
  """Keeps the measurements, their page, and the figures.

  Args:
    found: what analysis.json holds.
    workdir: folder of the run.
    root: the folder with experiments/ and docs/.
  """
  file = root / "experiments/results/magmax_analysis.json"
  kept = json.loads(file.read_text()) if file.exists() else {}
  kept[found["config"]["variant"]] = found
  _workdir.write_json(file, kept)
  images = root / "docs/images"
  images.mkdir(parents=True, exist_ok=True)
  lines = [
    "# The hypotheses behind MagMax",
    "",
    "Made by `python -m experiments.magmax_analysis --publish`; figures from",
    "`experiments/results/magmax_analysis.json`.",
  ]
  for name, one in sorted(kept.items()):
    lines += ["", f"## {name}", "", report(one).rstrip()]
    for figure in _analysis_plots.FIGURES:
      lines += ["", f"![{figure}](../images/magmax-{name}-{figure}.png)"]
  for figure in _analysis_plots.FIGURES:
    for ending in ("png", "svg"):
      name = f"magmax-{found['config']['variant']}-{figure}.{ending}"
      shutil.copyfile(workdir / f"{figure}.{ending}", images / name)
  _workdir.write_text(
    root / "docs/results/magmax_analysis.md", "\n".join(lines) + "\n"
  )


def main(argv: Sequence[str]) -> None:
  """Runs the analysis that the flags describe, and prints its page."""
  if len(argv) > 1:
    raise ValueError(f"Unknown arguments: {' '.join(argv[1:])}")
  mpf.require_flags("config", "workdir")
  flag = flags.FLAGS
  found = run(flag.config, str(flag.workdir), flag.data_dir)
  print(report(found))
  print(f"Files and pictures: {flag.workdir}")
  if _publish.PUBLISH.value:
    publish(found, pathlib.Path(flag.workdir), _ROOT)


if __name__ == "__main__":
  _cli.run(main)
