"""Results of the study of merging without storage: table, pictures, page."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
from typing import Any

import numpy as np

from experiments import _mpf_report, _workdir
from jaxmerge.continual import metrics

Results = dict[str, Any]
Row = dict[str, Any]

# Rows that merge: the best of them is what TRM is measured by.
MERGES = (
  "avg_half",
  "avg_1_t",
  "magmax",
  "became",
  "became_unprojected",
  "pam",
  "pam_network",
)

# Settings and rows as they follow each other on the page; JSON has them sorted
# by letters.
_SETTINGS = ("clinc150", "cifar10", "digits")
_ROWS = ("joint", "naive", *MERGES, "ewc", "lwf", "trm")

_COLUMNS = (
  ("final_accuracy", "final accuracy %", 100),
  ("average_accuracy", "after each task %", 100),
  ("forgetting", "forgetting", 100),
  ("within", "within tasks %", 100),
  ("within_forgetting", "forgetting within", 100),
  ("learning_accuracy", "learning accuracy %", 100),
  ("start_loss", "loss at the start", 1),
  ("start_gradient", "gradient norm at the start", 1),
  ("steps_to_learn", "steps to 90%", 1),
  ("merging_seconds", "merging s a task", 1),
  ("merging_share", "of training %", 100),
)


def _place(name: str, names: tuple[str, ...]) -> tuple[int, list[Any]]:
  """Sorts a name by its place among others, by letters and numbers if none."""
  parts = re.split(r"(\d+)", name)
  letters: list[Any] = [int(p) if p.isdecimal() else p for p in parts]
  return names.index(name) if name in names else len(names), letters


def _arranged(kept: dict[str, Results]) -> dict[str, Results]:
  """The settings and their rows in the order of the page."""

  def setting(name: str) -> tuple[Any, ...]:
    whole = name.removesuffix("-smoke").removesuffix("-ablations")
    return _place(whole.split("-")[0], _SETTINGS), _place(whole, ()), name

  arranged = {}
  for name in sorted(kept, key=setting):
    rows = kept[name]["rows"]
    order = sorted(rows, key=lambda row: _place(row, _ROWS))
    arranged[name] = {**kept[name], "rows": {row: rows[row] for row in order}}
  return arranged


def _later(row: Row, part: str, name: str) -> float | None:
  """Mean of what the tasks after the first one have reported, if all have."""
  found = [task.get(part, {}).get(name) for task in row["tasks"][1:]]
  if not found or any(value is None for value in found):
    return None
  return float(np.mean(found))


def _seconds(row: Row, part: str) -> float | None:
  """Seconds of a part, a task; the first two tasks compile."""
  found = [
    task["seconds"][part]
    for task in row["tasks"][2:]
    if part in task.get("seconds", {})
  ]
  return float(np.median(found)) if found else None


def metrics_of(
  row: Row, sizes: tuple[int, ...], baseline: np.ndarray
) -> dict[str, float | None]:
  """The figures of a row in one class order.

  Args:
    row: accuracies and what the strategy has reported.
    sizes: number of examples of each task.
    baseline: accuracy of the pre-trained network on each task.

  Returns:
    By name; None for what this row has not.
  """
  matrix = np.array(row["accuracy"], np.float64)
  found: dict[str, float | None] = {}
  for name, value in metrics.summarize(
    matrix, sizes=sizes, baseline=baseline
  ).items():
    value = np.asarray(value)
    if value.ndim == 0:
      found[name] = float(value)
  if "accuracy_within" in row:
    within = np.array(row["accuracy_within"], np.float64)
    summary_within = metrics.summarize(within, sizes=sizes)
    found["within"] = float(summary_within["final_accuracy"])
    # Of a training on all tasks at once only the end is known.
    if "forgetting" in summary_within:
      found["within_forgetting"] = float(summary_within["forgetting"])
  found["start_loss"] = _later(row, "start", "loss")
  found["start_gradient"] = _later(row, "start", "gradient_norm")
  found["steps_to_learn"] = _later(row, "training", "learned")
  merging, training = _seconds(row, "merging"), _seconds(row, "training")
  found["merging_seconds"] = merging
  found["merging_share"] = (
    merging / training if merging is not None and training else None
  )
  return found


def metrics_before(
  found: dict[str, list[float]], sizes: tuple[int, ...]
) -> dict[str, float | None]:
  """The figures of the pre-trained network in one class order.

  Args:
    found: its accuracies on each task.
    sizes: number of examples of each task.

  Returns:
    By name, as those of `metrics_of`.
  """
  names = {"accuracy": "final_accuracy", "accuracy_within": "within"}
  return {
    names[name]: float(np.average(values, weights=sizes))
    for name, values in found.items()
  }


def over_orders(
  entries: list[Row], name: str, factor: float = 1
) -> tuple[float, float | None] | None:
  """Mean and sample standard deviation of a figure over the class orders."""
  values = [one["metrics"].get(name) for one in entries]
  if any(value is None or np.isnan(value) for value in values):
    return None
  array = factor * np.array(values, np.float64)
  std = float(array.std(ddof=1)) if len(array) > 1 else None
  return float(array.mean()), std


def _networks(results: Results, row: Row) -> str:
  """What is held between tasks, in networks and in bytes."""
  count = row["memory"]["networks"]
  whole = 4 * results["num_parameters"]
  size = f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"
  return f"{count / whole:.2f} ({size})"


def table(results: Results) -> str:
  """Makes the Markdown table of a run.

  Args:
    results: what results.json holds.

  Returns:
    The table, one line a row.
  """
  config = results["config"]
  network = config.get("network") or config["model"]["source"]
  images = config["kind"] == "images"
  columns = [
    one for one in _COLUMNS if images or not one[0].startswith("within")
  ]
  orders = len(config["orders"])
  lines = [
    f"{network} on {config['dataset']}, {config['num_tasks']} tasks,"
    f" {orders} class order{'s' if orders > 1 else ''}; accuracy % on the"
    f" {config['judge']} set among all classes. Hardware:"
    f" {results['hardware']}.",
    "",
    "| row | "
    + " | ".join(title for _, title, _ in columns)
    + " | networks held |",
    "|---" * (len(columns) + 2) + "|",
  ]
  # Of the network before any task there is nothing else to say.
  before = [{"metrics": one} for one in results["zero_shot"]]
  for name, entries in {"zero-shot": before, **results["rows"]}.items():
    cells = [name]
    for field, _, factor in columns:
      found = over_orders(entries, field, factor)
      cells.append(_mpf_report.cell(*found) if found else "")
    known = entries is not before
    cells.append(_networks(results, entries[0]) if known else "")
    lines.append("| " + " | ".join(cells) + " |")
  lines += [
    "",
    "Mean ± sample standard deviation over the class orders. Zero-shot: the"
    " network before any task. Start: the mean"
    " over the tasks after the first, on 200 examples of the task, over its"
    " classes. Steps: until the mean accuracy of five batches in training, over"
    " the classes of its loss, is at least 90% of the last; 5 is the least."
    " Seconds: the median over the tasks after the second, the first two"
    " compile. Of training %: the seconds of a task's merge, over those of its"
    " training.",
  ]
  if images:
    lines += [
      "",
      "The network has been trained on the first half of the order's classes"
      " (tasks 1, 2 and half of 3): a strategy that learns nothing keeps the"
      " accuracy of zero-shot. Within tasks: among the classes of the"
      " example's own task, as if the task were known.",
    ]
  if "no_alignment" in config["rows"]:
    row = config["rows"]["trm"]
    path, granularity = row["path"], row.get("granularity", "global")
    lines += [
      "",
      f"Each row is `trm` with one thing changed. `trm` has {path['snapshots']}"
      f" snapshots by {path['by']} and {granularity} coefficients.",
    ]
  return "\n".join(lines) + "\n"


def plot(results: Results, workdir: pathlib.Path) -> None:
  """Draws accuracy, and the gradient at the start, from task to task."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot, ticker

  figure, (left, right) = pyplot.subplots(
    1, 2, figsize=(10, 4), layout="constrained"
  )
  for name, entries in results["rows"].items():
    # There are ten other colours.
    style = {"color": "black", "lw": 2.5} if name == "trm" else {}
    style |= {"marker": "o", "ms": 3, "label": name}
    matrices = np.array([one["accuracy"] for one in entries], np.float64)
    tasks = np.arange(1, matrices.shape[-1] + 1)
    means = metrics.accuracies_over_tasks(100 * matrices).mean(axis=0)
    if not np.isnan(means).any():
      left.plot(tasks, means, **style)
    norms = [
      [task["start"]["gradient_norm"] for task in one["tasks"]]
      for one in entries
      if len(one["tasks"]) == len(tasks)
      and all("start" in task for task in one["tasks"])
    ]
    if len(norms) == len(entries):
      right.plot(tasks, np.mean(norms, axis=0), **style)
  left.set_xlabel("tasks learned")
  left.set_ylabel("accuracy on them %")
  left.legend(fontsize=6, ncols=2)
  right.set_xlabel("task")
  right.set_ylabel("gradient norm at its start")
  right.set_yscale("log")
  for which in (
    right.yaxis.set_major_formatter,
    right.yaxis.set_minor_formatter,
  ):
    which(ticker.ScalarFormatter())
  _mpf_report.save_figure(figure, workdir / "tasks.png")
  pyplot.close(figure)


def publish(
  results: Results, workdir: pathlib.Path, root: pathlib.Path
) -> None:
  """Adds a run to the results file; makes the page, and keeps a picture.

  Args:
    results: what results.json holds.
    workdir: folder of the run.
    root: the folder with experiments/ and docs/.
  """
  file = root / "experiments/results/trm.json"
  kept = json.loads(file.read_text()) if file.exists() else {}
  name = results["config"]["variant"]
  kept[name] = _without_steps(results)
  page = render(kept)
  _workdir.write_json(file, kept)
  images = root / "docs/images"
  images.mkdir(parents=True, exist_ok=True)
  shutil.copyfile(workdir / "tasks.png", images / f"trm-{name}.png")
  _workdir.write_text(root / "docs/results/trm.md", page)


def _without_steps(results: Results) -> Results:
  """The results without what was recorded at every step of a merge."""
  rows = {}
  for name, entries in results["rows"].items():
    rows[name] = [
      {
        **one,
        "tasks": [
          {
            part: {
              key: value
              for key, value in values.items()
              if not key.startswith("step/") and key != "coefficients"
            }
            for part, values in task.items()
          }
          for task in one["tasks"]
        ],
      }
      for one in entries
    ]
  return {**results, "rows": rows}


def _whole(kept: dict[str, Results]) -> dict[str, Results]:
  return {
    name: one
    for name, one in kept.items()
    if not name.endswith(("-ablations", "-smoke"))
  }


def _main_runs(kept: dict[str, Results]) -> dict[str, Results]:
  """Without the digits, which take seconds and say little."""
  return {name: one for name, one in _whole(kept).items() if name != "digits"}


def summary(kept: dict[str, Results]) -> str:
  """Final accuracy and forgetting of all settings side by side."""
  runs = _main_runs(kept)
  names = list(
    dict.fromkeys(name for one in runs.values() for name in one["rows"])
  )
  lines = [
    "| row | "
    + " | ".join(f"{run}: accuracy, forgetting" for run in runs)
    + " | mean accuracy | mean forgetting |",
    "|---" * (len(runs) + 3) + "|",
  ]
  for name in names:
    cells, means = [name], []
    for one in runs.values():
      entries = one["rows"].get(name, [])
      pair = [
        over_orders(entries, field, 100) if entries else None
        for field in ("final_accuracy", "forgetting")
      ]
      cells.append(
        ", ".join(_mpf_report.cell(*part) if part else "-" for part in pair)
      )
      means.append([part[0] if part else np.nan for part in pair])
    whole = np.array(means).mean(axis=0)
    cells += ["" if np.isnan(value) else f"{value:.2f}" for value in whole]
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines) + "\n"


def best_baseline(kept: dict[str, Results]) -> str:
  """How far TRM is from the best merging baseline, in the mean."""
  runs = _main_runs(kept).values()

  def mean(name: str) -> float:
    parts = [
      over_orders(one["rows"][name], "final_accuracy", 100)
      if name in one["rows"]
      else None
      for one in runs
    ]
    return float(np.mean([part[0] if part else -np.inf for part in parts]))

  means = {name: mean(name) for name in MERGES}
  best = max(means, key=lambda name: means[name])
  return (
    f"In the mean of these settings `trm` has {mean('trm'):.2f} % and the best"
    f" merge beside it, `{best}`, {means[best]:.2f} %."
  )


def claims(kept: dict[str, Results]) -> str:
  """The two claims of TRM's abstract, tested in every setting."""
  lines = [
    "| setting | against | forgetting, less by | of orders |"
    " gradient norm at the start, times | of orders |",
    "|---" * 6 + "|",
  ]
  for run, one in _whole(kept).items():
    trm = one["rows"]["trm"]
    for other in ("naive", "avg_half", "avg_1_t"):
      entries = one["rows"][other]
      less = np.array(
        [
          100 * (b["metrics"]["forgetting"] - a["metrics"]["forgetting"])
          for a, b in zip(trm, entries, strict=True)
        ]
      )
      times = np.array(
        [
          a["metrics"]["start_gradient"] / b["metrics"]["start_gradient"]
          for a, b in zip(trm, entries, strict=True)
        ]
      )
      cells = [run, other]
      for values, least in ((less, 0), (times, 1)):
        std = float(values.std(ddof=1)) if len(values) > 1 else None
        cells.append(_mpf_report.cell(float(values.mean()), std))
        cells.append(f"{int((values > least).sum())} of {len(values)}")
      lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines) + "\n"


def render(kept: dict[str, Results]) -> str:
  """Makes the page from the finished variants."""
  kept = _arranged(kept)
  lines = [
    "# Merging without storage",
    "",
    "Made by `python -m experiments.trm --publish`; figures from",
    "`experiments/results/trm.json`, rows and recipes in",
    "`experiments/configs/trm.py`. No strategy here stores an example.",
    "",
    "**What is the paper's, and what is ours.** Of Trajectory Regularized",
    "Merging the abstract is public: merging is an optimisation in an",
    "augmented subspace of the training's trajectory, with three objectives",
    "(task alignment, prediction consistency, gradient responsiveness), to",
    "keep what was learned and to let the next task begin with gradients that",
    "do not vanish. The equations, the networks and the settings are not.",
    "`trm` is jaxmerge's own construction (`jaxmerge.continual.merges.trm`);",
    "the paper's figures (forgetting of 2.5 points on CIFAR-100 and 1.8 on",
    "ImageNet-R) are of other benchmarks and cannot be compared with these.",
  ]
  if _main_runs(kept):
    lines += ["", summary(kept).rstrip(), "", best_baseline(kept)]
  if _whole(kept):
    lines += [
      "",
      "## The abstract's two claims",
      "",
      "TRM against sequential fine-tuning and the running averages, class",
      "order by class order.",
      "",
      claims(kept).rstrip(),
    ]
  for name, results in kept.items():
    lines += ["", f"## {name}", "", table(results).rstrip()]
    lines += ["", f"![{name}](../images/trm-{name}.png)"]
  return "\n".join(lines) + "\n"
