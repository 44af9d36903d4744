"""Results of the fusion study: table, verdicts, picture, page."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import _mpf_report

LABELS = {
  "avg": "AVG",
  "ot_weights": "OT, weights",
  "ot_activations": "OT, activations",
  "ot_importance": "OT, activations, importance",
  "ot_target": "OT, weights, outgoing by target",
  "sinkhorn": "Sinkhorn, weights",
  "random": "random alignment",
}


def _means(entries: Sequence[dict[str, Any]]) -> np.ndarray:
  return np.array([entry["mean"] for entry in entries])


def best(entries: Sequence[dict[str, Any]]) -> int:
  """The proportion of the highest mean, by its index."""
  return int(_means(entries).argmax())


def _ordered(part: dict[str, Any]) -> list[tuple[str, Any]]:
  """Methods in the order of the labels; JSON keeps none."""
  return [
    (name, part["methods"][name]) for name in LABELS if name in part["methods"]
  ]


def _above(entries: Sequence[dict[str, Any]], rival: Any) -> str:
  """At how many proportions the mean is above a rival's."""
  wins = int((_means(entries) > rival).sum())
  return f"{wins}/{len(entries)}"


def verdicts(results: dict[str, Any]) -> list[str]:
  """A table of what the figures say, whichever way they fall."""
  proportions = results["config"]["proportions"]
  lines = [
    "| part | method | best (at weight) | above AVG | above random | above the"
    " aligned network alone |",
    "|---" * 6 + "|",
  ]
  for part in results["parts"]:
    methods = part["methods"]
    for method, entries in _ordered(part):
      i = best(entries)
      value = _mpf_report.cell(entries[i]["mean"], entries[i]["std"])
      counts = [
        _above(entries, _means(methods[rival]))
        if rival in methods and rival != method
        else ""
        for rival in ("avg", "random")
      ]
      counts.append(_above(entries, part["model"]["mean"]))
      lines.append(
        f"| {part['title']} | {LABELS[method]} | {value} at"
        f" {proportions[i]:g} | {' | '.join(counts)} |"
      )
  return lines


def table(results: dict[str, Any]) -> str:
  """Makes the Markdown tables of a run."""
  config = results["config"]
  mpf = config["mpf"]
  sizes = results["sizes"]
  lines = [
    f"Heterogeneous split of {mpf['dataset']}, special class"
    f" {mpf['special_class']}: A {sizes['a']:,} examples, B {sizes['b']:,},"
    f" test {sizes['test']:,}.",
    f"All networks: {mpf['base']['epochs']} epochs, batch {mpf['batch_size']},"
    f" SGD momentum {mpf['base']['momentum']}, learning rate"
    f" {mpf['base']['learning_rate']}, no biases; seeds {mpf['seeds']}.",
    f"Activations: {config['examples']:,} training examples, before the ReLU."
    f" Sinkhorn: epsilon {config['epsilon']} of the mean cost.",
    f"Hardware: {results['hardware']}; training took"
    f" {results['seconds']['training']:.0f} s, fusion and its evaluation"
    f" {results['seconds']['fusion']:.0f} s.",
  ]
  for part in results["parts"]:
    ends = [
      _mpf_report.cell(part[end]["mean"], part[end]["std"])
      for end in ("reference", "model")
    ]
    proportions = [f"{w:g}" for w in config["proportions"]]
    lines += [
      "",
      f"## {part['title']}",
      "",
      f"Reference {part['names'][0]}: {ends[0]}. Aligned network"
      f" {part['names'][1]}: {ends[1]}. Its weight:",
      "",
      f"| test accuracy % | {' | '.join(proportions)} |",
      "|---" * (1 + len(proportions)) + "|",
    ]
    for method, entries in _ordered(part):
      cells = [_mpf_report.cell(e["mean"], e["std"]) for e in entries]
      lines.append(f"| {LABELS[method]} | {' | '.join(cells)} |")
  lines += [
    "",
    "Mean ± sample standard deviation over the seeds.",
    "",
    "## What the figures say",
    "",
    "At how many of the proportions the mean is above that of AVG, of random"
    " alignment,\nand of the aligned network alone (which is the zero-shot"
    " transfer baseline where it\nis the smaller one).",
    "",
    *verdicts(results),
  ]
  return "\n".join(lines) + "\n"


def page(results: dict[str, Any]) -> str:
  """Makes the results page."""
  mpf = results["config"]["mpf"]
  variant = f"{mpf['dataset']}-{mpf['network']}"
  return (
    "# Optimal transport fusion, equal and unequal widths\n\n"
    "Made by\n\n"
    "    python -m experiments.fusion --publish --workdir=runs/fusion \\\n"
    f"      --config=experiments/configs/fusion.py:{variant}\n\n"
    "from `experiments/results/fusion.json`. Singh and Jaggi's sweep: one"
    " network is\naligned to the other, the reference, and averaged with it at"
    " the weight that the\ncolumn names. Where the widths differ it is the"
    " smaller one, which alone is the\nzero-shot transfer baseline. The best"
    " weight is chosen on the test set, for every\nmethod alike.\n\n"
    "![Test accuracy against the weight of the aligned network]"
    "(../images/fusion.png)\n\n" + table(results)
  )


def plot(results: dict[str, Any], path: pathlib.Path) -> None:
  """Draws accuracy against the proportion, a panel a part."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  parts = results["parts"]
  figure, panels = pyplot.subplots(
    1, len(parts), figsize=(4.5 * len(parts), 4), layout="constrained"
  )
  for axes, part in zip(panels, parts, strict=True):
    for method, entries in _ordered(part):
      axes.errorbar(
        results["config"]["proportions"],
        _means(entries),
        yerr=[entry["std"] or 0 for entry in entries],
        label=LABELS[method],
        marker=".",
        capsize=2,
      )
    for end, style in (("reference", ":"), ("model", "--")):
      axes.axhline(part[end]["mean"], linestyle=style, color="0.5")
    axes.set_title(part["title"], fontsize="medium")
    axes.set_xlabel(f"weight of {part['names'][1]}")
    axes.legend(fontsize="x-small")
  panels[0].set_ylabel("test accuracy %")
  temporary = path.with_name(f".{path.name}")
  figure.savefig(temporary, format="png", dpi=80)
  temporary.replace(path)
  pyplot.close(figure)
