"""Streams of tasks, made of labelled image sets.

A stream is data: a pool of training and of test examples, and the rows of the
pools that belong to each task. The rows of the source sets are recorded, so
that a result can name the exact examples of every task.

Random choices depend on the seed alone, and not on the version of NumPy.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

import numpy as np

# One choice a seed makes -> its number, so that choices are independent.
_ORDER, _VALIDATION, _PARTS, _PIXELS = range(4)

# Images rotated at a time: what is held beside the pool stays small.
_CHUNK = 4096

# Writes the images of one task, made of those of the source, into a pool.
_Change = Callable[[np.ndarray, np.ndarray], None]


def class_incremental(
  train: Source,
  test: Source,
  *,
  num_tasks: int | None = None,
  groups: Sequence[Sequence[int]] | None = None,
  order: Sequence[int] | None = None,
  seed: int | None = None,
  validation: float = 0.0,
  relabel: bool = False,
) -> Stream:
  """Each task brings new classes; which task a sample is of must be found out.

  The classes are cut into groups: into `num_tasks` of equal size along `order`,
  or into the `groups` given. Classes that no group names stay in the pool, and
  belong to no task. Images are not copied: the pools are the source arrays.

  Args:
    train: the training set: a `jaxmerge.data.Dataset`, or another `Source`.
    test: the test set, of the same image shape, dtype and number of classes.
    num_tasks: how many groups; it must divide the number of classes.
    groups: the classes of each task, instead of `num_tasks`.
    order: all classes in the order of the stream; None for 0..num_classes-1.
    seed: a non-negative integer that shuffles the order, and draws the
      validation samples; None for no shuffling, and a draw by seed 0. Where
      `order` or `groups` say the order it must be None.
    validation: the fraction in [0, 1) of the training samples of each class
      that is held out, rounded down.
    relabel: whether classes become 0, 1, 2.. in the order of the stream, and
      those of no task -1, so that a head can grow at its end.

  Returns:
    A `Stream`; in its pools the "task" of a sample of no task is -1.

  Raises:
    StreamError: the sets do not fit each other, the groups cannot be made or
      share a class, a class has no training sample, or a task no test sample.

  References:
    van de Ven et al., Three types of incremental learning, 2022
    (https://doi.org/10.1038/s42256-022-00568-3).

  >>> from jaxmerge import data
  >>> digits = data.load("digits", "train"), data.load("digits", "test")
  >>> stream = class_incremental(*digits, num_tasks=5, validation=0.1)
  >>> stream.num_tasks, stream.tasks[1].classes
  (5, (2, 3))
  >>> stream = class_incremental(*digits, groups=[[7, 1], [0]], relabel=True)
  >>> stream.num_classes, stream.tasks[0].classes
  (3, (0, 1))
  """
  _check_validation(validation)
  return _by_class(
    train,
    test,
    _groups(_pair(train, test), num_tasks, groups, order, seed),
    seed=seed or 0,
    validation=validation,
    relabel=relabel,
  )


def task_incremental(
  train: Source,
  test: Source,
  *,
  num_tasks: int | None = None,
  groups: Sequence[Sequence[int]] | None = None,
  order: Sequence[int] | None = None,
  seed: int | None = None,
  validation: float = 0.0,
  relabel: bool = False,
) -> Stream:
  """Each task brings new classes; which task a sample is of is told.

  The stream is that of `class_incremental`; only its scenario differs: the
  learner chooses among the `classes` of the task.

  Args:
    train: as in `class_incremental`, and so are the others.
    test: the test set.
    num_tasks: how many groups.
    groups: the classes of each task, instead of `num_tasks`.
    order: all classes in the order of the stream.
    seed: shuffles the order, and draws the validation samples.
    validation: the fraction held out.
    relabel: whether classes are numbered in the order of the stream.

  Returns:
    A `Stream`.

  Raises:
    StreamError: as in `class_incremental`.

  References:
    van de Ven et al., Three types of incremental learning, 2022
    (https://doi.org/10.1038/s42256-022-00568-3).

  >>> from jaxmerge import data
  >>> digits = data.load("digits", "train"), data.load("digits", "test")
  >>> task_incremental(*digits, num_tasks=2).scenario
  'task-incremental'
  """
  stream = class_incremental(
    train,
    test,
    num_tasks=num_tasks,
    groups=groups,
    order=order,
    seed=seed,
    validation=validation,
    relabel=relabel,
  )
  return stream._replace(scenario="task-incremental")


def data_incremental(
  train: Source,
  test: Source,
  *,
  num_tasks: int,
  seed: int,
  validation: float = 0.0,
) -> Stream:
  """Each task brings more samples of all classes.

  The training set is cut at random into parts whose sizes differ by one sample
  at most. Images are not copied: the pools are the source arrays.

  Args:
    train: the training set.
    test: the test set, of the same image shape, dtype and number of classes.
    num_tasks: how many parts.
    seed: a non-negative integer that draws the parts and the validation
      samples.
    validation: the fraction in [0, 1) of the training samples of each class
      that is held out in each part, rounded down.

  Returns:
    A `Stream`; the test of every task is the whole test set, whose "task" is
    -1 in the pool.

  Raises:
    StreamError: the sets do not fit each other, or there are more tasks than
      samples.

  >>> from jaxmerge import data
  >>> digits = data.load("digits", "train"), data.load("digits", "test")
  >>> stream = data_incremental(*digits, num_tasks=3, seed=0)
  >>> [len(task.train) for task in stream.tasks]
  [479, 479, 479]
  """
  pair = _pair(train, test)
  labels, test_labels = _labels(train), _labels(test)
  _check_seed(seed)
  _check_validation(validation)
  _check_num_tasks(num_tasks)
  if num_tasks > len(labels):
    raise StreamError(
      f"num_tasks {num_tasks} is more than the {len(labels)} training samples:"
      " take fewer tasks."
    )
  parts = np.array_split(_order(len(labels), seed, _PARTS), num_tasks)
  key = _order(len(labels), seed, _VALIDATION)
  everything = _rows(len(test_labels))
  task_of = np.empty(len(labels), np.int32)
  tasks = []
  for number, part in enumerate(parts):
    task_of[part] = number
    rows, held_out = _hold_out(labels, np.sort(part), validation, key)
    classes = np.union1d(labels[part], test_labels)
    tasks.append(
      Task(
        f"part {number}", tuple(classes.tolist()), rows, held_out, everything
      )
    )
  return Stream(
    "data-incremental",
    {"image": train.images, "label": labels, "task": task_of},
    {
      "image": test.images,
      "label": test_labels,
      "task": np.full(len(test_labels), -1, np.int32),
    },
    tuple(tasks),
    pair.num_classes,
    _one_source(len(labels), len(test_labels)),
  )


def permuted(
  train: Source,
  test: Source,
  *,
  num_tasks: int,
  seed: int,
  validation: float = 0.0,
) -> Stream:
  """Each task shows all images with their pixels in another fixed order.

  The first task has the images as they are. The channels of a pixel stay
  together. The pools hold the images of every task: num_tasks times the memory
  of the source sets.

  Args:
    train: the training set.
    test: the test set, of the same image shape, dtype and number of classes.
    num_tasks: how many orders.
    seed: a non-negative integer that draws the orders and the validation
      samples.
    validation: the fraction in [0, 1) of the training samples of each class
      that is held out, rounded down: the same samples in every task.

  Returns:
    A `Stream` whose scenario is "domain-incremental"; images have the dtype of
    the source.

  Raises:
    StreamError: the sets do not fit each other, or there is no task.

  References:
    Goodfellow et al., An Empirical Investigation of Catastrophic Forgetting in
    Gradient-Based Neural Networks, 2013 (https://arxiv.org/abs/1312.6211).

  >>> from jaxmerge import data
  >>> digits = data.load("digits", "train"), data.load("digits", "test")
  >>> stream = permuted(*digits, num_tasks=3, seed=0)
  >>> stream.train["image"].shape  # 3 times 1,437 images
  (4311, 8, 8, 1)
  """
  pair = _pair(train, test)
  _check_seed(seed)
  _check_validation(validation)
  _check_num_tasks(num_tasks)
  height, width = pair.shape[:2]
  pixels = height * width
  changes = [_permutation(np.arange(pixels))] + [
    _permutation(_order(pixels, seed, _PIXELS, number))
    for number in range(1, num_tasks)
  ]
  names = [f"permutation {number}" for number in range(num_tasks)]
  return _changed(train, test, changes, names, seed, validation)


def rotated(
  train: Source,
  test: Source,
  *,
  angles: Sequence[float],
  validation: float = 0.0,
  seed: int = 0,
) -> Stream:
  """Each task shows all images turned by another angle.

  Images turn about their centre, counter-clockwise as `np.rot90` does, by
  bilinear interpolation; what comes from outside of the image is 0, and
  integers are rounded to the nearest. The angle 0 gives the images as they are.
  The pools hold the images of every task: len(angles) times the memory of the
  source sets.

  Args:
    train: the training set.
    test: the test set, of the same image shape, dtype and number of classes.
    angles: the angle of each task in degrees, each once.
    validation: the fraction in [0, 1) of the training samples of each class
      that is held out, rounded down: the same samples in every task.
    seed: a non-negative integer that draws the validation samples.

  Returns:
    A `Stream` whose scenario is "domain-incremental"; images have the dtype of
    the source.

  Raises:
    StreamError: the sets do not fit each other, there is no angle, or an angle
      is not finite or occurs twice.

  References:
    Lopez-Paz and Ranzato, Gradient Episodic Memory for Continual Learning, 2017
    (https://arxiv.org/abs/1706.08840).

  >>> from jaxmerge import data
  >>> digits = data.load("digits", "train"), data.load("digits", "test")
  >>> stream = rotated(*digits, angles=[0, 15, 30])
  >>> [task.name for task in stream.tasks]
  ['0 degrees', '15 degrees', '30 degrees']
  """
  pair = _pair(train, test)
  _check_seed(seed)
  _check_validation(validation)
  degrees = [float(angle) for angle in angles]
  if not degrees or not np.isfinite(degrees).all():
    raise StreamError(
      f"angles must be finite numbers of degrees, one for each task: got"
      f" {list(angles)}."
    )
  names = [f"{angle!r} degrees".replace(".0 ", " ") for angle in degrees]
  _check_once(degrees, "angles")
  changes = [_rotation(pair.shape, angle) for angle in degrees]
  return _changed(train, test, changes, names, seed, validation)


def domains(
  pairs: Sequence[tuple[Source, Source]],
  *,
  validation: float = 0.0,
  seed: int = 0,
  names: Sequence[str] | None = None,
) -> Stream:
  """Each task is a data set of its own, all with the same classes.

  The pools are copies of all sets, one after the other.

  Args:
    pairs: the training and the test set of each task, all of the same image
      shape, dtype and number of classes.
    validation: the fraction in [0, 1) of the training samples of each class
      that is held out in each set, rounded down.
    seed: a non-negative integer that draws the validation samples.
    names: the name of each task, each once; None for "domain 0" and so on.

  Returns:
    A `Stream` whose scenario is "domain-incremental".

  Raises:
    StreamError: the sets do not fit each other, there is none, or the names are
      not one for each.

  >>> from jaxmerge import data
  >>> train, test = data.load("digits", "train"), data.load("digits", "test")
  >>> inverted = [
  ...   part._replace(images=16 - part.images) for part in (train, test)
  ... ]
  >>> stream = domains([(train, test), inverted], names=["dark", "light"])
  >>> stream.source["train_set"][stream.tasks[1].train[:2]]
  array([1, 1], dtype=int32)
  """
  pairs = [(train, test) for train, test in pairs]
  if not pairs:
    raise StreamError("pairs is empty: give a (train, test) for each task.")
  _check_seed(seed)
  _check_validation(validation)
  if names is None:
    names = [f"domain {number}" for number in range(len(pairs))]
  if len(names) != len(pairs):
    raise StreamError(
      f"names has {len(names)} entries for {len(pairs)} pairs: give one for"
      " each."
    )
  _check_once(names, "names")
  first, *others = [
    _pair(*pair, name=name) for pair, name in zip(pairs, names, strict=True)
  ]
  for name, other in zip(names[1:], others, strict=True):
    if other != first:
      raise StreamError(
        f"{names[0]!r} has {first}, but {name!r} has {other}: the tasks of a"
        " domain-incremental stream share images and classes, so resize,"
        " convert or relabel one of them."
      )
  trains, tests = zip(*pairs, strict=True)
  return _of_domains(
    np.concatenate([source.images for source in trains]),
    np.concatenate([source.images for source in tests]),
    [(_labels(train), _labels(test)) for train, test in pairs],
    range(len(pairs)),
    names,
    first.num_classes,
    seed,
    validation,
  )


def describe(stream: Stream) -> dict[str, Any]:
  """What a stream is, in a few lines of JSON.

  Args:
    stream: any stream.

  Returns:
    "scenario", "num_classes", and "tasks": for each its "name", "classes",
    "sizes" and "crc32", both with an entry for "train", "validation" and
    "test"; the checksum is that of the rows as little-endian int32. Equal
    checksums of two streams of the same sets mean the same examples.

  >>> from jaxmerge import data
  >>> digits = data.load("digits", "train"), data.load("digits", "test")
  >>> stream = class_incremental(*digits, num_tasks=5)
  >>> describe(stream)["tasks"][0]["sizes"]
  {'train': 287, 'validation': 0, 'test': 73}
  """
  return {
    "scenario": stream.scenario,
    "num_classes": stream.num_classes,
    "tasks": [
      {
        "name": task.name,
        "classes": list(task.classes),
        "sizes": {part: len(rows) for part, rows in _parts(task).items()},
        "crc32": {
          part: zlib.crc32(rows.astype("<i4").tobytes())
          for part, rows in _parts(task).items()
        },
      }
      for task in stream.tasks
    ],
  }


def as_json(stream: Stream) -> dict[str, Any]:
  """The exact examples of every task, as JSON.

  Args:
    stream: any stream.

  Returns:
    "scenario", "num_classes", and "tasks": for each its "name", "classes", and
    under "train", "validation" and "test" a dict from the number of the source
    set (a string, as JSON has it) to the list of the rows of that set.

  >>> from jaxmerge import data
  >>> digits = data.load("digits", "train"), data.load("digits", "test")
  >>> stream = permuted(*digits, num_tasks=2, seed=0)
  >>> as_json(stream)["tasks"][1]["test"]["0"][:3]
  [0, 1, 2]
  """
  return {
    "scenario": stream.scenario,
    "num_classes": stream.num_classes,
    "tasks": [
      {"name": task.name, "classes": list(task.classes)}
      | {
        part: _source_rows(stream, "test" if part == "test" else "train", rows)
        for part, rows in _parts(task).items()
      }
      for task in stream.tasks
    ],
  }


class StreamError(ValueError):
  """A stream that cannot be made of the sets."""


class Source(Protocol):
  """What a stream is made of; `jaxmerge.data.Dataset` is one."""

  @property
  def images(self) -> np.ndarray:
    """Images [n, height, width, channels]."""

  @property
  def labels(self) -> np.ndarray:
    """Integers [n], each in 0..num_classes-1."""

  @property
  def num_classes(self) -> int:
    """The number of classes of the set."""


class Task(NamedTuple):
  """One task of a stream: which rows of the pools are its own.

  Attributes:
    name: unique in the stream.
    classes: the labels that occur in it, in the order of the stream.
    train: int32 rows of `Stream.train`, sorted.
    validation: int32 rows of `Stream.train`, sorted, none of them in `train`;
      may be empty.
    test: int32 rows of `Stream.test`, sorted.
  """

  name: str
  classes: tuple[int, ...]
  train: np.ndarray
  validation: np.ndarray
  test: np.ndarray


class Stream(NamedTuple):
  """A sequence of tasks over a pool of training and one of test examples.

  The arrays may be those of the source sets: copy before writing.

  Attributes:
    scenario: "class-incremental", "task-incremental", "domain-incremental" or
      "data-incremental".
    train: "image" [N, height, width, channels], "label" int32 [N], and "task"
      int32 [N], the task that the example belongs to, validation included; -1
      if to none.
    test: the same of the test examples; "task" is -1 also for examples that
      belong to all tasks.
    tasks: the tasks in order.
    num_classes: labels are below it.
    source: "train" and "test", int32: the row of the source set that each
      example of the pool came from; "train_set" and "test_set", int32: the
      number of that set, 0 where there is one.
  """

  scenario: str
  train: dict[str, np.ndarray]
  test: dict[str, np.ndarray]
  tasks: tuple[Task, ...]
  num_classes: int
  source: dict[str, np.ndarray]

  @property
  def num_tasks(self) -> int:
    """The number of tasks."""
    return len(self.tasks)


class _Kind(NamedTuple):
  """What two sets of one stream have in common."""

  shape: tuple[int, ...]
  dtype: np.dtype[Any]
  num_classes: int

  def __str__(self) -> str:
    return f"{self.dtype} images {self.shape} of {self.num_classes} classes"


def _pair(train: Source, test: Source, name: str = "") -> _Kind:
  """Checks a training and a test set; returns what both are."""
  where = f"{name!r}: " if name else ""
  kind = _check_source(train, where + "train")
  other = _check_source(test, where + "test")
  if kind != other:
    raise StreamError(
      f"{where}train has {kind}, but test has {other}: give two splits of one"
      " set."
    )
  return kind


def _check_source(source: Source, name: str) -> _Kind:
  images, labels = source.images, np.asarray(source.labels)
  if images.ndim != 4:
    raise StreamError(
      f"{name}: images must be [n, height, width, channels], got shape"
      f" {images.shape}: add the axes of length 1."
    )
  if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
    raise StreamError(
      f"{name}: labels must be a vector of integers, one class for each image:"
      f" got {labels.dtype} of shape {labels.shape}."
    )
  if len(images) != len(labels):
    raise StreamError(
      f"{name} has {len(images)} images but {len(labels)} labels: give one for"
      " each."
    )
  if not len(labels):
    raise StreamError(f"{name} is empty: a stream needs samples.")
  if labels.min() < 0 or labels.max() >= source.num_classes:
    raise StreamError(
      f"{name}: labels are in {labels.min()}..{labels.max()}, but num_classes"
      f" {source.num_classes} allows 0..{source.num_classes - 1}: mend one of"
      " them."
    )
  return _Kind(images.shape[1:], images.dtype, int(source.num_classes))


def _groups(
  kind: _Kind,
  num_tasks: int | None,
  groups: Sequence[Sequence[int]] | None,
  order: Sequence[int] | None,
  seed: int | None,
) -> list[tuple[int, ...]]:
  """Returns the classes of each task."""
  said = [
    name
    for name, value in (("groups", groups), ("order", order), ("seed", seed))
    if value is not None
  ]
  if len(said) > 1:
    raise StreamError(
      f"{' and '.join(said)} each say the order of the classes: give one of"
      " them."
    )
  if groups is not None:
    if num_tasks is not None:
      raise StreamError(
        "num_tasks and groups both say the groups: give one of them."
      )
    return _check_groups(groups, kind.num_classes)
  if num_tasks is None:
    raise StreamError(
      "give num_tasks, for groups of equal size, or the groups themselves."
    )
  _check_num_tasks(num_tasks)
  classes = range(kind.num_classes)
  if order is not None:
    if sorted(order) != list(classes):
      raise StreamError(
        f"order {list(order)} must name each of the classes"
        f" 0..{kind.num_classes - 1} once: to leave some out, give groups."
      )
  elif seed is None:
    order = classes
  else:
    _check_seed(seed)
    order = _order(kind.num_classes, seed, _ORDER).tolist()
  size, rest = divmod(kind.num_classes, num_tasks)
  if rest:
    divisors = [
      n for n in range(1, kind.num_classes + 1) if kind.num_classes % n == 0
    ]
    raise StreamError(
      f"num_tasks {num_tasks} does not divide the {kind.num_classes} classes:"
      f" take one of {divisors}, or give groups of unequal"
      " size."
    )
  return [
    tuple(int(label) for label in order[start : start + size])
    for start in range(0, kind.num_classes, size)
  ]


def _check_groups(
  groups: Sequence[Sequence[int]], num_classes: int
) -> list[tuple[int, ...]]:
  if not len(groups):
    raise StreamError("groups is empty: give the classes of each task.")
  found: dict[int, int] = {}
  for number, group in enumerate(groups):
    if not len(group):
      raise StreamError(
        f"group {number} is empty, a task with no sample: name its classes, or"
        " leave it out."
      )
    for label in group:
      whole = isinstance(label, int | np.integer)
      if not whole or not 0 <= label < num_classes:
        raise StreamError(
          f"group {number} names the class {label!r}, but the classes of"
          f" the set are 0..{num_classes - 1}."
        )
      if label in found:
        raise StreamError(
          f"class {label} is in group {found[label]} and in group {number}:"
          " tasks of this scenario share no class, so name it once."
        )
      found[int(label)] = number
  return [tuple(int(label) for label in group) for group in groups]


def _by_class(
  train: Source,
  test: Source,
  groups: list[tuple[int, ...]],
  *,
  seed: int,
  validation: float,
  relabel: bool,
) -> Stream:
  """A stream whose tasks have the classes of the groups."""
  labels, test_labels = _labels(train), _labels(test)
  counts = np.bincount(labels, minlength=train.num_classes)
  test_counts = np.bincount(test_labels, minlength=train.num_classes)
  task_of_class = np.full(train.num_classes, -1, np.int32)
  new_label = np.full(train.num_classes, -1, np.int32)
  first = 0
  for number, group in enumerate(groups):
    for label in group:
      if not counts[label]:
        raise StreamError(
          f"class {label} of task {number} has no training sample: give groups"
          " that leave it out."
        )
    if not test_counts[list(group)].any():
      raise StreamError(
        f"task {number}, of the classes {list(group)}, has no test sample:"
        " nothing could be measured on it."
      )
    task_of_class[list(group)] = number
    new_label[list(group)] = range(first, first + len(group))
    first += len(group)
  task_of, test_task_of = task_of_class[labels], task_of_class[test_labels]
  key = _order(len(labels), seed, _VALIDATION)
  tasks = []
  for number, group in enumerate(groups):
    rows, held_out = _hold_out(
      labels, np.flatnonzero(task_of == number), validation, key
    )
    named = new_label[list(group)].tolist() if relabel else group
    tasks.append(
      Task(
        f"task {number}",
        tuple(named),
        rows,
        held_out,
        np.flatnonzero(test_task_of == number).astype(np.int32),
      )
    )
  if relabel:
    labels, test_labels = new_label[labels], new_label[test_labels]
  return Stream(
    "class-incremental",
    {"image": train.images, "label": labels, "task": task_of},
    {"image": test.images, "label": test_labels, "task": test_task_of},
    tuple(tasks),
    first if relabel else int(train.num_classes),
    _one_source(len(labels), len(test_labels)),
  )


def _changed(
  train: Source,
  test: Source,
  changes: Sequence[_Change],
  names: Sequence[str],
  seed: int,
  validation: float,
) -> Stream:
  """A stream whose tasks are the same sets, with their images changed."""

  def pool(images: np.ndarray) -> np.ndarray:
    made = np.empty((len(changes), *images.shape), images.dtype)
    for change, part in zip(changes, made, strict=True):
      change(images, part)
    return made.reshape(-1, *images.shape[1:])

  return _of_domains(
    pool(train.images),
    pool(test.images),
    [(_labels(train), _labels(test))] * len(changes),
    [0] * len(changes),
    names,
    int(train.num_classes),
    seed,
    validation,
  )


def _of_domains(
  images: np.ndarray,
  test_images: np.ndarray,
  labels: Sequence[tuple[np.ndarray, np.ndarray]],
  sets: Sequence[int],
  names: Sequence[str],
  num_classes: int,
  seed: int,
  validation: float,
) -> Stream:
  """A stream of pools in which the tasks lie one after the other.

  Args:
    images: those of the training pool.
    test_images: those of the test pool.
    labels: for each task, those of its training and of its test examples.
    sets: for each task, the number of its source set.
    names: for each task, its name.
    num_classes: the number of classes.
    seed: draws the validation samples.
    validation: the fraction held out.

  Returns:
    The stream.
  """
  tasks = []
  start = test_start = 0
  for name, (train, test) in zip(names, labels, strict=True):
    # One key a set: a sample held out in one task is held out in all that show
    # the same set, so that none is trained on under another guise.
    key = _order(len(train), seed, _VALIDATION)
    rows, held_out = _hold_out(train, np.arange(len(train)), validation, key)
    tasks.append(
      Task(
        name,
        tuple(np.union1d(train, test).tolist()),
        (start + rows).astype(np.int32),
        (start + held_out).astype(np.int32),
        (test_start + _rows(len(test))).astype(np.int32),
      )
    )
    start += len(train)
    test_start += len(test)
  source = {}
  pools = []
  for number, (split, pictures) in enumerate(
    (("train", images), ("test", test_images))
  ):
    each = [pair[number] for pair in labels]
    sizes = [len(part) for part in each]
    source[split] = np.concatenate([_rows(size) for size in sizes])
    source[f"{split}_set"] = np.repeat(np.array(sets, np.int32), sizes)
    pools.append(
      {
        "image": pictures,
        "label": np.concatenate(each),
        "task": np.repeat(_rows(len(sizes)), sizes),
      }
    )
  return Stream(
    "domain-incremental", pools[0], pools[1], tuple(tasks), num_classes, source
  )


def _hold_out(
  labels: np.ndarray, rows: np.ndarray, fraction: float, key: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Cuts rows into those to train on and those held out, class by class.

  Args:
    labels: the class of each example.
    rows: the examples to cut, sorted.
    fraction: the share of each class that is held out, rounded down.
    key: a number for each example; those with the smallest are held out.

  Returns:
    Both parts: int32, sorted.
  """
  # In floats 0.29 * 100 is 28.999...: as decimals it is 29.
  share = Fraction(str(float(fraction)))
  held_out = np.zeros(len(rows), bool)
  for label in np.unique(labels[rows]):
    members = np.flatnonzero(labels[rows] == label)
    size = int(share * len(members))
    held_out[members[np.argsort(key[rows[members]])[:size]]] = True
  return rows[~held_out].astype(np.int32), rows[held_out].astype(np.int32)


def _permutation(order: np.ndarray) -> _Change:
  """The change of images that puts their pixels in an order."""

  def change(images: np.ndarray, out: np.ndarray) -> None:
    pixels = images.reshape(len(images), len(order), images.shape[3])
    out[...] = pixels[:, order].reshape(out.shape)

  return change


def _rotation(shape: tuple[int, ...], degrees: float) -> _Change:
  """The change of images [n, *shape] that turns them counter-clockwise."""
  height, width, channels = shape
  if degrees % 360 == 0:
    return lambda images, out: np.copyto(out, images)
  sine, cosine = np.sin(np.deg2rad(degrees)), np.cos(np.deg2rad(degrees))
  rows, columns = np.indices((height, width)).reshape(2, -1)
  y, x = rows - (height - 1) / 2, columns - (width - 1) / 2
  # Where each pixel comes from; rounded, so that right angles hit pixels.
  y_from = np.round(cosine * y + sine * x + (height - 1) / 2, 9)
  x_from = np.round(cosine * x - sine * y + (width - 1) / 2, 9)
  top, left = np.floor(y_from).astype(int), np.floor(x_from).astype(int)
  corners = []
  for row, column in np.ndindex(2, 2):
    place_y, place_x = top + row, left + column
    weight = (1 - abs(y_from - place_y)) * (1 - abs(x_from - place_x))
    inside = (
      (place_y >= 0) & (place_y < height) & (place_x >= 0) & (place_x < width)
    )
    corners.append(
      (np.where(inside, place_y * width + place_x, 0), weight * inside)
    )

  def change(images: np.ndarray, out: np.ndarray) -> None:
    dtype = np.result_type(images.dtype, np.float32)
    for start in range(0, len(images), _CHUNK):
      part = images[start : start + _CHUNK]
      pixels = part.reshape(len(part), height * width, channels)
      made = np.zeros(pixels.shape, dtype)
      for places, weight in corners:
        made += pixels[:, places] * weight.astype(dtype)[:, None]
      if np.issubdtype(images.dtype, np.integer):
        made = np.rint(made)
      out[start : start + _CHUNK] = made.reshape(part.shape)

  return change


def _parts(task: Task) -> dict[str, np.ndarray]:
  return {
    "train": task.train,
    "validation": task.validation,
    "test": task.test,
  }


def _source_rows(
  stream: Stream, split: str, rows: np.ndarray
) -> dict[str, list[int]]:
  """Returns the number of the source set -> the rows of it."""
  sets = stream.source[f"{split}_set"][rows]
  source = stream.source[split][rows]
  return {
    str(number): source[sets == number].tolist() for number in np.unique(sets)
  }


def _one_source(size: int, test_size: int) -> dict[str, np.ndarray]:
  """Returns `Stream.source` where the pools are the source sets."""
  return {
    "train": _rows(size),
    "test": _rows(test_size),
    "train_set": np.zeros(size, np.int32),
    "test_set": np.zeros(test_size, np.int32),
  }


def _labels(source: Source) -> np.ndarray:
  return np.asarray(source.labels, np.int32)


def _rows(size: int) -> np.ndarray:
  return np.arange(size, dtype=np.int32)


def _order(n: int, seed: int, *choice: int) -> np.ndarray:
  """Returns a random permutation of 0..n-1, another one for each choice."""
  # NumPy keeps the raw stream of a bit generator for ever, but not what
  # Generator.permutation makes of it.
  bits = np.random.PCG64([seed, *choice])
  return np.argsort(bits.random_raw(n), kind="stable")


def _check_seed(seed: int) -> None:
  if not isinstance(seed, int | np.integer) or seed < 0:
    raise StreamError(f"seed must be an integer >= 0, got {seed!r}.")


def _check_num_tasks(num_tasks: int) -> None:
  if not isinstance(num_tasks, int | np.integer) or num_tasks < 1:
    raise StreamError(f"num_tasks must be an integer >= 1, got {num_tasks!r}.")


def _check_validation(fraction: float) -> None:
  if not 0 <= fraction < 1:
    raise StreamError(
      f"validation {fraction} must lie in [0, 1): it is the fraction of the"
      " training samples that is held out."
    )


def _check_once(names: Sequence[Any], what: str) -> None:
  if len(set(names)) != len(names):
    raise StreamError(
      f"{what} must name each task once, got {list(names)}: a repeated one"
      " would be the same task again."
    )
