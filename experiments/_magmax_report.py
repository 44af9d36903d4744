"""Results of the study of MagMax: table, pictures, page."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import numpy as np

from experiments import _mpf_report, _workdir

Results = dict[str, Any]


def _over_orders(values: list[float]) -> tuple[float, float | None]:
  """Mean and sample standard deviation, in percent."""
  found = 100 * np.array(values, np.float64)
  return float(found.mean()), (
    float(found.std(ddof=1)) if len(found) > 1 else None
  )


def _final(entries: list[dict[str, Any]]) -> str:
  return _mpf_report.cell(*_over_orders([one["accuracy"] for one in entries]))


def _measured(entries: list[dict[str, Any]], name: str) -> list[Any]:
  """A metric in the class orders that it was measured in."""
  found = [one.get("metrics", {}).get(name) for one in entries]
  return [value for value in found if value is not None]


def _metric(entries: list[dict[str, Any]], name: str) -> str:
  found = _measured(entries, name)
  return _mpf_report.cell(*_over_orders(found)) if found else ""


def _scales(entries: list[dict[str, Any]]) -> str:
  return ", ".join(
    f"{scale:g}" for scale in sorted({one["scale"] for one in entries})
  )


def table(results: Results) -> str:
  """Makes the Markdown table of a run.

  Args:
    results: what results.json holds.

  Returns:
    The table, one line a row.
  """
  config = results["config"]
  lines = [
    f"MagMax, {config['model']['source']} on {config['dataset']},"
    f" {config['num_tasks']} tasks, {len(config['orders'])} class orders;"
    " accuracy % on the whole test set among all classes."
    + (
      f" {config['per_class']} training examples a class."
      if config["per_class"]
      else ""
    ),
    f"Hardware: {results['hardware']}; {results['seconds'] / 60:.0f} minutes of"
    " training.",
    "",
    "| row | fixed coefficient | recipe | accuracy | chosen coefficients |"
    " recipe | accuracy | after each task | forgetting |",
    "|---" * 9 + "|",
    f"| zero-shot | | | {100 * results['zero_shot']:.2f} | | |"
    f" {100 * results['zero_shot']:.2f} | | |",
  ]
  for name in results["order"]:
    fixed, chosen = (
      results["rows"][name][kind] for kind in ("fixed", "chosen")
    )
    merged = bool(config["rows"][name]["rule"])
    cells = [
      name,
      _scales(fixed) if merged else "",
      fixed[0]["recipe"],
      _final(fixed),
      _scales(chosen) if merged else "",
      chosen[0]["recipe"],
      _final(chosen),
      _metric(chosen, "average_accuracy"),
      _metric(chosen, "forgetting"),
    ]
    lines.append("| " + " | ".join(cells) + " |")
  lines += [
    "",
    "Mean ± sample standard deviation over the class orders. Recipes and"
    " coefficients are chosen on the validation split of the first order."
    " `independent` is the mean over the tasks of each one's own network on its"
    " own examples, which needs the task's number. After each task: the mean of"
    " the accuracies over the tasks so far; it and forgetting are measured in"
    f" {min(config['curve_orders'], len(config['orders']))} of the orders.",
  ]
  return "\n".join(lines) + "\n"


def plot(results: Results, workdir: pathlib.Path) -> None:
  """Draws the accuracy over the tasks so far, after each task."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
  drawn = False
  for name in results["order"]:
    entries = results["rows"][name]["chosen"]
    lines = _measured(entries, "accuracies_over_tasks")
    if not lines:
      continue
    means = 100 * np.array(lines, np.float64).mean(axis=0)
    axes.plot(range(1, len(means) + 1), means, "o-", ms=3, label=name)
    drawn = True
  if drawn:
    axes.axhline(
      100 * results["zero_shot"], color="gray", ls=":", label="zero-shot"
    )
    axes.set_xlabel("tasks learned")
    axes.set_ylabel("accuracy on them %")
    axes.legend(fontsize=7, ncols=2)
    _mpf_report.save_figure(figure, workdir / "tasks.png")
  pyplot.close(figure)


def measured(results: Results) -> Results:
  """A run without the places of its matrices where nothing was measured.

  Args:
    results: what results.json holds.

  Returns:
    The same, row i of a matrix having the accuracies on the tasks that were
    measured after task i: the first i + 1 ones, or none. With 30 tasks nine
    tenths of the file would be nulls.
  """

  def entry(one: Results) -> Results:
    if "matrix" not in one:
      return one
    lines = [
      [value for value in line if value is not None] for line in one["matrix"]
    ]
    return {**one, "matrix": lines}

  rows = {
    name: {
      variant: [entry(one) for one in entries]
      for variant, entries in variants.items()
    }
    for name, variants in results["rows"].items()
  }
  return {**results, "rows": rows}


def publish(
  results: Results, workdir: pathlib.Path, root: pathlib.Path
) -> None:
  """Adds a run to the results file; makes the page, and keeps a picture.

  Args:
    results: what results.json holds.
    workdir: folder of the run.
    root: the folder with experiments/ and docs/.
  """
  file = root / "experiments/results/magmax.json"
  kept = json.loads(file.read_text()) if file.exists() else {}
  name = results["config"]["variant"]
  kept[name] = measured(results)
  page = render(kept)
  _workdir.write_json(file, kept)
  if results["config"]["num_tasks"] > 1 and (workdir / "tasks.png").exists():
    images = root / "docs/images"
    images.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(workdir / "tasks.png", images / f"magmax-{name}.png")
  _workdir.write_text(root / "docs/results/magmax.md", page)


def _by_tasks(kept: dict[str, Results]) -> list[tuple[int, Results]]:
  runs = [
    (one["config"]["num_tasks"], one)
    for name, one in kept.items()
    if one["config"]["kind"] == "texts" and not name.endswith("-smoke")
  ]
  return sorted(runs, key=lambda run: run[0])


def summary(kept: dict[str, Results]) -> str:
  """All numbers of tasks side by side, coefficients chosen on validation.

  Args:
    kept: the finished variants.

  Returns:
    A Markdown table with the mean over the numbers of tasks.
  """
  runs = [(tasks, one) for tasks, one in _by_tasks(kept) if tasks > 1]
  heads = [f"{tasks} tasks" for tasks, _ in runs]
  lines = [
    "| row | " + " | ".join(heads) + " | mean | mean, fixed coefficient |",
    "|---" * (len(runs) + 3) + "|",
  ]
  names = list(dict.fromkeys(name for _, one in runs for name in one["order"]))
  for name in names:
    cells: list[str] = []
    means: dict[str, list[float]] = {"chosen": [], "fixed": []}
    for _, one in runs:
      row = one["rows"].get(name)
      cells.append(_final(row["chosen"]) if row else "")
      for kind, values in means.items():
        if row:
          found = [entry["accuracy"] for entry in row[kind]]
          values.append(_over_orders(found)[0])
    whole = [
      f"{np.mean(values):.2f}" if len(values) == len(runs) else ""
      for values in means.values()
    ]
    lines.append("| " + " | ".join([name, *cells, *whole]) + " |")
  return "\n".join(lines) + "\n"


def render(kept: dict[str, Results]) -> str:
  """Makes the page from the finished variants."""
  ceiling = [
    f"Joint training on all tasks at once: {_final(rows['joint']['chosen'])};"
    f" the network before any training: {100 * one['zero_shot']:.2f}."
    for tasks, one in _by_tasks(kept)
    if tasks == 1 and "joint" in (rows := one["rows"])
  ]
  lines = [
    "# MagMax on a pre-trained network",
    "",
    "Made by `python -m experiments.magmax --publish`; figures from",
    "`experiments/results/magmax.json`. Every row, its recipes and its",
    "coefficients are in `experiments/configs/magmax.py`; BUILD_NOTES.md says",
    "how they were chosen.",
    "",
    "Accuracy % on the test set of CLINC150 among its 150 classes, mean and"
    " sample standard deviation over three class orders:",
    "",
    summary(kept).rstrip(),
    "",
    *ceiling,
  ]
  for name, results in sorted(
    kept.items(), key=lambda item: (item[1]["config"]["num_tasks"], item[0])
  ):
    lines += ["", f"## {name}", "", table(results).rstrip()]
    if results["config"]["num_tasks"] > 1 and any(
      _measured(row["chosen"], "accuracies_over_tasks")
      for row in results["rows"].values()
    ):
      lines += ["", f"![{name}](../images/magmax-{name}.png)"]
  return "\n".join(lines) + "\n"
