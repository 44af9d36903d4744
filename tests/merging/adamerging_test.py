"""Tests of AdaMerging."""

from __future__ import annotations

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized
from sklearn import datasets

from jaxmerge import merging, tree

KEY = jax.random.key(0)
# Of two layers, by name.
NAMES = ("one/bias", "one/kernel", "two/bias", "two/kernel")


def params(seed, dtype=jnp.float32, sizes=(3, 4, 5)):
  rng = np.random.default_rng(seed)
  first, hidden, last = sizes
  make = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
  return {
    "one": {"bias": make(hidden), "kernel": make(first, hidden)},
    "two": {"bias": make(last), "kernel": make(hidden, last)},
  }


def logits_fn(params, x):
  one, two = params["one"], params["two"]
  hidden = jnp.tanh(x @ one["kernel"] + one["bias"][None])
  return hidden @ two["kernel"] + two["bias"][None]


def examples(seed, size, width=3):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(size, width)), jnp.float32)


def as_numpy(params):
  return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(params)]


def entropies(base, models, data, coefficients):
  """The tasks' mean entropies, in float64; coefficients [T, L]."""
  base, models = as_numpy(base), [as_numpy(model) for model in models]
  b1, w1, b2, w2 = (
    leaf
    + sum(
      row[i] * (model[i] - leaf)
      for row, model in zip(coefficients, models, strict=True)
    )
    for i, leaf in enumerate(base)
  )
  found = []
  for x in data:
    logits = np.tanh(np.asarray(x, np.float64) @ w1 + b1) @ w2 + b2
    p = np.exp(logits)
    p /= p.sum(axis=1, keepdims=True)
    found.append(-(p * np.log(p)).sum(axis=1).mean())
  return np.array(found)


def differences(objective, at, step=1e-5):
  """The gradient of a function of an array, by central differences."""
  found = np.zeros_like(at)
  for place in np.ndindex(at.shape):
    up, down = at.copy(), at.copy()
    up[place] += step
    down[place] -= step
    found[place] = (objective(up) - objective(down)) / (2 * step)
  return found


def setting(dtype=jnp.float32, tasks=2):
  models = [params(i, dtype) for i in range(1, tasks + 1)]
  return params(0, dtype), models, [examples(i + 3, 6) for i in range(tasks)]


def learn(base, models, data, fn=logits_fn, **options):
  options = {"key": KEY, "steps": 3, "batch_size": 6, **options}
  return merging.adamerging(fn, base, models, data, **options)


class GradientTest(parameterized.TestCase):
  """One step of plain gradient descent shows the gradient."""

  @parameterized.parameters(
    ({"granularity": "layer"}, NAMES, [0, 1, 2, 3]),
    ({"granularity": "task"}, ("all",), [0, 0, 0, 0]),
    ({"layers": "^[a-z]+"}, ("one", "two"), [0, 0, 1, 1]),
    ({"layers": "kernel"}, ("one/bias", "kernel", "two/bias"), [0, 1, 2, 1]),
    ({"layers": lambda name: "bias" in name}, ("True", "False"), [0, 1, 0, 1]),
  )
  def test_against_differences(self, options, layers, groups):
    base, models, data = setting()
    start = np.random.default_rng(5).uniform(0.2, 0.6, (2, len(layers)))
    objective = lambda at: entropies(base, models, data, at[:, groups]).sum()  # noqa: E731
    _, info = learn(
      base,
      models,
      data,
      init=jnp.asarray(start, jnp.float32),
      optimizer=optax.sgd(0.1),
      steps=1,
      clip=None,
      **options,
    )
    self.assertEqual(info.layers, layers)
    np.testing.assert_allclose(
      (start - np.asarray(info.coefficients)) / 0.1,
      differences(objective, start),
      atol=2e-5,
    )
    np.testing.assert_allclose(
      info.entropies[0],
      entropies(base, models, data, start[:, groups]),
      rtol=1e-5,
    )

  def test_many_steps_of_adam(self):
    """All data in each batch, so that their order is of no account."""
    base, models, data = setting()
    params, info = learn(base, models, data, steps=5, learning_rate=0.05)
    at = np.full((2, 4), 0.3)
    state = optax.adam(0.05)
    with jax.numpy_dtype_promotion("standard"):
      moments = state.init(jnp.asarray(at))
      for i in range(5):
        found = entropies(base, models, data, at)
        np.testing.assert_allclose(info.entropies[i], found, rtol=1e-4)
        gradient = differences(
          lambda x: entropies(base, models, data, x).sum(), at
        )
        updates, moments = state.update(jnp.asarray(gradient), moments)
        at = np.clip(at + np.asarray(updates, np.float64), 0, 1)
    np.testing.assert_allclose(info.coefficients, at, atol=1e-4)
    self.assertEqual(info.steps, 5)
    # The parameters are those of the coefficients.
    want = [
      leaf + sum(at[t, i] * (as_numpy(models[t])[i] - leaf) for t in range(2))
      for i, leaf in enumerate(as_numpy(base))
    ]
    chex.assert_trees_all_close(jax.tree.leaves(params), want, atol=1e-3)
    again = merging.task_arithmetic(base, models, weights=info.weights)
    chex.assert_trees_all_close(again, params, rtol=1e-6, atol=1e-6)

  def test_trimmed_task_vectors(self):
    """AdaMerging++: the largest that agree in sign, by NumPy."""
    base = jax.tree.map(lambda x: jnp.round(x * 4) / 4, params(0))
    models = [
      jax.tree.map(lambda b, x: b + jnp.round(x * 2) / 2, base, params(i))
      for i in (1, 2, 3)
    ]
    flat = lambda one: np.concatenate([x.ravel() for x in as_numpy(one)])  # noqa: E731
    taus = np.stack([flat(model) - flat(base) for model in models])
    for tau in taus:
      tau[np.abs(tau) < np.sort(np.abs(tau))[-int(0.4 * tau.size)]] = 0
    sign = np.sign(taus.sum(axis=0))
    self.assertTrue(((sign == 0) & (taus != 0).any(axis=0)).any())
    self.assertNotEqual(sign.sum(), 0)
    sign[sign == 0] = np.sign(sign.sum())
    kept = np.where(np.sign(taus) == sign, taus, 0)
    data = [examples(i, 6) for i in range(3)]
    got, _ = learn(
      base, models, data, density=0.4, init=[0.25, 0.5, 1.0], learning_rate=0.0
    )
    want = flat(base) + 0.25 * kept[0] + 0.5 * kept[1] + kept[2]
    np.testing.assert_allclose(flat(got), want, rtol=1e-6, atol=1e-6)


class BehaviourTest(parameterized.TestCase):
  def test_same_key_same_result_and_one_compilation(self):
    base, models, _ = setting()
    data = [examples(3, 20), examples(4, 11)]
    calls = []

    def counted(params, x):
      calls.append(x.shape)
      return logits_fn(params, x)

    options = {"fn": counted, "batch_size": 4, "steps": 8}
    first = learn(base, models, data, **options)
    traced = len(calls)
    second = learn(base, models, data, **options)
    # Only the check of shapes runs again.
    self.assertEqual(len(calls) - traced, 2)
    chex.assert_trees_all_equal(first[0], second[0])
    chex.assert_trees_all_equal(first[1].entropies, second[1].entropies)
    other = learn(base, models, data, key=jax.random.key(1), **options)
    self.assertFalse((first[1].entropies == other[1].entropies).all())
    self.assertEqual(set(calls), {(4, 3)})

  def test_batches_go_through_the_data(self):
    """Without a change of the coefficients, an epoch's mean is the data's."""
    base, models, _ = setting()
    data = [examples(3, 12), examples(4, 12)]
    _, info = learn(
      base, models, data, batch_size=4, steps=6, learning_rate=0.0
    )
    want = entropies(base, models, data, np.full((2, 4), 0.3))
    for epoch in (info.entropies[:3], info.entropies[3:]):
      np.testing.assert_allclose(epoch.mean(axis=0), want, rtol=1e-5)
    self.assertFalse((info.entropies[:3] == info.entropies[3:]).all())

  def test_own_heads_and_data_of_any_form(self):
    base, models, _ = setting()
    heads = (
      lambda params, batch: logits_fn(params, batch["x"])[:, :2],
      lambda params, x: logits_fn(params, x).reshape(-1, 1, 5)[..., 2:],
    )
    data = [
      {"x": np.asarray(examples(3, 9)), "id": np.arange(9)},
      examples(4, 7),
    ]
    _, info = learn(base, models, data, fn=heads, steps=30, learning_rate=0.02)
    self.assertEqual(info.entropies.shape, (30, 2))
    self.assertLess(info.entropies[-1].sum(), info.entropies[0].sum())
    self.assertLessEqual(float(info.entropies[0, 0]), np.log(2))

  def test_classes_that_are_ruled_out(self):
    """Logits of -inf neither make NaN nor change the others' entropy."""
    base, models, data = setting(tasks=1)
    mask = jnp.asarray([True, False, True, False, True])
    masked = lambda p, x: jnp.where(mask[None], logits_fn(p, x), -jnp.inf)  # noqa: E731
    chosen = lambda p, x: logits_fn(p, x)[:, ::2]  # noqa: E731
    got, want = (
      learn(base, models, data, fn=fn, learning_rate=0.1)[1]
      for fn in (masked, chosen)
    )
    np.testing.assert_allclose(got.entropies, want.entropies, rtol=1e-4)
    np.testing.assert_allclose(got.coefficients, want.coefficients, rtol=1e-4)

  def test_large_logits(self):
    """The entropy of sure predictions is zero, not NaN."""
    base, models, data = setting(tasks=1)
    _, info = learn(base, models, data, fn=lambda p, x: 1e6 * logits_fn(p, x))
    np.testing.assert_allclose(info.entropies, 0, atol=1e-6)

  def test_bounds(self):
    base, models, data = setting(tasks=1)
    options = {"learning_rate": 10.0, "steps": 2}
    _, info = learn(base, models, data, **options)
    self.assertTrue(np.isin(info.coefficients, [0, 1]).all())
    _, info = learn(base, models, data, clip=None, **options)
    self.assertGreater(float(jnp.abs(info.coefficients).max()), 1)

  def test_stops_at_a_loss_that_is_not_finite(self):
    base, models, data = setting(tasks=1)
    start = base["two"]["bias"] + 0.3 * sum(
      model["two"]["bias"] - base["two"]["bias"] for model in models
    )

    def bad(params, x):
      """Infinite as soon as a coefficient has moved."""
      moved = jnp.abs(params["two"]["bias"] - start).max() > 1e-6
      return logits_fn(params, x) * jnp.where(moved, jnp.inf, 1)

    message = "entropy of task 0 is nan at step 1, counted from 0"
    with self.assertRaisesRegex(FloatingPointError, message):
      learn(base, models, data, fn=bad, learning_rate=0.1, steps=1000)

  def test_gradient_that_is_not_finite(self):
    base, models, data = setting(tasks=1)
    # The root of zero has no derivative.
    bad = lambda p, x: logits_fn(p, x) + jnp.sqrt(0 * p["one"]["bias"].sum())  # noqa: E731
    with self.assertRaisesRegex(FloatingPointError, "not finite after step 0"):
      learn(base, models, data, fn=bad, steps=1)


class ConformanceTest(parameterized.TestCase):
  @parameterized.parameters("float32", "bfloat16", "float16")
  def test_keeps_everything(self, dtype):
    base, models, data = setting(dtype, tasks=1)
    more = {
      "steps": jnp.asarray(3),
      "mask": np.asarray([True]),
      "key": jax.random.key(5),
      "none": None,
      "empty": jnp.zeros((0, 2), dtype),
      "count": 7,
    }
    base = {"net": base, **more}
    models = [
      {"net": model, **more, "steps": jnp.asarray(9)} for model in models
    ]
    copies = jax.tree.map(jnp.copy, (base["net"], models[0]["net"], data))

    def fn(params, x):
      assert params["count"] == 7
      chex.assert_equal(params["steps"].dtype, jnp.int32)
      jax.random.normal(params["key"])
      return logits_fn(params["net"], x.astype(dtype))

    got, info = learn(base, models, data, fn=fn, learning_rate=0.1)
    chex.assert_trees_all_equal((base["net"], models[0]["net"], data), copies)
    self.assertEqual(int(got["steps"]), 3)
    self.assertEqual(got.pop("count"), base.pop("count"))
    self.assertIs(got["key"], base["key"])
    chex.assert_trees_all_equal_shapes_and_dtypes(got, base)
    self.assertEqual(info.coefficients.dtype, jnp.float32)
    self.assertEqual(info.entropies.dtype, jnp.float32)
    chex.assert_tree_all_finite(got["net"])

  def test_selection_and_dtype(self):
    base, models, data = setting(tasks=1)
    got, info = learn(base, models, data, select="kernel", dtype=jnp.float16)
    self.assertEqual(info.layers, ("one/kernel", "two/kernel"))
    want = base["one"]["bias"].astype(jnp.float16)
    np.testing.assert_array_equal(got["one"]["bias"], want)
    for leaf in jax.tree.leaves(got):
      self.assertEqual(leaf.dtype, jnp.float16)

  def test_jit_and_memory(self):
    """Neither task vectors nor models are copied, however many there are."""
    size = 256
    shape = (size, size)
    base = {f"w{i}": jnp.eye(size) for i in range(3)}
    models = [
      {
        f"w{i}": jax.random.normal(jax.random.key(j), shape) / 16
        for i in range(3)
      }
      for j in range(3)
    ]
    data = [examples(j, 8, size) for j in range(3)]

    def fn(params, x):
      for i in range(3):
        x = jnp.tanh(x @ params[f"w{i}"])
      return x

    merge = lambda *args: learn(*args, fn=fn)[0]  # noqa: E731
    compiled = jax.jit(merge).lower(base, models, data).compile()
    stored = compiled.memory_analysis().temp_size_in_bytes
    self.assertLess(stored, 2.5 * 3 * size**2 * 4)
    chex.assert_trees_all_close(
      compiled(base, models, data), merge(base, models, data), atol=1e-5
    )

  def test_sharded(self):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P())
    split = jax.NamedSharding(mesh, jax.P(None, "x"))
    base, models, data = setting(tasks=1)
    want, _ = learn(base, models, data, learning_rate=0.1)
    place = lambda one: {  # noqa: E731
      "one": {
        "bias": jax.device_put(one["one"]["bias"], sharding),
        "kernel": jax.device_put(one["one"]["kernel"], split),
      },
      "two": jax.device_put(one["two"], sharding),
    }
    got, _ = learn(
      place(base),
      [place(model) for model in models],
      jax.device_put(data, sharding),
      learning_rate=0.1,
    )
    chex.assert_trees_all_close(got, want, atol=1e-5)
    self.assertTrue(got["one"]["kernel"].sharding.is_equivalent_to(split, 2))

  @parameterized.parameters(
    ({"data": []}, "data of 0 tasks for 2 models"),
    ({"data": [examples(0, 6)]}, "data of 1 tasks for 2 models"),
    ({"data": examples(0, 6)}, "data must be a sequence"),
    ({"data": [examples(0, 6), {}]}, "data of task 1 hold no examples"),
    ({"data": [examples(0, 6), jnp.zeros((0, 3))]}, "1 hold no examples"),
    ({"data": [jnp.zeros(()), examples(0, 6)]}, "0 hold no examples"),
    (
      {"data": [(jnp.zeros(6), jnp.zeros(7)), examples(0, 6)]},
      "task 0 have different numbers of examples",
    ),
    ({"batch_size": 7}, "batch_size is 7 but task 0 has 6 examples"),
    ({"batch_size": 0}, "batch_size must be an integer, at least 1"),
    ({"steps": 0}, "steps must be an integer, at least 1; got 0"),
    ({"steps": 2.5}, "steps must be an integer, at least 1; got 2.5"),
    ({"init": "half"}, "init must be numbers; got 'half'"),
    ({"optimizer": "adam"}, "optimizer must be an Optax transformation"),
    ({"learning_rate": [0.1, 0.2]}, "learning_rate must be one number"),
    ({"density": [0.2, 0.2]}, "density must be one number"),
    ({"granularity": "leaf"}, "granularity must be one of 'layer', 'task'"),
    ({"granularity": "task", "layers": "one"}, "layers groups leaves with"),
    ({"layers": "("}, "not a valid regular expression"),
    ({"init": 1.5}, r"init must lie in \[0, 1\]; got 1.5"),
    ({"init": jnp.zeros(3)}, r"\(2,\) or \(2, 4\).*; got \(3,\)"),
    ({"density": 0.0}, "density must lie"),
    ({"fn": [logits_fn]}, "got 1 logits_fn for 2 models"),
    ({"fn": lambda p, x: x.sum()}, re.escape("must return logits [6, ...,")),
    ({"fn": lambda p, x: (x, x)}, "logits_fn of task 0 must return logits"),
    ({"fn": lambda p, x: x[:3]}, "logits_fn of task 0 must return logits"),
    ({"fn": lambda p, x: x.astype(int)}, "must return logits"),
  )
  def test_errors(self, options, message):
    base, models, data = setting()
    options = {"data": data, **options}
    with self.assertRaisesRegex(ValueError, message):
      learn(base, models, **options)

  def test_errors_of_models(self):
    base, models, data = setting()
    with self.assertRaisesRegex(ValueError, "models is empty"):
      learn(base, [], [])
    other = {**models[1], "two": {**models[1]["two"], "bias": jnp.ones(2)}}
    with self.assertRaisesRegex(tree.TreeMismatchError, "'two/bias'"):
      learn(base, [models[0], other], data)
    bad = jax.tree.map(lambda x: x * jnp.nan, models[0])
    with self.assertRaisesRegex(ValueError, "of model 0 holds NaN"):
      learn(base, [bad, models[1]], data)
    whole = {"w": jnp.arange(3)}
    with self.assertRaisesRegex(ValueError, "no floating-point leaf"):
      learn(whole, [whole] * 2, data)
    with self.assertRaisesRegex(ValueError, "'w' is complex"):
      one = {"w": jnp.zeros(3, jnp.complex64)}
      learn(one, [one] * 2, data, density=0.2)


class DigitsTest(parameterized.TestCase):
  """Two networks of one start, tuned on upright 0-4 and on turned 5-9."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    images, labels = datasets.load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8)
    turned = np.rot90(images, axes=(1, 2))
    is_train = np.arange(len(labels)) < 1200
    cls.heads = [
      lambda p, x: logits_fn(p, x)[:, :5],
      lambda p, x: logits_fn(p, x)[:, 5:],
    ]
    cls.base = jax.tree.map(
      lambda leaf: leaf * leaf.shape[0] ** -0.5 if leaf.ndim > 1 else 0 * leaf,
      params(0, sizes=(64, 48, 10)),
    )
    cls.models, cls.tests = [], []
    for i, source in enumerate((images, turned)):
      x = source.reshape(-1, 64)
      y = labels - 5 * i
      mine = (y >= 0) & (y < 5)
      cls.models.append(
        cls.tune(cls.heads[i], x[is_train & mine], y[is_train & mine])
      )
      cls.tests.append((x[~is_train & mine], y[~is_train & mine]))

  @classmethod
  def tune(cls, head, x, y):
    optimizer = optax.adam(3e-3)

    def loss(params):
      logits = head(params, x)
      return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def run(params):
      def body(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

      start = (params, optimizer.init(params))
      return jax.lax.scan(body, start, None, length=100)[0][0]

    with jax.numpy_dtype_promotion("standard"):
      return run(cls.base)

  def accuracy(self, params):
    return np.mean(
      [
        (np.asarray(head(params, x)).argmax(-1) == y).mean()
        for head, (x, y) in zip(self.heads, self.tests, strict=True)
      ]
    )

  @parameterized.parameters("layer", "task")
  def test_better_than_task_arithmetic(self, granularity):
    params, info = merging.adamerging(
      self.heads,
      self.base,
      self.models,
      [x for x, _ in self.tests],
      key=KEY,
      granularity=granularity,
      learning_rate=1e-2,
      steps=200,
      batch_size=64,
    )
    found = self.accuracy(params)
    # Those coefficients that it starts from, the paper's.
    plain = self.accuracy(
      merging.task_arithmetic(self.base, self.models, scale=0.3)
    )
    totals = np.asarray(info.entropies).sum(axis=1)
    self.assertLess(totals[-10:].mean(), 0.6 * totals[:10].mean())
    self.assertGreater(found, plain + 0.05)


if __name__ == "__main__":
  absltest.main()
