"""Tests of the diagonal Fisher and of the average that it weights."""

from __future__ import annotations

import functools

import chex
import equinox as eqx
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxmerge import merging, tree

SETTINGS = hypothesis.settings(max_examples=20, deadline=None)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(11, 4)).astype(np.float32)
Y = RNG.integers(0, 3, 11).astype(np.int32)
W = RNG.normal(size=(4, 3)).astype(np.float32)
B = RNG.normal(size=3).astype(np.float32)
PARAMS = {"kernel": jnp.asarray(W), "bias": jnp.asarray(B), "steps": 3}


def logits(params, x):
  y = x @ params["kernel"]
  return y + jnp.broadcast_to(params["bias"], y.shape)


def probabilities(x=X):
  z = x.astype(np.float64) @ W + B
  e = np.exp(z - z.max(axis=1, keepdims=True))
  return e / e.sum(axis=1, keepdims=True)


def closed_form(labels, x=X, y=Y):
  """Mean Fisher of softmax regression: the gradient is x (y - p)."""
  p = probabilities(x)
  if labels == "exact":
    # The variance of one entry of y - p.
    residual = p * (1 - p)
  else:
    residual = (np.eye(3)[y] - p) ** 2
  squares = x.astype(np.float64) ** 2
  return squares.T @ residual / len(x), residual.mean(axis=0)


def batches(sizes, labels="exact"):
  start = 0
  for size in sizes:
    part = slice(start, start + size)
    yield (X[part], Y[part]) if labels == "empirical" else X[part]
    start += size


class DiagonalFisherTest(parameterized.TestCase):
  @parameterized.product(
    labels=["exact", "empirical"], reduction=["mean", "sum"]
  )
  def test_softmax_regression(self, labels, reduction):
    want = closed_form(labels)
    # Even, with a smaller last one, growing, one example alone, in chunks.
    for sizes, chunk_size in (
      ((11,), None),
      ((4, 4, 3), None),
      ((4, 4, 3), 3),
      ((2, 8, 1), None),
    ):
      got = merging.diagonal_fisher(
        logits,
        PARAMS,
        batches(sizes, labels),
        labels=labels,
        reduction=reduction,
        chunk_size=chunk_size,
      )
      scale = 11 if reduction == "sum" else 1
      np.testing.assert_allclose(got["kernel"], want[0] * scale, rtol=1e-5)
      np.testing.assert_allclose(got["bias"], want[1] * scale, rtol=1e-5)
      self.assertEqual(got["steps"], 3)

  def test_not_the_square_of_the_batch_mean(self):
    """Gradients that cancel in the mean still inform."""
    params = {"w": jnp.zeros(())}
    fn = lambda params, x: jnp.stack([params["w"] * x, 0 * x], -1)  # noqa: E731
    got = merging.diagonal_fisher(
      fn,
      params,
      [(jnp.ones(2), jnp.asarray([0, 1]))],
      labels="empirical",
    )
    np.testing.assert_allclose(got["w"], 0.25)

  def test_sampled(self):
    run = functools.partial(
      merging.diagonal_fisher, logits, PARAMS, labels="sampled"
    )
    key = jax.random.key(1)
    got = run(batches((4, 4, 3)), key=key)
    # The labels do not depend on the batches.
    other = run(batches((11,)), key=key, chunk_size=2)
    chex.assert_trees_all_close(got, other, rtol=1e-5)
    # Each is a possible one: the empirical Fisher of some labels.
    p = probabilities()
    residuals = (np.eye(3)[:, None] - p) ** 2
    bias = np.asarray(got["bias"], np.float64) * 11
    self.assertTrue((bias <= residuals.max(axis=0).sum(axis=0)).all())
    # On average the exact one: many copies of the same examples.
    many = run([np.tile(X, (600, 1))], key=key, chunk_size=600)
    want = closed_form("exact")
    np.testing.assert_allclose(many["kernel"], want[0], rtol=0.1)
    np.testing.assert_allclose(many["bias"], want[1], rtol=0.1)

  def test_independent_outputs_are_summed(self):
    """Two outputs an example: the Fisher is the sum of both."""
    inputs = np.stack([X[:5], X[5:10]], axis=1)
    got = merging.diagonal_fisher(logits, PARAMS, [inputs])
    want = closed_form("exact", X[:10])
    np.testing.assert_allclose(got["kernel"], 2 * want[0], rtol=1e-5)
    got = merging.diagonal_fisher(
      logits,
      PARAMS,
      [(inputs, np.stack([Y[:5], Y[5:10]], axis=1))],
      labels="empirical",
    )
    p = probabilities(X[:10])
    residual = np.eye(3)[Y[:10]] - p
    joint = residual[:5] + residual[5:]
    np.testing.assert_allclose(got["bias"], (joint**2).mean(axis=0), rtol=1e-4)

  def test_squared_gradients_of_a_density(self):
    """A Gaussian with mean m and log scale s."""

    def log_density(params, z):
      scale = jnp.exp(params["s"])
      return (-0.5 * ((z - params["m"][None]) / scale) ** 2 - params["s"]).sum(
        -1
      )

    z = RNG.normal(size=(7, 2)).astype(np.float32)
    params = {"m": jnp.asarray([0.5, -1.0]), "s": jnp.asarray(0.3)}
    got = merging.squared_gradients(
      log_density, params, [z[:5], z[5:]], chunk_size=2
    )
    r = (z.astype(np.float64) - [0.5, -1.0]) / np.exp(0.3)
    np.testing.assert_allclose(
      got["m"], ((r / np.exp(0.3)) ** 2).mean(axis=0), rtol=1e-5
    )
    np.testing.assert_allclose(
      got["s"], (((r**2).sum(-1) - 2) ** 2).mean(), rtol=1e-5
    )

  def test_compiled_once(self):
    traces = []

    def fn(params, x):
      traces.append(x.shape)
      return logits(params, x)

    merging.diagonal_fisher(fn, PARAMS, batches((4, 4)))
    first = len(traces)
    # A smaller last batch is padded: both shapes are checked, and no program
    # is traced.
    merging.diagonal_fisher(fn, PARAMS, batches((4, 4, 3)))
    self.assertEqual(traces[first:], [(4, 4), (3, 4)])

  def test_half_types_and_any_pytree(self):
    params = {
      "kernel": jnp.asarray(W, jnp.bfloat16),
      "bias": jnp.asarray(B, jnp.bfloat16),
    }
    got = merging.diagonal_fisher(
      lambda params, x: logits(params, x.astype(jnp.bfloat16)), params, [X]
    )
    self.assertEqual(got["kernel"].dtype, jnp.float32)
    np.testing.assert_allclose(got["kernel"], closed_form("exact")[0], rtol=0.1)
    model = eqx.nn.MLP(4, 3, 5, 1, key=jax.random.key(0))
    fisher = merging.diagonal_fisher(
      lambda model, batch: jax.vmap(model)(batch["x"]), model, [{"x": X}]
    )
    self.assertEqual(jax.tree.structure(fisher), jax.tree.structure(model))
    linear = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    graph, state = nnx.split(linear)
    fisher = merging.diagonal_fisher(
      lambda state, x: nnx.merge(graph, state)(x), state, [X]
    )
    self.assertEqual(fisher["kernel"][...].shape, (4, 3))

  def test_inputs_are_untouched(self):
    params = jax.tree.map(jnp.array, PARAMS)
    copy = jax.tree.map(np.array, params)
    batch = jnp.asarray(X)
    merging.diagonal_fisher(logits, params, [batch, batch])
    chex.assert_trees_all_equal(params, copy)
    np.testing.assert_array_equal(batch, X)

  def test_padding_that_has_no_gradient_is_left_out(self):
    """Probabilities of 0, whose logarithm is infinite, count for nothing."""
    mask = jnp.asarray([0.0, 0.0, -jnp.inf])
    got = merging.diagonal_fisher(
      lambda params, x: logits(params, x) + mask[None], PARAMS, [X[:4], X[4:5]]
    )
    chex.assert_tree_all_finite(got["kernel"])
    np.testing.assert_array_equal(got["kernel"][:, 2], 0)

  @parameterized.parameters(
    ({"labels": "true"}, X, "labels must be one of 'exact', 'sampled'"),
    ({"labels": "sampled"}, X, "needs a PRNG key"),
    ({"key": jax.random.key(0)}, X, "leave key out"),
    ({"reduction": "max"}, X, "reduction must be one of 'mean', 'sum'"),
    ({"chunk_size": 0}, X, "chunk_size must be an int of at least 1"),
    ({"labels": "empirical"}, X, r"needs batches \(inputs, labels\)"),
    (
      {"labels": "empirical"},
      (X, Y.astype(np.float32)),
      r"integers of shape \(11,\); got shape \(11,\) and dtype float32",
    ),
    ({"labels": "empirical"}, (X, Y[:, None]), r"got shape \(11, 1\)"),
    ({"labels": "empirical"}, (X, Y[:3]), r"'1' of batch 0 has shape \(3,\)"),
    ({}, {"x": np.float32(1)}, "'x' of batch 0 is a scalar"),
    ({}, X[:0], "no example"),
  )
  def test_errors(self, options, batch, message):
    with self.assertRaisesRegex(ValueError, message):
      merging.diagonal_fisher(logits, PARAMS, [batch], **options)

  @parameterized.parameters(-1, 9)
  def test_labels_of_every_batch(self, label):
    """The second batch of a shape is looked at as well."""
    batches = [(X[:4], Y[:4]), (X[4:8], Y[4:8].copy())]
    batches[1][1][2] = label
    with self.assertRaisesRegex(ValueError, f"batch 1 has {label}"):
      merging.diagonal_fisher(logits, PARAMS, batches, labels="empirical")

  def test_errors_of_outputs(self):
    with self.assertRaisesRegex(ValueError, r"shape \(11, ..., classes\)"):
      merging.diagonal_fisher(lambda p, x: logits(p, x)[:, 0], PARAMS, [X])
    with self.assertRaisesRegex(ValueError, r"shape \(11,\); got"):
      merging.squared_gradients(logits, PARAMS, [X])
    with self.assertRaisesRegex(ValueError, "no example"):
      merging.diagonal_fisher(logits, PARAMS, [])


def make(seed, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  return {
    "a": [jnp.asarray(rng.normal(size=(3, 2)), dtype), None],
    "b": jnp.asarray(rng.normal(), dtype),
    "empty": jnp.zeros((0, 2), dtype),
    "steps": jnp.asarray(seed),
    "key": jax.random.key(seed),
  }


def make_fisher(seed):
  rng = np.random.default_rng(100 + seed)
  fisher = make(seed)
  return {
    **fisher,
    "a": [jnp.asarray(rng.random((3, 2)), jnp.float32), None],
    "b": jnp.asarray(rng.random(), jnp.float32),
  }


MODELS = [make(seed) for seed in range(1, 4)]
FISHERS = [make_fisher(seed) for seed in range(1, 4)]


def average(leaves, fishers, weights=(1, 1, 1), floor=1e-6, norms=(1, 1, 1)):
  """The formula, in float64."""
  leaves = np.stack([np.asarray(leaf, np.float64) for leaf in leaves])
  fishers = np.stack([np.asarray(one, np.float64) for one in fishers])
  precision = np.stack(
    [
      weight * np.maximum(fisher, floor) / norm
      for weight, fisher, norm in zip(weights, fishers, norms, strict=True)
    ]
  )
  return (precision * leaves).sum(axis=0) / precision.sum(axis=0)


def stream(method, base, models, statistics):
  state = method.init(base)
  for params, one in zip(models, statistics, strict=True):
    state = method.update(state, params, statistics=one)
  return method.finalize(state)


def floats(params):
  return tree.partition(params)[0]


class FisherAverageTest(parameterized.TestCase):
  @parameterized.product(
    dtype=["float32", "bfloat16"],
    weights=[None, [1, 2, 0.5], [0, 1, 0]],
    normalize=[None, "leaf", "vector"],
  )
  def test_against_numpy(self, dtype, weights, normalize):
    models = [make(seed, dtype) for seed in range(1, 4)]
    got = merging.fisher_average(
      models, FISHERS, weights=weights, normalize=normalize
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(got, models[0])
    self.assertEqual(int(got["steps"]), 1)
    pick = {"a": lambda tree: tree["a"][0], "b": lambda tree: tree["b"]}
    size = lambda one: (np.asarray(one, np.float64) ** 2).sum()  # noqa: E731
    for leaf in pick.values():
      norms = [1, 1, 1]
      if normalize == "leaf":
        norms = [np.sqrt(size(leaf(one))) for one in FISHERS]
      elif normalize == "vector":
        norms = [np.sqrt(size(one["a"][0]) + size(one["b"])) for one in FISHERS]
      np.testing.assert_allclose(
        np.asarray(leaf(got), np.float64),
        average(
          [leaf(model) for model in models],
          [leaf(one) for one in FISHERS],
          weights or [1, 1, 1],
          norms=norms,
        ),
        rtol=8e-3 if dtype == "bfloat16" else 1e-5,
        atol=1e-6,
      )

  @SETTINGS
  @hypothesis.given(
    fishers=hnp.arrays(
      np.float32, (3, 4), elements=st.sampled_from([0, 1e-30, 0.5, 2, 1e20])
    )
  )
  def test_lies_between_the_models(self, fishers):
    """However the scales of the Fishers differ; zeros do not count."""
    leaves = np.float32([[1, 1, 1, 1], [2, 2, 2, 2], [4, 4, 4, 4]])
    got = merging.fisher_average(
      [{"w": jnp.asarray(leaf)} for leaf in leaves],
      [{"w": jnp.asarray(fisher)} for fisher in fishers],
      floor=0.0,
    )["w"]
    precision = fishers.astype(np.float64)
    # Where nothing is known, the plain average.
    precision[:, precision.sum(axis=0) == 0] = 1
    want = (precision * leaves).sum(axis=0) / precision.sum(axis=0)
    np.testing.assert_allclose(got, want, rtol=1e-5)

  def test_zero_fishers_give_the_average(self):
    zeros = jax.tree.map(
      lambda leaf: jnp.zeros_like(leaf) if tree.is_float(leaf) else leaf,
      FISHERS[0],
    )
    for floor in (0.0, 1e-6):
      for normalize in (None, "vector", "leaf"):
        got = merging.fisher_average(
          MODELS, [zeros] * 3, floor=floor, normalize=normalize
        )
        chex.assert_trees_all_close(
          floats(got), floats(merging.average(MODELS)), rtol=1e-6
        )
    got = merging.fisher_average(
      MODELS, [zeros] * 3, floor=0.0, weights=[3, 1, 0]
    )
    want = merging.weighted_average(MODELS, [3, 1, 0])
    chex.assert_trees_all_close(floats(got), floats(want), rtol=1e-6)

  def test_floor_of_the_first_model_only(self):
    """Where no Fisher is larger, the first model wins."""
    models = [{"w": jnp.asarray([1.0, 1.0])}, {"w": jnp.asarray([5.0, 5.0])}]
    fishers = [{"w": jnp.asarray([0.0, 1.0])}, {"w": jnp.asarray([0.0, 3.0])}]
    got = merging.fisher_average(models, fishers, floor=[1e-6, 0.0])
    np.testing.assert_allclose(got["w"], [1.0, 4.0], rtol=1e-6)
    got = merging.fisher_average(models, fishers, floor={".*": 1e-6})
    np.testing.assert_allclose(got["w"], [3.0, 4.0], rtol=1e-6)

  @parameterized.parameters(jnp.float32, jnp.bfloat16)
  def test_equal_models_are_exactly_a_fixed_point(self, dtype):
    params = make(5, dtype)
    got = merging.fisher_average([params] * 3, FISHERS, weights=[1, 0.3, 2])
    chex.assert_trees_all_equal(floats(got), floats(params))

  @parameterized.parameters(
    {}, {"normalize": "vector"}, {"normalize": "leaf", "floor": [0.1, 0, 0]}
  )
  def test_streamed_is_the_list_bit_for_bit(self, **options):
    models = [make(seed) for seed in range(3)]
    fishers = [make_fisher(seed) for seed in range(3)]
    method = merging.fisher_average_method(**options)
    got = merging.fisher_average(models, fishers, **options)
    chex.assert_trees_all_equal(
      floats(stream(method, models[0], models, fishers)), floats(got)
    )
    chex.assert_trees_all_equal(
      floats(merging.fold(method, models[0], models, None, fishers)),
      floats(got),
    )
    state = method.init(models[0])
    chex.assert_trees_all_equal(
      floats(method.finalize(state)), floats(models[0])
    )

  def test_many_models(self):
    keys = jax.random.split(jax.random.key(0), 19)
    models = [{"w": jax.random.normal(key, (7,))} for key in keys]
    fishers = [{"w": jax.random.uniform(key, (7,))} for key in keys]
    got = merging.fisher_average(models, fishers)
    method = merging.fisher_average_method()
    chex.assert_trees_all_equal(stream(method, models[0], models, fishers), got)
    want = average(
      [one["w"] for one in models],
      [one["w"] for one in fishers],
      np.ones(19),
      norms=np.ones(19),
    )
    np.testing.assert_allclose(got["w"], want, rtol=1e-4, atol=1e-5)

  def test_jit_scan_and_gradient(self):
    chex.clear_trace_counter()
    fn = jax.jit(chex.assert_max_traces(merging.fisher_average, n=1))
    for _ in range(2):
      got = fn(MODELS, FISHERS)
    chex.assert_trees_all_close(
      floats(got),
      floats(merging.fisher_average(MODELS, FISHERS)),
      rtol=1e-6,
    )
    method = merging.fisher_average_method()
    stacked = {"w": jnp.asarray([[1.0, 0.0], [5.0, 2.0]])}
    precision = {"w": jnp.asarray([[3.0, 0.0], [1.0, 0.0]])}

    def body(state, one):
      return method.update(state, one[0], statistics=one[1]), None

    state = method.init({"w": jnp.zeros(2)})
    state, _ = jax.lax.scan(body, state, (stacked, precision))
    np.testing.assert_allclose(method.finalize(state)["w"], [2.0, 1.0])

    def merged(weight):
      models = [{"w": jnp.asarray(1.0)}, {"w": jnp.asarray(5.0)}]
      fishers = [{"w": jnp.asarray(3.0)}, {"w": jnp.asarray(1.0)}]
      return merging.fisher_average(models, fishers, weights=[1.0, weight])["w"]

    # (3 + 5 w) / (3 + w)
    np.testing.assert_allclose(jax.grad(merged)(1.0), 12 / 16, rtol=1e-5)

  def test_leaf_by_leaf_is_the_whole(self):
    got = merging.fisher_average(MODELS, FISHERS)["b"]
    one = lambda trees: [{"b": one["b"]} for one in trees]  # noqa: E731
    alone = merging.fisher_average(one(MODELS), one(FISHERS))["b"]
    np.testing.assert_array_equal(alone, got)

  def test_selected_leaves_and_dtype(self):
    got = merging.fisher_average(
      MODELS, FISHERS, select="^a", dtype=jnp.float16
    )
    np.testing.assert_array_equal(got["b"], MODELS[0]["b"].astype(jnp.float16))
    self.assertEqual(got["a"][0].dtype, jnp.float16)

  def test_complex_leaves(self):
    models = [{"w": jnp.asarray([1 + 1j])}, {"w": jnp.asarray([5 - 3j])}]
    fishers = [{"w": jnp.asarray([3.0])}, {"w": jnp.asarray([1.0])}]
    got = merging.fisher_average(models, fishers, normalize=None)
    np.testing.assert_allclose(got["w"], [2 + 0j], atol=1e-6)

  def test_inputs_are_untouched(self):
    copies = jax.tree.map(lambda leaf: leaf, (MODELS, FISHERS))
    merging.fisher_average(MODELS, FISHERS, normalize="vector")
    chex.assert_trees_all_equal(floats((MODELS, FISHERS)), floats(copies))

  def test_errors(self):
    model, fisher = {"w": jnp.ones(2)}, {"w": jnp.ones(2)}
    merge = lambda *fishers, **more: merging.fisher_average(  # noqa: E731
      [model] * 2, list(fishers), **more
    )
    for bad, message in (
      ({"v": jnp.ones(2)}, "'w' is in model 0 but missing from Fisher 1"),
      (
        {"w": jnp.ones(3)},
        r"'w' has shape \(2,\) in model 0 but \(3,\) in Fisher 1",
      ),
    ):
      with self.assertRaisesRegex(tree.TreeMismatchError, message):
        merge(fisher, bad)
    for bad, message in (
      ({"w": jnp.asarray([1.0, -1.0])}, "'w' of Fisher 1 is negative"),
      ({"w": jnp.asarray([1.0, 3e38])}, "'w' of Fisher 1 is 3e\\+38 somewhere"),
      ({"w": jnp.asarray([1.0, jnp.nan])}, "'w' of Fisher 1 holds NaN"),
      ({"w": jnp.ones(2, jnp.complex64)}, "'w' of Fisher 1 is complex"),
      (None, "Fisher 1 is missing.*diagonal_fisher"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        merge(fisher, bad)
    with self.assertRaisesRegex(ValueError, "got 1 statistics for 2 models"):
      merge(fisher)
    with self.assertRaisesRegex(ValueError, "must be a sequence"):
      merging.fisher_average([model], fisher)
    with self.assertRaisesRegex(ValueError, "Fisher 0 is missing"):
      merging.fisher_average([model], None)
    with self.assertRaisesRegex(ValueError, "models is empty"):
      merging.fisher_average([], [])
    with self.assertRaisesRegex(ValueError, "give none that is negative"):
      merge(fisher, fisher, weights=[2, -1])
    with self.assertRaisesRegex(ValueError, "sum to 0"):
      merge(fisher, fisher, weights=[0, 0])
    with self.assertRaisesRegex(ValueError, r"floor must lie in \[0, inf\]"):
      merge(fisher, fisher, floor=-1.0)
    with self.assertRaisesRegex(ValueError, "normalize must be one of"):
      merge(fisher, fisher, normalize="l2")

  def test_errors_of_the_protocol(self):
    model = {"w": jnp.ones(2)}
    method = merging.fisher_average_method()
    state = method.init(model)
    with self.assertRaisesRegex(ValueError, "Fisher is missing"):
      method.update(state, model)
    with self.assertRaisesRegex(ValueError, "weight must lie"):
      method.update(state, model, -1.0, statistics=model)
    with self.assertRaisesRegex(ValueError, "Fisher is missing"):
      merging.fold(method, model, [model])
    with self.assertRaisesRegex(ValueError, "got 2 statistics for 1 models"):
      merging.fold(method, model, [model], statistics=[model, model])
    with self.assertRaisesRegex(ValueError, "statistics must be a sequence"):
      merging.fold(method, model, [model], statistics=model)
    # Methods that need none: a rule for one leaf, one that gathers, one
    # without weights.
    for other in (
      merging.average_method(),
      merging.ties_method(),
      merging.sce_method(),
      merging.model_stock_method(),
    ):
      with self.assertRaisesRegex(ValueError, "needs no statistics"):
        other.update(other.init(model), model, statistics=model)
      with self.assertRaisesRegex(ValueError, "needs no statistics"):
        merging.fold(other, model, [model], statistics=[model])


if __name__ == "__main__":
  absltest.main()
