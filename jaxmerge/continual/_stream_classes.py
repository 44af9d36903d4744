"""Streams whose tasks are parts of one set: by class, or at random."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxmerge.continual import _stream
from jaxmerge.continual._stream import Source, Stream, StreamError, Task


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
  belong to no task. Inputs are not copied: the pools are the source arrays.

  Args:
    train: the training set: a `jaxmerge.data.Dataset`, or another `Source`.
    test: the test set, with inputs of the same shape and dtype, and as many
      classes.
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
  _stream.check_validation(validation)
  return _by_class(
    train,
    test,
    _groups(_stream.check_pair(train, test), num_tasks, groups, order, seed),
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
  at most. Inputs are not copied: the pools are the source arrays.

  Args:
    train: the training set.
    test: the test set, with inputs of the same shape and dtype, and as many
      classes.
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
  pair = _stream.check_pair(train, test)
  labels, test_labels = _stream.labels_of(train), _stream.labels_of(test)
  _stream.check_seed(seed)
  _stream.check_validation(validation)
  _stream.check_num_tasks(num_tasks)
  if num_tasks > len(labels):
    raise StreamError(
      f"num_tasks {num_tasks} is more than the {len(labels)} training samples:"
      " take fewer tasks."
    )
  parts = np.array_split(
    _stream.random_order(len(labels), seed, _stream.PARTS), num_tasks
  )
  key = _stream.random_order(len(labels), seed, _stream.VALIDATION)
  everything = _stream.all_rows(len(test_labels))
  task_of = np.empty(len(labels), np.int32)
  tasks = []
  for number, part in enumerate(parts):
    task_of[part] = number
    rows, held_out = _stream.hold_out(labels, np.sort(part), validation, key)
    classes = np.union1d(labels[part], test_labels)
    tasks.append(
      Task(
        f"part {number}", tuple(classes.tolist()), rows, held_out, everything
      )
    )
  return Stream(
    "data-incremental",
    {"input": train.inputs, "label": labels, "task": task_of},
    {
      "input": test.inputs,
      "label": test_labels,
      "task": np.full(len(test_labels), -1, np.int32),
    },
    tuple(tasks),
    pair.num_classes,
    _stream.one_source(len(labels), len(test_labels)),
  )


def _groups(
  kind: _stream.Kind,
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
  _stream.check_num_tasks(num_tasks)
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
    _stream.check_seed(seed)
    order = _stream.random_order(kind.num_classes, seed, _stream.ORDER).tolist()
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
  labels, test_labels = _stream.labels_of(train), _stream.labels_of(test)
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
  key = _stream.random_order(len(labels), seed, _stream.VALIDATION)
  tasks = []
  for number, group in enumerate(groups):
    rows, held_out = _stream.hold_out(
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
    {"input": train.inputs, "label": labels, "task": task_of},
    {"input": test.inputs, "label": test_labels, "task": test_task_of},
    tuple(tasks),
    first if relabel else int(train.num_classes),
    _stream.one_source(len(labels), len(test_labels)),
  )
