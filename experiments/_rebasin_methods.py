"""The ways to align a pair of networks, and what is measured of each."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _rebasin_study
from jaxmerge import alignment, curves, merging, training

PyTree = Any
Aligned = tuple[PyTree, dict[str, Any]]


def _match_weights(
  study: _rebasin_study.Study, reference: PyTree, model: PyTree, key: jax.Array
) -> Aligned:
  aligned, info = alignment.weight_matching(
    reference, model, study.spec, key=key, restarts=study.config.restarts
  )
  return aligned, {
    "objective": float(info.objectives[-1]),
    "sweeps": info.n_iters,
    "converged": bool(info.converged),
  }


def _match_activations(
  study: _rebasin_study.Study, reference: PyTree, model: PyTree, key: jax.Array
) -> Aligned:
  del key
  aligned, info = alignment.activation_matching(
    *_by_group(study, reference, model), model, study.spec
  )
  return aligned, {"objective": float(info.objectives[-1])}


def _by_group(
  study: _rebasin_study.Study, reference: PyTree, model: PyTree
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """Activations of the matching images, for each group of neurons."""
  first, second = (
    alignment.group_activations(
      study.spec, params, study.collect(params, study.matching["input"])
    )
    for params in (reference, model)
  )
  return first, second


def _transport(**options: Any) -> Callable[..., Aligned]:
  """Optimal transport with options of `alignment.ot_align`."""

  def align(
    study: _rebasin_study.Study,
    reference: PyTree,
    model: PyTree,
    key: jax.Array,
  ) -> Aligned:
    del key
    more: dict[str, Any] = {}
    if options["by"] == "activations":
      more["activations"] = _by_group(study, reference, model)
    aligned, info = alignment.ot_align(
      reference, model, study.spec, **options, **more
    )
    return aligned, {
      "cost": [float(cost) for cost in info.cost],
      "converged": bool(info.converged.all()),
    }

  return align


def _straight_through(
  study: _rebasin_study.Study, reference: PyTree, model: PyTree, key: jax.Array
) -> Aligned:
  config = study.config
  size = min(config.batch_size, len(study.matching["label"]))
  batches = jax.tree.map(
    lambda leaf: leaf[: len(leaf) // size * size].reshape(
      -1, size, *leaf.shape[1:]
    ),
    study.matching,
  )
  aligned, info = alignment.straight_through(
    reference,
    model,
    study.mean_loss_fn,
    batches,
    optax.sgd(config.straight_through_rate, momentum=0.9),
    study.spec,
    key=key,
    steps=config.straight_through_steps,
  )
  return aligned, {
    "losses": [float(info.losses[0]), float(info.losses[info.best_step])],
    "best_step": int(info.best_step),
  }


def _randomly(
  study: _rebasin_study.Study, reference: PyTree, model: PyTree, key: jax.Array
) -> Aligned:
  del reference
  permutations = alignment.random_permutations(study.spec, model, key)
  return alignment.apply_permutations(study.spec, model, permutations), {}


_METHODS: dict[str, Callable[..., Aligned]] = {
  "naive": lambda study, reference, model, key: (model, {}),
  "random": _randomly,
  "weights": _match_weights,
  "activations": _match_activations,
  "ot_weights": _transport(by="weights"),
  "ot_activations": _transport(by="activations"),
  "sinkhorn": _transport(by="weights", solver="sinkhorn"),
  "straight_through": _straight_through,
}


def measure(
  study: _rebasin_study.Study, method: str, first: PyTree, second: PyTree
) -> dict[str, Any]:
  """Aligns every pair by a method, and measures the line between them.

  Args:
    study: the study.
    method: a name in `experiments.configs.rebasin.METHODS`.
    first: variables of the first networks, with an axis of seeds.
    second: those of the second ones.

  Returns:
    Figures, each a list with one entry a seed; accuracies in per cent.
  """
  config = study.config
  begin = time.perf_counter()
  pairs, records = [], []
  for i, seed in enumerate(config.seeds):
    reference, model = (
      jax.tree.map(lambda leaf, i=i: leaf[i], tree) for tree in (first, second)
    )
    key = jax.random.fold_in(jax.random.key(seed), 2)
    aligned, record = _METHODS[method](study, reference, model, key)
    pairs.append(jax.block_until_ready(aligned))
    records.append(record)
  seconds = (time.perf_counter() - begin) / len(pairs)
  aligned = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pairs)
  figures = _line(study, first, aligned)
  if config.repair and study.reset_fn is not None:
    repaired = _line(study, first, aligned, study.reset_fn)
    figures |= {f"repaired_{name}": value for name, value in repaired.items()}
  merged = merging.average([first, aligned])
  figures |= _judge(study, merged, "midpoint")
  if config.repair:
    figures |= _judge(
      study, _repaired(study, merged, first, aligned), "repaired"
    )
  return figures | {"seconds": seconds, "records": records}


def _line(
  study: _rebasin_study.Study,
  first: PyTree,
  second: PyTree,
  prepare: Callable[[PyTree], PyTree] | None = None,
) -> dict[str, Any]:
  """Loss and accuracy along the line, and its barriers."""
  line = curves.BezierCurve.through(first, second)
  figures: dict[str, Any] = {}
  profiles: dict[str, Any] = {}
  for part, data, rows in (
    ("train", study.train, study.profiled),
    ("test", study.test, None),
  ):
    grid, means = curves.profile(
      study.metric_fn,
      line,
      data,
      study.config.profile_points,
      prepare=prepare,
      seed_axis=True,
      indices=rows,
    )
    profiles["t"] = grid.tolist()
    for metric, scale in (("loss", 1), ("accuracy", 100)):
      values = scale * means[metric].astype(np.float64)
      found = curves.barrier(
        values, grid, higher_is_better=metric == "accuracy"
      )
      profiles[f"{part}_{metric}"] = values.tolist()
      figures[f"barrier_{part}_{metric}"] = found.barrier.tolist()
      figures[f"ends_{part}_{metric}"] = values[:, [0, -1]].tolist()
  return figures | {"profile": profiles}


def _repaired(
  study: _rebasin_study.Study, merged: PyTree, first: PyTree, second: PyTree
) -> PyTree:
  """The merged networks after REPAIR; with BatchNorm, that is a reset."""
  if study.reset_fn is not None:
    return jax.lax.map(study.reset_fn, merged)
  networks = []
  images = study.repairing.reshape(-1, *study.repairing.shape[2:])
  for i in range(len(study.config.seeds)):
    one, start, end = (
      jax.tree.map(lambda leaf, i=i: leaf[i], tree)
      for tree in (merged, first, second)
    )
    networks.append(
      alignment.repair(one, start, end, study.activations_fn, images)[0]
    )
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *networks)


def _judge(
  study: _rebasin_study.Study, networks: PyTree, name: str
) -> dict[str, Any]:
  """Loss and accuracy of networks, on training and test examples."""
  figures = {}
  for part, data, rows in (
    ("train", study.train, study.profiled),
    ("test", study.test, None),
  ):
    means = training.evaluate(
      study.metric_fn, networks, data, seed_axis=True, indices=rows
    )
    for metric, scale in (("loss", 1), ("accuracy", 100)):
      values = scale * means[metric].astype(np.float64)
      figures[f"{name}_{part}_{metric}"] = values.tolist()
  return figures
