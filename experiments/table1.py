"""Reproduces Table 1 of the Mode Path Fusion paper.

    python -m experiments.table1 --workdir=runs/table1

Runs experiments.mpf on MNIST and CIFAR-10 with three networks, five seeds, in
the corrected recipe (with the controls) and in the published code's. The
cheapest cells come first. Every finished cell goes into
experiments/results/table1.json at once, and docs/results/table1.md is made
from that file; cells that stand there with the same configuration are not run
again, unless --rerun is given. Killed and started again, it goes on in the
middle of a cell.
"""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_collections
from absl import flags

from experiments import _cli, _mpf_report, _paper, _workdir, mpf
from experiments.configs import mpf as mpf_config

_ROOT = pathlib.Path(__file__).parent.parent

# --workdir, --data_dir and --progress are those of experiments.mpf.
_DATASETS = flags.DEFINE_list("datasets", ["mnist", "cifar10"], "Data sets.")
_NETS = flags.DEFINE_list(
  "nets", ["mlpnet", "mlplarge", "mlphuge"], "Networks."
)
_RECIPES = flags.DEFINE_list("recipes", ["corrected", "paper"], "Recipes.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2", "3", "4"], "Seeds.")
_RESULTS = flags.DEFINE_string(
  "results", str(_ROOT / "experiments/results/table1.json"), "Results file."
)
_RERUN = flags.DEFINE_bool(
  "rerun", False, "Run the cells that the results file has, too."
)
_PAGE = flags.DEFINE_string(
  "page", str(_ROOT / "docs/results/table1.md"), "Page made from it."
)

# Multiply-adds of a network and example, in thousands: cheap cells first.
_COST = {
  ("mnist", "mlpnet"): 415,
  ("mnist", "mlplarge"): 1029,
  ("mnist", "mlphuge"): 1460,
  ("cifar10", "mlpnet"): 1330,
  ("cifar10", "mlplarge"): 2860,
  ("cifar10", "mlphuge"): 3804,
}
_NAMES = {
  "mnist": "MNIST",
  "cifar10": "CIFAR-10",
  "mlpnet": "MLPNET",
  "mlplarge": "MLPLARGE",
  "mlphuge": "MLPHUGE",
}


def cells(
  datasets: Sequence[str],
  nets: Sequence[str],
  recipes: Sequence[str],
  seeds: Sequence[int],
) -> dict[str, ml_collections.ConfigDict]:
  """Returns the configuration of every cell, the cheapest first."""
  for kind, given, known in (
    ("dataset", datasets, {dataset for dataset, _ in _COST}),
    ("network", nets, {net for _, net in _COST}),
    ("recipe", recipes, {"corrected", "paper"}),
  ):
    for name in given:
      if name not in known:
        raise ValueError(
          f"Unknown {kind} {name!r}. Choose from {', '.join(sorted(known))}."
        )
  pairs = sorted(itertools.product(datasets, nets), key=_COST.__getitem__)
  found = {}
  for (dataset, net), recipe in itertools.product(pairs, recipes):
    suffix = "-paper" if recipe == "paper" else ""
    config = mpf_config.get_config(f"{dataset}-{net}{suffix}")
    config.seeds = tuple(seeds)
    found[f"{dataset}-{net}-{recipe}"] = config
  return found


def run_table(
  wanted: dict[str, ml_collections.ConfigDict],
  workdir: pathlib.Path,
  results_file: pathlib.Path,
  page: pathlib.Path,
  data_dir: str | None = None,
  progress: bool = True,
  rerun: bool = False,
) -> None:
  """Runs the cells that the results file lacks, and writes the page.

  Args:
    wanted: configurations by name of the cell.
    workdir: folder of the runs, one sub-folder a cell.
    results_file: JSON file of the finished cells.
    page: Markdown page made from it.
    data_dir: folder of prepared TFDS sets, None for the default one.
    progress: whether to show progress bars.
    rerun: run the cells that the file has, too.

  Raises:
    ValueError: bad input, or a cell would be replaced by one of fewer seeds.
    FloatingPointError: a loss became NaN or infinite.
  """
  kept = _read(results_file)
  for name, config in wanted.items():
    have = kept.get(name)
    if have is not None and len(have["config"]["seeds"]) > len(config.seeds):
      raise ValueError(
        f"{results_file} has {name} with more seeds. Give --results another "
        "file."
      )
  for name, config in wanted.items():
    have = kept.get(name)
    same = have is not None and have["config"] == _workdir.as_json(config)
    if same and not rerun:
      print(f"{name}: in {results_file.name} already.", flush=True)
      continue
    results = mpf.run(config, str(workdir / name), data_dir, progress)
    # Read anew: another process may have finished a cell meanwhile.
    kept = _read(results_file)
    kept[name] = {
      key: results[key]
      for key in (
        "config",
        "sizes",
        "rows",
        "steps",
        "versions",
        "hardware",
        "seconds",
      )
    }
    _workdir.write_json(results_file, kept)
    _workdir.write_text(page, render(kept))
    print(_mpf_report.table(results), flush=True)
  if kept:
    _workdir.write_text(page, render(kept))


def _read(results_file: pathlib.Path) -> dict[str, Any]:
  """The finished cells."""
  if not results_file.exists():
    return {}
  try:
    kept = json.loads(results_file.read_text())
    if not all("config" in cell for cell in kept.values()):
      raise ValueError("a cell lacks its config")
  except (AttributeError, TypeError, ValueError) as error:
    raise ValueError(
      f"{results_file} is damaged ({error}). Mend or remove it."
    ) from error
  return kept


def _sorted(kept: dict[str, Any]) -> dict[str, Any]:
  """The cells in the order of the page."""
  names = list(_NAMES)

  def place(item: tuple[str, Any]) -> tuple[int, int, str]:
    config = item[1]["config"]
    return (
      names.index(config["dataset"]),
      names.index(config["network"]),
      config["recipe"],
    )

  return dict(sorted(kept.items(), key=place))


def render(kept: dict[str, Any]) -> str:
  """Makes the page from the finished cells."""
  kept = _sorted(kept)
  lines = [
    "# Table 1: Mode Path Fusion of two networks",
    "",
    "Made by `python -m experiments.table1`; figures from",
    "`experiments/results/table1.json`. Accuracy on the whole test set in per",
    "cent, mean ± sample standard deviation over the seeds. The recipes and",
    "the rows are explained in BUILD_NOTES.md.",
  ]
  for recipe, title in (
    ("corrected", "Corrected recipe"),
    ("paper", "Recipe of the published code"),
  ):
    found = {
      name: cell
      for name, cell in kept.items()
      if cell["config"]["recipe"] == recipe
    }
    if not found:
      continue
    lines += ["", f"## {title}"]
    for dataset in ("mnist", "cifar10"):
      mine = [
        cell for cell in found.values() if cell["config"]["dataset"] == dataset
      ]
      if mine:
        lines += ["", *_block(dataset, mine)]
  lacking = [
    f"{dataset}-{net}-{recipe}"
    for (dataset, net), recipe in itertools.product(
      _COST, ("corrected", "paper")
    )
    if f"{dataset}-{net}-{recipe}" not in kept
  ]
  lines += ["", "## Runs", "", *_runs(kept)]
  if lacking:
    lines += ["", f"Not run yet: {', '.join(lacking)}."]
  return "\n".join(lines) + "\n"


def _block(dataset: str, mine: list[dict[str, Any]]) -> list[str]:
  """One data set's table: ours and the paper's figures side by side."""
  nets = [cell["config"]["network"] for cell in mine]
  heads = [f"{_NAMES[net]} | paper" for net in nets]
  lines = [
    f"| {_NAMES[dataset]} | " + " | ".join(heads) + " |",
    "|---" * (1 + 2 * len(nets)) + "|",
  ]
  # JSON keeps no order of keys.
  for row in mine[0]["config"]["rows"]:
    entries = [_mpf_report.LABELS[row]]
    for cell, net in zip(mine, nets, strict=True):
      if row not in cell["rows"]:
        entries += ["", ""]
        continue
      accuracy = cell["rows"][row]["accuracy"]
      printed = _paper.table1(dataset, net, row)
      entries.append(_mpf_report.cell(accuracy["mean"], accuracy["std"]))
      entries.append(_mpf_report.cell(*printed) if printed else "")
    lines.append("| " + " | ".join(entries) + " |")
  return lines


def _runs(kept: dict[str, Any]) -> list[str]:
  """Seeds, hardware, versions and time of every cell."""
  lines = [
    "| cell | seeds | training time | hardware | jax | jaxmerge |",
    "|---|---|---|---|---|---|",
  ]
  for name, cell in kept.items():
    lines.append(
      f"| {name} | {len(cell['config']['seeds'])} | "
      f"{cell['seconds']['total'] / 60:.1f} min | {cell['hardware']} | "
      f"{cell['versions']['jax']} | {cell['versions']['jaxmerge']} |"
    )
  return lines


def main(argv: Sequence[str]) -> None:
  """Runs the table that the flags describe."""
  if len(argv) > 1:
    raise ValueError(f"Unknown arguments: {' '.join(argv[1:])}")
  mpf.require_flags("workdir")
  flag = flags.FLAGS
  if flag.config is not None:
    raise ValueError(
      "--config is not used: choose cells by --datasets, --nets, --recipes."
    )
  try:
    seeds = [int(seed) for seed in _SEEDS.value]
  except ValueError as error:
    raise ValueError(
      f"--seeds must be integers, got {','.join(_SEEDS.value)}."
    ) from error
  run_table(
    cells(_DATASETS.value, _NETS.value, _RECIPES.value, seeds),
    pathlib.Path(flag.workdir),
    pathlib.Path(_RESULTS.value),
    pathlib.Path(_PAGE.value),
    flag.data_dir,
    flag.progress,
    _RERUN.value,
  )


if __name__ == "__main__":
  _cli.run(main)
