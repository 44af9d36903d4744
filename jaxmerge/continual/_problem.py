"""What strategies work on: a stream, a network, several seeds at once."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import alignment, merging, training
from jaxmerge.continual import replay as replay_lib
from jaxmerge.continual import streams

PyTree = Any
LogitsFn = Callable[[PyTree, Any], jax.Array]


AugmentOnHost = Callable[[np.ndarray, np.random.Generator], np.ndarray]


class Keep(Protocol):
  """Keeps what takes long to make: on disk, say."""

  def __call__(
    self, name: str, make: Callable[[], PyTree], like: Callable[[], PyTree]
  ) -> PyTree:
    """Returns what `make()` returned, now or in an earlier process.

    Args:
      name: its name, a path of words.
      make: makes it.
      like: makes a tree of the same structure, shapes and dtypes.
    """


class Report(Protocol):
  """Is told of what happens within a strategy."""

  def __call__(self, what: str, task: int, values: dict[str, Any]) -> None:
    """Takes some figures.

    Args:
      what: what they are of: "start", the loss and the norm of its gradient
        where a task's training starts, over the task's classes; "training",
        every metric at every step; "seconds" of the "training" and the
        "merging", compilation included; or a merge's name.
      task: number of the task.
      values: NumPy arrays `[seeds, ...]`, and names.
    """


def _make(
  name: str, make: Callable[[], PyTree], like: Callable[[], PyTree]
) -> PyTree:
  del name, like
  return make()


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
  """A stream of tasks and a network to learn it, for several seeds.

  Attributes:
    stream: the tasks.
    logits_fn: `logits_fn(params, inputs) -> [b, classes]`, normalisation
      included.
    params: initial parameters, leaves with a leading axis of seeds; all are
      floating-point.
    keys: PRNG keys, one a seed.
    train: the stream's training pool on the devices.
    test: its test pool.
    replay: the replay buffer, or None for a data-free run.
    transform: `transform(key, example) -> example`, augmentation on the
      device, or None.
    spec: the network's permutation specification; None for one that
      `jaxmerge.alignment.derive_spec` finds.
    augment_on_host: `augment_on_host(rows, draws) -> inputs` makes the inputs
      of an epoch from rows of the training pool and a `numpy.random.Generator`,
      while the devices work on the epoch before: for inputs that are decoded or
      changed on the host. Two epochs of a task lie on the devices, not the
      pool. None for a pool that lies on the devices.
    statistics_fn: a `logits_fn` for the statistics of layers' inputs, where
      the layers of `logits_fn` itself stand in a condition or a loop; None for
      that one.
    mask_fn: `mask_fn(inputs) -> bool [b, ...]`, which rows of a layer's inputs
      those statistics are of, as tokens that are no padding; None for all.
    keep: keeps what takes long to make; by default nothing but memory does.
    report: is told of each task's start, training and merge; None for no one,
      which saves what it takes to know them.
    memo: what has been made in this process.
  """

  stream: streams.Stream
  logits_fn: LogitsFn
  params: PyTree
  keys: jax.Array
  train: training.Replicated
  test: training.Replicated
  replay: replay_lib.Replay | None = None
  transform: Callable[[jax.Array, PyTree], PyTree] | None = None
  spec: alignment.PermutationSpec | None = None
  augment_on_host: AugmentOnHost | None = None
  statistics_fn: LogitsFn | None = None
  mask_fn: Callable[[Any], jax.Array] | None = None
  keep: Keep = _make
  report: Report | None = None
  memo: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

  @property
  def num_seeds(self) -> int:
    """Number of seeds."""
    return len(self.keys)

  @property
  def num_tasks(self) -> int:
    """Number of tasks."""
    return len(self.stream.tasks)

  def keys_for(self, *names: str | int) -> jax.Array:
    """PRNG keys of a purpose, one a seed.

    Args:
      *names: what they are for: the same names, the same keys.

    Returns:
      PRNG keys `[seeds]`.
    """
    keys = self.keys
    for name in names:
      number = zlib.crc32(name.encode()) if isinstance(name, str) else name
      keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
    return keys

  def rows_of(self, tasks: Sequence[int]) -> np.ndarray:
    """The training rows of some tasks, int32 `[seeds, n]`."""
    rows = np.concatenate([self.stream.tasks[task].train for task in tasks])
    return np.broadcast_to(rows, (self.num_seeds, len(rows)))

  def batches(
    self, task: int, samples: int | None = None
  ) -> list[dict[str, np.ndarray]]:
    """Training examples of a task, 1000 at a time.

    Args:
      task: its number.
      samples: how many: the first ones, or, where these lack a class that the
        task has (a sorted set), as many evenly spaced ones. None for all.

    Returns:
      The batches.
    """
    rows = self.stream.tasks[task].train
    if samples is not None and samples < len(rows):
      labels = self.stream.train["label"]
      first = rows[:samples]
      if len(np.unique(labels[first])) < len(np.unique(labels[rows])):
        first = rows[np.linspace(0, len(rows) - 1, samples).astype(int)]
      rows = first
    return [
      self.examples(rows[i : i + 1000]) for i in range(0, len(rows), 1000)
    ]

  def examples(self, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Training examples by row, leaves of the rows' shape and more."""
    return {name: values[rows] for name, values in self.stream.train.items()}

  def once(
    self, name: str, make: Callable[[], PyTree], like: Callable[[], PyTree]
  ) -> PyTree:
    """What `make` makes, made once in this process, and kept by `keep`."""
    if name not in self.memo:
      self.memo[name] = self.keep(name, make, like)
    return self.memo[name]


def make_problem(
  stream: streams.Stream,
  logits_fn: LogitsFn,
  params: PyTree,
  *,
  keys: jax.Array,
  replay: replay_lib.Replay | None = None,
  transform: Callable[[jax.Array, PyTree], PyTree] | None = None,
  spec: alignment.PermutationSpec | None = None,
  augment_on_host: AugmentOnHost | None = None,
  statistics_fn: LogitsFn | None = None,
  mask_fn: Callable[[Any], jax.Array] | None = None,
  devices: Sequence[jax.Device] | int | None = None,
) -> Problem:
  """Puts a stream on the devices.

  Args:
    stream: the tasks.
    logits_fn: see `Problem`.
    params: initial parameters, leaves `[seeds, ...]`, all floating-point.
    keys: PRNG keys, `[seeds]`.
    replay: see `Problem`.
    transform: see `Problem`.
    spec: see `Problem`.
    augment_on_host: see `Problem`; for one seed.
    statistics_fn: see `Problem`.
    mask_fn: see `Problem`.
    devices: as in `training.resolve_devices`.

  Returns:
    The problem.

  Raises:
    ValueError: the leaves have not one leading axis of seeds, or there are
      several and the inputs are made on the host.
  """
  if augment_on_host is not None and len(keys) != 1:
    raise ValueError(
      f"augment_on_host is for one seed, got {len(keys)} keys: make a problem"
      " for each."
    )
  params = jax.tree.map(jnp.asarray, params)
  for leaf in jax.tree.leaves(params):
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise ValueError(
        "All leaves of params must be floating-point, got one of "
        f"{leaf.dtype}. Give the network's parameters alone."
      )
    if leaf.ndim < 1 or len(leaf) != len(keys):
      raise ValueError(
        f"Every leaf of params needs a leading axis of {len(keys)} seeds, as "
        f"keys has, got shape {leaf.shape}. Initialise with jax.vmap over the "
        "seeds."
      )

  def place(pool: dict[str, Any]) -> training.Replicated:
    if augment_on_host is not None:
      pool = {name: pool[name] for name in ("label", "task")}
    return training.replicate(dict(pool), devices)

  return Problem(
    stream=stream,
    logits_fn=logits_fn,
    params=params,
    keys=keys,
    train=place(stream.train),
    test=place(stream.test),
    replay=replay,
    transform=transform,
    spec=spec,
    augment_on_host=augment_on_host,
    statistics_fn=statistics_fn,
    mask_fn=mask_fn,
  )


def head_masks(problem: Problem, head: str, task: int) -> np.ndarray:
  """Which logits count for the examples of each task.

  Args:
    problem: the problem.
    head: "all" for all classes, "seen" for those of the tasks so far, "task"
      for each example those of its own task.
    task: the current task.

  Returns:
    bool `[tasks, classes]`, by the task of the example.
  """
  tasks = problem.stream.tasks
  masks = np.zeros((len(tasks), problem.stream.num_classes), bool)
  if head == "all":
    masks[:] = True
  elif head == "seen":
    for one in tasks[: task + 1]:
      masks[:, list(one.classes)] = True
  elif head == "task":
    for number, one in enumerate(tasks):
      masks[number, list(one.classes)] = True
  else:
    raise ValueError(f"Unknown head {head!r}. Choose all, seen or task.")
  return masks


class OwnLogits(NamedTuple):
  """The logits that a task's network is trained on.

  Attributes:
    logits_fn: `logits_fn(params, prepare(inputs)) -> [b, classes]`.
    prepare: `prepare(inputs)`, what it takes.
    places: int32, the place of each class among the logits.
  """

  logits_fn: LogitsFn
  prepare: Callable[[Any], Any]
  places: np.ndarray


# Cached: equal functions share one compiled program. The classes are an
# argument, so that all tasks of as many classes share it, too.
@functools.lru_cache(maxsize=64)
def _picked(logits_fn: LogitsFn) -> LogitsFn:
  def picked(params: PyTree, given: Any) -> jax.Array:
    logits = logits_fn(params, given["input"])
    return jnp.take_along_axis(logits, given["classes"], axis=1)

  return picked


def own_logits(problem: Problem, task: int, head: str = "all") -> OwnLogits:
  """The logits that a task's network is trained on.

  Args:
    problem: the problem.
    task: number of the task.
    head: as in `head_masks`; in a task-incremental stream always "task".

  Returns:
    The logits of these classes alone.
  """
  count = problem.stream.num_classes
  if problem.stream.scenario == "task-incremental":
    head = "task"
  if head == "all":
    every = np.arange(count, dtype=np.int32)
    return OwnLogits(problem.logits_fn, lambda inputs: inputs, every)
  classes = np.flatnonzero(head_masks(problem, head, task)[task])
  classes = classes.astype(np.int32)
  places = np.zeros(count, np.int32)
  places[classes] = np.arange(len(classes))

  def prepare(inputs: Any) -> Any:
    size = len(jax.tree.leaves(inputs)[0])
    picks = np.broadcast_to(classes, (size, len(classes)))
    return {"input": inputs, "classes": picks}

  return OwnLogits(_picked(problem.logits_fn), prepare, places)


def per_seed(
  problem: Problem, make: Callable[..., PyTree], *trees: PyTree
) -> PyTree:
  """Calls a function once a seed and stacks what it returns."""
  made = [
    make(*(jax.tree.map(lambda leaf, i=i: leaf[i], tree) for tree in trees))
    for i in range(problem.num_seeds)
  ]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *made)


def gram_matrices(
  problem: Problem,
  params: PyTree,
  inputs: Iterable[Any],
  reduction: str = "mean",
) -> dict[str, jax.Array]:
  """Gram matrices of the layers' inputs, of one seed.

  Args:
    problem: the problem.
    params: the parameters, without the axis of seeds.
    inputs: the inputs of each batch.
    reduction: "mean" or "sum" over the examples.

  Returns:
    The matrices by the names of the kernels.
  """
  return merging.gram_matrices(
    problem.statistics_fn or problem.logits_fn,
    params,
    inputs,
    reduction=reduction,
    mask=problem.mask_fn,
  )


def seed_axis(problem: Problem, value: Any) -> jax.Array:
  """The same value for every seed."""
  value = jnp.asarray(value)
  return jnp.broadcast_to(value, (problem.num_seeds, *value.shape))


@functools.lru_cache(maxsize=16)
def _accuracy_fn(
  logits_fn: LogitsFn, num_tasks: int
) -> Callable[[PyTree, PyTree], jax.Array]:
  def metric(given: PyTree, batch: PyTree) -> jax.Array:
    logits = logits_fn(given["params"], batch["input"])
    logits = jnp.where(given["masks"][batch["task"]], logits, -jnp.inf)
    hits = logits.argmax(axis=-1).astype(jnp.int32) == batch["label"]
    # Examples that belong to all tasks have the task -1.
    own = batch["task"][:, None] == jnp.arange(num_tasks)[None]
    counts = own | (batch["task"] < 0)[:, None]
    return (hits[:, None] & counts).astype(jnp.float32)

  return metric


def accuracies(
  problem: Problem, params: PyTree, *, split: str = "test"
) -> np.ndarray:
  """Accuracy on every task, in one compiled pass.

  In a task-incremental stream an example is classified among the classes of its
  own task, in the others among all.

  Args:
    problem: the problem.
    params: parameters `[seeds, ...]`.
    split: "test" or "validation".

  Returns:
    float64 `[seeds, tasks]`, in [0, 1].

  Raises:
    ValueError: an unknown split, there are no validation examples, or the
      inputs are not on the devices.
  """
  if problem.augment_on_host is not None:
    raise ValueError(
      "The inputs of this problem are made on the host, not on the devices:"
      " evaluate its networks on batches of them."
    )
  tasks = problem.stream.tasks
  if split not in ("test", "validation"):
    raise ValueError(f"Unknown split {split!r}. Choose test or validation.")
  data = problem.test if split == "test" else problem.train
  rows = [getattr(task, split) for task in tasks]
  if not all(len(one) for one in rows):
    raise ValueError(
      "There are no validation examples: make the stream with validation=0.1, "
      "say."
    )
  own = problem.stream.scenario == "task-incremental"
  masks = head_masks(problem, "task" if own else "all", 0)
  union = np.unique(np.concatenate(rows))
  means = training.evaluate(
    _accuracy_fn(problem.logits_fn, len(tasks)),
    {"params": params, "masks": seed_axis(problem, masks)},
    data,
    indices=union,
    seed_axis=True,
  )
  sizes = np.array([len(one) for one in rows], np.float64)
  # Whole numbers of hits again: a float32 mean is not exact.
  return np.rint(np.asarray(means, np.float64) * len(union)) / sizes
