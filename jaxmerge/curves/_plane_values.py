"""Metrics on a grid of a plane, in chunks, kept in a file."""

from __future__ import annotations

import json
import os
import pathlib
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from jaxmerge import training
from jaxmerge import tree as tree_lib
from jaxmerge.curves import _plane, _profile

PyTree = Any


class PlaneValues(NamedTuple):
  """What `plane_values` returns.

  Attributes:
    xs: coordinates along the plane's first axis, float64 `[columns]`.
    ys: coordinates along the second axis, float64 `[rows]`.
    values: by data set and metric, float64 `[rows, columns]`; values that are
      not finite are kept.
    non_finite: by data set and metric, how many of them are not finite.
    seconds: wall time; of a resumed call, that of what it did.
  """

  xs: np.ndarray
  ys: np.ndarray
  values: dict[str, dict[str, np.ndarray]]
  non_finite: dict[str, dict[str, int]]
  seconds: float


def _checksum(tree: PyTree) -> int:
  """CRC-32 of a tree's names, shapes, dtypes and bytes."""
  code = 0
  for name, leaf in zip(
    tree_lib.leaf_names(tree), jax.tree.leaves(tree), strict=True
  ):
    host = np.asarray(leaf)
    code = zlib.crc32(f"{name} {host.shape} {host.dtype}".encode(), code)
    code = zlib.crc32(host.tobytes(), code)
  return code


class _File:
  """The npz file of an unfinished or finished plane.

  Attributes:
    values: by data set and metric, flat; NaN where nothing is known yet.
    done: by data set, how many grid points are known, from the first on.
  """

  def __init__(
    self, path: pathlib.Path | None, identity: dict[str, Any], axes: Any
  ) -> None:
    self._path = path
    self._identity = identity
    self._axes = axes
    self.values: dict[str, dict[str, np.ndarray]] = {}
    self.done: dict[str, int] = dict.fromkeys(identity["data"], 0)
    if path is not None and path.exists():
      self._read(path)

  def _read(self, path: pathlib.Path) -> None:
    try:
      # Opened here: of a damaged one NumPy would leave it open.
      with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
        arrays = dict(kept)
      identity = json.loads(str(arrays.pop("identity")))
      done = json.loads(str(arrays.pop("done")))
      axes = [arrays.pop("xs"), arrays.pop("ys")]
    except Exception as error:  # zipfile, NumPy and JSON each have their own
      raise ValueError(
        f"{path} is damaged ({error}). Remove it to begin anew."
      ) from error
    if not all(map(np.array_equal, axes, self._axes)):
      raise ValueError(
        f"{path} was made for another grid. Choose another file, or remove it."
      )
    for name, mine in self._identity.items():
      if identity.get(name) != mine:
        raise ValueError(
          f"{path} was made with another {name}: {identity.get(name)} there "
          f"and {mine} here (of arrays, checksums). Choose another file, or "
          "remove it."
        )
    self.done = done
    for name, array in arrays.items():
      dataset, metric = name.split("/", 1)
      self.values.setdefault(dataset, {})[metric] = array.ravel()

  def add(
    self, dataset: str, start: int, values: dict[str, np.ndarray], count: int
  ) -> None:
    """Adds the values of grid points from `start` on, and writes the file."""
    total = len(self._axes[0]) * len(self._axes[1])
    mine = self.values.setdefault(
      dataset, {metric: np.full(total, np.nan) for metric in values}
    )
    if mine.keys() != values.keys():
      raise ValueError(
        f"The metrics are {', '.join(sorted(values))}, but {self._path} holds "
        f"{', '.join(sorted(mine))}. Remove it to begin anew."
      )
    for metric, array in values.items():
      mine[metric][start : start + count] = array[:count]
    self.done[dataset] = start + count
    if self._path is None:
      return
    xs, ys = self._axes
    arrays: dict[str, Any] = {
      f"{dataset}/{metric}": array.reshape(len(ys), len(xs))
      for dataset, metrics in self.values.items()
      for metric, array in metrics.items()
    }
    temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
      np.savez(
        file,
        identity=np.array(json.dumps(self._identity)),
        done=np.array(json.dumps(self.done)),
        xs=xs,
        ys=ys,
        **arrays,
      )
    temporary.replace(self._path)


def _axis(values: Any, name: str) -> np.ndarray:
  axis = np.asarray(values, np.float64)
  if axis.ndim != 1 or not axis.size or not np.isfinite(axis).all():
    raise ValueError(
      f"{name} must be a list of finite coordinates, got {values}."
    )
  return axis


def plane_values(
  metric_fn: Callable[[PyTree, PyTree], dict[str, jax.Array]],
  plane: _plane.Plane,
  datasets: Mapping[str, PyTree],
  xs: Any,
  ys: Any,
  *,
  chunk: int = 128,
  path: str | os.PathLike[str] | None = None,
  prepare: Callable[[PyTree], PyTree] | None = None,
  progress: str | None = None,
  **options: Any,
) -> PlaneValues:
  """Means of per-example metrics on a grid of a plane.

      values[data][metric][i, j] = mean over data of metric(a + x_j u + y_i v)

  One compiled program a data set runs over chunks of grid points. No more
  networks are held at a time than are computed at a time (one on a CPU, 16
  elsewhere), so that a chunk needs memory for the metrics of one batch at its
  points and, of each layer of the networks' inputs, three outputs; see
  `profile` for why these layers cost little.

  Args:
    metric_fn: `metric_fn(params, batch)` returns a dictionary of arrays
      `[examples]`. Keep one function object: each one compiles anew.
    plane: a `Plane`.
    datasets: by name ("train", "test"), pytrees of arrays `[examples, ...]`,
      or `training.Replicated`.
    xs: coordinates along the first axis, `[columns]`; see `Plane.axes`.
    ys: coordinates along the second axis, `[rows]`.
    chunk: grid points a call of the program. Between chunks the bar moves and
      the file is written; smaller ones also need less memory.
    path: an npz file that is written after every chunk, under a temporary
      name that is then renamed. A call that finds it goes on from it.
      The first chunk is computed again and compared, so that a file of
      another ``metric_fn`` or ``prepare`` is refused.
    prepare: `prepare(params) -> what metric_fn gets`, see `profile`.
    progress: label of a progress bar, None for none.
    **options: `batch_size`, `indices` and `devices` of `training.evaluate`.

  Returns:
    A `PlaneValues`.

  Raises:
    ValueError: an option is out of its range; or the file is damaged, or was
      made with another plane, grid or data.

  References:
    Garipov et al., Loss Surfaces, Mode Connectivity, and Fast Ensembling of
    DNNs, 2018 (https://arxiv.org/abs/1802.10026).

  >>> plane = _plane.Plane.through(
  ...   {"w": np.float32([0, 0])},
  ...   {"w": np.float32([1, 0])},
  ...   {"w": np.float32([0, 2])},
  ... )
  >>> found = plane_values(
  ...   lambda params, batch: {"loss": params["w"].sum() * batch},
  ...   plane,
  ...   {"ones": np.ones(4, np.float32)},
  ...   [0.0, 1.0],
  ...   [0.0, 1.0, 2.0],
  ... )
  >>> found.values["ones"]["loss"].tolist()
  [[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]]
  """
  xs, ys = _axis(xs, "xs"), _axis(ys, "ys")
  if chunk < 1:
    raise ValueError(f"chunk must be at least 1, got {chunk}.")
  if not datasets:
    raise ValueError("datasets is empty: give at least one, by name.")
  if slashed := [name for name in datasets if "/" in name]:
    raise ValueError(
      f"The name {slashed[0]!r} of a data set has a '/', which parts names of "
      "data sets and metrics in the file. Choose another name."
    )
  devices = options.pop("devices", None)
  placed = {
    name: data
    if isinstance(data, training.Replicated)
    else training.replicate(data, devices)
    for name, data in datasets.items()
  }
  weights = plane.weights(*np.meshgrid(xs, ys)).reshape(-1, 3)
  total = len(weights)
  identity: dict[str, Any] = {"data": dict.fromkeys(placed, 0)}
  if path is not None:
    identity = {
      "plane": _checksum(plane.points),
      "data": {
        name: _checksum(training.first_replica(data.value))
        for name, data in placed.items()
      },
      "indices": _checksum(_as_rows(options.get("indices"))),
    }
  file = _File(None if path is None else pathlib.Path(path), identity, (xs, ys))
  # As even as can be: the last chunk is filled up to the size of the others.
  chunk = -(-total // -(-total // chunk))
  begin = time.perf_counter()
  with tqdm.tqdm(
    total=total * len(placed),
    initial=sum(file.done.values()),
    desc=progress,
    disable=progress is None,
    unit="points",
  ) as bar:
    for name, data in placed.items():
      if file.done[name]:
        # Functions leave no mark in the file, their values do.
        first = weights[:chunk]
        means = _profile.evaluate_sums(
          metric_fn,
          plane.points,
          np.concatenate([first, first[-1:].repeat(chunk - len(first), 0)]),
          data,
          prepare=prepare,
          **options,
        )
        _check_same(file.values[name], _as_metrics(means, chunk), path)
      for start in range(file.done[name], total, chunk):
        rows = weights[start : start + chunk]
        count = len(rows)
        filled = np.concatenate([rows, rows[-1:].repeat(chunk - count, 0)])
        means = _profile.evaluate_sums(
          metric_fn, plane.points, filled, data, prepare=prepare, **options
        )
        file.add(name, start, _as_metrics(means, chunk), count)
        bar.update(count)
  values = {
    name: {
      metric: array.reshape(len(ys), len(xs))
      for metric, array in file.values[name].items()
    }
    for name in placed
  }
  return PlaneValues(
    xs=xs,
    ys=ys,
    values=values,
    non_finite={
      name: {
        metric: int((~np.isfinite(array)).sum())
        for metric, array in metrics.items()
      }
      for name, metrics in values.items()
    },
    seconds=time.perf_counter() - begin,
  )


def _as_rows(indices: Any) -> np.ndarray:
  """Rows of the data as their file knows them; none given, an empty array."""
  return np.asarray(() if indices is None else indices, np.int64)


def _check_same(
  known: dict[str, np.ndarray], found: dict[str, np.ndarray], path: Any
) -> None:
  """Raises unless the first point has the values that the file has."""
  for name, array in known.items():
    if name in found and not np.isclose(
      array[0], found[name][0], rtol=1e-3, atol=1e-6, equal_nan=True
    ):
      raise ValueError(
        f"{path} was made with another metric_fn or prepare: its first "
        f"{name} is {array[0]:g}, and now {found[name][0]:g}. Choose another "
        "file, or remove it."
      )


def _as_metrics(means: Any, points: int) -> dict[str, np.ndarray]:
  """Checks that the metrics are a dictionary of one number a point."""
  if not isinstance(means, dict) or not all(
    np.shape(mean) == (points,) for mean in means.values()
  ):
    raise ValueError(
      "On a plane metric_fn must return a dictionary of arrays [examples], "
      f"got means of shapes {jax.tree.map(np.shape, means)} at {points} points."
    )
  return {name: np.asarray(mean, np.float64) for name, mean in means.items()}
