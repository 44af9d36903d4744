"""The rules that every merge method keeps, in one table."""

from __future__ import annotations

import functools
from typing import NamedTuple

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

from jaxmerge import merging, tree

KEY = jax.random.key(7)


def _list_of(fn, **options):
  return lambda base, models, **more: fn(base, models, **options, **more)


# Name: the function of a list, the same method streamed, whether leaves are
# merged apart, whether the order of the models is of no account.
METHODS = {
  "average": (
    lambda base, models, **more: (
      merging.average(models, **more)
      if "weights" not in more
      else merging.weighted_average(models, **more)
    ),
    merging.average_method,
    True,
    True,
  ),
  "ema": (
    _list_of(merging.ema, decay=0.7),
    functools.partial(merging.ema_method, 0.7),
    True,
    False,
  ),
}
for _name, _options, _leafwise, _symmetric in (
  ("task_arithmetic", {"scale": 0.3}, True, True),
  ("task_arithmetic", {"normalize": True}, True, True),
  ("magmax", {"scale": 0.5}, True, True),
  ("max_abs", {"scale": 1.0}, True, True),
  ("random_mix", {"key": KEY}, True, False),
  ("ties", {"density": 0.4}, False, True),
  ("ties", {"density": 0.4, "scope": "leaf"}, True, True),
  ("ties", {"elect": "count", "merge": "sum"}, False, True),
  ("ties", {"merge": "max", "zero_sign": "positive"}, False, True),
  ("dare", {"key": KEY}, True, False),
  ("dare", {"key": KEY, "variant": "ties", "rescale": "l1"}, True, False),
  ("della", {"key": KEY}, True, False),
  ("della", {"key": KEY, "variant": "linear"}, True, False),
  ("breadcrumbs", {"density": 0.5, "gamma": 0.2}, True, True),
  ("breadcrumbs", {"variant": "ties", "normalize": True}, True, True),
):
  _label = "_".join(
    [_name, *(str(value) for key, value in _options.items() if key != "key")]
  )
  METHODS[_label] = (
    _list_of(getattr(merging, _name), **_options),
    functools.partial(getattr(merging, f"{_name}_method"), **_options),
    _leafwise,
    _symmetric,
  )


def _params(seed, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  return {
    "a": {
      "kernel": jnp.asarray(rng.normal(size=(6, 5)), dtype),
      "bias": jnp.asarray(rng.normal(size=5), dtype),
    },
    "scalar": jnp.asarray(rng.normal(), dtype),
    "one": [jnp.asarray(rng.normal(size=1), dtype), None],
    "empty": jnp.zeros((0, 2), dtype),
    "steps": jnp.asarray(seed),
    "mask": jnp.asarray([seed % 2 == 0]),
    "key": jax.random.key(seed),
  }


def _models(count=3, dtype=jnp.float32):
  return [_params(seed, dtype) for seed in range(1, count + 1)]


def _bits_equal(got, want):
  chex.assert_trees_all_equal_structs(got, want)
  for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    if jnp.issubdtype(jnp.asarray(one).dtype, jax.dtypes.prng_key):
      one, two = jax.random.key_data(one), jax.random.key_data(two)
    np.testing.assert_array_equal(np.asarray(one), np.asarray(two))


def _stream(method, base, models):
  state = method.init(base)
  for params in models:
    state = method.update(state, params)
  return method.finalize(state)


class Pair(NamedTuple):
  left: jax.Array
  right: jax.Array


@flax.struct.dataclass
class Box:
  w: jax.Array


ALL = [(name,) for name in METHODS]


class ConformanceTest(parameterized.TestCase):
  @parameterized.product(
    name=list(METHODS), dtype=["float32", "bfloat16", "float16"]
  )
  def test_keeps_everything(self, name, dtype):
    merge, _, _, _ = METHODS[name]
    base, models = _params(0, dtype), _models(dtype=dtype)
    copies = jax.tree.map(lambda leaf: leaf, (base, models))
    got = merge(base, models)
    _bits_equal((base, models), copies)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, base)
    source = models[0] if name == "average" else base
    for leaf in ("steps", "mask", "key"):
      _bits_equal(got[leaf], source[leaf])
    floats, _ = tree.partition(got)
    chex.assert_tree_all_finite(floats)

  @parameterized.parameters(*ALL)
  def test_jit_equals_no_jit(self, name):
    merge, _, _, _ = METHODS[name]
    base, models = _params(0), _models()
    chex.clear_trace_counter()
    fn = jax.jit(chex.assert_max_traces(merge, n=1))
    for _ in range(2):
      got, _ = tree.partition(fn(base, models))
    want, _ = tree.partition(merge(base, models))
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)

  @parameterized.parameters(*ALL)
  def test_streamed_is_the_list_bit_for_bit(self, name):
    merge, make, _, _ = METHODS[name]
    base, models = _params(0), _models()
    start = models[0] if name == "average" else base
    _bits_equal(_stream(make(), start, models), merge(base, models))

  @parameterized.parameters(*ALL)
  def test_leaf_by_leaf_is_the_whole_bit_for_bit(self, name):
    merge, _, leafwise, _ = METHODS[name]
    if not leafwise:
      self.skipTest("The method looks at the whole vector.")
    base, models = _params(0), _models()
    whole = merge(base, models)
    names = tree.leaf_names(base)
    for place, leaf in enumerate(names):
      one = lambda params: {leaf: jax.tree.leaves(params)[place]}  # noqa: B023, E731
      _bits_equal(
        merge(one(base), [one(params) for params in models]), one(whole)
      )

  @parameterized.parameters(*ALL)
  def test_base_is_a_fixed_point(self, name):
    merge, make, _, _ = METHODS[name]
    base = _params(0)
    got, _ = tree.partition(merge(base, [base] * 3))
    chex.assert_trees_all_close(got, tree.partition(base)[0], rtol=1e-6)
    _bits_equal(_stream(make(), base, []), base)

  @parameterized.parameters(*ALL)
  def test_order_is_of_no_account(self, name):
    merge, _, _, symmetric = METHODS[name]
    if not symmetric:
      self.skipTest("The order of the models counts.")
    base, models = _params(0), _models()
    source = lambda merged: tree.partition(merged)[0]  # noqa: E731
    chex.assert_trees_all_close(
      source(merge(base, models[::-1])),
      source(merge(base, models)),
      rtol=1e-5,
      atol=1e-6,
    )

  @parameterized.parameters(*ALL)
  def test_many_models(self, name):
    """More than one kernel takes; the same bits as one at a time."""
    merge, make, _, _ = METHODS[name]
    base = {"w": jnp.linspace(-1, 1, 7)}
    models = [
      {"w": jax.random.normal(jax.random.key(seed), (7,))} for seed in range(19)
    ]
    start = models[0] if name == "average" else base
    _bits_equal(_stream(make(), start, models), merge(base, models))

  @parameterized.parameters(*ALL)
  def test_weights_of_leaves(self, name):
    merge, _, _, _ = METHODS[name]
    base, models = _params(0), _models(2)
    by_name = [{"kernel": 2.0, ".*": 1.0}, 3.0]
    by_prefix = [
      {
        "a": {"kernel": 2.0, "bias": 1.0},
        **dict.fromkeys(
          ("scalar", "one", "empty", "steps", "mask", "key"), 1.0
        ),
      },
      3.0,
    ]
    _bits_equal(
      merge(base, models, weights=by_name),
      merge(base, models, weights=by_prefix),
    )

  @parameterized.parameters(*ALL)
  def test_selected_leaves_and_dtype(self, name):
    merge, make, _, _ = METHODS[name]
    base, models = _params(0), _models()
    start = models[0] if name == "average" else base
    options = {"select": "kernel$", "dtype": jnp.float16}
    got = merge(base, models, **options)
    _bits_equal(_stream(make(**options), start, models), got)
    np.testing.assert_array_equal(
      got["a"]["bias"], start["a"]["bias"].astype(jnp.float16)
    )
    for leaf in jax.tree.leaves(tree.partition(got)[0]):
      self.assertEqual(leaf.dtype, jnp.float16)
    unmerged = np.asarray(start["a"]["kernel"], np.float16)
    self.assertFalse((np.asarray(got["a"]["kernel"]) == unmerged).all())

  @parameterized.parameters(*ALL)
  def test_containers(self, name):
    merge, _, _, _ = METHODS[name]
    want = None
    values = [jnp.asarray([0.5, -1.0, 2.0]) * i for i in range(3)]
    for wrap in (
      lambda x: {"w": x},
      lambda x: Box(w=x),
      lambda x: nnx.State({"w": nnx.Param(x)}),
      lambda x: Pair(x, x),
    ):
      base, *models = map(wrap, values)
      got = merge(base, models)
      self.assertEqual(jax.tree.structure(got), jax.tree.structure(base))
      # All but the pair name their leaf alike, so that keys are equal.
      if not isinstance(base, Pair):
        leaf = jax.tree.leaves(got)[0]
        want = leaf if want is None else want
        np.testing.assert_array_equal(leaf, want)

  @parameterized.parameters(*ALL)
  def test_sharded_stays_sharded(self, name):
    merge, _, _, _ = METHODS[name]
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("x"))
    base, *models = (
      {"w": jax.device_put(jnp.arange(8.0) * i, sharding)} for i in range(3)
    )
    got = merge(base, models)
    self.assertTrue(got["w"].sharding.is_equivalent_to(sharding, 1))

  @parameterized.parameters("task_arithmetic", "magmax", "ties", "dare")
  def test_scales_map_and_differentiate(self, name):
    options = {"key": KEY} if name == "dare" else {}
    base, models = {"w": jnp.arange(4.0)}, [{"w": jnp.ones(4) * 3}] * 2

    def merge(scale):
      fn = getattr(merging, name)
      return fn(base, models, scale=scale, **options)["w"]

    scales = jnp.asarray([0.0, 0.5, 1.0])
    together = jax.vmap(merge)(scales)
    apart = jnp.stack([merge(scale) for scale in scales])
    np.testing.assert_allclose(together, apart, rtol=1e-6)
    gradient = jax.grad(lambda scale: merge(scale).sum())(0.5)
    np.testing.assert_allclose(gradient, (apart[2] - apart[0]).sum(), rtol=1e-5)

  @parameterized.parameters(*ALL)
  def test_errors(self, name):
    merge, make, _, _ = METHODS[name]
    base, models = _params(0), _models()
    if name != "average":
      with self.assertRaisesRegex(ValueError, "models is empty"):
        merge(base, [])
    other = {**models[1], "scalar": jnp.ones(2)}
    with self.assertRaisesRegex(tree.TreeMismatchError, "'scalar'"):
      merge(base, [models[0], other])
    with self.assertRaisesRegex(tree.TreeMismatchError, "'scalar'"):
      _stream(make(), base, [other])
    with self.assertRaisesRegex(ValueError, "got 2 weights for 3 models"):
      merge(base, models, weights=[1.0, 2.0])
    with self.assertRaisesRegex(ValueError, "no value for leaf"):
      merge(base, models, weights=[{"^nothing$": 1.0}] * 3)
    bad = {**models[1], "scalar": jnp.asarray(jnp.nan)}
    with self.assertRaisesRegex(ValueError, "'scalar' of model 1 holds NaN"):
      merge(base, [models[0], bad])
    with self.assertRaisesRegex(ValueError, "'scalar' of params holds NaN"):
      _stream(make(), base, [bad])
    merge(base, [models[0], bad], allow_nonfinite=True)
    with self.assertRaisesRegex(ValueError, "no leaf name matches"):
      merge(base, models, select="^nothing$")


class OptionsTest(parameterized.TestCase):
  def test_traced_scale_with_known_models(self):
    base, models = {"w": jnp.zeros(3)}, [{"w": jnp.ones(3)}] * 2
    fn = jax.jit(lambda scale: merging.magmax(base, models, scale=scale)["w"])
    np.testing.assert_array_equal(fn(0.5), [0.5, 0.5, 0.5])

  @parameterized.parameters(
    ("ties", {"density": 0.0}, r"density must lie in \(0, 1\]; got 0"),
    ("ties", {"density": 1.5}, "density must lie"),
    ("ties", {"density": [0.5, np.nan]}, "density must lie"),
    ("ties", {"scope": "tensor"}, "scope must be one of 'vector', 'leaf'"),
    ("ties", {"elect": "all"}, "elect must be one of"),
    ("ties", {"merge": "median"}, "merge must be one of"),
    ("ties", {"zero_sign": "up"}, "zero_sign must be one of"),
    ("ties", {"scale": np.nan}, "scale is nan"),
    ("dare", {"key": KEY, "density": -1.0}, "density must lie"),
    ("dare", {"key": KEY, "variant": "sum"}, "variant must be one of"),
    ("dare", {"key": KEY, "rescale": "l3"}, "rescale must be one of"),
    ("della", {"key": KEY, "epsilon": 1.2}, "epsilon must lie"),
    ("della", {"key": KEY, "density": 0.1}, r"keeps them in \(0, 1\]"),
    ("breadcrumbs", {"gamma": -0.1}, "gamma must lie"),
    ("ema", {"decay": 1.1}, "decay must lie"),
    ("magmax", {"scale": {"(": 1.0}}, "not a valid regular expression"),
    ("magmax", {"scale": {"w": jnp.ones(2)}}, "must be a scalar"),
  )
  def test_bad(self, name, options, message):
    base, models = {"w": jnp.zeros(3)}, [{"w": jnp.ones(3)}] * 2
    with self.assertRaisesRegex(ValueError, message):
      getattr(merging, name)(base, models, **options)


if __name__ == "__main__":
  absltest.main()
