"""Results of the barrier study: table, pictures, page."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import numpy as np

from experiments import _mpf_report, _workdir

LABELS = {
  "naive": "as they are",
  "random": "random permutation",
  "weights": "weight matching",
  "activations": "activation matching",
  "ot_weights": "OT by weights",
  "ot_activations": "OT by activations",
  "sinkhorn": "OT by weights, Sinkhorn",
  "straight_through": "straight-through",
}

_COLUMNS = (
  ("barrier_train_loss", "barrier, train loss", 4),
  ("barrier_test_loss", "barrier, test loss", 4),
  ("barrier_test_accuracy", "barrier, test accuracy", 2),
  ("midpoint_test_loss", "midpoint, test loss", 4),
  ("midpoint_test_accuracy", "midpoint, test accuracy %", 2),
  ("repaired_barrier_test_loss", "with REPAIR, barrier, test loss", 4),
  ("repaired_test_loss", "with REPAIR, midpoint, test loss", 4),
  ("repaired_test_accuracy", "with REPAIR, midpoint, test accuracy %", 2),
)


def _cell(values: Any, digits: int) -> str:
  array = np.asarray(values, np.float64)
  text = f"{array.mean():.{digits}f}"
  if len(array) > 1:
    text += f" ± {array.std(ddof=1):.{digits}f}"
  return text


def _by_rate(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
  """The rows of each learning rate, from the largest on."""
  return sorted(
    results["rows"].items(),
    key=lambda item: -float(item[0].removeprefix("lr-")),
  )


def table(results: dict[str, Any]) -> str:
  """Makes the Markdown table of a run."""
  config = results["config"]
  known = {
    name
    for rows in results["rows"].values()
    for row in rows.values()
    for name in row
  }
  columns = [column for column in _COLUMNS if column[0] in known]
  lines = [
    f"Barriers, {config['dataset']}, {config['network']}: pairs of networks of"
    f" seeds {config['seeds']}.",
    f"SGD, momentum {config['momentum']}, weight decay"
    f" {config['weight_decay']}, batch {config['batch_size']},"
    f" {config['epochs']} epochs; the learning rate is constant for half of"
    f" them and then falls to {config['final_fraction']:g} of itself.",
    f"Train loss on {config['profile_examples']:,} examples,"
    f" {config['profile_points']} points on the line. Hardware:"
    f" {results['hardware']}; training took"
    f" {sum(results['seconds'].values()) / 60:.1f} minutes.",
    "",
    "| learning rate | alignment | "
    + " | ".join(title for _, title, _ in columns)
    + " |",
    "|---" * (len(columns) + 2) + "|",
  ]
  for rate, rows in _by_rate(results):
    # The ends are those of every method that keeps the networks' functions.
    ends = rows[config["methods"][0]]
    entries = []
    for name, _, digits in columns:
      end = ends.get(name.replace("midpoint", "ends"))
      if name.startswith("midpoint") and end is not None:
        entries.append(_cell(np.mean(end, axis=-1), digits))
      else:
        entries.append("")
    lines.append(
      f"| {rate.removeprefix('lr-')} | the networks themselves | "
      + " | ".join(entries)
      + " |"
    )
    for method in config["methods"]:
      entries = [
        _cell(rows[method][name], digits) if name in rows[method] else ""
        for name, _, digits in columns
      ]
      lines.append(f"| | {LABELS[method]} | " + " | ".join(entries) + " |")
  lines += ["", "Mean ± sample standard deviation over the pairs."]
  return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], workdir: pathlib.Path) -> None:
  """Draws the loss along the line, one panel a learning rate."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  config = results["config"]
  figure, panels = pyplot.subplots(
    1,
    len(results["rows"]),
    figsize=(4 * len(results["rows"]) + 2, 3.5),
    layout="constrained",
    squeeze=False,
  )
  for axes, (rate, rows) in zip(panels[0], _by_rate(results), strict=True):
    for method in config["methods"]:
      profile = rows[method]["profile"]
      axes.plot(
        profile["t"],
        np.mean(profile["test_loss"], axis=0),
        label=LABELS[method],
      )
    axes.set_title(rate.replace("lr-", "learning rate "))
    axes.set_xlabel("t")
    axes.set_ylabel("test loss")
  panels[0][-1].legend(fontsize="small")
  figure.suptitle(f"{config['dataset']}, {config['network']}")
  _mpf_report.save_figure(figure, workdir / "profiles.png")
  pyplot.close(figure)


def publish(
  results: dict[str, Any], workdir: pathlib.Path, root: pathlib.Path
) -> None:
  """Adds a run to the results file; makes the page, and keeps the picture.

  Args:
    results: what results.json holds.
    workdir: folder of the run.
    root: the folder with experiments/ and docs/.
  """
  results_file = root / "experiments/results/rebasin.json"
  kept = json.loads(results_file.read_text()) if results_file.exists() else {}
  config = results["config"]
  name = f"{config['dataset']}-{config['network']}"
  kept[name] = results
  _workdir.write_json(results_file, kept)
  _workdir.write_text(root / "docs/results/rebasin.md", render(kept))
  picture = root / f"docs/images/rebasin-{name}.png"
  picture.parent.mkdir(parents=True, exist_ok=True)
  shutil.copyfile(workdir / "profiles.png", picture)


def render(kept: dict[str, Any]) -> str:
  """Makes the page from the finished variants."""
  lines = [
    "# Barriers between networks trained apart",
    "",
    "Made by `python -m experiments.rebasin --publish`; figures from",
    "`experiments/results/rebasin.json`. A barrier is the largest excess of a",
    "metric over the line between its values at the ends (Entezari et al.,",
    "2021); that of the accuracy is in percentage points. Sinkhorn's plans mix",
    "neurons, so that its aligned end is another, worse network: compare its",
    "midpoint, not its barrier. REPAIR gives the middle the activation",
    "statistics of the ends; with batch normalisation it is an estimate of the",
    "running statistics from data, made anew at every point of the line.",
  ]
  for name, results in sorted(kept.items(), reverse=True):
    lines += ["", f"## {name}", "", table(results).rstrip()]
    lines += ["", f"![Test loss along the line](../images/rebasin-{name}.png)"]
  return "\n".join(lines) + "\n"
