"""Domain-incremental streams: the same classes, seen in another way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from jaxmerge.continual import _stream
from jaxmerge.continual._stream import Source, Stream, StreamError, Task

# Images rotated at a time: what is held beside the pool stays small.
_CHUNK = 4096

# Writes the images of one task, made of those of the source, into a pool.
_Change = Callable[[np.ndarray, np.ndarray], None]


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
  >>> stream.train["input"].shape  # 3 times 1,437 images
  (4311, 8, 8, 1)
  """
  pair = _stream.check_images(_stream.check_pair(train, test))
  _stream.check_seed(seed)
  _stream.check_validation(validation)
  _stream.check_num_tasks(num_tasks)
  height, width = pair.shape[:2]
  pixels = height * width
  changes = [_permutation(np.arange(pixels))] + [
    _permutation(_stream.random_order(pixels, seed, _stream.PIXELS, number))
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
  pair = _stream.check_images(_stream.check_pair(train, test))
  _stream.check_seed(seed)
  _stream.check_validation(validation)
  degrees = [float(angle) for angle in angles]
  if not degrees or not np.isfinite(degrees).all():
    raise StreamError(
      f"angles must be finite numbers of degrees, one for each task: got"
      f" {list(angles)}."
    )
  names = [f"{angle!r} degrees".replace(".0 ", " ") for angle in degrees]
  _stream.check_once(degrees, "angles")
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
    pairs: the training and the test set of each task, all with inputs of the
      same shape and dtype, and as many classes.
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
  _stream.check_seed(seed)
  _stream.check_validation(validation)
  if names is None:
    names = [f"domain {number}" for number in range(len(pairs))]
  if len(names) != len(pairs):
    raise StreamError(
      f"names has {len(names)} entries for {len(pairs)} pairs: give one for"
      " each."
    )
  _stream.check_once(names, "names")
  first, *others = [
    _stream.check_pair(*pair, name=name)
    for pair, name in zip(pairs, names, strict=True)
  ]
  for name, other in zip(names[1:], others, strict=True):
    if other != first:
      raise StreamError(
        f"{names[0]!r} has {first}, but {name!r} has {other}: the tasks of a"
        " domain-incremental stream share inputs and classes, so resize,"
        " convert or relabel one of them."
      )
  trains, tests = zip(*pairs, strict=True)
  return _of_domains(
    np.concatenate([source.inputs for source in trains]),
    np.concatenate([source.inputs for source in tests]),
    [
      (_stream.labels_of(train), _stream.labels_of(test))
      for train, test in pairs
    ],
    range(len(pairs)),
    names,
    first.num_classes,
    seed,
    validation,
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
    pool(train.inputs),
    pool(test.inputs),
    [(_stream.labels_of(train), _stream.labels_of(test))] * len(changes),
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
    key = _stream.random_order(len(train), seed, _stream.VALIDATION)
    rows, held_out = _stream.hold_out(
      train, np.arange(len(train)), validation, key
    )
    tasks.append(
      Task(
        name,
        tuple(np.union1d(train, test).tolist()),
        (start + rows).astype(np.int32),
        (start + held_out).astype(np.int32),
        (test_start + _stream.all_rows(len(test))).astype(np.int32),
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
    source[split] = np.concatenate([_stream.all_rows(size) for size in sizes])
    source[f"{split}_set"] = np.repeat(np.array(sets, np.int32), sizes)
    pools.append(
      {
        "input": pictures,
        "label": np.concatenate(each),
        "task": np.repeat(_stream.all_rows(len(sizes)), sizes),
      }
    )
  return Stream(
    "domain-incremental", pools[0], pools[1], tuple(tasks), num_classes, source
  )


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
