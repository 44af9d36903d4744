"""Results of the continual learning study: table, pictures, page."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import numpy as np

from experiments import _mpf_report, _paper, _workdir

_COLUMNS = (
  ("final_accuracy", "final accuracy %"),
  ("average_accuracy", "average %"),
  ("forgetting", "forgetting"),
  ("backward_transfer", "backward transfer"),
  ("forward_transfer", "forward transfer"),
  ("learning_accuracy", "learning accuracy %"),
  ("intransigence", "intransigence"),
)


def _kilobytes(count: float) -> str:
  return f"{count / 1000:,.0f}"


def _cell(found: dict[str, Any] | None) -> str:
  if found is None:
    return ""
  return _mpf_report.cell(found["mean"], found["std"])


def _entries(results: dict[str, Any]) -> list[tuple[str, int, dict[str, Any]]]:
  """Rows in the order of the configuration, buffer sizes ascending."""
  found = []
  for label in results["order"]:
    for size, row in sorted(
      results["rows"][label].items(), key=lambda item: int(item[0])
    ):
      found.append((label, int(size), row))
  return found


def table(results: dict[str, Any]) -> str:
  """Makes the Markdown table of a run, beside published figures."""
  config = results["config"]
  stream = results["stream"]
  network = config["network"]
  if network == "mlp":
    network = "MLP " + "-".join(map(str, config["features"]))
  per = config["buffer"]["per"]
  unit = "in total" if per == "total" else f"per {per}"
  lines = [
    f"Continual learning, {config['dataset']}, {stream['scenario']}, "
    f"{len(stream['tasks'])} tasks, {network}, seeds {config['seeds']}; "
    f"accuracies on the {config['judge']} set.",
    f"Buffers: {config['buffer']['policy']}, sizes are {unit}. Hardware: "
    f"{results['hardware']}; {results['seconds'] / 60:.0f} minutes.",
    "",
    "| row | buffer | "
    + " | ".join(title for _, title in _COLUMNS)
    + " | networks, examples kB | published % |",
    "|---" * (len(_COLUMNS) + 4) + "|",
  ]
  for label, size, row in _entries(results):
    printed = _paper.continual(config["variant"], label, size)
    memory = row["memory"]
    cells = [
      label,
      str(size or ""),
      *(_cell(row["metrics"].get(name)) for name, _ in _COLUMNS),
      f"{_kilobytes(memory['networks'])}, {_kilobytes(memory['examples'])}",
      _mpf_report.cell(*printed) if printed else "",
    ]
    lines.append("| " + " | ".join(cells) + " |")
  lines += [
    "",
    "Mean ± sample standard deviation over the seeds. Memory is what one seed "
    "holds between tasks, the network that is evaluated included.",
  ]
  return "\n".join(lines) + "\n"


def _largest(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
  """Each row at its largest buffer."""
  last = {label: row for label, _, row in _entries(results)}
  return list(last.items())


def _plot_matrices(results: dict[str, Any], workdir: pathlib.Path) -> None:
  """The accuracy matrices as heat maps, mean over the seeds."""
  from matplotlib import pyplot

  rows = _largest(results)
  across = min(5, len(rows))
  down = -(-len(rows) // across)
  figure, axes = pyplot.subplots(
    down,
    across,
    figsize=(2.1 * across, 2.1 * down + 0.3),
    layout="constrained",
    squeeze=False,
  )
  image = None
  for one, (label, row) in zip(axes.flat, rows, strict=False):
    matrix = 100 * np.array(row["accuracy"], np.float64).mean(axis=0)
    image = one.imshow(matrix, vmin=0, vmax=100, cmap="viridis")
    one.set_title(label, fontsize=8)
    one.set_xticks(range(len(matrix)))
    one.set_yticks(range(len(matrix)))
    one.tick_params(labelsize=6)
  for one in axes.flat[len(rows) :]:
    one.axis("off")
  if image is not None:
    figure.colorbar(image, ax=axes, shrink=0.6, label="accuracy %")
  figure.supxlabel("evaluated on task", fontsize=8)
  figure.supylabel("after task", fontsize=8)
  _mpf_report.save_figure(figure, workdir / "matrices.png")
  pyplot.close(figure)


def _plot_tasks(results: dict[str, Any], workdir: pathlib.Path) -> None:
  """Mean accuracy on the tasks so far, after each task."""
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
  for label, row in _largest(results):
    matrix = 100 * np.array(row["accuracy"], np.float64)
    if np.isnan(matrix).any():
      continue
    tasks = matrix.shape[-1]
    means = np.array(
      [matrix[:, i, : i + 1].mean(axis=-1) for i in range(tasks)]
    )
    axes.plot(range(1, tasks + 1), means.mean(axis=-1), "o-", ms=3, label=label)
  axes.set_xlabel("tasks learned")
  axes.set_xticks(range(1, len(results["stream"]["tasks"]) + 1))
  axes.set_ylabel("accuracy on them %")
  axes.legend(fontsize=7, ncols=2)
  _mpf_report.save_figure(figure, workdir / "tasks.png")
  pyplot.close(figure)


def _plot_sizes(results: dict[str, Any], workdir: pathlib.Path) -> None:
  """Final accuracy against the size of the buffer, with bands of one std."""
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
  for label in results["order"]:
    entries = sorted(
      (int(size), row["metrics"]["final_accuracy"])
      for size, row in results["rows"][label].items()
    )
    sizes = [size for size, _ in entries]
    if sizes == [0]:
      continue
    means = np.array([found["mean"] for _, found in entries])
    stds = np.array([found["std"] or 0.0 for _, found in entries])
    (line,) = axes.plot(sizes, means, "o-", ms=3, label=label)
    axes.fill_between(
      sizes, means - stds, means + stds, color=line.get_color(), alpha=0.2
    )
  axes.set_xscale("log", base=2)
  axes.set_xlabel(f"buffer, examples per {results['config']['buffer']['per']}")
  axes.set_ylabel("final accuracy %")
  axes.legend(fontsize=7, ncols=2)
  _mpf_report.save_figure(figure, workdir / "sizes.png")
  pyplot.close(figure)


def plot(results: dict[str, Any], workdir: pathlib.Path) -> None:
  """Draws accuracy matrices, accuracy over tasks and over buffer sizes."""
  import matplotlib

  matplotlib.use("Agg")
  _plot_matrices(results, workdir)
  _plot_tasks(results, workdir)
  if len(results["config"]["buffer"]["sizes"]) > 1:
    _plot_sizes(results, workdir)


def publish(
  results: dict[str, Any], workdir: pathlib.Path, root: pathlib.Path
) -> None:
  """Adds a run to the results file; makes the page, and keeps a picture.

  Args:
    results: what results.json holds.
    workdir: folder of the run.
    root: the folder with experiments/ and docs/.
  """
  results_file = root / "experiments/results/continual.json"
  kept = json.loads(results_file.read_text()) if results_file.exists() else {}
  name = results["config"]["variant"]
  kept[name] = results
  _workdir.write_json(results_file, kept)
  picture = workdir / "sizes.png"
  if not picture.exists():
    picture = workdir / "matrices.png"
  images = root / "docs/images"
  images.mkdir(parents=True, exist_ok=True)
  shutil.copyfile(picture, images / f"continual-{name}.png")
  _workdir.write_text(root / "docs/results/continual.md", render(kept))


def render(kept: dict[str, Any]) -> str:
  """Makes the page from the finished variants."""
  lines = [
    "# Continual learning by merging",
    "",
    "Made by `python -m experiments.continual --publish`; figures from",
    "`experiments/results/continual.json`. Final accuracy is that on the full",
    "test set after the last task; forgetting, transfer and the rest are",
    "defined in `jaxmerge.continual.metrics`. The settings of every row are in",
    "`experiments/configs/continual.py`; BUILD_NOTES.md says how they were",
    "chosen and what was tried.",
  ]
  for name, results in sorted(kept.items()):
    lines += ["", f"## {name}", "", table(results).rstrip()]
    lines += ["", f"![{name}](../images/continual-{name}.png)"]
  return "\n".join(lines) + "\n"
