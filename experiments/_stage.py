"""A stage of a study: done once, gone on with, or found done."""

from __future__ import annotations

import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments import _workdir
from jaxmerge import checkpoints

PyTree = Any
Meta = dict[str, Any]


def run(
  name: str,
  make: Callable[[dict[str, Any]], tuple[PyTree, Meta]],
  like: PyTree,
  workdir: pathlib.Path,
  *,
  checkpoint_every: int = 1,
  progress: bool = False,
) -> tuple[PyTree, Meta]:
  """Does a stage, goes on with it, or finds it done.

  Args:
    name: the stage's name: that of its folder in networks/ and training/, and
      of its lines in metrics.jsonl.
    make: does the work: given options of the training loop (checkpoints,
      reports, progress bar), returns a tree and what is to be recorded.
    like: a tree of the structure and shapes that `make` returns.
    workdir: the run's folder.
    checkpoint_every: epochs between checkpoints.
    progress: whether to show a progress bar.

  Returns:
    The stage's tree and its record, with its seconds.
  """
  with checkpoints.Store(workdir / "networks" / name, max_to_keep=1) as done:
    found = done.restore(like)
    folder = workdir / "training" / name
    if found is not None:
      shutil.rmtree(folder, ignore_errors=True)
      return jax.tree.map(jnp.asarray, found[1]), found[2]
    log = _workdir.MetricsLog(workdir)
    log.begin(name)
    seconds: list[float] = []

    def on_epoch(record: dict[str, Any]) -> None:
      seconds.append(record["seconds"])
      log.add(name, record)

    begin = time.perf_counter()
    with checkpoints.Store(folder) as states:
      tree, meta = make(
        {
          "checkpoints": states,
          "checkpoint_every": checkpoint_every,
          "on_epoch": on_epoch,
          "progress": f"{name:13}" if progress else None,
        }
      )
    # Training is timed by its epochs, which a resumed run has kept.
    meta["seconds"] = sum(seconds) or time.perf_counter() - begin
    done.save(0, tree, meta)
    done.wait()
  shutil.rmtree(folder, ignore_errors=True)
  return tree, meta
