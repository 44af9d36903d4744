"""What the continual learning study is made of: stream, network, strategies."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from experiments import _classify, _stage
from jaxmerge import continual, models, training
from jaxmerge import data as data_lib
from jaxmerge.continual import replay, strategies, streams

PyTree = Any

SCENARIOS = ("class", "task", "data", "permuted", "rotated")


def _stream(
  config: ml_collections.ConfigDict,
  train: data_lib.Dataset,
  test: data_lib.Dataset,
) -> streams.Stream:
  """The stream of a configuration."""
  wanted = config.stream
  seed = None if wanted.seed < 0 else wanted.seed
  common: dict[str, Any] = {"validation": wanted.validation}
  if wanted.scenario in ("class", "task"):
    make = (
      streams.class_incremental
      if wanted.scenario == "class"
      else streams.task_incremental
    )
    return make(train, test, num_tasks=wanted.num_tasks, seed=seed, **common)
  if wanted.scenario == "rotated":
    return streams.rotated(
      train, test, angles=tuple(wanted.angles), seed=seed or 0, **common
    )
  others = {"data": streams.data_incremental, "permuted": streams.permuted}
  if wanted.scenario not in others:
    raise ValueError(
      f"Unknown scenario {wanted.scenario!r}. Choose one of "
      f"{', '.join(SCENARIOS)}."
    )
  return others[wanted.scenario](
    train, test, num_tasks=wanted.num_tasks, seed=seed or 0, **common
  )


def split(
  stream: streams.Stream, per_class: int, held_out: np.ndarray
) -> streams.Stream:
  """A stream that trains on some of its examples.

  Args:
    stream: the stream.
    per_class: so many of each class, the first ones; 0 for all.
    held_out: rows that are for validation, in place of the stream's own where
      there are any.

  Returns:
    The stream.

  Raises:
    ValueError: `per_class` is negative.
  """
  if per_class < 0:
    raise ValueError(f"per_class must be at least 0, got {per_class}.")
  labels = stream.train["label"]
  tasks = []
  for task in stream.tasks:
    rows = task.train[~np.isin(task.train, held_out)]
    if per_class:
      rows = np.sort(
        np.concatenate(
          [rows[labels[rows] == label][:per_class] for label in task.classes]
        )
      )
    validation = task.validation
    if held_out.size:
      validation = task.train[np.isin(task.train, held_out)]
    tasks.append(task._replace(train=rows, validation=validation))
  return stream._replace(tasks=tuple(tasks))


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
  """The first dictionary with the entries of the second, level by level."""
  whole = dict(first)
  for name, value in second.items():
    if isinstance(value, dict) and isinstance(whole.get(name), dict):
      value = _merged(whole[name], value)
    whole[name] = value
  return whole


def settings(name: str, given: Any) -> continual.Training:
  """Settings of a training run from their entry in a configuration."""
  try:
    made = continual.Training(**given)
  except TypeError as error:
    raise ValueError(
      f"{name}: {error}. The fields are "
      f"{', '.join(continual.Training._fields)}."
    ) from error
  continual.check_training(made, name)
  return made


def _finetune(label: str, given: dict[str, Any]) -> continual.Finetune:
  tuned = settings(f"{label}.finetune", given.get("training", {}))
  try:
    return continual.Finetune(**{**given, "training": tuned})
  except TypeError as error:
    raise ValueError(
      f"{label}.finetune: {error}. The fields are "
      f"{', '.join(continual.Finetune._fields)}."
    ) from error


# Options of strategies that are settings of their own.
_PARTS: dict[str, Any] = {
  "adapter": models.Lora,
  "path": continual.Path,
  "projection": continual.Projection,
  "signs": continual.Signs,
}


def _part(name: str, make: Any, given: dict[str, Any]) -> Any:
  """Settings from their entry in a configuration."""
  given = dict(given)
  if given.get("training"):
    given["training"] = settings(f"{name}.training", given["training"])
  try:
    return make(**given)
  except TypeError as error:
    raise ValueError(
      f"{name}: {error}. The fields are {', '.join(make._fields)}."
    ) from error


def strategy(
  label: str, row: dict[str, Any], size: int | None
) -> continual.Strategy:
  """Makes the strategy of a row.

  Args:
    label: the row's name, for messages.
    row: its entry in the configuration.
    size: the buffer's size, which `by_size` may know; None for any.

  Returns:
    The strategy.

  Raises:
    ValueError: an option is unknown or out of its range.
  """
  options = dict(row)
  known = options.pop("by_size", {})
  options = _merged(options, known.get(str(size), {}))
  if "strategy" not in options:
    raise ValueError(f"Row {label} names no strategy: add one.")
  name = options.pop("strategy")
  for field in ("training", "curve", "coefficients"):
    if field in options:
      options[field] = settings(f"{label}.{field}", options[field])
  for field, make in _PARTS.items():
    if options.get(field):
      options[field] = _part(f"{label}.{field}", make, options[field])
  if options.get("finetune"):
    options["finetune"] = _finetune(label, options["finetune"])
  try:
    return strategies.get(name, **options)
  except ValueError as error:
    raise ValueError(f"Row {label}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Run:
  """One row at one buffer size.

  Attributes:
    label: the row's name.
    size: the buffer's size, None where no example is stored.
    strategy: the strategy.
    problem: the problem, with the buffer.
  """

  label: str
  size: int | None
  strategy: continual.Strategy
  problem: continual.Problem

  @property
  def name(self) -> str:
    """Name of its files."""
    return self.label if self.size is None else f"{self.label}-{self.size}"


def check_config(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError where a field is out of its range."""
  seeds = config.seeds
  if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
    raise ValueError(f"seeds must be distinct and not negative, got {seeds}.")
  if not config.rows:
    raise ValueError("rows names no strategy: there is nothing to run.")
  if config.judge not in ("test", "validation"):
    raise ValueError(
      f"Unknown judge {config.judge!r}. Choose test or validation."
    )
  if config.judge == "validation" and not config.stream.validation:
    raise ValueError(
      "judge='validation' needs held-out data: set stream.validation=0.1, say."
    )


def _network(config: ml_collections.ConfigDict, num_classes: int) -> Any:
  options = {
    "num_classes": num_classes,
    "use_bias": config.use_bias,
    "kernel_init": config.kernel_init,
  }
  if config.network == "mlp":
    return models.MLP(features=tuple(config.features), **options)
  known = models.names(models.MLP)
  if config.network not in known:
    raise ValueError(
      f"Unknown network {config.network!r}. Choose one of mlp, "
      f"{', '.join(known)}."
    )
  return models.get(config.network, **options)


def build(config: ml_collections.ConfigDict, data_dir: str | None) -> list[Run]:
  """Loads the data and makes all runs of a configuration.

  Args:
    config: the configuration.
    data_dir: folder of prepared TFDS sets, None for the default one.

  Returns:
    The runs; they share the data on the devices, and what has been made.

  Raises:
    ValueError: a field is out of its range, or the data cannot be had.
  """
  check_config(config)
  rows = {label: row.to_dict() for label, row in config.rows.items()}
  sizes = tuple(config.buffer.sizes)
  made: list[tuple[str, int | None, continual.Strategy]] = []
  for label, row in rows.items():
    first = strategy(label, row, None)
    if not first.needs_replay:
      made.append((label, None, first))
    else:
      made += [(label, size, strategy(label, row, size)) for size in sizes]
  devices = training.resolve_devices(config.devices or None)
  train = data_lib.load(config.dataset, "train", data_dir=data_dir)
  test = data_lib.load(config.dataset, "test", data_dir=data_dir)
  stream = _stream(config, train, test)
  model = _network(config, train.num_classes)
  normalize = _classify.normalizer(
    config.dataset, np.asarray(train.images), data_dir
  )

  def logits_fn(params: PyTree, images: jax.Array) -> jax.Array:
    return jnp.asarray(model.apply({"params": params}, normalize(images)))

  keys = jnp.stack([jax.random.key(seed) for seed in config.seeds])
  example = jnp.zeros((1, *train.images.shape[1:]))
  problem = continual.make_problem(
    stream,
    logits_fn,
    jax.vmap(lambda key: model.init(key, example)["params"])(keys),
    keys=keys,
    transform=_classify.augmentation(config.crop_padding, config.flip),
    devices=devices,
  )
  buffers = {
    size: replay.get(
      config.buffer.policy,
      size,
      per=config.buffer.per,
      num_classes=stream.num_classes,
      num_tasks=problem.num_tasks,
    )
    for size in sizes
  }
  runs = []
  for label, size, one in made:
    mine = dataclasses.replace(
      problem, replay=None if size is None else buffers[size]
    )
    one.init(mine)  # What it cannot do is said before anything is trained.
    runs.append(Run(label, size, one, mine))
  return runs


def keeping(
  problem: continual.Problem, workdir: pathlib.Path
) -> continual.Problem:
  """The problem, with what takes long to make kept in the run's folder."""

  def keep(name: str, make: Any, like: Any) -> PyTree:
    return _stage.run(name, lambda options: (make(), {}), like(), workdir)[0]

  return dataclasses.replace(problem, keep=keep)
