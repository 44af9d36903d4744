"""The stages of the Mode Path Fusion study: each makes one network a seed."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import _mpf_study, _stage
from jaxmerge import alignment, curves, merging, training

PyTree = Any
Networks = dict[str, PyTree]
Meta = dict[str, Any]


class Run(NamedTuple):
  """What a stage is given.

  Attributes:
    study: data, network and losses.
    networks: what the earlier stages made.
    keys: PRNG keys, one a seed.
    options: of the training loop: checkpoints, reports, progress bar.
  """

  study: _mpf_study.Study
  networks: Networks
  keys: jax.Array
  options: dict[str, Any]


class Stage(NamedTuple):
  """A stage.

  Attributes:
    number: fixed, for its PRNG keys.
    needs: names of the stages whose networks it uses.
    make: does the work: the network's tree and what is to be recorded.
  """

  number: int
  needs: tuple[str, ...]
  make: Callable[[Run], tuple[PyTree, Meta]]


def _trained(result: training.TrainResult) -> tuple[PyTree, Meta]:
  return {"params": result.params}, {"steps": result.steps}


def _optimizer(
  run: Run, settings: Any, rows: Any, epochs: int, per_epoch: bool = False
) -> training.Optimizer:
  study = run.study
  plan = training.plan_epoch(
    rows.shape[1], study.config.batch_size, study.num_devices
  )
  return training.sgd(
    settings.learning_rate,
    settings.final_learning_rate,
    epochs,
    plan.steps,
    momentum=settings.momentum,
    weight_decay=settings.weight_decay,
    per_epoch=per_epoch,
  )


def _base(part: str) -> Callable[[Run], tuple[PyTree, Meta]]:
  """Trains a network from scratch on a part of the data."""

  def make(run: Run) -> tuple[PyTree, Meta]:
    study, settings = run.study, run.study.config.base
    init_keys, keys = jax.vmap(jax.random.split, out_axes=1)(run.keys)
    rows = study.parts[part]
    return _trained(
      training.fit(
        study.loss_fn,
        study.init(init_keys),
        study.train,
        key=keys,
        indices=rows,
        optimizer=_optimizer(run, settings, rows, settings.epochs),
        epochs=settings.epochs,
        reset_optimizer=settings.reset_optimizer,
        **run.options,
      )
    )

  return make


def _finetune(start: str) -> Callable[[Run], tuple[PyTree, Meta]]:
  """Trains on from a network: the curve's data for the curve's steps."""

  def make(run: Run) -> tuple[PyTree, Meta]:
    study, config = run.study, run.study.config
    rows = study.parts["joint"]
    return _trained(
      training.fit(
        study.loss_fn,
        run.networks[start]["params"],
        study.train,
        key=run.keys,
        indices=rows,
        optimizer=_optimizer(run, config.finetune, rows, config.curve.epochs),
        epochs=config.curve.epochs,
        **run.options,
      )
    )

  return make


def _average(run: Run) -> tuple[PyTree, Meta]:
  a, b = (run.networks[name]["params"] for name in ("model_a", "model_b"))
  return {"params": merging.average([a, b])}, {}


def _align(run: Run) -> tuple[PyTree, Meta]:
  """Aligns B to A; in the published code both to a random network."""
  a, b = (run.networks[name]["params"] for name in ("model_a", "model_b"))
  if run.study.config.recipe == "paper":
    reference = run.study.init(run.keys)
    a = jax.vmap(_aligned)(reference, a)
    b = jax.vmap(_aligned)(reference, b)
  else:
    b = jax.vmap(_aligned)(a, b)
  return {"params": b, "a": a}, {}


@jax.jit
def _aligned(reference: PyTree, model: PyTree) -> PyTree:
  return alignment.ot_align(reference, model)[0]


def _ot(run: Run) -> tuple[PyTree, Meta]:
  aligned = run.networks["aligned"]
  return {"params": merging.average([aligned["a"], aligned["params"]])}, {}


def _curve(
  ends: Callable[[Networks], tuple[PyTree, PyTree]], beta: bool = False
) -> Callable[[Run], tuple[PyTree, Meta]]:
  """Mode Path Fusion between two networks."""

  def make(run: Run) -> tuple[PyTree, Meta]:
    study, settings = run.study, run.study.config.curve
    start, end = ends(run.networks)
    init_keys, keys = jax.vmap(jax.random.split, out_axes=1)(run.keys)
    init = settings.init
    if init == "network":
      init = [
        study.init(jax.vmap(jax.random.fold_in, (0, None))(init_keys, index))
        for index in range(settings.num_points - 2)
      ]
    rows = study.parts["joint"]
    merged, info = curves.mode_path_fusion(
      study.loss_fn,
      start,
      end,
      study.train,
      key=keys,
      grid_examples=5_000,
      indices=rows,
      optimizer=_optimizer(
        run, settings, rows, settings.epochs, settings.per_epoch_schedule
      ),
      epochs=settings.epochs,
      kind=settings.kind,
      num_points=settings.num_points,
      init=init,
      t_sampling="beta" if beta else settings.t_sampling,
      concentration=settings.concentration,
      t_shared=settings.t_shared,
      phi_weight_decay=settings.phi_weight_decay,
      **run.options,
    )
    return {"params": merged, "points": info.curve.points}, {
      "steps": info.steps,
      "grid": info.grid.tolist(),
      "train_loss": info.losses.tolist(),
      "best_t": info.best_t.tolist(),
    }

  return make


def _a_and_b(networks: Networks) -> tuple[PyTree, PyTree]:
  return networks["model_a"]["params"], networks["model_b"]["params"]


def _average_and_b(networks: Networks) -> tuple[PyTree, PyTree]:
  # The published code averages in place, so that the curve begins at the
  # average and not at A.
  return networks["avg"]["params"], networks["model_b"]["params"]


def _a_and_aligned(networks: Networks) -> tuple[PyTree, PyTree]:
  return networks["model_a"]["params"], networks["aligned"]["params"]


_ENDS = ("model_a", "model_b")

STAGES: dict[str, Stage] = {
  "joint": Stage(0, (), _base("joint")),
  "model_a": Stage(1, (), _base("a")),
  "model_b": Stage(2, (), _base("b")),
  "avg": Stage(3, _ENDS, _average),
  "aligned": Stage(4, _ENDS, _align),
  "ot": Stage(5, ("aligned",), _ot),
  "mpf": Stage(6, _ENDS, _curve(_a_and_b)),
  "mpf_ot": Stage(7, ("model_a", "aligned"), _curve(_a_and_aligned)),
  "mpf_beta": Stage(8, _ENDS, _curve(_a_and_b, beta=True)),
  "avg_finetune": Stage(9, ("avg",), _finetune("avg")),
  "joint_extra": Stage(10, ("joint",), _finetune("joint")),
  "ensemble": Stage(11, _ENDS, lambda run: ({}, {})),
}

_PAPER_STAGES = {"mpf": Stage(6, ("avg", "model_b"), _curve(_average_and_b))}


def stages_of(config: Any) -> dict[str, Stage]:
  """The stages that a configuration's rows need, in order."""
  known = STAGES | (_PAPER_STAGES if config.recipe == "paper" else {})
  wanted: dict[str, Stage] = {}

  def want(name: str) -> None:
    for need in known[name].needs:
      want(need)
    wanted.setdefault(name, known[name])

  for row in config.rows:
    want(row)
  return wanted


def like(name: str, study: _mpf_study.Study) -> PyTree:
  """A tree of the structure and shapes that a stage saves."""
  params = study.init(study.keys(0))
  tree = {"params": params}
  if name == "aligned":
    tree["a"] = params
  if name.startswith("mpf"):
    count = study.config.curve.num_points
    tree["points"] = jax.tree.map(lambda x: jnp.stack([x] * count), params)
  return tree


def run_stage(
  name: str,
  stage: Stage,
  study: _mpf_study.Study,
  networks: Networks,
  workdir: pathlib.Path,
  progress: bool,
) -> tuple[PyTree, Meta]:
  """Does a stage, goes on with it, or finds it done.

  Args:
    name: the stage's name.
    stage: the stage.
    study: data, network and losses.
    networks: what the earlier stages made.
    workdir: the run's folder.
    progress: whether to show a progress bar.

  Returns:
    The stage's tree and its record.
  """
  if name == "ensemble":
    return stage.make(Run(study, networks, study.keys(stage.number), {}))

  def make(options: dict[str, Any]) -> tuple[PyTree, Meta]:
    options |= {
      "batch_size": study.config.batch_size,
      "seed_axis": True,
      "transform": study.transform,
    }
    return stage.make(Run(study, networks, study.keys(stage.number), options))

  return _stage.run(
    name,
    make,
    like(name, study),
    workdir,
    checkpoint_every=study.config.checkpoint_every,
    progress=progress,
  )
