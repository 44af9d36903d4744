"""Tests of NearSwap, Arcee Fusion and Model Stock."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from absl.testing import absltest, parameterized

from jaxmerge import merging, tree


def make(seed, dtype=jnp.float32, scale=1.0, special=False):
  """Random parameters; those of special shapes take long to compile."""
  rng, common = np.random.default_rng(seed), np.random.default_rng(99)

  def leaf(*shape):
    value = common.normal(size=shape) + scale * rng.normal(size=shape)
    return jnp.asarray(value, dtype)

  params = {"kernel": leaf(6, 9), "bias": leaf(9), "steps": jnp.asarray(seed)}
  if special:
    params |= {
      "scalar": leaf(),
      "one": [leaf(1), None],
      "zeros": jnp.zeros((6, 9), dtype),
      "empty": jnp.zeros((0, 2), dtype),
    }
  return params


def wide(leaf):
  return np.asarray(leaf).astype(np.float64)


class NearswapTest(parameterized.TestCase):
  @parameterized.product(
    t=[0.0, 1e-4, 0.5, 100.0], dtype=["float32", "bfloat16"]
  )
  def test_against_numpy(self, t, dtype):
    base, model = (make(seed, dtype, special=True) for seed in (0, 1))
    got = merging.nearswap(base, model, t)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, base)
    for name in ("kernel", "bias", "scalar"):
      a, b = wide(base[name]), wide(model[name])
      weight = np.clip(t / np.abs(a - b), 0, 1)
      np.testing.assert_allclose(
        wide(got[name]),
        weight * b + (1 - weight) * a,
        rtol=1e-6 if dtype == "float32" else 1e-2,
        atol=1e-6,
      )
    np.testing.assert_array_equal(got["steps"], 0)

  def test_near_parameters_are_the_models(self):
    base = {"w": jnp.asarray([1.0, 1.0, 0.0])}
    model = {"w": jnp.asarray([1.0 + 1e-7, 1.5, -3.0])}
    got = merging.nearswap(base, model, {"w": 0.5})["w"]
    np.testing.assert_array_equal(got, [model["w"][0], 1.5, -0.5])
    got = merging.nearswap({"w": 1j}, {"w": 1j + 3 + 4j}, 1.0)["w"]
    np.testing.assert_allclose(got, 1j + 0.6 + 0.8j, rtol=1e-6)

  def test_gradient(self):
    base = {"w": jnp.asarray([1.0, 1.0, 0.0])}
    model = {"w": jnp.asarray([1.0, 1.25, -3.0])}

    def total(t, model):
      return merging.nearswap(base, model, t)["w"].sum()

    of_t, of_model = jax.grad(total, argnums=(0, 1))(0.5, model)
    self.assertEqual(of_t, -1.0)
    np.testing.assert_array_equal(of_model["w"], [1.0, 1.0, 0.0])

  def test_bad_input(self):
    model = make(1)
    for t in (-1.0, np.nan, np.inf, {"kernel": -1.0, ".*": 1.0}):
      with self.assertRaisesRegex(ValueError, "t must lie in"):
        merging.nearswap(model, model, t)
    with self.assertRaisesRegex(tree.TreeMismatchError, "base.*model"):
      merging.nearswap(model, [model], 1.0)
    method = merging.nearswap_method(1.0)
    state = method.update(method.init(model), model)
    with self.assertRaisesRegex(ValueError, "takes no weights; say how far"):
      method.update(state, model, {"kernel": 2.0, ".*": 1.0})
    with self.assertRaisesRegex(ValueError, "nearswap takes exactly 1 model;"):
      method.finalize(method.update(state, model))


def importance(a, b, axes):
  """Change times divergence, from float64 and SciPy's relative entropy."""
  p, q = (scipy.special.softmax(x, axis=axes) for x in (b, a))
  divergence = scipy.special.rel_entr(p, q).sum(axis=axes, keepdims=True)
  return np.abs(b - a) * divergence


def fused(a, b, scores):
  low, middle, high = np.quantile(scores, [0.25, 0.5, 0.75], method="lower")
  return np.where(scores >= middle + 1.5 * (high - low), b, a)


class ArceeFusionTest(parameterized.TestCase):
  @parameterized.product(axis=[-1, -2, (0, 1)], scale=[3e-4, 0.02, 1.0])
  def test_against_numpy(self, axis, scale):
    """Also for models so near that float32's logarithms are equal."""
    base, model = make(0, scale=scale), make(1, scale=scale)
    got = merging.arcee_fusion(base, model, axis=axis)
    axes = axis if isinstance(axis, tuple) else (axis,)
    for name, along in (("kernel", axes), ("bias", (0,))):
      a, b = wide(base[name]), wide(model[name])
      want = fused(a, b, importance(a, b, along))
      self.assertGreater((want != a).sum(), 0)
      self.assertGreater((want != b).sum(), 0)
      np.testing.assert_array_equal(got[name], want)

  def test_large_parameters(self):
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(5, 7)).astype(np.float32) * 50 for _ in range(2))
    got = merging.arcee_fusion({"w": jnp.asarray(a)}, {"w": jnp.asarray(b)})
    a, b = wide(a), wide(b)
    np.testing.assert_array_equal(got["w"], fused(a, b, importance(a, b, -1)))

  def test_leaves_without_a_divergence_are_the_models(self):
    base, model = (make(seed, special=True) for seed in (0, 1))
    got = merging.arcee_fusion(base, model)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, base)
    np.testing.assert_array_equal(got["scalar"], model["scalar"])
    np.testing.assert_array_equal(got["one"][0], model["one"][0])
    np.testing.assert_array_equal(got["steps"], 0)

  def test_half_types_keep_their_bits(self):
    base, model = ({"w": make(seed, "bfloat16")["bias"]} for seed in (0, 1))
    got = merging.arcee_fusion(base, model)["w"]
    chosen = (got == base["w"]) | (got == model["w"])
    self.assertTrue(chosen.all())

  def test_gradient_is_the_mask(self):
    base, model = ({"w": make(seed)["kernel"]} for seed in range(2))

    def total(base, model):
      return merging.arcee_fusion(base, model)["w"].sum()

    of_base, of_model = jax.grad(total, argnums=(0, 1))(base, model)
    mask = merging.arcee_fusion(base, model)["w"] == model["w"]
    np.testing.assert_array_equal(of_model["w"], mask)
    np.testing.assert_array_equal(of_base["w"], ~mask)

  def test_bad_input(self):
    model = {"w": jnp.ones((2, 2))}
    with self.assertRaisesRegex(ValueError, "axis must be an int"):
      merging.arcee_fusion(model, model, axis="rows")
    with self.assertRaisesRegex(ValueError, "ranks real parameters only"):
      merging.arcee_fusion({"w": 1j}, {"w": 2j})
    with self.assertRaisesRegex(ValueError, "'w' of model holds NaN"):
      merging.arcee_fusion(model, {"w": jnp.full((2, 2), jnp.nan)})


def stock(base, leaves, axes, clip=False):
  """The formula, pair by pair, along some axes."""
  taus = [leaf - base for leaf in leaves]
  n = len(taus)

  def inner(x, y):
    return (x * y).sum(axis=axes, keepdims=True)

  cosines = [
    inner(x, y) / np.sqrt(inner(x, x) * inner(y, y))
    for i, x in enumerate(taus)
    for y in taus[:i]
  ]
  cosine = sum(cosines) / len(cosines)
  t = n * cosine / (1 + (n - 1) * cosine)
  t = np.clip(t, 0, 1) if clip else t
  return t * sum(leaves) / n + (1 - t) * base


class ModelStockTest(parameterized.TestCase):
  @parameterized.parameters(
    (2, None, False),
    (3, None, True),
    (3, -1, False),
    (3, -2, True),
    (3, (-3, -2), False),
  )
  def test_against_numpy(self, count, axis, clip):
    base, *models = (
      make(seed, scale=0.3, special=clip) for seed in range(count + 1)
    )
    options = {} if axis is None else {"filter_wise": True, "axis": axis}
    got = merging.model_stock(base, models, clip=clip, **options)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, base)
    for name, along in (
      ("kernel", {None: (0, 1), -1: 1, -2: 0}.get(axis, 0)),
      ("bias", 0),
    ):
      want = stock(
        wide(base[name]), [wide(m[name]) for m in models], along, clip
      )
      np.testing.assert_allclose(got[name], want, rtol=1e-4, atol=1e-5)
    if clip:
      np.testing.assert_array_equal(got["zeros"], 0)
    np.testing.assert_array_equal(got["steps"], 0)

  @parameterized.parameters(("float32", 1e-6), ("bfloat16", 1e-2))
  def test_special_cases(self, dtype, tolerance):
    array = functools.partial(jnp.asarray, dtype=dtype)
    base = {"w": array([1.0, 2.0])}
    model = {"w": array([2.0, 4.0])}
    opposite = {"w": array([0.5, 1.0])}
    other = {"w": array([3.0, 1.0])}
    for models, want in (
      # Equal task vectors are kept, orthogonal and opposite ones are noise.
      ([model] * 2, model),
      ([base] * 2, base),
      ([model, base], base),
      ([model, other], base),
      ([model, opposite], base),
    ):
      got = merging.model_stock(base, models)
      chex.assert_trees_all_close(got, want, rtol=tolerance)

  def test_gradients_are_finite(self):
    base = {name: jnp.asarray([1.0, 2.0]) for name in "abcd"}
    steps = jnp.asarray([1.0, -0.5])
    models = [
      {"a": base["a"], "b": base["b"], "c": steps + 1, "d": base["d"] + steps},
      {"a": base["a"], "b": steps, "c": steps, "d": base["d"] - steps},
    ]

    def total(base, models):
      merged = jax.tree.leaves(merging.model_stock(base, models))
      return sum(jnp.sum(leaf * (1 + leaf)) for leaf in merged)

    chex.assert_tree_all_finite(jax.grad(total, (0, 1))(base, models))

  def test_bad_input(self):
    model = {"w": jnp.ones((2, 2))}
    with self.assertRaisesRegex(
      ValueError, "model_stock takes at least 2 models; got 1"
    ):
      merging.model_stock(model, [model])
    with self.assertRaisesRegex(tree.TreeMismatchError, "'w'.*base.*model 1"):
      merging.model_stock(model, [model, {"w": jnp.ones(2)}])
    with self.assertRaisesRegex(ValueError, "axis must be an int"):
      merging.model_stock(model, [model] * 2, axis=None)


class StreamedTest(parameterized.TestCase):
  @parameterized.parameters(
    ("nearswap", 1, (0.5,)), ("arcee_fusion", 1, ()), ("model_stock", 2, ())
  )
  def test_is_the_list_bit_for_bit(self, name, count, options):
    base, *models = map(make, range(count + 1))
    method = getattr(merging, f"{name}_method")(*options)
    state = method.init(base)
    chex.assert_trees_all_equal(method.finalize(state), base)
    for params in models:
      state = method.update(state, params)
    given = models if name == "model_stock" else models[0]
    want = getattr(merging, name)(base, given, *options)
    chex.assert_trees_all_equal(method.finalize(state), want)

  def test_jit(self):
    base, *models = ({"w": make(seed)["kernel"]} for seed in range(3))

    def merge(base, models, t):
      return (
        merging.nearswap(base, models[0], t),
        merging.arcee_fusion(base, models[0]),
        merging.model_stock(base, models),
      )

    chex.assert_trees_all_close(
      jax.jit(merge)(base, models, 0.5), merge(base, models, 0.5), rtol=1e-5
    )

  def test_leaves_that_are_not_selected_are_the_bases(self):
    base, *models = ({"v": x * 1.0, "w": x + 1.0} for x in range(3))
    options = {"select": "w", "dtype": jnp.float16}
    for got in (
      merging.nearswap(base, models[0], 9.0, **options),
      merging.arcee_fusion(base, models[0], **options),
      merging.model_stock(base, models, **options),
    ):
      self.assertEqual(got["v"], base["v"])
      self.assertNotEqual(got["w"], base["w"])
      self.assertEqual(got["v"].dtype, jnp.float16)


if __name__ == "__main__":
  absltest.main()
