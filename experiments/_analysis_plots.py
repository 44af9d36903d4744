"""The figures of the analysis of task vectors, as PNG and SVG."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

FIGURES = ("kept", "conflicts", "consistency", "cosines")


def _save(figure: Any, folder: pathlib.Path, name: str) -> None:
  """Writes both formats under temporary names and renames them."""
  for ending in ("png", "svg"):
    path = folder / f"{name}.{ending}"
    temporary = path.with_name(f".{path.name}")
    # No date: the same figures give the same file.
    metadata = {"Date": None} if ending == "svg" else None
    figure.savefig(temporary, format=ending, dpi=110, metadata=metadata)
    temporary.replace(path)


def _kept(axes: Any, found: dict[str, Any]) -> None:
  kept = found["kept"]
  x = 100 * np.array(kept["densities"])
  for which, label in (
    ("top", "highest magnitude"),
    ("random", "random"),
    ("bottom", "lowest magnitude"),
  ):
    axes.plot(x, 100 * np.array(kept["accuracy"][which]), "o-", label=label)
  axes.axhline(100 * kept["whole"], color="black", ls="--", label="all")
  axes.axhline(100 * kept["none"], color="gray", ls=":", label="none")
  axes.set_xlabel("kept entries of the task vector %")
  axes.set_ylabel("accuracy on the task %")
  axes.legend(fontsize=7)


def _conflicts(axes: Any, found: dict[str, Any]) -> None:
  for learner, rates in found["conflicts"].items():
    x = np.arange(2, len(rates) + 2)
    axes.plot(x, 100 * np.array(rates), "o-", label=learner)
  axes.set_xlabel("tasks")
  axes.set_ylabel(
    f"sign conflicts % of the top {100 * found['config']['top']:g}%"
  )
  axes.legend()


def _consistency(axes: Any, found: dict[str, Any]) -> None:
  for place, (which, label) in enumerate(
    (("all", "all parameters"), ("without", "without tables of embeddings"))
  ):
    one = found["consistency"][which]
    there = np.flatnonzero(one["numbers"])
    sizes = np.array(one["magnitudes"])[there]
    axes.bar(there + 0.4 * place, sizes, width=0.4, align="edge", label=label)
  axes.legend(fontsize=7)
  axes.set_xlabel("updates in the direction taken most often")
  axes.set_ylabel("mean magnitude of the task vector")


def plot(found: dict[str, Any], folder: pathlib.Path) -> None:
  """Draws all figures.

  Args:
    found: the measurements.
    folder: receives them.
  """
  import matplotlib

  matplotlib.use("Agg")
  # Fixed identifiers in the SVG.
  matplotlib.rcParams["svg.hashsalt"] = "jaxmerge"
  from matplotlib import pyplot

  for name, draw in (
    ("kept", _kept),
    ("conflicts", _conflicts),
    ("consistency", _consistency),
  ):
    figure, axes = pyplot.subplots(figsize=(5, 3.5), layout="constrained")
    draw(axes, found)
    _save(figure, folder, name)
    pyplot.close(figure)
  figure, both = pyplot.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
  image: Any = None
  for axes, (learner, matrix) in zip(
    both, found["cosines"].items(), strict=True
  ):
    image = axes.imshow(np.array(matrix), vmin=-1, vmax=1, cmap="RdBu_r")
    axes.set_title(learner, fontsize=9)
    axes.set_xlabel("task")
  figure.colorbar(image, ax=both, shrink=0.8, label="cosine")
  _save(figure, folder, "cosines")
  pyplot.close(figure)
