"""Tests of RegMean and of the Gram matrices that it needs."""

from __future__ import annotations

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl.testing import absltest, parameterized
from flax import nnx

from jaxmerge import data, merging, models, tree


def floats(params):
  return tree.partition(params)[0]


def rows(seed, n, width):
  return np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)


def make(seed, dtype=jnp.float32):
  """A kernel, one with two axes of inputs, and leaves without matrices."""
  rng = np.random.default_rng(seed)
  return {
    "dense": {
      "kernel": jnp.asarray(rng.normal(size=(5, 3)), dtype),
      "bias": jnp.asarray(rng.normal(size=3), dtype),
    },
    "general": jnp.asarray(rng.normal(size=(2, 2, 3)), dtype),
    "scalar": jnp.asarray(rng.normal(), dtype),
    "empty": jnp.zeros((0, 2), dtype),
    "steps": jnp.asarray(seed),
    "key": jax.random.key(seed),
  }


def make_grams(seed):
  inputs = {"dense/kernel": rows(seed, 20, 5), "general": rows(seed, 20, 4)}
  return {name: jnp.asarray(x.T @ x) for name, x in inputs.items()}


MODELS = [make(seed) for seed in range(1, 4)]
GRAMS = [make_grams(seed) for seed in range(1, 4)]


def solution(kernels, grams, weights=(1, 1, 1), alpha=0.9):
  """The paper's formula, in float64."""
  numerator, total = 0.0, 0.0
  for kernel, gram, weight in zip(kernels, grams, weights, strict=True):
    gram = np.asarray(gram, np.float64)
    gram = weight * (alpha * gram + (1 - alpha) * np.diag(np.diag(gram)))
    kernel = np.asarray(kernel, np.float64)
    total = total + gram
    numerator = numerator + gram @ kernel.reshape(len(gram), -1)
  return np.linalg.solve(total, numerator)


def stream(method, base, params, statistics):
  state = method.init(base)
  for one, grams in zip(params, statistics, strict=True):
    state = method.update(state, one, statistics=grams)
  return method.finalize(state)


class RegmeanTest(parameterized.TestCase):
  @parameterized.product(
    dtype=["float32", "bfloat16"],
    weights=[None, [1, 2, 0.5], [0, 1, 0]],
    alpha=[1.0, 0.9, 0.0],
  )
  def test_against_numpy(self, dtype, weights, alpha):
    params = [make(seed, dtype) for seed in range(1, 4)]
    got = merging.regmean(params, GRAMS, weights=weights, alpha=alpha)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, params[0])
    self.assertEqual(int(got["steps"]), 1)
    tolerance = {"bfloat16": 8e-3, "float32": 1e-4}[dtype]
    weights = weights or [1, 1, 1]
    for leaf, pick in (
      ("dense/kernel", lambda one: one["dense"]["kernel"]),
      ("general", lambda one: one["general"]),
    ):
      want = solution(
        [pick(one) for one in params],
        [grams[leaf] for grams in GRAMS],
        weights,
        alpha,
      )
      np.testing.assert_allclose(
        np.asarray(pick(got), np.float64).reshape(want.shape),
        want,
        rtol=tolerance,
        atol=tolerance / 10,
      )
    average = merging.weighted_average(params, weights)
    for leaf in ("scalar", "empty"):
      np.testing.assert_allclose(
        np.asarray(got[leaf], np.float64),
        np.asarray(average[leaf], np.float64),
        rtol=tolerance,
      )
    np.testing.assert_allclose(
      np.asarray(got["dense"]["bias"], np.float64),
      np.asarray(average["dense"]["bias"], np.float64),
      rtol=tolerance,
      atol=1e-6,
    )

  def test_least_squares_of_the_joined_data(self):
    """With alpha 1, the kernel that fits all inputs to all outputs."""
    inputs = [rows(10 + i, 30, 5) * np.float32(1 + i) for i in range(3)]
    kernels = [np.asarray(one["dense"]["kernel"]) for one in MODELS]
    outputs = [x @ w for x, w in zip(inputs, kernels, strict=True)]
    want = np.linalg.lstsq(
      np.concatenate(inputs).astype(np.float64),
      np.concatenate(outputs).astype(np.float64),
    )[0]
    got = merging.regmean(
      [{"w": jnp.asarray(kernel)} for kernel in kernels],
      [{"w": merging.gram_matrix(x)} for x in inputs],
      alpha=1.0,
    )
    np.testing.assert_allclose(got["w"], want, rtol=1e-4, atol=1e-5)

  def test_where_no_model_has_inputs_the_average_remains(self):
    """Fewer rows than inputs, and inputs that are always zero."""
    inputs = [rows(i, 2, 6) for i in range(2)]
    for x in inputs:
      x[:, 5] = 0
    kernels = [rows(20 + i, 6, 3) for i in range(2)]
    got = merging.regmean(
      [{"w": jnp.asarray(kernel)} for kernel in kernels],
      [{"w": merging.gram_matrix(x)} for x in inputs],
      alpha=1.0,
    )["w"]
    average = (kernels[0] + kernels[1]) / 2
    # The correction of the average, in units where the diagonal is one.
    joined = np.concatenate(inputs).astype(np.float64)
    target = np.concatenate(
      [x @ (w - average) for x, w in zip(inputs, kernels, strict=True)]
    )
    scale = np.sqrt((joined**2).sum(axis=0))
    joined = joined / np.where(scale > 0, scale, 1)
    gram = joined.T @ joined + 1e-5 * np.eye(6)
    want = np.linalg.solve(gram, joined.T @ target)
    want /= np.where(scale > 0, scale, 1)[:, None]
    # Rounding over ridge is a few thousandths.
    np.testing.assert_allclose(got, average + want, atol=2e-2)
    np.testing.assert_allclose(got[5], average[5], rtol=2e-6)
    for ridge in (0.0, 1e-3):
      again = merging.regmean(
        [{"w": jnp.asarray(kernel)} for kernel in kernels],
        [{"w": merging.gram_matrix(x)} for x in inputs],
        alpha=1.0,
        ridge=ridge,
      )["w"]
      self.assertTrue(np.isfinite(again).all())
      np.testing.assert_allclose(again[5], average[5], rtol=2e-6)

  @parameterized.parameters(1.0, 1e-12, 1e12)
  def test_the_scale_of_the_matrices_is_of_no_account(self, scale):
    scaled = [jax.tree.map(lambda one: one * scale, one) for one in GRAMS]
    chex.assert_trees_all_close(
      floats(merging.regmean(MODELS, scaled)),
      floats(merging.regmean(MODELS, GRAMS)),
      rtol=1e-4,
      atol=1e-5,
    )

  def test_a_large_ridge_gives_the_average(self):
    got = merging.regmean(MODELS, GRAMS, ridge=1e8)
    chex.assert_trees_all_close(
      floats(got), floats(merging.average(MODELS)), rtol=1e-5, atol=1e-6
    )
    got = merging.regmean(MODELS, [{}] * 3)
    chex.assert_trees_all_close(
      floats(got), floats(merging.average(MODELS)), rtol=1e-5, atol=1e-6
    )

  @parameterized.product(
    dtype=["float32", "bfloat16"], ridge=[0.0, 1e-6], alpha=[1.0]
  )
  def test_equal_models_are_exactly_a_fixed_point(self, dtype, ridge, alpha):
    """Even where the matrices are singular, and whatever the base."""
    x = rows(0, 1, 5)
    grams = [{"dense/kernel": jnp.asarray(x.T @ x) * i} for i in (1, 2, 0.3)]
    params = make(5, dtype)
    options = {"ridge": ridge, "alpha": alpha}
    got = merging.regmean([params] * 3, grams, weights=[0, 0.3, 2], **options)
    chex.assert_trees_all_equal(floats(got), floats(params))
    method = merging.regmean_method(**options)
    got = stream(method, make(6, dtype), [params] * 3, grams)
    chex.assert_trees_all_equal(floats(got), floats(params))

  @parameterized.parameters({}, {"alpha": 1.0}, {"alpha": [0.1, 0.5, 1.0]})
  def test_streamed_is_the_list_bit_for_bit(self, **options):
    params = [make(seed) for seed in range(3)]
    grams = [make_grams(seed) for seed in range(3)]
    method = merging.regmean_method(**options)
    got = floats(merging.regmean(params, grams, **options))
    chex.assert_trees_all_equal(
      floats(stream(method, params[0], params, grams)), got
    )
    chex.assert_trees_all_equal(
      floats(merging.fold(method, params[0], params, None, grams)), got
    )
    weights = [0.2, 1.7, 3]
    chex.assert_trees_all_equal(
      floats(merging.fold(method, params[0], params, weights, grams)),
      floats(merging.regmean(params, grams, weights=weights, **options)),
    )
    empty = method.finalize(method.init(params[0]))
    chex.assert_trees_all_equal(floats(empty), floats(params[0]))

  @parameterized.parameters((1, 1), (130, 33))
  def test_streamed_bits_of_several_sizes(self, width, out):
    params = [{"w": jnp.asarray(rows(i, width, out))} for i in range(3)]
    grams = [
      {"w": merging.gram_matrix(rows(9 + i, 2 * width, width))}
      for i in range(3)
    ]
    method = merging.regmean_method()
    chex.assert_trees_all_equal(
      stream(method, params[0], params, grams), merging.regmean(params, grams)
    )

  def test_many_models(self):
    params = [{"w": jnp.asarray(rows(i, 4, 2))} for i in range(19)]
    grams = [{"w": merging.gram_matrix(rows(50 + i, 9, 4))} for i in range(19)]
    got = merging.regmean(params, grams)
    method = merging.regmean_method()
    chex.assert_trees_all_equal(stream(method, params[0], params, grams), got)
    want = solution(
      [one["w"] for one in params], [one["w"] for one in grams], np.ones(19)
    )
    np.testing.assert_allclose(got["w"], want, rtol=1e-4, atol=1e-5)

  def test_jit_scan_and_leaf_by_leaf(self):
    chex.clear_trace_counter()
    fn = jax.jit(chex.assert_max_traces(merging.regmean, n=1))
    want = merging.regmean(MODELS, GRAMS)
    for _ in range(2):
      got = fn(MODELS, GRAMS)
    chex.assert_trees_all_close(floats(got), floats(want), rtol=1e-5, atol=1e-6)
    # From the first model on the state has a fixed structure.
    method = merging.regmean_method()
    alone = [{"general": one["general"]} for one in MODELS]
    grams = [{"general": one["general"]} for one in GRAMS]
    state = method.update(method.init(alone[0]), alone[0], statistics=grams[0])
    rest = jax.tree.map(
      lambda *one: jnp.stack(one), *zip(alone[1:], grams[1:], strict=True)
    )
    body = lambda state, one: (  # noqa: E731
      method.update(state, one[0], statistics=one[1]),
      None,
    )
    state, _ = jax.lax.scan(body, state, rest)
    np.testing.assert_allclose(
      method.finalize(state)["general"], want["general"], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(
      merging.regmean(alone, grams)["general"], want["general"]
    )

  def test_gradient_of_a_weight(self):
    models = [{"general": one["general"]} for one in MODELS]
    grams = [{"general": one["general"]} for one in GRAMS]

    def loss(weight):
      return merging.regmean(models, grams, weights=[1, weight, 1])[
        "general"
      ].sum()

    step = 1e-2
    want = (loss(1.0 + step) - loss(1.0 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(loss)(1.0), want, rtol=1e-2)

  def test_selected_leaves_dtype_and_inputs(self):
    copies = jax.tree.map(lambda leaf: leaf, (MODELS, GRAMS))
    got = merging.regmean(MODELS, GRAMS, select="kernel$", dtype=jnp.float16)
    np.testing.assert_array_equal(
      got["general"], MODELS[0]["general"].astype(jnp.float16)
    )
    self.assertEqual(got["dense"]["kernel"].dtype, jnp.float16)
    chex.assert_trees_all_equal(floats((MODELS, GRAMS)), floats(copies))

  def test_errors(self):
    model, gram = {"w": jnp.ones((2, 3)), "b": jnp.ones(())}, jnp.eye(2)
    merge = lambda *grams, **more: merging.regmean(  # noqa: E731
      [model] * len(grams), list(grams), **more
    )
    with self.assertRaisesRegex(
      tree.TreeMismatchError,
      r"'w' has shape \(2, 3\) in model 0 but a matrix of shape \(3, 3\) in"
      r" Gram matrices 0; give \[in, in\], with in = 2",
    ):
      merge({"w": jnp.eye(3)})
    with self.assertRaisesRegex(tree.TreeMismatchError, r"'b' has shape \(\)"):
      merge({"b": jnp.eye(1)})
    for bad, message in (
      ({"w": -gram}, "'w' of Gram matrices 0 is negative on its diagonal"),
      ({"w": gram * jnp.nan}, "'w' of Gram matrices 0 holds NaN"),
      ({"w": jnp.array([[1.0, 2], [2, 1]])}, "larger off its diagonal than a"),
      ({"w": jnp.array([[1.0, 0.5], [0, 1]])}, "'w' .* is not symmetric"),
      ({"params/w": gram}, "an entry for 'params/w', which is no leaf"),
      (None, "Gram matrices 0 is missing.*gram_matrices"),
      (gram, "must map names of leaves to matrices"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        merge(bad)
    with self.assertRaisesRegex(ValueError, "'w' has a Gram matrix of shape"):
      merge({"w": gram}, {})
    with self.assertRaisesRegex(ValueError, "got 1 statistics for 2 models"):
      merging.regmean([model] * 2, [{"w": gram}])
    with self.assertRaisesRegex(ValueError, "must be a sequence"):
      merging.regmean([model], {"w": gram})
    with self.assertRaisesRegex(ValueError, "models is empty"):
      merging.regmean([], [])
    with self.assertRaisesRegex(ValueError, "give none that is negative"):
      merge({"w": gram}, {"w": gram}, weights=[2, -1])
    with self.assertRaisesRegex(ValueError, r"alpha must lie in \[0, 1\]"):
      merge({"w": gram}, alpha=1.1)
    with self.assertRaisesRegex(ValueError, r"ridge must lie in \[0, inf\]"):
      merge({"w": gram}, ridge=-1.0)
    merge({"w": gram * jnp.nan}, allow_nonfinite=True)

  def test_rounded_grams(self):
    # What summing in half precision leaves of a matrix of rank one passes.
    rows = np.random.RandomState(0).normal(size=(1, 64)).astype(np.float32)
    gram = jnp.asarray(rows.T @ rows)
    model = {"w": jnp.ones((64, 2))}
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
      grams = [{"w": gram.astype(dtype)}] * 2
      got = merging.regmean([model, model], grams)
      chex.assert_trees_all_close(got, model, rtol=1e-5)
    merging.regmean([model], [{"w": jnp.eye(64, dtype=jnp.int32)}])

  def test_kernel_with_one_output(self):
    # The axis of length 1 comes first, yet it is that of the output.
    rng = np.random.RandomState(0)
    models = [
      {"w": rng.normal(size=(1, 5)).astype(np.float32)} for _ in range(2)
    ]
    xs = [rng.normal(size=(9, 5)).astype(np.float32) for _ in range(2)]
    fn = lambda params, x: jnp.einsum("ni,oi->no", x, params["w"])  # noqa: E731
    grams = [
      merging.gram_matrices(fn, model, [x], reduction="sum")
      for model, x in zip(models, xs, strict=True)
    ]
    got = merging.regmean(models, grams, alpha=1.0, ridge=0.0)["w"]
    stacked = np.concatenate(xs).astype(np.float64)
    targets = np.concatenate(
      [x @ model["w"][0] for x, model in zip(xs, models, strict=True)]
    )
    want = np.linalg.lstsq(stacked, targets, rcond=None)[0]
    np.testing.assert_allclose(got[0], want, rtol=1e-4)

  def test_errors_of_the_method(self):
    model, gram = {"w": jnp.ones((2, 3))}, {"w": jnp.eye(2)}
    method = merging.regmean_method()
    state = method.init(model)
    with self.assertRaisesRegex(ValueError, "Gram matrices is missing"):
      method.update(state, model)
    with self.assertRaisesRegex(ValueError, "weight must lie"):
      method.update(state, model, -1.0, statistics=gram)
    for first, second in ((gram, {}), ({}, gram)):
      with self.assertRaisesRegex(ValueError, "'w' has a Gram matrix"):
        merging.fold(method, model, [model] * 2, statistics=[first, second])


class Net(nn.Module):
  use_bias: bool = True

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Dense(5, use_bias=self.use_bias)(x))
    return nn.Dense(2, use_bias=self.use_bias)(x)


class Mixed(nn.Module):
  """Layers whose kernels have several axes."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(3, (2, 3), strides=(1, 2), padding="VALID", name="conv")(x)
    x = nn.Conv(4, (1, 1), name="point")(x)
    x = nn.DenseGeneral((2, 3), name="split")(x)
    x = nn.DenseGeneral(5, axis=(-2, -1), dtype=jnp.bfloat16, name="join")(x)
    return nn.LayerNorm(name="norm")(x.astype(jnp.float32))


def apply(module):
  return lambda params, x: module.apply({"params": params}, x)


class GramMatricesTest(parameterized.TestCase):
  @parameterized.product(
    use_bias=[True, False], reduction=["mean", "sum"], jit=[True, False]
  )
  def test_two_layers_by_hand(self, use_bias, reduction, jit):
    net, x = Net(use_bias), rows(0, 7, 4)
    params = jax.jit(net.init)(jax.random.key(0), x)["params"]
    fn = jax.jit(apply(net)) if jit else apply(net)
    got = merging.gram_matrices(fn, params, [x[:4], x[4:]], reduction=reduction)
    self.assertEqual(list(got), ["Dense_0/kernel", "Dense_1/kernel"])
    hidden = x.astype(np.float64) @ np.asarray(params["Dense_0"]["kernel"])
    if use_bias:
      hidden += np.asarray(params["Dense_0"]["bias"])
    hidden = np.maximum(hidden, 0)
    scale = 1 if reduction == "sum" else 1 / 7
    for name, inputs in (("Dense_0", x), ("Dense_1", hidden)):
      np.testing.assert_allclose(
        got[f"{name}/kernel"],
        inputs.T @ inputs * scale,
        rtol=1e-5,
        atol=1e-6,
      )

  def test_kernels_with_several_axes(self):
    """The rows times the kernel, by hand, are what the layer gives out."""
    x = rows(0, 2 * 3 * 5 * 2, 1).reshape(2, 3, 5, 2)
    net = Mixed()
    params = jax.jit(net.init)(jax.random.key(0), x)["params"]
    got = merging.gram_matrices(apply(net), params, [x], reduction="sum")
    widths = {"conv": 12, "point": 3, "split": 4, "join": 6}
    self.assertEqual(
      {name: gram.shape for name, gram in got.items()},
      {
        f"{name}/kernel": (width, width)
        for name, width in sorted(widths.items())
      },
    )
    # The first layer's patches: 2 places down, 2 across, each 2 by 3 by 2.
    patches = np.stack(
      [
        x[:, i : i + 2, 2 * j : 2 * j + 3].reshape(2, -1)
        for i in range(2)
        for j in range(2)
      ]
    ).reshape(-1, 12)
    np.testing.assert_allclose(
      got["conv/kernel"], patches.T @ patches, rtol=1e-5, atol=1e-5
    )

    @jax.jit
    def layer_inputs(params, x):
      found = {}

      def record(fn, args, kwargs, context):
        found.setdefault(context.module.name, args[0])
        return fn(*args, **kwargs)

      with nn.intercept_methods(record):
        net.apply({"params": params}, x)
      return {name: found[name] for name in widths}

    layers = layer_inputs(params, x)
    for name, width in list(widths.items())[1:]:
      inputs = np.asarray(layers[name]).reshape(-1, width)
      if name == "join":
        inputs = np.asarray(jnp.asarray(inputs, jnp.bfloat16), np.float32)
      np.testing.assert_allclose(
        got[f"{name}/kernel"], inputs.T @ inputs, rtol=1e-4, atol=1e-4
      )
    # They fit the leaves.
    merging.regmean([params], [got])

  def test_attention_in_nnx_and_linen(self):
    """The same numbers in both libraries, by the names of each."""
    x = rows(3, 2 * 3 * 4, 1).reshape(2, 3, 4)
    module = nn.MultiHeadDotProductAttention(2)
    fn = lambda params, x: module.apply({"params": params}, x, x)  # noqa: E731
    params = jax.jit(module.init)(jax.random.key(0), x, x)["params"]
    got = merging.gram_matrices(fn, params, [x])
    flat = x.reshape(-1, 4)
    for name in ("query", "key", "value"):
      np.testing.assert_allclose(
        got[f"{name}/kernel"], flat.T @ flat / 2, rtol=1e-5, atol=1e-6
      )
    self.assertEqual(got["out/kernel"].shape, (4, 4))
    attention = nnx.MultiHeadAttention(
      num_heads=2, in_features=4, decode=False, rngs=nnx.Rngs(0)
    )
    graph, state = nnx.split(attention)
    state = jax.tree.map(lambda leaf: leaf, state)
    for name in ("query", "key", "value", "out"):
      state[name]["kernel"][...] = params[name]["kernel"]
      state[name]["bias"][...] = params[name]["bias"]
    other = merging.gram_matrices(
      lambda state, x: nnx.merge(graph, state)(x), state, [x]
    )
    for name in ("query", "key", "value", "out"):
      np.testing.assert_allclose(
        other[f"{name}/kernel"], got[f"{name}/kernel"], rtol=1e-5, atol=1e-6
      )
    merging.regmean([state], [other])

  def test_hand_written_and_wrapped(self):
    """Einsums, remat, custom gradients, shared kernels; batches of dicts."""

    @jax.custom_vjp
    def scaled(x):
      return 2 * x

    scaled.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))

    @jax.checkpoint
    def layer(kernel, x):
      return jnp.einsum("ni,io->no", scaled(x), kernel)

    def fn(params, batch):
      y = layer(params["w"], batch["x"])
      return layer(params["w"], y) @ params["transposed"].T

    params = {"w": jnp.asarray(rows(0, 3, 3)), "transposed": jnp.ones((2, 3))}
    x = rows(1, 4, 3)
    got = merging.gram_matrices(fn, params, [{"x": x}], reduction="sum")
    second = 2 * x @ np.asarray(params["w"])
    want = 4 * (x.T @ x + second.T @ second)
    self.assertEqual(list(got), ["w"])
    np.testing.assert_allclose(got["w"], want, rtol=1e-5)

  @parameterized.parameters(True, False)
  def test_mask_leaves_out_padding(self, flat):
    """Texts with padding have the matrices of their tokens alone."""
    x, lengths = rows(5, 3 * 4 * 2, 1).reshape(3, 4, 2), np.array([4, 1, 2])
    x[1, 1:] = np.nan
    kept = np.arange(4) < lengths[:, None]
    params = {"token": jnp.ones((2, 3)), "text": jnp.ones((3, 2))}

    def fn(params, batch):
      tokens = batch["x"].reshape(-1, 2) if flat else batch["x"]
      hidden = (tokens @ params["token"]).reshape(3, 4, 3)
      return jnp.nan_to_num(hidden).mean(axis=1) @ params["text"]

    batch = {"x": x, "mask": kept}
    got = merging.gram_matrices(
      fn, params, [batch], reduction="sum", mask=lambda batch: batch["mask"]
    )
    tokens = x[kept]
    np.testing.assert_allclose(got["token"], tokens.T @ tokens, rtol=1e-5)
    # The three texts have rows of their own, which the mask is not for.
    means = np.nan_to_num(x @ np.ones((2, 3))).mean(axis=1)
    np.testing.assert_allclose(got["text"], means.T @ means, rtol=1e-5)

  @parameterized.parameters(
    (lambda x: jnp.ones(len(x)), r"bool \[7, ...\].*float32 \(7,\)"),
    (lambda x: jnp.ones((2, 7), bool), r"bool \[7, ...\].*bool \(2, 7\)"),
    (lambda x: jnp.array(True), r"bool \(\)"),
    (lambda x: jnp.ones((7, 3), bool), "21 entries.*no layer"),
  )
  def test_a_mask_that_does_not_fit(self, mask, message):
    linear = lambda params, x: x @ params["w"]  # noqa: E731
    with self.assertRaisesRegex(ValueError, message):
      merging.gram_matrices(
        linear, {"w": jnp.ones((4, 2))}, [rows(0, 7, 4)], mask=mask
      )

  def test_half_inputs_are_summed_in_float32(self):
    x = jnp.full((1000, 1), 0.1, jnp.bfloat16)
    got = merging.gram_matrix(x)
    self.assertEqual(got.dtype, jnp.float32)
    np.testing.assert_allclose(got, 1000 * float(x[0, 0]) ** 2, rtol=1e-5)

  def test_select_and_compiled_once(self):
    net, x = Net(), rows(0, 9, 4)
    params = jax.jit(net.init)(jax.random.key(0), x)["params"]
    traces = []

    def fn(params, x):
      traces.append(x.shape)
      return apply(net)(params, x)

    got = merging.gram_matrices(fn, params, [x[:4], x[4:8]], select="Dense_1")
    self.assertEqual(list(got), ["Dense_1/kernel"])
    # Once for the shapes of the result, once for the program.
    self.assertEqual(traces, [(4, 4)] * 2)
    merging.gram_matrices(fn, params, [x[:4], x[4:8], x[8:]], select="Dense_1")
    self.assertEqual(traces[2:], [(4, 4), (1, 4)])

  def test_errors(self):
    net, x = Net(), rows(0, 4, 4)
    params = jax.jit(net.init)(jax.random.key(0), x)["params"]
    fn = apply(net)
    with self.assertRaisesRegex(ValueError, "no example"):
      merging.gram_matrices(fn, params, [])
    with self.assertRaisesRegex(ValueError, "reduction must be one of"):
      merging.gram_matrices(fn, params, [x], reduction="max")
    with self.assertRaisesRegex(ValueError, "no leaf name matches"):
      merging.gram_matrices(fn, params, [x], select="^nothing$")
    with self.assertRaisesRegex(ValueError, "no leaf is the kernel of a"):
      merging.gram_matrices(fn, params, [x], select="bias$")
    with self.assertRaisesRegex(ValueError, "must have shape"):
      merging.gram_matrix(1.0)

    def looped(params, x):
      body = lambda x, w: (x @ w, None)  # noqa: E731
      return jax.lax.scan(body, x, params["w"])[0]

    with self.assertRaisesRegex(ValueError, "'w' is used within a scan"):
      merging.gram_matrices(looped, {"w": jnp.ones((2, 4, 4))}, [x])
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = lambda params, x: jax.shard_map(  # noqa: E731
      lambda w, x: x @ w, mesh=mesh, in_specs=jax.P(), out_specs=jax.P()
    )(params["w"], x)
    with self.assertRaisesRegex(ValueError, "'w' is used within a shard_map"):
      merging.gram_matrices(mapped, {"w": jnp.ones((x.shape[-1], 4))}, [x])


class DigitsTest(absltest.TestCase):
  def test_regmean_is_better_than_the_average(self):
    """Networks trained on other halves of the digits, from one start."""
    train, test = data.load("digits", "train"), data.load("digits", "test")
    prepare = lambda images: (  # noqa: E731
      np.asarray(images, np.float32).reshape(len(images), -1) / 255
    )
    images, labels = prepare(train.images), np.asarray(train.labels)
    net = models.MLP(features=(32,), num_classes=10, use_bias=True)
    fn = apply(net)
    start = jax.jit(net.init)(jax.random.key(0), images[:1])["params"]
    optimizer = optax.sgd(0.3, momentum=0.9)

    @jax.jit
    def fit(params, x, y):
      def step(carry, _):
        params, state = carry
        loss = lambda params: (  # noqa: E731
          optax.softmax_cross_entropy_with_integer_labels(
            fn(params, x), y
          ).mean()
        )
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

      carry = (params, optimizer.init(params))
      return jax.lax.scan(step, carry, length=60)[0][0]

    @jax.jit
    def accuracy(params):
      found = fn(params, prepare(test.images)).argmax(axis=-1)
      return (found == jnp.asarray(test.labels)).mean()

    size = 700
    trained, grams, fishers = [], [], []
    for chosen in (labels < 5, labels >= 5):
      x, y = images[chosen][:size], labels[chosen][:size]
      params = fit(start, x, y)
      trained.append(params)
      parts = [x[first : first + 350] for first in range(0, size, 350)]
      grams.append(merging.gram_matrices(fn, params, parts))
      fishers.append(merging.diagonal_fisher(fn, params, parts))
    got = {
      "average": accuracy(merging.average(trained)),
      "fisher_average": accuracy(
        merging.fisher_average(trained, fishers, normalize="vector")
      ),
      "regmean": accuracy(merging.regmean(trained, grams)),
    }
    got = {name: float(one) for name, one in got.items()}
    self.assertGreater(got["regmean"], got["average"] + 0.05, got)
    self.assertGreater(got["fisher_average"], got["average"], got)


if __name__ == "__main__":
  absltest.main()
