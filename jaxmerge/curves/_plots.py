"""Pictures of planes."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmerge.curves import _plane_values


def _import_matplotlib() -> Any:
  try:
    import matplotlib
    import matplotlib.figure
  except ImportError as error:
    raise ImportError(
      "Pictures need matplotlib, which is not installed: "
      "pip install 'jaxmerge[experiments]'."
    ) from error
  return matplotlib


def _levels(values: np.ndarray, count: int) -> np.ndarray:
  """Log-spaced levels between the smallest and the largest positive value."""
  good = values[np.isfinite(values) & (values > 0)]
  low, high = (good.min(), good.max()) if good.size else (0.1, 1.0)
  return np.geomspace(low, max(high, low * (1 + 1e-6)), count)


def _draw(
  figure: Any,
  axes: Any,
  xs: np.ndarray,
  ys: np.ndarray,
  values: np.ndarray,
  label: str,
  levels: int,
) -> int:
  """Draws one map; returns how many cells are not finite."""
  from matplotlib import colors

  bad = ~np.isfinite(values)
  ladder = _levels(values, levels)
  if (~bad).any() and min(values.shape) > 1:
    filled = axes.contourf(
      xs,
      ys,
      # Zeros have no logarithm.
      np.ma.masked_array(np.maximum(values, ladder[0]), bad),
      levels=ladder,
      norm=colors.LogNorm(ladder[0], ladder[-1]),
      cmap="viridis_r",
      extend="max",
    )
    bar = figure.colorbar(filled, ax=axes, label=label)
    places = ladder[:: max(1, levels // 6)]
    bar.set_ticks(places, labels=[f"{place:.3g}" for place in places])
    bar.ax.minorticks_off()
  if bad.any():
    axes.pcolor(
      xs,
      ys,
      np.ma.masked_array(np.ones_like(values), ~bad),
      shading="nearest",
      cmap=colors.ListedColormap(["0.8"]),
      hatch="///",
      edgecolor="0.4",
      linewidth=0,
    )
  return int(bad.sum())


def plot_plane(
  found: _plane_values.PlaneValues,
  path: str | os.PathLike[str],
  *,
  maps: Sequence[tuple[str, str, str]] | None = None,
  curve: Any = None,
  ends: Any = None,
  merged: Any = None,
  title: str = "",
  levels: int = 25,
) -> list[pathlib.Path]:
  """Draws metrics on a plane side by side, with a curve in it.

  Colours are spaced by logarithm. The ends are dots joined by a dashed
  straight line, the merged network is a diamond. Cells whose value is not
  finite are grey and hatched, and their number is in the map's title.

  Args:
    found: what `plane_values` returned.
    path: where to write, with or without a suffix: .png, .svg, and .npz with
      all that is drawn.
    maps: what to draw, as data set, metric and label; by default every metric
      of every data set.
    curve: coordinates of points of a curve, `[points, 2]`, or None.
    ends: coordinates of the two ends, `[2, 2]`, or None.
    merged: coordinates of the merged network, `[2]`, or None.
    title: of the figure.
    levels: number of levels of each map.

  Returns:
    The paths that were written.

  Raises:
    ImportError: matplotlib is not installed.
    ValueError: a map names what was not measured, or there are fewer than
      two levels.

  References:
    Garipov et al., Loss Surfaces, Mode Connectivity, and Fast Ensembling of
    DNNs, 2018 (https://arxiv.org/abs/1802.10026).

  >>> import tempfile
  >>> xs, values = np.arange(3.0), np.array([[1, 2, 3], [2, 3, 4.0]])
  >>> found = _plane_values.PlaneValues(
  ...   xs, xs[:2], {"test": {"loss": values}}, {"test": {"loss": 0}}, 0.0
  ... )
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   paths = plot_plane(found, f"{folder}/plane", ends=[[0, 0], [2, 0]])
  >>> [path.name for path in paths]
  ['plane.png', 'plane.svg', 'plane.npz']
  """
  if maps is None:
    maps = [
      (dataset, metric, f"{dataset} {metric}")
      for dataset, metrics in found.values.items()
      for metric in metrics
    ]
  for dataset, metric, _ in maps:
    if metric not in found.values.get(dataset, {}):
      known = [
        f"{a}/{b}" for a, metrics in found.values.items() for b in metrics
      ]
      raise ValueError(
        f"{dataset}/{metric} was not measured. Choose from {', '.join(known)}."
      )
  if levels < 2 or not maps:
    raise ValueError(f"A picture needs a map and 2 levels, got {levels}.")
  matplotlib = _import_matplotlib()
  # Not pyplot, which would choose a backend for the whole process.
  spread = [max(float(np.ptp(axis)), 1e-12) for axis in (found.ys, found.xs)]
  height = 1.0 + 3.9 * min(max(spread[0] / spread[1], 0.4), 1.5)
  figure = matplotlib.figure.Figure(
    figsize=(5.2 * len(maps), height), layout="constrained"
  )
  row = figure.subplots(1, len(maps), squeeze=False)
  for axes, (dataset, metric, label) in zip(row[0], maps, strict=True):
    values = found.values[dataset][metric]
    bad = _draw(figure, axes, found.xs, found.ys, values, label, levels)
    if ends is not None:
      places = np.asarray(ends)
      axes.plot(*places.T, "k--", linewidth=1.2)
    if curve is not None:
      axes.plot(*np.asarray(curve).T, color="C3", linewidth=2)
    if ends is not None:
      axes.plot(*places.T, "ko", markersize=7)
    if merged is not None:
      axes.plot(*np.asarray(merged), "D", color="C3", mec="k", markersize=8)
    cells = (
      f" ({bad} of {values.size} cells not finite, hatched)" if bad else ""
    )
    axes.set_title(label + cells, fontsize="medium")
    axes.set_aspect("equal")
  figure.suptitle(title)
  stem = pathlib.Path(path)
  if stem.suffix in (".png", ".svg", ".npz"):
    stem = stem.with_suffix("")
  stem.parent.mkdir(parents=True, exist_ok=True)
  drawn = {
    name: np.asarray(value, np.float64)
    for name, value in (("curve", curve), ("ends", ends), ("merged", merged))
    if value is not None
  }
  arrays: dict[str, Any] = {"xs": found.xs, "ys": found.ys} | drawn
  for dataset, metric, _ in maps:
    arrays[f"{dataset}/{metric}"] = found.values[dataset][metric]
  paths = []
  for kind in ("png", "svg", "npz"):
    target = stem.with_name(f"{stem.name}.{kind}")
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    if kind == "npz":
      with temporary.open("wb") as file:
        np.savez(file, **arrays)
    else:
      # Neither dates nor random names: equal figures are equal files.
      dated = {"Date": None} if kind == "svg" else None
      with matplotlib.rc_context({"svg.hashsalt": "jaxmerge"}):
        figure.savefig(temporary, format=kind, dpi=110, metadata=dated)
    temporary.replace(target)
    paths.append(target)
  return paths
