"""Results of the Mode Path Fusion study: figures, table, pictures."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments import _hardware, _mpf_study, _paper, _workdir
from jaxmerge import curves, training

LABELS = {
  "joint": "Joint",
  "model_a": "Model A",
  "model_b": "Model B",
  "avg": "AVG",
  "ot": "OT",
  "mpf": "MPF",
  "mpf_ot": "MPF after OT alignment",
  "mpf_beta": "MPF, Beta-sampled t",
  "avg_finetune": "AVG + fine-tune, MPF's data and steps",
  "joint_extra": "Joint + MPF's steps",
  "ensemble": "Logit ensemble of A and B",
}


def summary(values: Sequence[float]) -> dict[str, Any]:
  """Per-seed values with their mean and sample standard deviation."""
  array = np.asarray(values, np.float64)
  std = float(array.std(ddof=1)) if len(array) > 1 else None
  return {"seeds": array.tolist(), "mean": float(array.mean()), "std": std}


def evaluate_rows(
  study: _mpf_study.Study, networks: dict[str, Any]
) -> dict[str, Any]:
  """Loss, and accuracy in per cent, of every row on the whole test set."""
  rows = {}
  for name in study.config.rows:
    if name == "ensemble":
      params = tuple(
        networks[part]["params"] for part in ("model_a", "model_b")
      )
      metric_fn = study.ensemble_fn
    else:
      params, metric_fn = networks[name]["params"], study.metric_fn
    means = training.evaluate(metric_fn, params, study.test, seed_axis=True)
    rows[name] = {
      "accuracy": summary(100 * means["accuracy"].astype(np.float64)),
      "loss": summary(means["loss"]),
    }
  return rows


def evaluate_paths(
  study: _mpf_study.Study, networks: dict[str, Any]
) -> dict[str, Any]:
  """Test loss and accuracy along the curve and its chord, first seed."""
  if "mpf" not in networks:
    return {}
  points = jax.tree.map(lambda leaf: leaf[:, 0], networks["mpf"]["points"])
  curve = curves.get(study.config.curve.kind)(points)
  chord = curves.PolyChain.through(curve.point(0), curve.point(-1))
  paths = {}
  for name, path in (("curve", curve), ("line", chord)):
    grid, means = curves.profile(
      study.metric_fn, path, study.test, study.config.profile_points
    )
    paths[name] = {
      "t": grid.tolist(),
      "loss": np.asarray(means["loss"], np.float64).tolist(),
      "accuracy": (100 * means["accuracy"].astype(np.float64)).tolist(),
    }
  return paths


def write_results(
  study: _mpf_study.Study,
  rows: dict[str, Any],
  paths: dict[str, Any],
  metas: dict[str, Any],
  workdir: pathlib.Path,
) -> dict[str, Any]:
  """Writes results.json and returns what it holds."""
  seconds = {
    name: meta["seconds"] for name, meta in metas.items() if "seconds" in meta
  }
  results = {
    "config": _workdir.as_json(study.config),
    "sizes": study.sizes,
    "rows": rows,
    "paths": paths,
    "along_curve": {
      name: {key: meta[key] for key in ("grid", "train_loss", "best_t")}
      for name, meta in metas.items()
      if "grid" in meta
    },
    "steps": {
      name: meta["steps"] for name, meta in metas.items() if "steps" in meta
    },
    "versions": _hardware.versions(),
    "hardware": _hardware.hardware(study.num_devices),
    "seconds": seconds | {"total": sum(seconds.values())},
  }
  _workdir.write_json(workdir / "results.json", results)
  return results


def cell(mean: float, std: float | None) -> str:
  """A mean and standard deviation for a table."""
  return f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f}"


def table(results: dict[str, Any]) -> str:
  """Makes the Markdown table of a run, beside the paper's figures."""
  config, sizes = results["config"], results["sizes"]
  judged = "held-out" if config["holdout"] else "test"
  lines = [
    f"Mode Path Fusion, {config['dataset']}, {config['network']}, "
    f"{config['recipe']} recipe, seeds {config['seeds']}.",
    f"Examples: A {sizes['a']:,}, B {sizes['b']:,}, all {sizes['joint']:,}, "
    f"{judged} {sizes['test']:,}. Batch {config['batch_size']}, "
    f"{config['base']['epochs']} epochs, then {config['curve']['epochs']} for "
    "the curve and the controls.",
    f"Hardware: {results['hardware']}; training took "
    f"{results['seconds']['total']:.0f} s.",
    "",
    f"| row | {judged} accuracy % | {judged} loss | paper % |",
    "|---|---|---|---|",
  ]
  for name, row in results["rows"].items():
    printed = _paper.table1(config["dataset"], config["network"], name)
    accuracy, loss = row["accuracy"], row["loss"]
    lines.append(
      f"| {LABELS[name]} | {cell(accuracy['mean'], accuracy['std'])} | "
      f"{loss['mean']:.4f} | {cell(*printed) if printed else ''} |"
    )
  lines += ["", "Mean ± sample standard deviation over the seeds."]
  return "\n".join(lines) + "\n"


def save_figure(figure: Any, path: pathlib.Path) -> None:
  """Writes a picture under a temporary name and renames it."""
  temporary = path.with_name(f".{path.name}")
  figure.savefig(temporary, format="png", dpi=110)
  temporary.replace(path)


def plot(results: dict[str, Any], workdir: pathlib.Path) -> None:
  """Draws the rows as bars, and the curve against the straight line."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  config = results["config"]
  title = f"{config['dataset']}, {config['network']} ({config['recipe']})"
  names = list(results["rows"])
  accuracies = [results["rows"][name]["accuracy"] for name in names]
  figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
  axes.barh(
    [LABELS[name] for name in names],
    [accuracy["mean"] for accuracy in accuracies],
    xerr=[accuracy["std"] or 0 for accuracy in accuracies],
    color=["C1" if name.startswith("mpf") else "C0" for name in names],
  )
  axes.invert_yaxis()
  lowest = min(min(accuracy["seeds"]) for accuracy in accuracies)
  axes.set_xlim(max(0, lowest - 5), 100 if lowest > 60 else None)
  axes.set_xlabel("accuracy %")
  axes.set_title(title)
  save_figure(figure, workdir / "rows.png")
  pyplot.close(figure)

  if not results["paths"]:
    return
  figure, both = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
  judged = "held-out" if config["holdout"] else "test"
  for axes, metric, label in zip(
    both,
    ("loss", "accuracy"),
    (f"{judged} loss", f"{judged} accuracy %"),
    strict=True,
  ):
    for name, style in (("curve", "-"), ("line", "--")):
      path = results["paths"][name]
      axes.plot(path["t"], path[metric], style, label=name)
    middle = results["paths"]["curve"]
    merged = int(np.argmin(np.abs(np.array(middle["t"]) - 0.5)))
    axes.plot(middle["t"][merged], middle[metric][merged], "D", label="merged")
    axes.set_xlabel("t")
    axes.set_ylabel(label)
  both[0].set_yscale("log")
  both[0].legend()
  start = "AVG" if config["recipe"] == "paper" else "A"
  figure.suptitle(
    f"{title}, seed {config['seeds'][0]}: from {start} (t = 0) to B (t = 1)"
  )
  save_figure(figure, workdir / "curve.png")
  pyplot.close(figure)
