"""What the study of merging without storage is made of: streams, networks."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from experiments import (
  _backbone,
  _classify,
  _continual_study,
  _predictions,
  _stage,
)
from jaxmerge import continual, models, training
from jaxmerge import data as data_lib
from jaxmerge.continual import streams

PyTree = Any

# `make(order) -> problem` before any training, `finish(order, problem,
# workdir) -> setting`, and the number of parameters.
Parts = tuple[
  Callable[[int], continual.Problem],
  Callable[[int, continual.Problem, pathlib.Path], "Setting"],
  int,
]


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
  """One class order: a stream, a pre-trained network, and how it is judged.

  Attributes:
    problem: the stream and the network, for one seed.
    measure: `measure(params, count) -> accuracies` on the first so many tasks,
      float `[count]` in [0, 1], leaves of params with an axis of one seed:
      `accuracy` among all classes, and for images `accuracy_within`, among
      those of the example's task.
    sizes: number of examples that each task is judged on.
  """

  problem: continual.Problem
  measure: Callable[[PyTree, int], dict[str, np.ndarray]]
  sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
  """A configuration with what all its class orders share.

  Attributes:
    config: the configuration.
    strategies: the rows by name.
    make: `make(order, workdir) -> Setting` of the order's number.
    num_parameters: of the network.
  """

  config: ml_collections.ConfigDict
  strategies: dict[str, continual.Strategy]
  make: Callable[[int, pathlib.Path], Setting]
  num_parameters: int


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
  kinds = {"texts": _texts, "images": _images}
  if config.kind not in kinds:
    raise ValueError(
      f"Unknown kind {config.kind!r}. Choose one of {', '.join(kinds)}."
    )
  if not config.rows or not config.orders:
    raise ValueError("rows and orders must name at least one each.")
  if len(set(config.orders)) != len(config.orders):
    raise ValueError(f"orders must be distinct, got {config.orders}.")
  if config.judge not in ("test", "validation"):
    raise ValueError(
      f"Unknown judge {config.judge!r}. Choose test or validation."
    )
  made = {
    label: _continual_study.strategy(label, row.to_dict(), None)
    for label, row in config.rows.items()
  }
  for label, one in made.items():
    if one.needs_replay:
      raise ValueError(
        f"Row {label} stores examples; this study is of strategies that do not."
      )
  make, finish, count = kinds[config.kind](config, data_dir)
  problem = make(0)
  for label, one in made.items():
    try:
      one.init(problem)  # What it cannot do is said before anything is trained.
    except ValueError as error:
      raise ValueError(f"Row {label}: {error}") from error

  def setting(number: int, workdir: pathlib.Path) -> Setting:
    return finish(number, make(number), workdir)

  return Study(config, made, setting, count)


def _texts(config: ml_collections.ConfigDict, data_dir: str | None) -> Parts:
  """A pre-trained encoder of sentences with a frozen head."""
  back = _backbone.texts(config, data_dir)

  def make(number: int) -> continual.Problem:
    order = config.orders[number]
    stream = streams.class_incremental(
      back.pool, back.test, num_tasks=config.num_tasks, seed=order
    )
    stream = _continual_study.split(stream, config.per_class, back.held_out)
    return continual.make_problem(
      stream,
      back.logits_fn,
      jax.tree.map(lambda leaf: leaf[None], back.params),
      keys=jax.random.fold_in(jax.random.key(0), order)[None],
      statistics_fn=back.statistics_fn,
      mask_fn=back.mask_fn,
      devices=config.devices or None,
    )

  def finish(
    number: int, problem: continual.Problem, workdir: pathlib.Path
  ) -> Setting:
    del number, workdir
    split = config.judge
    rows = [getattr(task, split) for task in problem.stream.tasks]

    def measure(params: PyTree, count: int) -> dict[str, np.ndarray]:
      found = _predictions.task_accuracies(
        back.logits_fn,
        jax.tree.map(lambda leaf: leaf[0], params),
        back.test if split == "test" else back.pool,
        rows[:count],
        batch_size=config.eval_batch_size,
      )
      return {"accuracy": np.array(found)}

    return Setting(problem, measure, tuple(len(one) for one in rows))

  return make, finish, _size(back.params)


def _size(params: PyTree) -> int:
  return sum(int(leaf.size) for leaf in jax.tree.leaves(params))


def _images(config: ml_collections.ConfigDict, data_dir: str | None) -> Parts:
  """A network that is trained on half of the classes first."""
  train = data_lib.load(config.dataset, "train", data_dir=data_dir)
  test = data_lib.load(config.dataset, "test", data_dir=data_dir)
  normalize = _classify.normalizer(
    config.dataset, np.asarray(train.images), data_dir
  )
  model = models.get(
    config.network,
    num_classes=train.num_classes,
    **config.network_options.to_dict(),
  )

  def logits_fn(params: PyTree, images: jax.Array) -> jax.Array:
    return jnp.asarray(model.apply({"params": params}, normalize(images)))

  metric = _hits(logits_fn)
  example = jnp.zeros((1, *train.images.shape[1:]))
  transform = _classify.augmentation(config.crop_padding, config.flip)
  shapes = jax.eval_shape(model.init, jax.random.key(0), example)["params"]

  def make(number: int) -> continual.Problem:
    order = config.orders[number]
    stream = streams.class_incremental(
      train,
      test,
      num_tasks=config.num_tasks,
      seed=order,
      validation=config.validation,
    )
    stream = _continual_study.split(
      stream, config.per_class, np.zeros(0, np.int32)
    )
    key = jax.random.fold_in(jax.random.key(0), order)
    return continual.make_problem(
      stream,
      logits_fn,
      jax.tree.map(lambda leaf: leaf[None], model.init(key, example)["params"]),
      keys=key[None],
      transform=transform,
      devices=config.devices or None,
    )

  def finish(
    number: int, problem: continual.Problem, workdir: pathlib.Path
  ) -> Setting:
    like, stream = problem.params, problem.stream
    params, _ = _stage.run(
      f"pretrained-{number}",
      lambda options: (_pretrained(config, problem, options), {}),
      like,
      workdir,
    )
    problem = dataclasses.replace(problem, params=params)
    rows = [getattr(task, config.judge) for task in stream.tasks]

    sizes = np.array([len(one) for one in rows])
    masks = np.zeros((1, len(rows), stream.num_classes), bool)
    for index, task in enumerate(stream.tasks):
      masks[0, index, list(task.classes)] = True

    def measure(params: PyTree, count: int) -> dict[str, np.ndarray]:
      means = training.evaluate(
        metric,
        {"params": params, "masks": jnp.asarray(masks)},
        problem.test if config.judge == "test" else problem.train,
        indices=np.sort(np.concatenate(rows[:count])),
        seed_axis=True,
      )
      total = sizes[:count].sum()
      # Whole numbers of hits again: a float32 mean is not exact.
      return {
        name: np.rint(total * values[0, :count].astype(np.float64))
        / sizes[:count]
        for name, values in means.items()
      }

    return Setting(problem, measure, tuple(sizes.tolist()))

  return make, finish, _size(shapes)


def _hits(
  logits_fn: Callable[[PyTree, jax.Array], jax.Array],
) -> Callable[[PyTree, PyTree], dict[str, jax.Array]]:
  """Hits among all classes and among those of the task, a column a task."""

  def metric(given: PyTree, batch: PyTree) -> dict[str, jax.Array]:
    logits = logits_fn(given["params"], batch["input"])
    masks = given["masks"]
    own = batch["task"][:, None] == jnp.arange(len(masks))[None]

    def columns(logits: jax.Array) -> jax.Array:
      hits = logits.argmax(axis=-1).astype(jnp.int32) == batch["label"]
      return (hits[:, None] & own).astype(jnp.float32)

    return {
      "accuracy": columns(logits),
      "accuracy_within": columns(
        jnp.where(masks[batch["task"]], logits, -jnp.inf)
      ),
    }

  return metric


def _pretrained(
  config: ml_collections.ConfigDict,
  problem: continual.Problem,
  options: dict[str, Any],
) -> PyTree:
  """The network trained on the first half of the classes of a stream."""
  stream = problem.stream
  order = [label for task in stream.tasks for label in task.classes]
  known = np.array(order[: len(order) // 2])
  mask = np.zeros(stream.num_classes, bool)
  mask[known] = True
  rows = np.flatnonzero(np.isin(stream.train["label"], known))
  for task in stream.tasks:
    rows = rows[~np.isin(rows, task.validation)]
  settings = config.pretraining
  steps = -(-len(rows) // settings.batch_size)
  result = training.train(
    _pretraining_loss(problem.logits_fn),
    problem.params,
    problem.train,
    optimizer=training.sgd(
      settings.learning_rate,
      settings.final_learning_rate,
      settings.epochs,
      steps,
      weight_decay=settings.weight_decay,
    ),
    epochs=settings.epochs,
    batch_size=settings.batch_size,
    keys=jax.vmap(jax.random.fold_in, (0, None))(problem.keys, 1),
    frozen={"mask": jnp.asarray(mask)[None]},
    indices=rows[None],
    transform=problem.transform if settings.augment else None,
    **options,
  )
  return result.params


def _pretraining_loss(logits_fn: Any) -> Any:
  def loss(params: PyTree, context: training.Context) -> jax.Array:
    logits = logits_fn(params, context.batch["input"])
    return optax.softmax_cross_entropy_with_integer_labels(
      jnp.where(context.frozen["mask"], logits, -jnp.inf),
      context.batch["label"],
    )

  return loss
