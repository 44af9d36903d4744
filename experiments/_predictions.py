"""Predictions of a network on a split, with one program a bucket."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _backbone

PyTree = Any
LogitsFn = Callable[[PyTree, Any], jax.Array]


@functools.lru_cache(maxsize=16)
def _compiled(logits_fn: LogitsFn) -> Callable[[PyTree, Any], jax.Array]:
  def predict(params: PyTree, inputs: Any) -> jax.Array:
    return logits_fn(params, inputs).argmax(axis=-1).astype(jnp.int32)

  return jax.jit(predict)


def predictions(
  logits_fn: LogitsFn,
  params: PyTree,
  examples: _backbone.Examples,
  rows: np.ndarray | None = None,
  *,
  batch_size: int = 100,
) -> np.ndarray:
  """The class of the largest logit, of some examples.

  Args:
    logits_fn: `logits_fn(params, inputs) -> [b, classes]`.
    params: the parameters.
    examples: the split.
    rows: the examples, sorted; None for all.
    batch_size: how many at a time; a last one is padded, so that each bucket
      has one shape.

  Returns:
    int32, one for each of the rows.
  """
  if rows is None:
    rows = np.arange(len(examples.labels))
  run = _compiled(logits_fn)
  found = np.empty(len(examples.labels), np.int32)
  pending: list[tuple[np.ndarray, jax.Array]] = []
  for inputs, places in examples.buckets:
    mine = np.flatnonzero(np.isin(places, rows))
    for start in range(0, len(mine), batch_size):
      part = mine[start : start + batch_size]
      padded = np.resize(part, batch_size)
      # Not read yet: the next batch is sent while this one is computed.
      pending.append((places[part], run(params, inputs[padded])))
  for part, predicted in pending:
    found[part] = np.asarray(predicted)[: len(part)]
  return found[rows]


def accuracy(
  logits_fn: LogitsFn,
  params: PyTree,
  examples: _backbone.Examples,
  rows: np.ndarray | None = None,
  *,
  batch_size: int = 100,
) -> float:
  """The share of some examples that are classified rightly.

  Args:
    logits_fn: see `predictions`, and so are the others.
    params: the parameters.
    examples: the split.
    rows: which examples; None for all.
    batch_size: how many at a time.

  Returns:
    In [0, 1].
  """
  if rows is None:
    rows = np.arange(len(examples.labels))
  found = predictions(logits_fn, params, examples, rows, batch_size=batch_size)
  return float((found == examples.labels[rows]).mean())


def task_accuracies(
  logits_fn: LogitsFn,
  params: PyTree,
  examples: _backbone.Examples,
  tasks: list[np.ndarray],
  *,
  batch_size: int = 100,
) -> list[float]:
  """The accuracy on the examples of each task, among all classes.

  Args:
    logits_fn: see `predictions`.
    params: the parameters.
    examples: the split.
    tasks: the rows of each task.
    batch_size: how many at a time.

  Returns:
    In [0, 1], one a task.
  """
  rows = np.sort(np.concatenate(tasks))
  hits = np.zeros(len(examples.labels), bool)
  found = predictions(logits_fn, params, examples, rows, batch_size=batch_size)
  hits[rows] = found == examples.labels[rows]
  return [float(hits[task].mean()) for task in tasks]
