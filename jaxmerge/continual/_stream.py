"""A stream of tasks: what it is, what it is checked for, how it is drawn.

Random choices depend on the seed alone, and not on the version of NumPy.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

import numpy as np

# One choice a seed makes -> its number, so that choices are independent.
ORDER, VALIDATION, PARTS, PIXELS = range(4)


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
  >>> from jaxmerge.continual import streams
  >>> digits = data.load("digits", "train"), data.load("digits", "test")
  >>> stream = streams.class_incremental(*digits, num_tasks=5)
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
  >>> from jaxmerge.continual import streams
  >>> digits = data.load("digits", "train"), data.load("digits", "test")
  >>> stream = streams.permuted(*digits, num_tasks=2, seed=0)
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
  def inputs(self) -> np.ndarray:
    """Inputs of a network [n, ...]: images, or the tokens of texts."""

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
    train: "input" [N, ...], "label" int32 [N], and "task" int32 [N], the task
      that the example belongs to, validation included; -1 if to none.
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


class Kind(NamedTuple):
  """What two sets of one stream have in common."""

  shape: tuple[int, ...]
  dtype: np.dtype[Any]
  num_classes: int

  def __str__(self) -> str:
    return f"{self.dtype} inputs {self.shape} of {self.num_classes} classes"


def check_pair(train: Source, test: Source, name: str = "") -> Kind:
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


def _check_source(source: Source, name: str) -> Kind:
  inputs, labels = source.inputs, np.asarray(source.labels)
  if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
    raise StreamError(
      f"{name}: labels must be a vector of integers, one class for each input:"
      f" got {labels.dtype} of shape {labels.shape}."
    )
  if len(inputs) != len(labels):
    raise StreamError(
      f"{name} has {len(inputs)} inputs but {len(labels)} labels: give one for"
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
  return Kind(inputs.shape[1:], inputs.dtype, int(source.num_classes))


def check_images(kind: Kind) -> Kind:
  """Checks that inputs are images, and returns what they are."""
  if len(kind.shape) != 3:
    raise StreamError(
      "images must be [n, height, width, channels], got inputs of shape"
      f" {('n', *kind.shape)}: add the axes of length 1."
    )
  return kind


def hold_out(
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


def one_source(size: int, test_size: int) -> dict[str, np.ndarray]:
  """Returns `Stream.source` where the pools are the source sets."""
  return {
    "train": all_rows(size),
    "test": all_rows(test_size),
    "train_set": np.zeros(size, np.int32),
    "test_set": np.zeros(test_size, np.int32),
  }


def labels_of(source: Source) -> np.ndarray:
  return np.asarray(source.labels, np.int32)


def all_rows(size: int) -> np.ndarray:
  return np.arange(size, dtype=np.int32)


def random_order(n: int, seed: int, *choice: int) -> np.ndarray:
  """Returns a random permutation of 0..n-1, another one for each choice."""
  # NumPy keeps the raw stream of a bit generator for ever, but not what
  # Generator.permutation makes of it.
  bits = np.random.PCG64([seed, *choice])
  return np.argsort(bits.random_raw(n), kind="stable")


def check_seed(seed: int) -> None:
  if not isinstance(seed, int | np.integer) or seed < 0:
    raise StreamError(f"seed must be an integer >= 0, got {seed!r}.")


def check_num_tasks(num_tasks: int) -> None:
  if not isinstance(num_tasks, int | np.integer) or num_tasks < 1:
    raise StreamError(f"num_tasks must be an integer >= 1, got {num_tasks!r}.")


def check_validation(fraction: float) -> None:
  if not 0 <= fraction < 1:
    raise StreamError(
      f"validation {fraction} must lie in [0, 1): it is the fraction of the"
      " training samples that is held out."
    )


def check_once(names: Sequence[Any], what: str) -> None:
  if len(set(names)) != len(names):
    raise StreamError(
      f"{what} must name each task once, got {list(names)}: a repeated one"
      " would be the same task again."
    )


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
