"""The examples of a training run."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxmerge import training
from jaxmerge.continual import _problem


def of_run(
  problem: _problem.Problem,
  rows: np.ndarray,
  keys: jax.Array,
  augmented: bool,
) -> tuple[Any, np.ndarray]:
  """The examples of a run, and which of them it goes through.

  Args:
    problem: the problem.
    rows: int32 `[seeds, n]`, rows of its training pool.
    keys: PRNG keys of the run, one a seed.
    augmented: whether the inputs are augmented, where the host does that.

  Returns:
    Data and indices as `training.train` takes them.
  """
  augment = problem.augment_on_host
  if augment is None:
    return problem.train, rows
  words = np.asarray(jax.random.key_data(keys[0])).tolist()
  pool = problem.stream.train

  def make(epoch: int) -> dict[str, np.ndarray]:
    draws = np.random.Generator(np.random.PCG64([*words, epoch]))
    inputs = augment(rows[0], draws) if augmented else pool["input"][rows[0]]
    return {
      "input": inputs,
      "label": pool["label"][rows[0]],
      "task": pool["task"][rows[0]],
    }

  every = np.arange(rows.shape[1], dtype=np.int32)
  return training.HostData(make, rows.shape[1]), every[None]
