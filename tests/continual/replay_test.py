"""Tests of the replay buffers."""

from __future__ import annotations

import collections
import functools
import itertools
import tempfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from absl.testing import absltest, parameterized

from jaxmerge import checkpoints, tree
from jaxmerge.continual import replay

_KEY = jax.random.key(0)
_NUM_CLASSES = 4

_BUFFERS = {
  "reservoir": replay.reservoir(7),
  "reservoir_per_class": replay.reservoir(
    3, per="class", num_groups=_NUM_CLASSES
  ),
  "reservoir_per_task": replay.reservoir(3, per="task", num_groups=3),
  "ring": replay.ring(7),
  "ring_per_task": replay.ring(3, per="task", num_groups=3),
  "class_balanced": replay.class_balanced(7, num_classes=_NUM_CLASSES),
  "herding": replay.herding(7, num_classes=_NUM_CLASSES),
  "herding_per_class": replay.herding(3, num_classes=_NUM_CLASSES, per="class"),
}
# Herding wants the items of a class at once.
_STREAMING = [name for name in _BUFFERS if "herding" not in name]


def _each(names=tuple(_BUFFERS)):
  return parameterized.named_parameters((name, name) for name in names)


def _stream(n=40, seed=0):
  """Items that say what they are, in random order of labels and tasks."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, _NUM_CLASSES, n).astype(np.int32)
  tasks = rng.integers(0, 3, n).astype(np.int32)
  row = np.arange(1, n + 1, dtype=np.int32)
  items = {
    "row": row,
    "input": np.stack([row, labels, tasks], 1).astype(np.float32),
  }
  return items, labels, tasks


def _features(n=40):
  return np.random.default_rng(9).normal(size=(n, 5)).astype(np.float32)


def _example():
  return {
    "row": jax.ShapeDtypeStruct((), jnp.int32),
    "input": jax.ShapeDtypeStruct((3,), jnp.float32),
  }


def _cut(batch, start, stop):
  return jax.tree.map(lambda leaf: leaf[start:stop], batch)


def _add_all(buffer, key=_KEY, n=40, **kwargs):
  state = buffer.init(_example())
  return buffer.add(state, *_stream(n), key, features=_features(n), **kwargs)


def _over_seeds(buffer, labels, cuts, num_seeds, tasks=0):
  """Positions in the stream that are held, [num_seeds, slots], -1 if empty."""

  @jax.jit
  @jax.vmap
  def run(key):
    state = buffer.init(jnp.int32(0))
    for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
      state = buffer.add(
        state,
        jnp.arange(start, stop, dtype=jnp.int32),
        jnp.asarray(labels[start:stop]),
        tasks,
        jax.random.fold_in(key, i),
      )
    return jnp.where(replay.valid(state), state.items, -1)

  return np.asarray(run(jax.random.split(_KEY, num_seeds)))


def _assert_uniform(held, num_seeds, kept):
  """Every position is held equally often: the chi-square test."""
  total = held.sum()
  np.testing.assert_equal(total, num_seeds * kept)
  # Draws without replacement vary less, by 1 - kept / n, than the test says.
  statistic = ((held - held.mean()) ** 2 / held.mean()).sum()
  n = len(held)
  p = scipy.stats.chi2.sf(statistic / (1 - kept / n), n - 1)
  assert 1e-4 < p, p


class EveryPolicyTest(parameterized.TestCase):
  @_each()
  def test_holds_what_was_offered(self, name):
    state = _add_all(_BUFFERS[name])
    items, labels, tasks = replay.contents(state)
    offered, offered_labels, offered_tasks = _stream()
    index = items["row"] - 1
    self.assertLen(set(index), len(index))
    self.assertNotEmpty(index)
    np.testing.assert_array_equal(items["input"], offered["input"][index])
    np.testing.assert_array_equal(labels, offered_labels[index])
    np.testing.assert_array_equal(tasks, offered_tasks[index])
    self.assertEqual(state.label.shape, (_BUFFERS[name].slots,))
    self.assertEqual(state.seen.sum(), 40)

  @_each()
  def test_jit_equals_no_jit_and_is_traced_once(self, name):
    buffer = _BUFFERS[name]
    chex.clear_trace_counter()
    add = jax.jit(chex.assert_max_traces(buffer.add, n=1))
    plain = compiled = buffer.init(_example())
    for seed in range(3):
      batch = _stream(seed=seed)
      key = jax.random.key(seed)
      plain = buffer.add(plain, *batch, key, features=_features())
      compiled = add(compiled, *batch, key, features=_features())
      chex.assert_trees_all_equal(plain, compiled)
    chex.assert_trees_all_equal_shapes_and_dtypes(
      plain, buffer.init(_example())
    )

  @_each()
  def test_vmap_over_seeds(self, name):
    buffer = _BUFFERS[name]
    keys = jax.random.split(_KEY, 3)
    many = jax.jit(jax.vmap(lambda key: _add_all(buffer, key)))(keys)
    single = [_add_all(buffer, key) for key in keys]
    for i, want in enumerate(single):
      one = jax.tree.map(lambda leaf, i=i: leaf[i], many)
      chex.assert_trees_all_equal(one, want)
    np.testing.assert_array_equal(
      replay.filled(many), [replay.filled(single[0])] * 3
    )
    # With the state mapped and nothing else.
    add = functools.partial(
      buffer.add,
      items=_stream()[0],
      labels=_stream()[1],
      tasks=1,
      key=_KEY,
      features=_features(),
    )
    again = jax.jit(jax.vmap(lambda state: add(state)))(many)
    chex.assert_trees_all_equal(
      jax.tree.map(lambda leaf: leaf[0], again), add(single[0])
    )

  @_each(_STREAMING)
  def test_scan_and_batches_of_any_size(self, name):
    buffer = _BUFFERS[name]
    want = _add_all(buffer)
    batches = jax.tree.map(
      lambda leaf: leaf.reshape(20, 2, *leaf.shape[1:]), _stream()
    )

    def step(state, batch):
      return buffer.add(state, *batch, _KEY), None

    state, _ = jax.lax.scan(step, buffer.init(_example()), batches)
    chex.assert_trees_all_equal(state, want)
    for cuts in ((0, 1, 40), (0, 39, 40)):
      state = buffer.init(_example())
      for start, stop in itertools.pairwise(cuts):
        state = buffer.add(state, *_cut(_stream(), start, stop), _KEY)
      chex.assert_trees_all_equal(state, want)

  @_each()
  def test_key(self, name):
    buffer = _BUFFERS[name]
    chex.assert_trees_all_equal(_add_all(buffer), _add_all(buffer))
    other = _add_all(buffer, jax.random.key(1))
    same = np.array_equal(other.items["row"], _add_all(buffer).items["row"])
    self.assertEqual(same, "ring" in name or "herding" in name)

  @_each()
  def test_padding_is_passed_over(self, name):
    buffer = _BUFFERS[name]
    items, labels, tasks = _stream()
    real = np.random.default_rng(1).permutation(np.arange(90) < 40)
    place = np.flatnonzero(real)

    def pad(leaf, fill):
      padded = np.full((90, *leaf.shape[1:]), fill, leaf.dtype)
      padded[place] = leaf
      return padded

    padded = (
      jax.tree.map(lambda leaf: pad(leaf, 99), items),
      pad(labels, -5),
      pad(tasks, 99),
    )
    state = buffer.add(
      buffer.init(_example()),
      *padded,
      _KEY,
      mask=real,
      features=pad(_features(), np.nan),
    )
    want = _add_all(buffer)
    chex.assert_trees_all_equal(state._replace(items=0), want._replace(items=0))
    chex.assert_trees_all_equal(replay.contents(state), replay.contents(want))
    nothing = buffer.add(
      want, *_stream(), _KEY, mask=np.zeros(40, bool), features=_features()
    )
    chex.assert_trees_all_equal(nothing, want)

  @_each()
  def test_empty_batch(self, name):
    state = _add_all(_BUFFERS[name])
    again = _BUFFERS[name].add(state, *_stream(0), _KEY, features=_features(0))
    chex.assert_trees_all_equal(again, state)

  @_each()
  def test_checkpoint(self, name):
    buffer = _BUFFERS[name]
    state = _add_all(buffer)
    with (
      tempfile.TemporaryDirectory() as folder,
      checkpoints.Store(folder) as store,
    ):
      store.save(1, state)
      _, restored, _ = store.restore(buffer.init(_example()))
    chex.assert_trees_all_equal(restored, state)
    more = (*_stream(), _KEY)
    chex.assert_trees_all_equal(
      jax.jit(lambda: replay.sample(restored, _KEY, 3))(),
      replay.sample(state, _KEY, 3),
    )
    chex.assert_trees_all_equal(
      buffer.add(restored, *more, features=_features()),
      buffer.add(state, *more, features=_features()),
    )

  @_each()
  def test_out_of_range_is_passed_over_when_compiled(self, name):
    buffer = _BUFFERS[name]
    items, labels, tasks = _stream()
    labels, tasks = labels.copy(), tasks.copy()
    wrong = np.arange(40) % 3 == 0
    labels[wrong], tasks[~wrong] = -1, np.where(wrong, 0, tasks)[~wrong]
    add = jax.jit(buffer.add)
    state = add(
      buffer.init(_example()), items, labels, tasks, _KEY, features=_features()
    )
    want = buffer.add(
      buffer.init(_example()),
      items,
      labels,
      tasks,
      _KEY,
      mask=~wrong,
      features=_features(),
    )
    chex.assert_trees_all_equal(state, want)
    far = np.full(40, 99, np.int32)
    beyond = add(
      buffer.init(_example()), items, -far, far, _KEY, features=_features()
    )
    self.assertEqual(replay.filled(beyond), 0)
    self.assertEqual(beyond.seen.sum(), 0)

  def test_inputs_stay(self):
    buffer = _BUFFERS["ring"]
    state = buffer.init(_example())
    buffer.add(state, *_stream(), _KEY)
    chex.assert_trees_all_equal(state, buffer.init(_example()))

  def test_dtypes_of_items(self):
    example = {
      "byte": np.zeros((2, 2), np.uint8),
      "half": jnp.zeros(3, jnp.bfloat16),
      "flag": True,
      "number": 1.0,
    }
    buffer = replay.reservoir(2)
    items = jax.tree.map(
      lambda leaf: (
        jnp.stack([jnp.asarray(leaf)] * 5) + 0
        if jnp.asarray(leaf).dtype != bool
        else jnp.ones(5, bool)
      ),
      example,
    )
    state = buffer.add(buffer.init(example), items, np.arange(5), 0, _KEY)
    self.assertEqual(
      {name: str(leaf.dtype) for name, leaf in state.items.items()},
      {
        "byte": "uint8",
        "half": "bfloat16",
        "flag": "bool",
        "number": "float32",
      },
    )
    self.assertEqual(replay.size_in_bytes(state), 2 * (4 + 6 + 1 + 4))

  def test_labels_of_other_integer_types(self):
    buffer = _BUFFERS["class_balanced"]
    items, labels, tasks = _stream()
    want = _add_all(buffer)
    for cast in (np.int64, np.uint8, jnp.uint8, jnp.int16):
      array = (jnp if cast in (jnp.uint8, jnp.int16) else np).asarray(
        labels, dtype=cast
      )
      for add in (buffer.add, jax.jit(buffer.add)):
        state = add(buffer.init(_example()), items, array, tasks, _KEY)
        chex.assert_trees_all_equal(state, want)
    state = buffer.add(
      buffer.init(_example()), items, labels.tolist(), tasks.tolist(), _KEY
    )
    chex.assert_trees_all_equal(state, want)


class ReservoirTest(parameterized.TestCase):
  @parameterized.parameters(((0, 30),), ((0, 4, 9, 30),))
  def test_uniform(self, cuts):
    seeds = 3000
    held = _over_seeds(replay.reservoir(8), np.zeros(30, np.int32), cuts, seeds)
    _assert_uniform(np.bincount(held.ravel(), minlength=30), seeds, 8)
    # No item twice.
    self.assertTrue((np.diff(np.sort(held, 1), axis=1) > 0).all())

  def test_every_set_equally_likely(self):
    seeds = 6000
    held = _over_seeds(
      replay.reservoir(2), np.zeros(6, np.int32), (0, 3, 6), seeds
    )
    sets = collections.Counter(map(tuple, np.sort(held, 1).tolist()))
    self.assertLen(sets, 15)
    self.assertGreater(scipy.stats.chisquare(list(sets.values())).pvalue, 1e-4)

  def test_uniform_per_class(self):
    seeds = 3000
    labels = np.repeat(np.int32([0, 1, 2]), (20, 3, 7))[
      np.random.default_rng(0).permutation(30)
    ]
    buffer = replay.reservoir(4, per="class", num_groups=3)
    held = _over_seeds(buffer, labels, (0, 11, 30), seeds)
    often = np.bincount(held[held >= 0], minlength=30)
    for label, kept in ((0, 4), (1, 3), (2, 4)):
      slots = held[:, 4 * label : 4 * label + 4]
      self.assertTrue((labels[slots[slots >= 0]] == label).all())
      if kept < 4:
        np.testing.assert_array_equal(often[labels == label], seeds)
      else:
        _assert_uniform(often[labels == label], seeds, kept)

  def test_uniform_per_task(self):
    seeds, buffer = 3000, replay.reservoir(4, per="task", num_groups=2)
    labels = np.zeros(20, np.int32)
    held = _over_seeds(buffer, labels, (0, 20), seeds, tasks=1)
    self.assertTrue((held[:, :4] == -1).all())
    _assert_uniform(np.bincount(held[:, 4:].ravel(), minlength=20), seeds, 4)

  @parameterized.parameters("class", "task")
  def test_capacity_per_group(self, per):
    buffer = replay.reservoir(5, per=per, num_groups=6)
    offered = np.int32([0, 2, 3, 9, 5, 40])
    group = np.random.default_rng(0).permutation(
      np.repeat(np.arange(6, dtype=np.int32), offered)
    )
    zero = np.zeros_like(group)
    labels, tasks = (group, zero) if per == "class" else (zero, group)
    state = buffer.init(0)
    # 59 items, the last batch is shorter.
    for start in (0, 48):
      batch = _cut((group, labels, tasks), start, start + 48)
      state = buffer.add(state, *batch, _KEY)
    stored = np.bincount(replay.contents(state)[0], minlength=6)
    np.testing.assert_array_equal(stored, np.minimum(offered, 5))
    np.testing.assert_array_equal(state.seen, offered)
    self.assertEqual(buffer.slots, 30)


class RingTest(parameterized.TestCase):
  @parameterized.product(per=("total", "class", "task"), size=(1, 5, 40))
  def test_is_a_deque(self, per, size):
    groups = {"total": None, "class": _NUM_CLASSES, "task": 3}[per]
    buffer = replay.ring(4, per=per, num_groups=groups)
    deques = collections.defaultdict(lambda: collections.deque(maxlen=4))
    state = buffer.init(_example())
    items, labels, tasks = _stream()
    for start in range(0, 40, size):
      state = buffer.add(state, *_cut(_stream(), start, start + size))
      for i in range(start, start + size):
        group = {"total": 0, "class": labels[i], "task": tasks[i]}[per]
        deques[group].append(items["row"][i])
      held = np.where(replay.valid(state), state.items["row"], -1)
      for group, seen in enumerate(np.asarray(state.seen)):
        slots = held[4 * group : 4 * group + 4]
        # The oldest is where the next one goes.
        slots = np.roll(slots, -(seen % 4)) if seen >= 4 else slots[:seen]
        self.assertEqual(slots.tolist(), list(deques[group]))


class ClassBalancedTest(parameterized.TestCase):
  @parameterized.parameters(1, 8, 60)
  def test_sizes(self, size):
    buffer = replay.class_balanced(23, num_classes=6)
    add = jax.jit(buffer.add)
    rng = np.random.default_rng(0)
    # Classes of very different sizes that come one pair after another.
    stream = np.concatenate(
      [
        rng.permutation(np.repeat(np.int32([0, 1]), (100, 30))),
        rng.permutation(np.repeat(np.int32([2, 3]), (30, 25))),
        rng.permutation(np.repeat(np.int32([4, 5]), (50, 5))),
      ]
    )
    state = buffer.init(0)
    for start in range(0, 240, size):
      state = add(state, np.arange(size), stream[start : start + size], 0, _KEY)
      seen = np.bincount(stream[: start + size], minlength=6)
      np.testing.assert_array_equal(state.seen, seen)
      counts = np.asarray(replay.counts(state, 6))
      self.assertEqual(counts.sum(), min(start + size, 23))
      # These were the largest at some time.
      enough = counts[seen >= 23]
      if enough.size and counts.sum() == 23:
        self.assertGreaterEqual(enough.min(), counts.max() - 1)
    # 3 or 4 of each, and each has offered more.
    self.assertLessEqual(np.ptp(counts), 1, counts)

  def test_small_class_is_kept_whole(self):
    buffer = replay.class_balanced(10, num_classes=3)
    labels = np.int32([1, 1] + [0] * 50 + [2] * 50)
    held = _over_seeds(buffer, labels, (0, 1, 60, 102), 50)
    self.assertTrue((np.sort(held, 1)[:, :2] == [0, 1]).all())
    sizes = [np.bincount(labels[row], minlength=3).tolist() for row in held]
    self.assertContainsSubset([tuple(size) for size in sizes], [(4, 2, 4)])

  def test_uniform_within_class(self):
    seeds = 4000
    labels = np.repeat(np.int32([0, 1]), (24, 12))[
      np.random.default_rng(0).permutation(36)
    ]
    buffer = replay.class_balanced(8, num_classes=2)
    held = _over_seeds(buffer, labels, (0, 9, 36), seeds)
    often = np.bincount(held.ravel(), minlength=36)
    for label in range(2):
      _assert_uniform(often[labels == label], seeds, 4)


def _herd(features, m):
  """The greedy choice, in float64."""
  features = features.astype(np.float64)
  mean, chosen = features.mean(0), []
  for k in range(1, min(m, len(features)) + 1):
    sums = features + features[chosen].sum(0)
    distance = np.linalg.norm(mean - sums / k, axis=1)
    distance[chosen] = np.inf
    chosen.append(int(distance.argmin()))
  return chosen


class HerdingTest(parameterized.TestCase):
  def _chosen(self, state, label):
    """Rows of a class in the order of choice."""
    held = np.asarray(state.label) == label
    order = np.argsort(np.asarray(state.rank)[held])
    np.testing.assert_array_equal(
      np.asarray(state.rank)[held][order], np.arange(held.sum())
    )
    return (np.asarray(state.items["row"])[held][order] - 1).tolist()

  @parameterized.parameters(1, 4, 25)
  def test_oracle_per_class(self, capacity):
    buffer = replay.herding(capacity, num_classes=_NUM_CLASSES, per="class")
    state = _add_all(buffer)
    labels = _stream()[1]
    for label in range(_NUM_CLASSES):
      rows = np.flatnonzero(labels == label)
      want = rows[_herd(_features()[rows], capacity)]
      self.assertEqual(self._chosen(state, label), want.tolist())

  @parameterized.parameters(4, 11, 40)
  def test_oracle_in_total(self, capacity):
    buffer = replay.herding(capacity, num_classes=_NUM_CLASSES)
    add = jax.jit(buffer.add)
    items, labels, tasks = _stream()
    state, before = buffer.init(_example()), {}
    for seen, label in enumerate((2, 0, 3, 1), start=1):
      state = add(
        state, items, labels, tasks, mask=labels == label, features=_features()
      )
      m = capacity // seen
      rows = np.flatnonzero(labels == label)
      before[label] = rows[_herd(_features()[rows], m)].tolist()
      for old, chosen in before.items():
        before[old] = chosen[:m]
        self.assertEqual(self._chosen(state, old), before[old])
      self.assertEqual(replay.filled(state), sum(map(len, before.values())))

  def test_mean_is_near(self):
    state = _add_all(replay.herding(40, num_classes=_NUM_CLASSES))
    labels, features = _stream()[1], _features()
    for label in range(_NUM_CLASSES):
      of_class = np.flatnonzero(labels == label)
      mean = features[of_class].mean(0)
      chosen = self._chosen(state, label)[:5]
      rng = np.random.default_rng(0)
      at_random = [
        np.linalg.norm(
          features[rng.choice(of_class, len(chosen), replace=False)].mean(0)
          - mean
        )
        for _ in range(50)
      ]
      self.assertLess(
        np.linalg.norm(features[chosen].mean(0) - mean), np.median(at_random)
      )

  def test_class_offered_again_is_chosen_anew(self):
    buffer = replay.herding(5, num_classes=_NUM_CLASSES, per="class")
    items, labels, tasks = _stream()
    state = _add_all(buffer)
    first = np.flatnonzero(labels == 1)[:3]
    state = buffer.add(
      state,
      *jax.tree.map(lambda leaf: leaf[first], (items, labels, tasks)),
      features=_features()[first],
    )
    self.assertCountEqual(self._chosen(state, 1), first.tolist())
    self.assertLen(self._chosen(state, 0), 5)

  def test_equal_features(self):
    buffer = replay.herding(6, num_classes=_NUM_CLASSES)
    state = buffer.add(
      buffer.init(0), np.arange(5), [0] * 5, 0, features=np.ones((5, 2))
    )
    self.assertEqual(replay.contents(state)[0].tolist(), [0, 1, 2, 3, 4])

  def test_features_that_are_not_finite(self):
    features = np.ones((5, 1), np.float32)
    features[1] = np.nan
    buffer = replay.herding(4, num_classes=1)
    state = buffer.add(
      buffer.init(0), np.arange(5), [0] * 5, 0, features=features
    )
    self.assertEqual(replay.filled(state), 4)


class QueriesTest(parameterized.TestCase):
  def test_filled_and_counts(self):
    buffer = replay.ring(5)
    state = buffer.init(_example())
    self.assertEqual(replay.filled(state), 0)
    self.assertEqual(replay.size_in_bytes(state), 0)
    np.testing.assert_array_equal(replay.counts(state, 3), [0, 0, 0])
    self.assertEmpty(replay.contents(state)[1])
    state = buffer.add(state, *_stream(3))
    self.assertEqual(replay.filled(state), 3)
    self.assertEqual(replay.filled(state).dtype, jnp.int32)
    np.testing.assert_array_equal(
      replay.valid(state), [True, True, True, False, False]
    )
    self.assertEqual(replay.size_in_bytes(state), 3 * (4 + 12))
    np.testing.assert_array_equal(
      replay.counts(state, 4), np.bincount(_stream(3)[1], minlength=4)
    )
    items, labels, tasks = replay.contents(state)
    self.assertIsInstance(items["row"], np.ndarray)
    chex.assert_trees_all_equal((items, labels, tasks), _stream(3))

  def test_sample_is_uniform(self):
    buffer = replay.ring(8)
    state = buffer.add(buffer.init(_example()), *_stream(6))
    draw = jax.jit(replay.sample, static_argnames="n")
    items, labels, tasks, mask = draw(state, _KEY, n=6000)
    self.assertTrue(mask.all())
    often = np.bincount(items["row"], minlength=7)
    self.assertEqual(often[0], 0)
    self.assertGreater(scipy.stats.chisquare(often[1:]).pvalue, 1e-4)
    np.testing.assert_array_equal(labels, _stream(6)[1][items["row"] - 1])
    np.testing.assert_array_equal(tasks, _stream(6)[2][items["row"] - 1])
    chex.assert_trees_all_equal(
      replay.sample(state, _KEY, 6000), (items, labels, tasks, mask)
    )

  def test_sample_without_a_task(self):
    state = _add_all(replay.reservoir(30))
    draw = jax.jit(
      lambda task: replay.sample(state, _KEY, 500, exclude_task=task)
    )
    for task in range(3):
      _, _, tasks, mask = draw(task)
      self.assertEqual(set(tasks.tolist()), {0, 1, 2} - {task})
      self.assertTrue(mask.all())

  def test_nothing_to_draw(self):
    buffer = replay.ring(8)
    empty = buffer.init(_example())
    one = buffer.add(empty, *_stream(6)[:2], 2)
    for result in (
      replay.sample(empty, _KEY, 3),
      replay.sample(one, _KEY, 3, exclude_task=2),
    ):
      items, labels, tasks, mask = result
      self.assertFalse(mask.any())
      self.assertEqual(labels.tolist(), [-1] * 3)
      self.assertEqual(tasks.tolist(), [-1] * 3)
      self.assertEqual(items["input"].shape, (3, 3))
      self.assertFalse(items["input"].any())

  def test_sample_over_seeds(self):
    buffer = replay.reservoir(8)
    keys = jax.random.split(_KEY, 3)
    states = jax.vmap(functools.partial(_add_all, buffer))(keys)
    many = jax.vmap(lambda state, key: replay.sample(state, key, 4))(
      states, keys
    )
    chex.assert_trees_all_equal(
      jax.tree.map(lambda leaf: leaf[1], many),
      replay.sample(_add_all(buffer, keys[1]), keys[1], 4),
    )
    self.assertEqual(replay.size_in_bytes(states), 3 * 8 * 16)
    with self.assertRaisesRegex(replay.ReplayError, "take one seed"):
      replay.contents(states)
    with self.assertRaisesRegex(replay.ReplayError, "use jax.vmap"):
      buffer.add(states, *_stream(), _KEY)

  @parameterized.parameters(0, -1, 1.5)
  def test_number_of_draws(self, n):
    with self.assertRaisesRegex(replay.ReplayError, "n must be an integer"):
      replay.sample(_add_all(replay.ring(2)), _KEY, n)


class GetTest(parameterized.TestCase):
  def test_names(self):
    self.assertEqual(
      replay.names(), ("class_balanced", "herding", "reservoir", "ring")
    )

  @parameterized.parameters(
    ("reservoir", "total", "reservoir, 9 in total", 9),
    ("reservoir", "class", "reservoir, 9 per class", 45),
    ("reservoir", "task", "reservoir, 9 per task", 27),
    ("ring", "total", "ring, 9 in total", 9),
    ("ring", "class", "ring, 9 per class", 45),
    ("ring", "task", "ring, 9 per task", 27),
    ("class_balanced", "total", "class_balanced, 9 in total", 9),
    ("herding", "total", "herding, 9 in total", 9),
    ("herding", "class", "herding, 9 per class", 45),
  )
  def test_get(self, policy, per, description, slots):
    make = functools.partial(
      replay.get, policy, 9, per=per, num_classes=5, num_tasks=3
    )
    buffer = make()
    self.assertEqual(buffer.description, description)
    self.assertEqual((buffer.capacity, buffer.per), (9, per))
    self.assertEqual(buffer.slots, slots)
    self.assertLen(buffer.init(0).label, slots)
    # So that jit knows the functions again.
    self.assertEqual(make(), buffer)

  @parameterized.parameters(
    ("reservior", {}, "did you mean 'reservoir'.*choose from class_balanced"),
    ("reservoir", {"per": "day"}, "unknown per 'day'.*total, class, task"),
    ("reservoir", {"per": "class"}, "per class needs num_classes; give"),
    ("ring", {"per": "task"}, "per task needs num_tasks; give"),
    ("class_balanced", {}, "class_balanced needs num_classes"),
    ("class_balanced", {"per": "class"}, "unknown per 'class'"),
    ("herding", {}, "herding needs num_classes"),
    ("herding", {"per": "task", "num_classes": 2}, "unknown per 'task'"),
    ("herding", {"num_classes": 0}, "num_classes must be an integer"),
    ("ring", {"per": "task", "num_tasks": 0}, "num_groups must be an integer"),
  )
  def test_errors(self, policy, options, message):
    with self.assertRaisesRegex(replay.ReplayError, message):
      replay.get(policy, 9, **options)


class ErrorsTest(parameterized.TestCase):
  @parameterized.product(
    policy=("reservoir", "ring", "class_balanced", "herding"),
    capacity=(0, -3, 2.5, None),
  )
  def test_capacity(self, policy, capacity):
    with self.assertRaisesRegex(
      replay.ReplayError, "capacity must be an integer of at least 1; got"
    ):
      replay.get(policy, capacity, num_classes=3)

  def test_fewer_slots_than_classes(self):
    message = "shares 4 slots between 5 classes; give a capacity of at least 5"
    with self.assertRaisesRegex(replay.ReplayError, message):
      replay.class_balanced(4, num_classes=5)
    with self.assertRaisesRegex(replay.ReplayError, message):
      replay.herding(4, num_classes=5)
    replay.herding(4, num_classes=5, per="class")

  @parameterized.parameters(replay.reservoir, replay.ring)
  def test_number_of_groups(self, policy):
    with self.assertRaisesRegex(
      replay.ReplayError, "give num_groups, how many"
    ):
      policy(4, per="class")
    with self.assertRaisesRegex(replay.ReplayError, "num_groups must be"):
      policy(4, per="class", num_groups=0)

  @parameterized.parameters(
    ("reservoir_per_class", 4, 0, "labels must be .* below 4; got 4"),
    ("class_balanced", 4, 0, "labels must be .* below 4; got 4"),
    ("herding", 4, 0, "labels must be .* below 4; got 4"),
    ("ring_per_task", 0, 3, "tasks must be .* below 3; got 3"),
    ("ring", -1, 0, "labels must be at least 0; got -1"),
    ("ring", 0, -1, "tasks must be at least 0; got -1"),
    ("ring", 2**31, 0, "labels must be at least 0; got 2147483648"),
  )
  def test_out_of_range(self, name, label, task, message):
    labels = np.zeros(40, np.int64)
    labels[5] = label
    for tasks in (task, np.full(40, task)):
      with self.assertRaisesRegex(replay.ReplayError, message):
        buffer = _BUFFERS[name]
        buffer.add(
          buffer.init(_example()),
          _stream()[0],
          labels,
          tasks,
          _KEY,
          features=_features(),
        )

  def test_shapes_and_dtypes(self):
    buffer = _BUFFERS["ring"]
    items, labels, tasks = _stream()
    for batch, mask, message in (
      (
        (items, labels[:-1], 0),
        None,
        "leaf '.*' of items has 40 rows but .*39",
      ),
      ((items, labels[None], 0), None, r"labels must have the shape \[n\]"),
      ((items, 1, 0), None, r"labels must have the shape \[n\]"),
      ((items, labels * 1.0, 0), None, "labels must be integers; got float"),
      ((items, labels, 1.0), None, "tasks must be integers"),
      ((items, labels, tasks[:3]), None, r"tasks has the shape \(3,\) for 40"),
      ((items, labels, 0), np.ones(3, bool), r"mask has the shape \(3,\)"),
      ((items, labels, 0), np.ones(40), "mask has .* the dtype float64"),
    ):
      with self.assertRaisesRegex(replay.ReplayError, message):
        buffer.add(buffer.init(_example()), *batch, mask=mask)

  def test_number_of_bare_items(self):
    buffer = _BUFFERS["ring"]
    with self.assertRaisesRegex(replay.ReplayError, "^items has 3 rows .* 2;"):
      buffer.add(buffer.init(0), np.arange(3), [0, 1], 0)

  def test_other_items(self):
    buffer = _BUFFERS["ring"]
    items, labels, _ = _stream()
    for other, message in (
      (
        {"row": items["row"]},
        "'input' is in the buffer but missing from items",
      ),
      ({**items, "input": items["input"][:, :2]}, r"\(40, 3\) in the buffer"),
      ({**items, "row": items["row"] * 1.0}, "dtype int32 in the buffer"),
      ({**items, "row": 3}, r"\(40,\) in the buffer but \(\)"),
    ):
      with self.assertRaisesRegex(tree.TreeMismatchError, message):
        buffer.add(buffer.init(_example()), other, labels, 0)

  @parameterized.parameters("reservoir", "class_balanced")
  def test_key_is_missing(self, name):
    with self.assertRaisesRegex(replay.ReplayError, "give add a PRNG key"):
      _add_all(_BUFFERS[name], None)

  def test_features(self):
    buffer = _BUFFERS["herding"]
    add = functools.partial(buffer.add, buffer.init(_example()), *_stream())
    with self.assertRaisesRegex(replay.ReplayError, "give add the features"):
      add()
    for wrong in (_features(39), _features()[:, 0]):
      with self.assertRaisesRegex(replay.ReplayError, "one row for each item"):
        add(features=wrong)

  def test_state_of_another_policy(self):
    ring = _BUFFERS["ring"].init(_example())
    for name in ("reservoir_per_task", "class_balanced"):
      with self.assertRaisesRegex(
        replay.ReplayError, "7 slots and counts 1 groups, .* the init function"
      ):
        _BUFFERS[name].add(ring, *_stream(), _KEY)
    for policy in (replay.class_balanced, replay.herding):
      with self.assertRaisesRegex(replay.ReplayError, "the state is not of"):
        policy(7, num_classes=1).add(
          ring, _stream()[0], np.zeros(40, int), 0, _KEY
        )


if __name__ == "__main__":
  absltest.main()
