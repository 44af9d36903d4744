"""Results of the landscape study: barriers, table, page, profiles."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from experiments import _mpf_report
from jaxmerge import curves

LABELS = {
  "line": "straight line",
  "line_aligned": "straight line, B aligned by OT",
  "curve": "curve",
  "curve_aligned": "curve, B aligned by OT",
}
# Between these a path is away from its ends, which all paths share.
INTERIOR = (0.25, 0.75)


def summarize(profiles: dict[str, Any]) -> dict[str, Any]:
  """Barriers and extremes of every path, and the curve against the line.

  Args:
    profiles: by path: t, and by data set losses and accuracies `[seeds, t]`.

  Returns:
    By path and quantity, per-seed values with mean and standard deviation;
    "ratio": the largest train loss of the straight line over the curve's, on
    the whole of both and between t = 0.25 and 0.75; "five_times_lower": the
    share of t where the curve's is a fifth of the line's largest, or less.
  """
  rows: dict[str, Any] = {}
  largest: dict[str, dict[str, np.ndarray]] = {}
  for name, path in profiles.items():
    ts = np.array(path["t"])
    inner = (ts >= INTERIOR[0]) & (ts <= INTERIOR[1])
    losses = {part: np.array(path[part]["loss"]) for part in ("train", "test")}
    accuracy = np.array(path["test"]["accuracy"])
    train, test = (curves.barrier(losses[part], ts) for part in losses)
    good = curves.barrier(accuracy, ts, higher_is_better=True)
    largest[name] = {
      "whole": train.maximum,
      "interior": losses["train"][:, inner].max(axis=-1)
      if inner.any()
      else train.maximum,
    }
    rows[name] = {
      key: _mpf_report.summary(value)
      for key, value in {
        "train_loss_barrier": train.barrier,
        "train_loss_max": train.maximum,
        "train_loss_max_interior": largest[name]["interior"],
        "train_loss_mean": train.mean,
        "train_loss_midpoint": train.midpoint,
        "train_loss_start": losses["train"][:, 0],
        "train_loss_end": losses["train"][:, -1],
        "test_loss_barrier": test.barrier,
        "test_accuracy_barrier": good.barrier,
        "test_accuracy_min": good.minimum,
        "test_accuracy_midpoint": good.midpoint,
        "norm_min": np.array(path["norm"]).min(axis=-1),
      }.items()
    }
  curve = profiles["curve"]
  low = (
    5 * np.array(curve["train"]["loss"]) <= (largest["line"]["whole"][:, None])
  )
  ratio = {
    part: _mpf_report.summary(largest["line"][part] / largest["curve"][part])
    for part in ("whole", "interior")
  }
  # The share of t, by the trapezoidal rule on a grid of any spacing.
  share = np.trapezoid(low.astype(np.float64), curve["t"], axis=-1)
  return {
    "paths": rows,
    "ratio": ratio,
    "five_times_lower": _mpf_report.summary(share),
  }


def _cell(row: dict[str, Any], digits: int = 3) -> str:
  mean, std = row["mean"], row["std"]
  if std is None:
    return f"{mean:.{digits}f}"
  return f"{mean:.{digits}f} ± {std:.{digits}f}"


def _table(results: dict[str, Any]) -> list[str]:
  columns = {
    "barrier, train loss": ("train_loss_barrier", 3),
    "barrier, test loss": ("test_loss_barrier", 3),
    "barrier, test accuracy": ("test_accuracy_barrier", 2),
    "largest train loss": ("train_loss_max", 3),
    "between 1/4 and 3/4": ("train_loss_max_interior", 3),
    "train loss at 1/2": ("train_loss_midpoint", 3),
    "test accuracy at 1/2, %": ("test_accuracy_midpoint", 2),
  }
  lines = [
    "| path | " + " | ".join(columns) + " |",
    "|---" * (1 + len(columns)) + "|",
  ]
  rows = results["summary"]["paths"]
  for name in LABELS:
    if name in rows:
      cells = [_cell(rows[name][key], n) for key, n in columns.values()]
      lines.append(f"| {LABELS[name]} | " + " | ".join(cells) + " |")
  return lines


def _ratios(results: dict[str, Any]) -> list[str]:
  ratio, rows = results["summary"]["ratio"], results["summary"]["paths"]
  seeds = ", ".join(f"{value:.2f}" for value in ratio["interior"]["seeds"])
  return [
    "Largest train loss along the straight line over the curve's: "
    f"{_cell(ratio['whole'], 2)} with the ends, which both paths share (train "
    f"loss {_cell(rows['line']['train_loss_start'])} at t = 0 and "
    f"{_cell(rows['line']['train_loss_end'])} at t = 1), "
    f"{_cell(ratio['interior'], 2)} between t = 1/4 and 3/4 (by seed: "
    f"{seeds}). At {_cell(results['summary']['five_times_lower'], 2)} of all t "
    "the curve's train loss is at least five times lower than the line's "
    "largest.",
  ]


def _about(results: dict[str, Any]) -> list[str]:
  config, other, plane = results["config"], results["mpf"], results["plane"]
  start = "A"
  if other["recipe"] == "paper":
    start = "the average, as in the published code,"
  lines = [
    f"{config['dataset']}, {config['network']}, {other['split']} split, "
    f"{other['recipe']} recipe, seeds {other['seeds']}; from {start} (t = 0) "
    f"to B (t = 1), {config['profile_points']} points. Train loss on all "
    f"{results['sizes']['joint']:,} training examples, accuracy on "
    f"{results['sizes']['test']:,}.",
    f"Plane: {plane['points'][0]} x {plane['points'][1]} points through the "
    f"curve's control points of seed {plane['seed']}; values that are not "
    f"finite: {plane['non_finite']['train']} (train), "
    f"{plane['non_finite']['test']} (test).",
  ]
  return lines


def table(results: dict[str, Any]) -> str:
  """Makes the Markdown table of a run."""
  lines = [
    *_about(results),
    f"Hardware: {results['hardware']}; {results['seconds']:.0f} s.",
    "",
    *_table(results),
    "",
    *_ratios(results),
    "",
    "Barrier: largest excess over the linear interpolation of the ends "
    "(Entezari et al.). Mean ± sample standard deviation over the seeds.",
  ]
  return "\n".join(lines) + "\n"


def page(results: dict[str, Any]) -> str:
  """Makes the page docs/results/landscape.md."""
  config, versions = results["config"], results["versions"]
  variant = f"{config['dataset']}-{config['network']}"
  lines = [
    "# The landscape around Mode Path Fusion",
    "",
    "Made by `python -m experiments.landscape --publish "
    f"--config=experiments/configs/landscape.py:{variant}` from networks of",
    f"`experiments.mpf` with seeds {results['mpf']['seeds']}; figures from",
    "`experiments/results/landscape.json`.",
    "",
    *_about(results),
    "",
    "![Train loss and test error on the plane](../images/landscape.png)",
    "",
    "The dots are A and B, the dashed line joins them, the diamond is the "
    "merged network on the curve. Colours are spaced by logarithm.",
    "",
    *_table(results),
    "",
    *_ratios(results),
    "",
    "Barrier: largest excess over the linear interpolation of the ends",
    "([Entezari et al.](https://arxiv.org/abs/2110.06296)), of an accuracy in "
    "points. Mean ± sample standard deviation over the seeds.",
    "",
    f"{results['hardware']}, jax {versions['jax']}, jaxmerge "
    f"{versions['jaxmerge']}, {results['seconds']:.0f} s.",
  ]
  return "\n".join(lines) + "\n"


def plot_profiles(results: dict[str, Any], path: pathlib.Path) -> None:
  """Draws train loss and test accuracy along every path, over the seeds."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(9, 3.5), layout="constrained")
  both = figure.subplots(1, 2)
  for axes, (part, metric, label) in zip(
    both,
    (("train", "loss", "train loss"), ("test", "accuracy", "test accuracy %")),
    strict=True,
  ):
    for name, text in LABELS.items():
      if name not in results["paths"]:
        continue
      found = results["paths"][name]
      values = np.array(found[part][metric])
      style = "--" if name.startswith("line") else "-"
      axes.plot(found["t"], values.mean(axis=0), style, label=text)
      axes.fill_between(
        found["t"], values.min(axis=0), values.max(axis=0), alpha=0.2
      )
    axes.set_xlabel("t")
    axes.set_ylabel(label)
  both[0].set_yscale("log")
  both[1].legend(fontsize="small")
  config = results["config"]
  figure.suptitle(
    f"{config['dataset']}, {config['network']}: mean and range of "
    f"{len(results['mpf']['seeds'])} seeds"
  )
  temporary = path.with_name(f".{path.name}")
  figure.savefig(temporary, format="png", dpi=110)
  temporary.replace(path)
