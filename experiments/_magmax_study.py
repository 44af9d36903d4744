"""What the study of MagMax is made of: streams, learners, merged networks."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from experiments import _backbone, _backbone_images, _continual_study
from jaxmerge import checkpoints, continual, merging
from jaxmerge import tree as tree_lib
from jaxmerge.continual import strategies, streams

PyTree = Any
Bar = Callable[[str], None]

# What a killed run loses at most, beside the task that it was in.
_SAVE_SECONDS = 60.0
LEARNERS = ("joint", "sequential", "independent", "lwf", "ewc")


class Row(NamedTuple):
  """One row of the table.

  Attributes:
    learner: whose networks it is made of.
    rule: a rule of `jaxmerge.merging`; "" for the network of the last task.
    options: of the rule.
    fixed: the coefficient that the paper has.
    grid: the ones that validation chooses from.
  """

  learner: str
  rule: str
  options: dict[str, Any]
  fixed: float
  grid: tuple[float, ...] = (1.0,)


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
  """A configuration with its network and data.

  Attributes:
    config: the configuration.
    backbone: the network and the set.
    rows: the rows by name.
  """

  config: ml_collections.ConfigDict
  backbone: _backbone.Backbone
  rows: dict[str, Row]


def build(config: ml_collections.ConfigDict, data_dir: str | None) -> Study:
  """Checks a configuration and loads its network and data.

  Args:
    config: the configuration.
    data_dir: folder of the set.

  Returns:
    The study.

  Raises:
    ValueError: a field is out of its range, or something cannot be had.
  """
  rows = {}
  for name, given in config.rows.items():
    try:
      row = Row(**given.to_dict())
    except TypeError as error:
      raise ValueError(
        f"Row {name}: {error}. The fields are {', '.join(Row._fields)}."
      ) from error
    if row.learner not in config.learners:
      raise ValueError(
        f"Row {name}: unknown learner {row.learner!r}. Choose one of "
        f"{', '.join(config.learners)}."
      )
    if row.rule:
      method = _rule(name, row)
      try:
        key = jax.random.key(0) if method.info.needs_key else None
        method.method(key)  # Checks the options' values.
      except ValueError as error:
        raise ValueError(f"Row {name}: {error}") from error
    rows[name] = row._replace(grid=tuple(row.grid))
  for field in ("curves", "export"):
    unknown = sorted(set(config[field]) - set(rows))
    if unknown:
      raise ValueError(f"{field} names {unknown[0]!r}, which is no row.")
  for name in config.export:
    if not rows[name].rule:
      raise ValueError(f"export names {name!r}, which is no merge.")
  if config.curve_orders < 0:
    raise ValueError(
      f"curve_orders must be at least 0, got {config.curve_orders}."
    )
  if not config.grow > 1:
    raise ValueError(f"grow must be above 1, got {config.grow}.")
  if not config.recipes or not config.orders:
    raise ValueError("recipes and orders must name at least one each.")
  study = Study(config, backbone=_load(config, data_dir), rows=rows)
  for order in range(len(config.orders)):
    stream(study, order)  # Says what does not fit before anything is trained.
  for name in config.learners:
    for recipe in recipes(study, name):
      strategy(study, name, recipe)
  return study


def _load(
  config: ml_collections.ConfigDict, data_dir: str | None
) -> _backbone.Backbone:
  kinds = {"texts": _backbone.texts, "images": _backbone_images.images}
  if config.kind not in kinds:
    raise ValueError(
      f"Unknown kind {config.kind!r}. Choose one of {', '.join(kinds)}."
    )
  return kinds[config.kind](config, data_dir)


def _rule(name: str, row: Row) -> merging.RegisteredMethod:
  """The rule of a row, whose coefficient is 1."""
  try:
    found = merging.get(row.rule, **row.options)
    scaled = "scale" in merging.info(row.rule).options
    rule = merging.get(row.rule, **row.options, scale=1.0) if scaled else found
  except (TypeError, ValueError) as error:
    raise ValueError(f"Row {name}: {error}") from error
  if not rule.info.streams or rule.info.statistics is not None:
    raise ValueError(
      f"Row {name}: {row.rule} does not take one network after the other. "
      "Choose another rule."
    )
  return rule


def stream(study: Study, order: int) -> streams.Stream:
  """The tasks in one of the class orders.

  Args:
    study: the study.
    order: place in `config.orders`.

  Returns:
    The stream; the backbone says which examples are for validation.
  """
  back, config = study.backbone, study.config
  given = config.orders[order]
  options: dict[str, Any]
  if isinstance(given, int):
    options = {"seed": None if given < 0 else given}
  else:
    options = {"order": tuple(given)}
  found = streams.class_incremental(
    back.pool, back.test, num_tasks=config.num_tasks, **options
  )
  return _continual_study.split(found, config.per_class, back.held_out)


def problem(study: Study, order: int) -> continual.Problem:
  """A stream and the pre-trained network on the devices."""
  key = jax.random.fold_in(jax.random.key(0), order)
  return continual.make_problem(
    stream(study, order),
    study.backbone.logits_fn,
    jax.tree.map(lambda leaf: leaf[None], study.backbone.params),
    keys=key[None],
    augment_on_host=study.backbone.augment_on_host,
    statistics_fn=study.backbone.statistics_fn,
    mask_fn=study.backbone.mask_fn,
    devices=study.config.devices or None,
  )


def kind(study: Study, learner: str) -> str:
  """Which of `LEARNERS` a learner is; by default its name says it."""
  return study.config.learners[learner].get("learner", learner)


def by_task(study: Study, row: str) -> bool:
  """Whether a row is each task's own network on its own examples."""
  one = study.rows[row]
  return kind(study, one.learner) == "independent" and not one.rule


def recipes(study: Study, learner: str) -> tuple[str, ...]:
  """Names of the recipes of a learner: its own, or those of all."""
  own = study.config.learners[learner].get("recipes")
  return tuple(own or study.config.recipes)


def strategy(study: Study, learner: str, recipe: str) -> continual.Strategy:
  """How a learner trains by a recipe.

  Args:
    study: the study.
    learner: its name.
    recipe: its name.

  Returns:
    The strategy, without a merge.

  Raises:
    ValueError: an option is unknown or out of its range.
  """
  config = study.config
  options = config.learners[learner].to_dict()
  own = options.pop("recipes", None) or config.recipes.to_dict()
  options.pop("learner", None)
  which = kind(study, learner)
  chosen = {**config.training.to_dict(), **own[recipe]}
  # A recipe may have options of the learner beside those of the training.
  for name in list(chosen):
    if name not in continual.Training._fields:
      options[name] = chosen.pop(name)
  training = _continual_study.settings(f"{learner}.{recipe}", chosen)
  if which not in LEARNERS:
    raise ValueError(
      f"Unknown learner {which!r}. Choose one of {', '.join(LEARNERS)}."
    )
  try:
    if which == "joint":
      return strategies.joint(training, **options)
    if which == "independent":
      one = continual.Learner(training, start="initial", head="task", **options)
      return continual.compose("independent", one)
    name = "naive" if which == "sequential" else which
    return strategies.get(name, training=training, head="task", **options)
  except (TypeError, ValueError) as error:
    raise ValueError(f"Learner {learner}: {error}") from error


def train(
  study: Study,
  one: continual.Problem,
  learner: str,
  recipe: str,
  folder: pathlib.Path,
  bar: Bar,
) -> float:
  """Trains the networks of all tasks, or goes on with it.

  Args:
    study: the study.
    one: the problem.
    learner: its name.
    recipe: its name.
    folder: receives a checkpoint a task, see `expert`.
    bar: is told of each task.

  Returns:
    Seconds of training.
  """
  chosen = strategy(study, learner, recipe)
  state = chosen.init(one)
  done, seconds = 0, 0.0
  with checkpoints.Store(folder / "state", max_to_keep=1) as kept:
    found = kept.restore(state)
    if found is not None:
      done, state, record = found
      seconds = record["seconds"]
    bar(f"{done} tasks found")
    saved = time.perf_counter()
    for task in range(done, one.num_tasks):
      begin = time.perf_counter()
      state = chosen.observe(one, state, task)
      one.memo.clear()
      if chosen.measured(one, task):
        params = jax.tree.map(lambda leaf: leaf[0], chosen.params(one, state))
        study.backbone.save(expert(folder, task), params)
      seconds += time.perf_counter() - begin
      # The state of a large network takes longer to write than a short task.
      now = time.perf_counter()
      if now - saved > _SAVE_SECONDS or task + 1 == one.num_tasks:
        kept.save(task + 1, state, {"seconds": seconds})
        saved = now
      bar(f"task {task + 1}")
    kept.wait()
  return seconds


def expert(folder: pathlib.Path, task: int) -> pathlib.Path:
  """Folder of a task's network."""
  return folder / f"task-{task:03d}"


_lerp = jax.jit(tree_lib.lerp)


def scaled(base: PyTree, merged: PyTree, scale: float) -> PyTree:
  """`base + scale * (merged - base)`: another coefficient of a merge."""
  return _lerp(base, merged, np.float32(scale))


def merges(
  study: Study,
  names: Sequence[str],
  folder: pathlib.Path,
  num_tasks: int,
  key: jax.Array,
) -> Iterator[tuple[int, Callable[[str], PyTree]]]:
  """Merges the networks of a learner, one task after the other.

  Each network is read once and given to every rule: what is held does not grow
  with their number.

  Args:
    study: the study.
    names: rows, all of that learner.
    folder: of the learner's networks.
    num_tasks: how many there are.
    key: PRNG key, for rules that draw.

  Yields:
    After each task its number, and a function that gives the network of a row
    (with the coefficient 1), which is to be called before going on.
  """
  base = study.backbone.params
  methods, states = {}, {}
  for name in names:
    row = study.rows[name]
    if row.rule:
      rule = _rule(name, row)
      methods[name] = rule.method(key if rule.info.needs_key else None)
      states[name] = methods[name].init(base)
  for task in range(num_tasks):
    params = study.backbone.load(expert(folder, task))
    for name, method in methods.items():
      states[name] = method.update(states[name], params, donate=True)

    def merged(name: str, params: PyTree = params) -> PyTree:
      if name in methods:
        return methods[name].finalize(states[name])
      return params

    yield task, merged


def seed_key(order: int) -> jax.Array:
  """PRNG key of the merges of a class order."""
  return jax.random.fold_in(jax.random.key(1), order)
