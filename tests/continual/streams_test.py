"""Tests of the streams."""

from __future__ import annotations

import json
import zlib
from typing import NamedTuple

import chex
import jax
import numpy as np
import scipy.ndimage
from absl.testing import absltest, parameterized

from jaxmerge import data
from jaxmerge.continual import _stream_domains, streams


class _Set(NamedTuple):
  inputs: np.ndarray
  labels: np.ndarray
  num_classes: int


def _set(
  seed=0, size=120, classes=6, shape=(5, 4, 2), dtype=np.uint8, labels=None
):
  rng = np.random.default_rng(seed)
  if labels is None:
    labels = rng.permutation(np.arange(size) % classes)
  labels = np.asarray(labels)
  images = rng.integers(0, 256, (len(labels), *shape)).astype(dtype)
  return _Set(images, labels, classes)


def _pair(**options):
  return _set(0, 120, **options), _set(1, 60, **options)


def _of_classes(labels, classes):
  return np.flatnonzero(np.isin(labels, classes))


def _both_by_class():
  return parameterized.parameters(
    streams.class_incremental, streams.task_incremental
  )


def _all_streams(train, test, validation=0.0):
  return (
    streams.class_incremental(
      train, test, num_tasks=3, seed=1, validation=validation
    ),
    streams.class_incremental(
      train, test, groups=[[5, 0], [2]], relabel=True, validation=validation
    ),
    streams.task_incremental(train, test, num_tasks=2, validation=validation),
    streams.data_incremental(
      train, test, num_tasks=7, seed=0, validation=validation
    ),
    streams.permuted(train, test, num_tasks=3, seed=0, validation=validation),
    streams.rotated(train, test, angles=[0, 30], validation=validation),
    streams.domains([(train, test), (test, train)], validation=validation),
  )


class EveryStreamTest(parameterized.TestCase):
  @parameterized.parameters(0.0, 0.25)
  def test_keeps_its_promises(self, validation):
    train, test = _pair()
    for stream in _all_streams(train, test, validation):
      with self.subTest(stream.scenario):
        self._check(stream)
        for task in stream.tasks:
          self.assertEqual(bool(len(task.validation)), validation > 0)

  def _check(self, stream):
    owner = np.full(len(stream.train["label"]), -1)
    for number, task in enumerate(stream.tasks):
      chex.assert_type([task.train, task.validation, task.test], np.int32)
      for rows in (task.train, task.validation, task.test):
        self.assertTrue(np.all(np.diff(rows) > 0))
      self.assertEmpty(np.intersect1d(task.train, task.validation))
      both = np.concatenate([task.train, task.validation])
      self.assertTrue(np.all(owner[both] == -1))
      owner[both] = number
      occurring = np.union1d(
        stream.train["label"][both], stream.test["label"][task.test]
      )
      self.assertCountEqual(task.classes, occurring)
      self.assertTrue(all(type(label) is int for label in task.classes))
      self.assertLess(max(task.classes), stream.num_classes)
      self.assertTrue(
        np.all(np.isin(stream.test["task"][task.test], [number, -1]))
      )
    np.testing.assert_array_equal(stream.train["task"], owner)
    self.assertLen({task.name for task in stream.tasks}, stream.num_tasks)
    for split in ("train", "test"):
      pool = getattr(stream, split)
      self.assertEqual(set(pool), {"input", "label", "task"})
      source = [stream.source[split], stream.source[f"{split}_set"]]
      chex.assert_type([pool["label"], pool["task"], *source], np.int32)
      chex.assert_equal_shape([pool["label"], pool["task"], *source])
      self.assertLen(pool["input"], len(pool["label"]))

  @parameterized.parameters(np.uint8, np.float32, np.float64)
  def test_keeps_the_dtype_of_the_images(self, dtype):
    train, test = _pair(dtype=dtype)
    for stream in _all_streams(train, test):
      self.assertEqual(stream.train["input"].dtype, dtype)
      self.assertEqual(stream.test["input"].dtype, dtype)

  def test_leaves_the_sets_untouched(self):
    train, test = _pair()
    copies = train.inputs.copy(), train.labels.copy()
    for part in (train, test):
      part.inputs.flags.writeable = False
      part.labels.flags.writeable = False
    _all_streams(train, test, 0.25)
    np.testing.assert_array_equal(train.inputs, copies[0])
    np.testing.assert_array_equal(train.labels, copies[1])

  def test_is_fixed_by_its_arguments(self):
    train, test = _pair()
    for first, again in zip(
      _all_streams(train, test, 0.25),
      _all_streams(train, test, 0.25),
      strict=True,
    ):
      jax.tree.map(np.testing.assert_array_equal, first, again)

  def test_the_digits_are_a_source(self):
    train, test = data.load("digits", "train"), data.load("digits", "test")
    stream = streams.class_incremental(train, test, num_tasks=5)
    for number, task in enumerate(stream.tasks):
      self.assertEqual(task.classes, (2 * number, 2 * number + 1))
      for pool, rows, source in (
        (stream.train, task.train, train),
        (stream.test, task.test, test),
      ):
        np.testing.assert_array_equal(
          rows, _of_classes(source.labels, task.classes)
        )
        np.testing.assert_array_equal(pool["label"], source.labels)


class ByClassTest(parameterized.TestCase):
  def test_the_scenarios_differ_in_their_name_alone(self):
    train, test = _pair()
    first = streams.class_incremental(train, test, num_tasks=3, seed=2)
    second = streams.task_incremental(train, test, num_tasks=3, seed=2)
    self.assertEqual(first.scenario, "class-incremental")
    self.assertEqual(second.scenario, "task-incremental")
    renamed = second._replace(scenario=first.scenario)
    jax.tree.map(np.testing.assert_array_equal, first, renamed)

  @_both_by_class()
  def test_groups_the_classes_along_the_order(self, make):
    train, test = _pair()
    stream = make(train, test, num_tasks=3, order=[4, 1, 0, 5, 3, 2])
    self.assertEqual(
      [task.classes for task in stream.tasks], [(4, 1), (0, 5), (3, 2)]
    )
    for task in stream.tasks:
      np.testing.assert_array_equal(
        task.train, _of_classes(train.labels, task.classes)
      )
      np.testing.assert_array_equal(
        task.test, _of_classes(test.labels, task.classes)
      )

  @_both_by_class()
  def test_copies_no_image(self, make):
    train, test = _pair()
    stream = make(train, test, num_tasks=2, relabel=True, validation=0.1)
    self.assertIs(stream.train["input"], train.inputs)
    self.assertIs(stream.test["input"], test.inputs)
    np.testing.assert_array_equal(stream.source["train"], np.arange(120))
    np.testing.assert_array_equal(stream.source["test"], np.arange(60))
    self.assertFalse(stream.source["train_set"].any())

  def test_the_seed_shuffles_the_order(self):
    train, test = _pair()
    orders = [
      sum(
        (
          task.classes
          for task in streams.class_incremental(
            train, test, num_tasks=3, seed=seed
          ).tasks
        ),
        (),
      )
      for seed in range(20)
    ]
    self.assertGreater(len(set(orders)), 15)
    for order in orders:
      self.assertEqual(sorted(order), list(range(6)))
    # Written down when this was made: the same on every machine.
    self.assertEqual(orders[0], (3, 2, 1, 0, 4, 5))

  def test_leaves_out_the_classes_of_no_group(self):
    train, test = _pair()
    stream = streams.class_incremental(train, test, groups=[[5], [0, 3]])
    self.assertEqual(stream.num_classes, 6)
    self.assertEqual([task.classes for task in stream.tasks], [(5,), (0, 3)])
    expected = np.array([1, -1, -1, 1, -1, 0])
    for pool, source in ((stream.train, train), (stream.test, test)):
      np.testing.assert_array_equal(pool["task"], expected[source.labels])
      np.testing.assert_array_equal(pool["label"], source.labels)

  def test_numbers_the_classes_along_the_stream(self):
    train, test = _pair()
    plain = streams.class_incremental(train, test, groups=[[5], [3, 0]])
    stream = streams.class_incremental(
      train, test, groups=[[5], [3, 0]], relabel=True
    )
    self.assertEqual(stream.num_classes, 3)
    self.assertEqual([task.classes for task in stream.tasks], [(0,), (1, 2)])
    expected = np.array([2, -1, -1, 1, -1, 0])
    for pool, source in ((stream.train, train), (stream.test, test)):
      np.testing.assert_array_equal(pool["label"], expected[source.labels])
    for task, other in zip(stream.tasks, plain.tasks, strict=True):
      np.testing.assert_array_equal(task.train, other.train)

  @parameterized.parameters((0.29, 29), (0.5, 50), (0.999, 99), (1e-9, 0))
  def test_holds_out_a_share_of_each_class(self, fraction, size):
    train = _set(labels=np.arange(300) % 3, classes=3)
    test = _set(classes=3)
    stream = streams.class_incremental(
      train, test, groups=[[0, 2], [1]], validation=fraction
    )
    for task in stream.tasks:
      for label in task.classes:
        self.assertEqual(np.sum(train.labels[task.validation] == label), size)
        self.assertEqual(np.sum(train.labels[task.train] == label), 100 - size)

  def test_holds_out_the_same_samples_however_classes_are_grouped(self):
    train, test = _pair()
    held_out = [
      np.sort(
        np.concatenate(
          [
            task.validation
            for task in streams.class_incremental(
              train, test, groups=groups, validation=0.25
            ).tasks
          ]
        )
      )
      for groups in ([[0, 1, 2, 3, 4, 5]], [[5, 2], [0], [4, 3, 1]])
    ]
    np.testing.assert_array_equal(*held_out)

  def test_draws_what_is_held_out_at_random(self):
    train = _set(labels=np.arange(600) % 2, classes=2)
    test = _set(classes=2)
    drawn = [
      streams.class_incremental(
        train, test, num_tasks=1, seed=seed, validation=0.5
      )
      .tasks[0]
      .validation
      for seed in range(40)
    ]
    # Halves of 600 share 150 on the average; each is drawn half of the time.
    self.assertLess(abs(len(np.intersect1d(drawn[0], drawn[1])) - 150), 50)
    often = np.bincount(np.concatenate(drawn), minlength=600)
    self.assertTrue(np.all((often > 2) & (often < 38)))
    unseeded = streams.class_incremental(
      train, test, num_tasks=1, validation=0.5
    )
    np.testing.assert_array_equal(unseeded.tasks[0].validation, drawn[0])

  def test_is_the_same_on_every_machine(self):
    train = _set(labels=[0] * 20, classes=1)
    stream = streams.class_incremental(
      train, train, num_tasks=1, seed=7, validation=0.3
    )
    self.assertEqual(stream.tasks[0].validation.tolist(), [1, 2, 3, 10, 11, 15])


class DataIncrementalTest(parameterized.TestCase):
  @parameterized.parameters((1, {120}), (8, {15}), (7, {17, 18}), (120, {1}))
  def test_cuts_the_training_set_into_equal_parts(self, num_tasks, sizes):
    train, test = _pair()
    stream = streams.data_incremental(train, test, num_tasks=num_tasks, seed=0)
    self.assertEqual(stream.scenario, "data-incremental")
    self.assertEqual({len(task.train) for task in stream.tasks}, sizes)
    np.testing.assert_array_equal(
      np.sort(np.concatenate([task.train for task in stream.tasks])),
      np.arange(120),
    )
    self.assertIs(stream.train["input"], train.inputs)
    self.assertIs(stream.test["input"], test.inputs)

  def test_tests_every_task_on_the_whole_test_set(self):
    train, test = _pair()
    stream = streams.data_incremental(train, test, num_tasks=3, seed=0)
    for task in stream.tasks:
      np.testing.assert_array_equal(task.test, np.arange(60))
      self.assertEqual(task.classes, tuple(range(6)))
    self.assertTrue(np.all(stream.test["task"] == -1))

  def test_draws_the_parts_by_the_seed(self):
    train, test = _set(size=1000), _set()
    first, second = (
      streams.data_incremental(train, test, num_tasks=2, seed=seed).tasks[0]
      for seed in (0, 1)
    )
    self.assertLess(
      abs(len(np.intersect1d(first.train, second.train)) - 250), 80
    )
    self.assertLess(abs(np.mean(first.train < 500) - 0.5), 0.1)

  def test_holds_out_of_each_part(self):
    train, test = _pair()
    stream = streams.data_incremental(
      train, test, num_tasks=2, seed=0, validation=0.25
    )
    for number, task in enumerate(stream.tasks):
      part = np.flatnonzero(stream.train["task"] == number)
      for label in range(6):
        self.assertEqual(
          np.sum(train.labels[task.validation] == label),
          np.sum(train.labels[part] == label) // 4,
        )


class DomainsTest(parameterized.TestCase):
  def _check_pools(self, stream, sources):
    """The pools are the sources, one after the other, but for the images."""
    start = test_start = 0
    for number, (train, test) in enumerate(sources):
      size, test_size = len(train.labels), len(test.labels)
      task = stream.tasks[number]
      for rows, first, count in (
        (np.union1d(task.train, task.validation), start, size),
        (task.test, test_start, test_size),
      ):
        np.testing.assert_array_equal(rows, first + np.arange(count))
      np.testing.assert_array_equal(
        stream.train["label"][start : start + size], train.labels
      )
      np.testing.assert_array_equal(
        stream.test["label"][test_start : test_start + test_size], test.labels
      )
      np.testing.assert_array_equal(stream.test["task"][task.test], number)
      np.testing.assert_array_equal(
        stream.source["train"][start : start + size], np.arange(size)
      )
      np.testing.assert_array_equal(
        stream.source["test"][task.test], np.arange(test_size)
      )
      start, test_start = start + size, test_start + test_size
    self.assertLen(stream.train["label"], start)
    self.assertEqual(stream.scenario, "domain-incremental")
    self.assertEqual(stream.num_classes, 6)

  def test_permutes_the_pixels_of_each_task(self):
    train, test = _pair()
    stream = streams.permuted(train, test, num_tasks=4, seed=3)
    self._check_pools(stream, [(train, test)] * 4)
    np.testing.assert_array_equal(stream.train["input"][:120], train.inputs)
    # A set whose pixels are their own numbers shows the order.
    numbers = np.arange(20, dtype=np.uint8).reshape(1, 5, 4, 1)
    probe = _Set(
      np.concatenate([numbers, 100 + numbers], -1), np.zeros(1, int), 6
    )
    shown = streams.permuted(probe, probe, num_tasks=4, seed=3).train["input"]
    orders = shown[..., 0].reshape(4, 20).astype(int)
    self.assertLen({tuple(order) for order in orders}, 4)
    for number, order in enumerate(orders):
      np.testing.assert_array_equal(np.sort(order), np.arange(20))
      for pool, source in ((stream.train, train), (stream.test, test)):
        size = len(source.labels)
        np.testing.assert_array_equal(
          pool["input"][number * size : (number + 1) * size],
          source.inputs.reshape(size, 20, 2)[:, order].reshape(size, 5, 4, 2),
        )
    other = streams.permuted(probe, probe, num_tasks=4, seed=4).train["input"]
    self.assertFalse(np.array_equal(other[1], shown[1]))
    np.testing.assert_array_equal(other[0], shown[0])

  def test_holds_out_the_same_samples_in_every_task(self):
    train, test = _pair()
    for stream in (
      streams.permuted(train, test, num_tasks=3, seed=0, validation=0.25),
      streams.rotated(train, test, angles=[0, 1, 2], validation=0.25),
    ):
      self._check_pools(stream, [(train, test)] * 3)
      first, *others = (
        stream.source["train"][task.validation] for task in stream.tasks
      )
      np.testing.assert_array_equal(np.bincount(train.labels[first]), [5] * 6)
      for other in others:
        np.testing.assert_array_equal(first, other)

  @parameterized.product(
    angle=[15, -40.5, 90, 180, 270, 359, 400],
    shape=[(7, 7, 2), (5, 8, 1), (1, 4, 1)],
  )
  def test_rotates_as_scipy_does(self, angle, shape):
    train = _set(size=9, shape=shape, dtype=np.float64)
    test = _set(size=4, shape=shape, dtype=np.float64)
    stream = streams.rotated(train, test, angles=[0, angle])
    self._check_pools(stream, [(train, test)] * 2)
    for pool, source in ((stream.train, train), (stream.test, test)):
      same, turned = np.split(pool["input"], 2)
      np.testing.assert_array_equal(same, source.inputs)
      expected = scipy.ndimage.rotate(
        source.inputs,
        angle,
        axes=(1, 2),
        reshape=False,
        order=1,
        mode="grid-constant",
      )
      np.testing.assert_allclose(turned, expected, atol=1e-5)

  @parameterized.parameters(np.uint8, np.float32, np.float64)
  def test_right_angles_only_move_pixels(self, dtype):
    train = _set(size=5, shape=(6, 6, 3), dtype=dtype)
    stream = streams.rotated(train, train, angles=[0, 90, 180, 270, -90, 360])
    parts = np.split(stream.train["input"], 6)
    for part, turns in zip(parts, (0, 1, 2, 3, 3, 0), strict=True):
      np.testing.assert_array_equal(
        part, np.rot90(train.inputs, turns, axes=(1, 2))
      )

  def test_rounds_integers(self):
    train = _set(size=5, shape=(6, 6, 1))
    exact = train._replace(inputs=train.inputs.astype(np.float64))
    found, expected = (
      streams.rotated(source, source, angles=[33]).train["input"]
      for source in (train, exact)
    )
    self.assertLess(np.max(np.abs(found - expected)), 0.5 + 1e-4)
    white = train._replace(inputs=np.full_like(train.inputs, 255))
    middle = streams.rotated(white, white, angles=[33]).train["input"][
      :, 2:4, 2:4
    ]
    np.testing.assert_array_equal(middle, 255)

  def test_rotates_more_images_than_fit_in_a_chunk(self):
    train = _set(size=_stream_domains._CHUNK + 5, shape=(3, 3, 1))
    stream = streams.rotated(train, _set(shape=(3, 3, 1)), angles=[90])
    np.testing.assert_array_equal(
      stream.train["input"], np.rot90(train.inputs, 1, axes=(1, 2))
    )

  def test_names_the_angles(self):
    train, test = _pair()
    stream = streams.rotated(train, test, angles=[0, 22.5, -10.0])
    self.assertEqual(
      [task.name for task in stream.tasks],
      ["0 degrees", "22.5 degrees", "-10 degrees"],
    )

  def test_joins_data_sets(self):
    pairs = [_pair(), (_set(2, 30), _set(3, 12)), (_set(4, 50), _set(5, 20))]
    stream = streams.domains(pairs, names=["a", "b", "c"], validation=0.25)
    self._check_pools(stream, pairs)
    self.assertEqual([task.name for task in stream.tasks], ["a", "b", "c"])
    for split, place in (("train", 0), ("test", 1)):
      sources = [pair[place] for pair in pairs]
      np.testing.assert_array_equal(
        getattr(stream, split)["input"],
        np.concatenate([source.inputs for source in sources]),
      )
      np.testing.assert_array_equal(
        stream.source[f"{split}_set"],
        np.repeat([0, 1, 2], [len(source.labels) for source in sources]),
      )
    self.assertEqual(
      [len(task.validation) for task in stream.tasks],
      # A quarter of each of six classes: of 20, of 5, and of 8 or 9.
      [6 * 5, 6 * 1, 6 * 2],
    )
    unnamed = streams.domains(pairs)
    self.assertEqual(unnamed.tasks[2].name, "domain 2")


class RecordTest(parameterized.TestCase):
  def test_describes_a_stream(self):
    train, test = _pair()
    stream = streams.class_incremental(
      train, test, groups=[[5, 0], [2]], validation=0.25
    )
    found = json.loads(json.dumps(streams.describe(stream)))
    self.assertEqual(found["scenario"], "class-incremental")
    self.assertEqual(found["num_classes"], 6)
    for task, entry in zip(stream.tasks, found["tasks"], strict=True):
      self.assertEqual(entry["name"], task.name)
      self.assertEqual(tuple(entry["classes"]), task.classes)
      for part in ("train", "validation", "test"):
        rows = getattr(task, part)
        self.assertEqual(entry["sizes"][part], len(rows))
        self.assertEqual(entry["crc32"][part], zlib.crc32(rows.astype("<i4")))

  def test_records_the_exact_examples(self):
    pairs = [_pair(), (_set(2, 30), _set(3, 12))]
    for stream, number in (
      (streams.domains(pairs, validation=0.25), "1"),
      (
        streams.permuted(*pairs[1], num_tasks=2, seed=0, validation=0.25),
        "0",
      ),
    ):
      found = json.loads(json.dumps(streams.as_json(stream)))
      second = found["tasks"][1]
      task = stream.tasks[1]
      self.assertEqual(second["name"], task.name)
      self.assertEqual(second["classes"], list(range(6)))
      self.assertEqual(second["test"], {number: list(range(12))})
      both = second["train"][number] + second["validation"][number]
      self.assertCountEqual(both, range(30))
      np.testing.assert_array_equal(
        stream.train["label"][task.train],
        pairs[1][0].labels[second["train"][number]],
      )

  def test_records_every_set_that_a_task_mixes(self):
    pairs = [_pair(), (_set(2, 30), _set(3, 12))]
    stream = streams.domains(pairs)
    rows = np.array([3, 118, 120, 149], np.int32)
    task = stream.tasks[0]._replace(train=rows)
    found = streams.as_json(stream._replace(tasks=(task,)))["tasks"][0]
    self.assertEqual(found["train"], {"0": [3, 118], "1": [0, 29]})
    self.assertEqual(found["validation"], {})


class ErrorsTest(parameterized.TestCase):
  def _refuses(self, message, make, *args, **options):
    with self.assertRaisesRegex(streams.StreamError, message):
      make(*args, **options)

  @parameterized.parameters(
    (dict(num_tasks=4), r"num_tasks 4 does .* 6 .* one of \[1, 2, 3, 6\]"),
    (dict(num_tasks=12), r"num_tasks 12 does not divide the 6"),
    (dict(num_tasks=0), r"num_tasks must be an integer >= 1, got 0"),
    (dict(num_tasks=2.0), r"num_tasks must be an integer >= 1, got 2\.0"),
    (dict(), "give num_tasks, .* or the groups"),
    (dict(num_tasks=1, groups=[[0]]), "num_tasks and groups both"),
    (dict(num_tasks=2, order=range(6), seed=0), "order and seed each"),
    (dict(groups=[[0]], order=range(6)), "groups and order each"),
    (dict(groups=[[0]], seed=0), "groups and seed each"),
    (dict(num_tasks=2, order=[0, 1, 2, 3, 4, 4]), r"order .* 0\.\.5 once"),
    (dict(num_tasks=2, order=[0, 1]), r"leave some out, give groups"),
    (dict(num_tasks=2, seed=-1), r"seed must be an integer >= 0, got -1"),
    (dict(num_tasks=2, seed=0.5), r"seed must be an integer >= 0, got 0\.5"),
    (dict(groups=[]), "groups is empty"),
    (dict(groups=[[0], []]), "group 1 is empty, a task with no sample"),
    (dict(groups=[[0], [6]]), r"group 1 names the class 6, .* 0\.\.5"),
    (dict(groups=[[-1]]), "group 0 names the class -1"),
    (dict(groups=[[0.5]]), r"group 0 names the class 0\.5"),
    (dict(groups=[[0], [1, 0]]), "class 0 is in group 0 and in group 1"),
    (dict(groups=[[2, 2]]), "class 2 is in group 0 and in group 0"),
    (dict(num_tasks=2, validation=1.0), r"validation 1\.0 must lie in"),
    (dict(num_tasks=2, validation=-0.1), r"validation -0\.1 must lie in"),
    (dict(num_tasks=2, validation=float("nan")), "validation nan must lie in"),
  )
  def test_refuses_tasks_that_cannot_be_made(self, options, message):
    for make in (streams.class_incremental, streams.task_incremental):
      self._refuses(message, make, *_pair(), **options)

  def test_refuses_tasks_without_samples(self):
    some = _set(labels=[0, 1, 3], classes=4)
    full = _set(classes=4)
    make = streams.class_incremental
    self._refuses(
      "class 2 of task 1 has no training sample", make, some, full, num_tasks=2
    )
    self._refuses(
      r"task 2, of the classes \[2\], has no test",
      make,
      full,
      some,
      num_tasks=4,
    )
    # Enough is there where a class of a task has test samples.
    self.assertLen(make(full, some, num_tasks=2).tasks, 2)

  @parameterized.parameters(
    (dict(labels=np.zeros(120)), "train: labels must be .* float64"),
    (dict(labels=np.zeros((120, 1), int)), r"labels .* shape \(120, 1\)"),
    (dict(labels=np.zeros(5, int)), "train has 120 inputs but 5 labels"),
    (dict(num_classes=5), r"0\.\.5, but num_classes 5 allows 0\.\.4"),
    (dict(labels=np.full(120, -1)), r"labels are in -1\.\.-1"),
    (
      dict(inputs=np.zeros((0, 5, 4, 2)), labels=np.zeros(0, int)),
      "train is empty",
    ),
    (
      dict(num_classes=7),
      r"train has uint8 inputs \(5, 4, 2\) of 7 .* test has .* of 6 classes",
    ),
    (
      dict(inputs=np.zeros((120, 5, 5, 2), np.float32)),
      r"train has float32 inputs \(5, 5, 2\) .* test has uint8 .*\(5, 4, 2\)",
    ),
  )
  def test_refuses_sets_that_do_not_fit(self, changes, message):
    train, test = _pair()
    train = train._replace(**changes)
    for make, options in (
      (streams.class_incremental, dict(num_tasks=2)),
      (streams.task_incremental, dict(num_tasks=2)),
      (streams.data_incremental, dict(num_tasks=2, seed=0)),
      (streams.permuted, dict(num_tasks=2, seed=0)),
      (streams.rotated, dict(angles=[0])),
    ):
      self._refuses(message, make, train, test, **options)
    self._refuses("'domain 0': .*" + message, streams.domains, [(train, test)])

  def test_takes_inputs_of_any_shape_but_for_the_streams_of_images(self):
    train, test = (
      part._replace(inputs=part.inputs.reshape(len(part.inputs), -1))
      for part in _pair()
    )
    stream = streams.class_incremental(train, test, num_tasks=2)
    self.assertIs(stream.train["input"], train.inputs)
    message = r"images must be .* \('n', 40\)"
    self._refuses(message, streams.permuted, train, test, num_tasks=2, seed=0)
    self._refuses(message, streams.rotated, train, test, angles=[0])

  def test_refuses_options_of_no_use(self):
    pair = _pair()
    for make in (streams.data_incremental, streams.permuted):
      self._refuses("num_tasks must be", make, *pair, num_tasks=0, seed=0)
    for make, options in (
      (streams.data_incremental, dict(num_tasks=2)),
      (streams.permuted, dict(num_tasks=2)),
      (streams.rotated, dict(angles=[0])),
      (lambda *pair, **rest: streams.domains([pair], **rest), {}),
    ):
      self._refuses("seed must be", make, *pair, seed=-1, **options)
      self._refuses(
        r"validation 1\.5", make, *pair, seed=0, validation=1.5, **options
      )
    self._refuses(
      "num_tasks 121 is more than the 120 training samples",
      streams.data_incremental,
      *pair,
      num_tasks=121,
      seed=0,
    )

  @parameterized.parameters(
    ([], "angles must be finite"),
    ([0, np.inf], "angles must be finite"),
    ([0, 10, 10.0], "angles must name each task once"),
  )
  def test_refuses_angles(self, angles, message):
    self._refuses(message, streams.rotated, *_pair(), angles=angles)

  def test_refuses_domains_that_differ(self):
    first = _pair()
    make = streams.domains
    self._refuses("pairs is empty", make, [])
    self._refuses("names has 1 entries for 2", make, [first] * 2, names=["a"])
    self._refuses(
      "names must name each task once", make, [first] * 2, names=["a", "a"]
    )
    for options, message in (
      (dict(shape=(5, 5, 2)), r"\(5, 4, 2\) .* 'b' has .* \(5, 5, 2\)"),
      (dict(classes=4), "of 6 classes, but 'b' has .* of 4 classes"),
      (dict(dtype=np.float32), "'a' has uint8 .* 'b' has float32"),
    ):
      self._refuses(message, make, [first, _pair(**options)], names=["a", "b"])


if __name__ == "__main__":
  absltest.main()
