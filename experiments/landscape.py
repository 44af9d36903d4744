"""Draws the loss landscape around a Mode Path Fusion, the paper's Figure 1.

    python -m experiments.landscape --workdir=runs/landscape \
      --mpf_workdir=runs/mnist \
      --config=experiments/configs/landscape.py:mnist-mlpnet

Takes the networks that experiments.mpf trained, looks at the loss and the
accuracy along the curve and along straight lines, before and after alignment,
for every seed, and at the plane through the curve's control points for one of
them. Killed at any moment and started again with the same workdir, it goes on.
See experiments/configs/landscape.py for the variants.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags

from experiments import (
  _cli,
  _hardware,
  _landscape_report,
  _mpf_stages,
  _mpf_study,
  _publish,
  _workdir,
  mpf,
)
from jaxmerge import checkpoints, curves

PyTree = Any

_ROOT = pathlib.Path(__file__).parent.parent

# --config, --workdir, --data_dir and --progress are those of experiments.mpf.
_MPF_WORKDIR = flags.DEFINE_string(
  "mpf_workdir", None, "Folder of the run of experiments.mpf."
)

# A and B, the curve's control points; the alignment is looked at if it is
# there.
_NEEDED = ("model_a", "model_b", "mpf")
_OPTIONAL = ("aligned", "mpf_ot")


def _check_config(config: ml_collections.ConfigDict) -> None:
  for name, least in (
    ("profile_points", 2),
    ("plane_points", 2),
    ("chunk", 1),
    ("eval_batch_size", 1),
    ("plane_seed", 0),
  ):
    if config[name] < least:
      raise ValueError(f"{name} must be at least {least}, got {config[name]}.")
  if config.margin < 0:
    raise ValueError(f"margin must not be negative, got {config.margin}.")


def _read_mpf_config(
  folder: pathlib.Path, config: ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
  """The configuration that the networks were trained with."""
  command = (
    "python -m experiments.mpf --config=experiments/configs/mpf.py:"
    f"{config.dataset}-{config.network} --workdir={folder}"
  )
  path = folder / "config.json"
  if not path.exists():
    raise ValueError(
      f"{folder} is no workdir of experiments.mpf (it has no config.json). "
      f"Make it with: {command}"
    )
  try:
    found = ml_collections.ConfigDict(json.loads(path.read_text()))
    theirs = found.dataset, found.network
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"{path} is damaged: it holds no configuration. Make it anew with: "
      f"{command}"
    ) from error
  if theirs != (config.dataset, config.network):
    raise ValueError(
      f"{folder} holds networks of {'-'.join(theirs)}, not of "
      f"{config.dataset}-{config.network}. Give that variant to --config, or "
      "another --mpf_workdir."
    )
  for name in _NEEDED:
    if not (folder / "networks" / name).is_dir():
      raise ValueError(
        f"{folder} has no finished network {name}. Make it with: {command} "
        f"(its config.rows must hold {', '.join(_NEEDED)})"
      )
  if config.plane_seed >= len(found.seeds):
    raise ValueError(
      f"plane_seed is {config.plane_seed}, but the networks have "
      f"{len(found.seeds)} seeds, counted from 0."
    )
  return found


def _load(
  folder: pathlib.Path, study: _mpf_study.Study
) -> tuple[dict[str, PyTree], int]:
  """The finished networks, and a checksum over them."""
  networks, checksum = {}, 0
  for name in (*_NEEDED, *_OPTIONAL):
    path = folder / "networks" / name
    if not path.is_dir():
      continue
    with checkpoints.Store(path, max_to_keep=1) as store:
      found = store.restore(_mpf_stages.like(name, study))
    if found is None:
      raise ValueError(
        f"{path} holds no good checkpoint. Run experiments.mpf again with "
        f"--workdir={folder}: it trains what is missing."
      )
    networks[name] = jax.tree.map(jnp.asarray, found[1])
    for leaf in jax.tree.leaves(networks[name]):
      checksum = zlib.crc32(np.asarray(leaf).tobytes(), checksum)
  return networks, checksum


def _paths(networks: dict[str, PyTree], kind: str) -> dict[str, Any]:
  """The curves and straight lines, with an axis of seeds in their points."""
  curve = curves.get(kind)(networks["mpf"]["points"])
  line = curves.BezierCurve.through(curve.point(0), curve.point(-1))
  paths = {"curve": curve, "line": line}
  if "aligned" in networks:
    aligned = networks["aligned"]
    paths["line_aligned"] = curves.BezierCurve.through(
      aligned["a"], aligned["params"]
    )
  if "mpf_ot" in networks:
    paths["curve_aligned"] = curves.get(kind)(networks["mpf_ot"]["points"])
  return paths


def _profiles(
  study: _mpf_study.Study,
  paths: dict[str, Any],
  config: ml_collections.ConfigDict,
  folder: pathlib.Path,
) -> dict[str, Any]:
  """Loss, accuracy in per cent, and weight norm along every path."""
  kept = folder / "profiles.json"
  found = json.loads(kept.read_text()) if kept.exists() else {}
  for name, path in paths.items():
    found.setdefault(name, {})
    if "norm" not in found[name]:
      grid, norms = curves.weight_norms(
        path, config.profile_points, seed_axis=True
      )
      found[name] |= {"t": grid.tolist(), "norm": norms.tolist()}
    for part, data in (("train", study.train), ("test", study.test)):
      if part in found[name]:
        continue
      _, means = curves.profile(
        study.metric_fn,
        path,
        data,
        config.profile_points,
        seed_axis=True,
        batch_size=config.eval_batch_size,
      )
      found[name][part] = {
        "loss": means["loss"].astype(np.float64).tolist(),
        "accuracy": (100 * means["accuracy"].astype(np.float64)).tolist(),
      }
      _workdir.write_json(kept, found)
  return found


def _plane(
  study: _mpf_study.Study,
  curve: Any,
  config: ml_collections.ConfigDict,
  folder: pathlib.Path,
  progress: bool,
) -> dict[str, Any]:
  """Measures and draws the plane through the control points of a curve."""
  seed = config.plane_seed
  curve = type(curve)(jax.tree.map(lambda leaf: leaf[:, seed], curve.points))
  middle = curve.num_points // 2
  plane = curves.Plane.through(
    curve.point(0), curve.point(-1), curve.point(middle)
  )
  xs, ys = plane.axes(config.plane_points, config.margin)
  found = curves.plane_values(
    study.metric_fn,
    plane,
    {"train": study.train, "test": study.test},
    xs,
    ys,
    chunk=config.chunk,
    path=folder / "plane_values.npz",
    progress="plane" if progress else None,
    batch_size=config.eval_batch_size,
  )
  for metrics in found.values.values():
    metrics["error"] = 100 * (1 - metrics["accuracy"])
  # Coordinates are linear in the control points.
  corners = np.array(
    [plane.coordinates(curve.point(i)) for i in range(curve.num_points)]
  )
  grid = jnp.linspace(0, 1, config.profile_points)
  weights = jax.vmap(lambda t: curve.weights(t, curve.num_points))(grid)
  merged = np.asarray(curve.weights(0.5, curve.num_points))
  curves.plot_plane(
    found,
    folder / "plane",
    maps=[
      ("train", "loss", "train loss"),
      ("test", "error", "test error %"),
    ],
    curve=np.asarray(weights) @ corners,
    ends=corners[[0, -1]],
    merged=merged @ corners,
    title=f"{config.dataset}, {config.network}, "
    f"seed {study.config.seeds[seed]}",
  )
  return {
    "seed": study.config.seeds[seed],
    "width": plane.width,
    "height": plane.height,
    "points": [len(xs), len(ys)],
    "non_finite": {
      part: counts["loss"] for part, counts in found.non_finite.items()
    },
    "train_loss_min": float(np.nanmin(found.values["train"]["loss"])),
    "test_error_min": float(np.nanmin(found.values["test"]["error"])),
    "corners": corners.tolist(),
  }


@contextlib.contextmanager
def _timed(folder: pathlib.Path) -> Iterator[list[float]]:
  """Adds to the seconds that earlier runs and parts took, kept in a file."""
  path = folder / "seconds.json"
  seconds: list[float] = json.loads(path.read_text()) if path.exists() else []
  begin = time.perf_counter()
  try:
    yield seconds
  finally:
    seconds.append(time.perf_counter() - begin)
    _workdir.write_json(path, seconds)


def run(
  config: ml_collections.ConfigDict,
  workdir: str,
  mpf_workdir: str,
  data_dir: str | None = None,
  progress: bool = True,
) -> dict[str, Any]:
  """Looks at the landscape, or goes on with it.

  Args:
    config: the configuration.
    workdir: folder of the run.
    mpf_workdir: folder of the run of experiments.mpf that has the networks.
    data_dir: folder of prepared TFDS sets, None for the default one.
    progress: whether to show a progress bar.

  Returns:
    What results.json holds.

  Raises:
    ValueError: bad input; one line says what and how to mend it.
  """
  _check_config(config)
  source = pathlib.Path(mpf_workdir)
  mpf_config = _read_mpf_config(source, config)
  study = _mpf_study.build(mpf_config, data_dir)
  networks, checksum = _load(source, study)
  # Of other networks, a workdir is refused as one of another configuration.
  whole = ml_collections.ConfigDict(
    {
      "landscape": _workdir.as_json(config),
      "mpf": _workdir.as_json(mpf_config),
      "networks": {"names": sorted(networks), "checksum": checksum},
    }
  )
  with _workdir.open_workdir(workdir, whole) as folder:
    paths = _paths(networks, mpf_config.curve.kind)
    with _timed(folder):
      profiles = _profiles(study, paths, config, folder)
    with _timed(folder) as seconds:
      plane = _plane(study, paths["curve"], config, folder, progress)
    results = {
      "config": _workdir.as_json(config),
      "mpf": _workdir.as_json(mpf_config),
      "sizes": study.sizes,
      "paths": profiles,
      "summary": _landscape_report.summarize(profiles),
      "plane": plane,
      "versions": _hardware.versions(),
      "hardware": _hardware.hardware(study.num_devices),
      "seconds": sum(seconds),
    }
    _workdir.write_json(folder / "results.json", results)
    _workdir.write_text(folder / "table.md", _landscape_report.table(results))
    _landscape_report.plot_profiles(results, folder / "profile.png")
  return results


def publish(
  results: dict[str, Any], folder: pathlib.Path, root: pathlib.Path = _ROOT
) -> None:
  """Keeps a run's figures in the repository: results, page and picture.

  Args:
    results: what `run` returned.
    folder: its workdir.
    root: of the checkout.
  """
  small = {name: value for name, value in results.items() if name != "paths"}
  _workdir.write_json(root / "experiments/results/landscape.json", small)
  _workdir.write_text(
    root / "docs/results/landscape.md", _landscape_report.page(small)
  )
  target = root / "docs/images/landscape.png"
  target.parent.mkdir(parents=True, exist_ok=True)
  shutil.copyfile(folder / "plane.png", target)


def main(argv: Sequence[str]) -> None:
  """Draws the landscape that the flags describe, and prints its table."""
  if len(argv) > 1:
    raise ValueError(f"Unknown arguments: {' '.join(argv[1:])}")
  mpf.require_flags("config", "workdir")
  if _MPF_WORKDIR.value is None:
    raise ValueError(
      "--mpf_workdir is missing, for instance --mpf_workdir=runs/digits: the "
      "workdir of experiments.mpf that has the networks."
    )
  flag = flags.FLAGS
  results = run(
    flag.config, flag.workdir, _MPF_WORKDIR.value, flag.data_dir, flag.progress
  )
  if _publish.PUBLISH.value:
    publish(results, pathlib.Path(flag.workdir))
  print(_landscape_report.table(results))
  print(f"Files and pictures: {flag.workdir}")


if __name__ == "__main__":
  _cli.run(main)
