"""The rules that every merge method keeps, in one table."""

from __future__ import annotations

from typing import NamedTuple
from unittest import mock

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

from jaxmerge import merging, tree
from jaxmerge.merging import _leafwise

KEY = jax.random.key(7)


class Case(NamedTuple):
  """A method with options, and what is expected of it.

  Attributes:
    method: The method.
    symmetric: Whether the order of the models is of no account.
    fixed: Whether equal models give that model.
  """

  method: merging.RegisteredMethod
  symmetric: bool = True
  fixed: bool = False

  @property
  def num_models(self) -> int:
    return min(3, self.method.info.max_models or 3)


def _cases():
  """The cases by a label."""
  found = {}
  for name, symmetric, fixed, options in (
    ("arcee_fusion", True, False, {}),
    ("average", True, True, {}),
    ("breadcrumbs", True, False, {"density": 0.5, "gamma": 0.2}),
    ("breadcrumbs", True, False, {"variant": "ties", "normalize": True}),
    ("consensus", True, False, {"tall_lambda": 0.6}),
    ("consensus", True, False, {"multi_task": "ties", "min_tasks": 1}),
    ("dare", False, False, {}),
    ("dare", False, False, {"variant": "ties", "rescale": "l1"}),
    ("della", False, False, {}),
    ("della", False, False, {"variant": "linear"}),
    ("ema", False, False, {"decay": 0.7}),
    ("emr_unified", True, True, {}),
    ("fisher_average", True, True, {}),
    ("fisher_average", True, True, {"normalize": "vector"}),
    ("iso_c", True, False, {"scale": 0.5}),
    ("iso_cts", True, False, {"common_fraction": 0.6}),
    ("karcher_mean", True, True, {}),
    ("magmax", True, False, {"scale": 0.5}),
    ("max_abs", True, True, {"scale": 1.0}),
    ("model_stock", True, True, {}),
    ("multislerp", True, True, {}),
    ("multislerp", True, True, {"task_vectors": True}),
    ("nearswap", True, False, {"t": 0.1}),
    ("nuslerp", True, True, {}),
    ("nuslerp", True, True, {"task_vectors": True, "flatten": False}),
    ("random_mix", False, True, {}),
    ("regmean", True, True, {}),
    ("sce", True, True, {}),
    ("sce", True, False, {"select_topk": 0.4}),
    ("slerp", True, True, {}),
    ("task_arithmetic", True, False, {"scale": 0.3}),
    ("task_arithmetic", True, True, {"normalize": True}),
    ("ties", True, False, {"density": 0.4}),
    ("ties", True, True, {"density": 1.0, "scope": "leaf"}),
    ("ties", True, False, {"elect": "count", "merge": "sum"}),
    ("ties", True, False, {"merge": "max", "zero_sign": "positive"}),
    ("tsv_merge", True, False, {}),
    ("tunable_magmax", False, True, {"scale": 1.0}),
    ("tunable_magmax", False, False, {"preferences": (0.5, 0.2, 0.3)}),
    ("weighted_average", True, True, {}),
  ):
    label = "_".join([name, *(str(value) for value in options.values())])
    found[label] = Case(merging.get(name, **options), symmetric, fixed)
  return found


CASES = _cases()
ALL = [(label,) for label in CASES]


def _params(seed, dtype=jnp.float32, edges=False):
  """All kinds of leaves; every shape costs a compilation, so edges are rare."""
  rng = np.random.default_rng(seed)
  params = {
    "a": {
      "kernel": jnp.asarray(rng.normal(size=(6, 5)), dtype),
      "bias": jnp.asarray(rng.normal(size=5), dtype),
    },
    "steps": jnp.asarray(seed),
    "mask": jnp.asarray([seed % 2 == 0]),
    "key": jax.random.key(seed),
    "none": [None],
  }
  if edges:
    params |= {
      "scalar": jnp.asarray(rng.normal(), dtype),
      "one": [jnp.asarray(rng.normal(size=1), dtype), None],
      "empty": jnp.zeros((0, 2), dtype),
    }
  return params


def _models(count=3, dtype=jnp.float32, edges=False):
  return [_params(seed, dtype, edges) for seed in range(1, count + 1)]


def _statistics(case, params):
  """What the method needs to know of a model's data, made of its numbers."""
  if case.method.info.statistics == "diagonal_fisher":
    return jax.tree.map(
      lambda leaf: (
        jnp.nan_to_num(jnp.square(leaf)) if tree.is_float(leaf) else leaf
      ),
      params,
    )
  if case.method.info.statistics is None:
    return None
  kernels = {
    name: leaf
    for name, leaf in zip(
      tree.leaf_names(params), jax.tree.leaves(params), strict=True
    )
    if tree.is_float(leaf) and jnp.ndim(leaf) == 2 and jnp.size(leaf)
  }
  return {
    name: jnp.float32(0.1) * jnp.eye(len(leaf))
    + (leaf @ leaf.T).astype(jnp.float32)
    for name, leaf in kernels.items()
  }


def _give(case, models, **given):
  """What else the method needs."""
  info = case.method.info
  if info.needs_weights:
    given.setdefault("weights", [1.0] * len(models))
  if info.statistics is not None:
    given["statistics"] = [_statistics(case, params) for params in models]
  return {**given, "key": KEY} if info.needs_key else given


def _merge(case, base, models, **options):
  """Merges a list."""
  given = {name: options.pop(name) for name in ("weights",) if name in options}
  method = case.method
  if options:
    method = merging.get(method.info.name, **method.options, **options)
  return method(base, models, **_give(case, models, **given))


def _start(case, base, models):
  """What a triple starts from, and takes what is not merged from."""
  return base if case.method.info.needs_base else models[0]


def _weights(case, count):
  """Weights that are not equal, and no power of two, where there are some."""
  if not case.method.info.takes_weights:
    return {}
  return {"weights": [0.5 + 0.3 * i for i in range(count)]}


def _stream(case, base, models, *, weights=None, donate=False, **options):
  method = merging.get(
    case.method.info.name, **case.method.options, **options
  ).method(KEY)
  state = method.init(_start(case, base, models))
  for params, weight in zip(
    models, weights or [1.0] * len(models), strict=True
  ):
    known = _statistics(case, params)
    state = method.update(
      state, params, weight, statistics=known, donate=donate
    )
  return method.finalize(state)


def _floats(params):
  return tree.partition(params)[0]


def _bits_equal(got, want):
  chex.assert_trees_all_equal_structs(got, want)
  for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    if jnp.issubdtype(jnp.asarray(one).dtype, jax.dtypes.prng_key):
      one, two = jax.random.key_data(one), jax.random.key_data(two)
    np.testing.assert_array_equal(np.asarray(one), np.asarray(two))


class Pair(NamedTuple):
  left: jax.Array
  right: jax.Array


@flax.struct.dataclass
class Box:
  w: jax.Array


class ConformanceTest(parameterized.TestCase):
  def test_all_methods_are_here(self):
    # What passthrough gives has another structure.
    self.assertEqual(
      {"passthrough", *(case.method.info.name for case in CASES.values())},
      set(merging.names()),
    )

  @parameterized.product(
    label=list(CASES), dtype=["float32", "bfloat16", "float16"]
  )
  def test_keeps_everything(self, label, dtype):
    """Inputs untouched, all but floats passed on, finite, one trace."""
    case = CASES[label]
    # Small leaves are as small in any dtype.
    edges = dtype == "float32"
    base = _params(0, dtype, edges)
    models = _models(case.num_models, dtype, edges)
    copies = jax.tree.map(jnp.copy, (base, models))
    merge = lambda *trees: _merge(case, *trees)  # noqa: E731
    traced = jax.jit(chex.assert_max_traces(merge, n=1))
    chex.clear_trace_counter()
    got = merge(base, models)
    for _ in range(2):
      jitted = traced(base, models)
    _bits_equal((base, models), copies)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, base)
    chex.assert_trees_all_equal_shapes_and_dtypes(jitted, base)
    source = _start(case, base, models)
    for leaf in ("steps", "mask", "key"):
      _bits_equal(got[leaf], source[leaf])
      _bits_equal(jitted[leaf], source[leaf])
    chex.assert_tree_all_finite(_floats(got))
    # In half precision the roundings before the last may fall either way.
    error = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}[dtype]
    wide = lambda params: jax.tree.map(  # noqa: E731
      lambda leaf: leaf.astype(jnp.float32), _floats(params)
    )
    chex.assert_trees_all_close(
      wide(jitted), wide(got), rtol=error, atol=error / 10
    )

  @parameterized.parameters(*ALL)
  def test_streamed_and_leaf_by_leaf_is_the_list_bit_for_bit(self, label):
    case = CASES[label]
    base = _params(0, edges=True)
    models = _models(case.num_models, edges=True)
    weights = _weights(case, case.num_models)
    want = _merge(case, base, models, **weights)
    _bits_equal(_stream(case, base, models, **weights), want)
    copies = jax.tree.map(jnp.copy, (base, models))
    _bits_equal(_stream(case, base, models, donate=True, **weights), want)
    _bits_equal((base, models), copies)
    given = _give(case, models, **weights)
    if case.method.options.get("normalize") == "vector":
      with self.assertRaisesRegex(ValueError, "norm of the whole Fisher"):
        dict(merging.merge_leaves(case.method, base, models, **given))
      return
    got = dict(merging.merge_leaves(case.method, base, models, **given))
    names = tree.leaf_names(want)
    self.assertEqual(list(got), names)
    _bits_equal(got, dict(zip(names, jax.tree.leaves(want), strict=True)))

  @parameterized.parameters(*ALL)
  def test_fixed_points(self, label):
    case = CASES[label]
    base, (model,) = _params(0), _models(1)
    count = case.num_models
    got = _merge(case, base, [base] * count)
    chex.assert_trees_all_close(
      _floats(got), _floats(base), rtol=1e-6, atol=1e-7
    )
    if case.fixed:
      got = _merge(case, base, [model] * count)
      chex.assert_trees_all_close(
        _floats(got), _floats(model), rtol=2e-6, atol=1e-6
      )
    if case.method.info.streams and case.method.info.needs_base:
      _bits_equal(_stream(case, base, []), base)

  @parameterized.parameters(
    *((label,) for label, case in CASES.items() if case.symmetric)
  )
  def test_order_is_of_no_account(self, label):
    case = CASES[label]
    base, models = _params(0), _models(case.num_models)
    # Singular vectors are less exact than sums.
    is_spectral = case.method.info.name in ("iso_c", "iso_cts", "tsv_merge")
    error = 1e-4 if is_spectral else 1e-5
    chex.assert_trees_all_close(
      _floats(_merge(case, base, models[::-1])),
      _floats(_merge(case, base, models)),
      rtol=error,
      atol=error / 10,
    )

  @parameterized.parameters(
    *((label,) for label, case in CASES.items() if case.method.info.streams)
  )
  def test_many_models(self, label):
    """More than one kernel takes; the same bits as one at a time."""
    case = CASES[label]
    base = {"w": jnp.linspace(-1, 1, 7)}
    models = [
      {"w": jax.random.normal(jax.random.key(seed), (7,))} for seed in range(7)
    ]
    with mock.patch.object(_leafwise, "_CHUNK", 3):
      got = _merge(case, base, models)
    _bits_equal(got, _stream(case, base, models))

  @parameterized.parameters(
    *(
      (label,)
      for label, case in CASES.items()
      if case.method.info.takes_weights
    )
  )
  def test_weights_of_leaves(self, label):
    case = CASES[label]
    base, models = _params(0), _models(2)
    by_name = [{"kernel": 2.0, ".*": 1.0}, 3.0]
    by_prefix = [
      {
        "a": {"kernel": 2.0, "bias": 1.0},
        **dict.fromkeys(("steps", "mask", "key", "none"), 1.0),
      },
      3.0,
    ]
    _bits_equal(
      _merge(case, base, models, weights=by_name),
      _merge(case, base, models, weights=by_prefix),
    )

  @parameterized.parameters(*ALL)
  def test_selected_leaves_and_dtype(self, label):
    case = CASES[label]
    base, models = _params(0), _models(case.num_models)
    start = _start(case, base, models)
    options = {"select": "kernel$", "dtype": jnp.float16}
    got = _merge(case, base, models, **options)
    _bits_equal(_stream(case, base, models, **options), got)
    np.testing.assert_array_equal(
      got["a"]["bias"], start["a"]["bias"].astype(jnp.float16)
    )
    for leaf in jax.tree.leaves(_floats(got)):
      self.assertEqual(leaf.dtype, jnp.float16)
    unmerged = np.asarray(start["a"]["kernel"], np.float16)
    self.assertFalse((np.asarray(got["a"]["kernel"]) == unmerged).all())

  @parameterized.parameters(*ALL)
  def test_containers(self, label):
    case = CASES[label]
    want = None
    values = [
      jnp.asarray([0.5, -1.0, 2.0]) * i for i in range(case.num_models + 1)
    ]
    for wrap in (
      lambda x: {"w": x},
      lambda x: Box(w=x),
      lambda x: nnx.State({"w": nnx.Param(x)}),
      lambda x: Pair(x, x),
    ):
      base, *models = map(wrap, values)
      got = _merge(case, base, models)
      self.assertEqual(jax.tree.structure(got), jax.tree.structure(base))
      # All but the pair name their leaf alike, so that keys are equal.
      if not isinstance(base, Pair):
        leaf = jax.tree.leaves(got)[0]
        want = leaf if want is None else want
        np.testing.assert_array_equal(leaf, want)

  @parameterized.parameters(*ALL)
  def test_sharded_stays_sharded(self, label):
    case = CASES[label]
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("x"))
    base, *models = (
      {"w": jax.device_put(jnp.arange(8.0) * i, sharding)}
      for i in range(1, case.num_models + 2)
    )
    got = _merge(case, base, models)
    self.assertTrue(got["w"].sharding.is_equivalent_to(sharding, 1))

  @parameterized.parameters(
    *(
      (label,)
      for label, case in CASES.items()
      if "scale" in case.method.info.options
    )
  )
  def test_scales_map_and_differentiate(self, label):
    case = CASES[label]
    base = {"w": jnp.arange(4.0)}
    models = [{"w": jnp.arange(4.0) + i} for i in (3.0, 2.0, -0.5)]
    options = {**case.method.options}
    options.pop("scale", None)

    def merge(scale):
      method = merging.get(case.method.info.name, **options, scale=scale)
      return method(base, models, **_give(case, models))["w"]

    scales = jnp.asarray([0.0, 0.5, 1.0])
    together = jax.vmap(merge)(scales)
    apart = jnp.stack([merge(scale) for scale in scales])
    np.testing.assert_allclose(together, apart, rtol=1e-6)
    gradient = jax.grad(lambda scale: merge(scale).sum())(0.5)
    np.testing.assert_allclose(gradient, (apart[2] - apart[0]).sum(), rtol=1e-5)

  @parameterized.parameters(*ALL)
  def test_errors(self, label):
    case = CASES[label]
    info = case.method.info
    count = case.num_models
    base, models = _params(0), _models(count)
    last, name = models[-1], f"model {count - 1}"
    if info.max_models == 1:
      name = "model"
    with self.assertRaisesRegex(ValueError, "models is empty"):
      _merge(case, base, [])
    other = {**last, "a": {**last["a"], "bias": jnp.ones(2)}}
    with self.assertRaisesRegex(tree.TreeMismatchError, "'a/bias'"):
      _merge(case, base, [*models[:-1], other])
    with self.assertRaisesRegex(tree.TreeMismatchError, "'a/bias'"):
      _stream(case, base, [*models[:-1], other])
    bad = {**last, "a": {**last["a"], "bias": jnp.full(5, jnp.nan)}}
    if count > 1:
      with self.assertRaisesRegex(ValueError, f"'a/bias' of {name} holds NaN"):
        _merge(case, base, [*models[:-1], bad])
    with self.assertRaisesRegex(ValueError, "'a/bias' of .* holds NaN"):
      _stream(case, base, [*models[:-1], bad])
    _merge(case, base, [*models[:-1], bad], allow_nonfinite=True)
    with self.assertRaisesRegex(ValueError, "no leaf name matches"):
      _merge(case, base, models, select="^nothing$")
    if info.max_models is not None:
      with self.assertRaisesRegex(ValueError, f"{info.name} takes"):
        _merge(case, base, [*models, last])
    if info.takes_weights:
      with self.assertRaisesRegex(ValueError, "weights for . models"):
        _merge(case, base, models, weights=[1.0] * (count + 1))
      with self.assertRaisesRegex(ValueError, "no value for leaf"):
        _merge(case, base, models, weights=[{"^nothing$": 1.0}] * count)


class OptionsTest(parameterized.TestCase):
  def test_traced_scale_with_known_models(self):
    base, models = {"w": jnp.zeros(3)}, [{"w": jnp.ones(3)}] * 2
    fn = jax.jit(lambda scale: merging.magmax(base, models, scale=scale)["w"])
    np.testing.assert_array_equal(fn(0.5), [0.5, 0.5, 0.5])

  def test_thousand_copies(self):
    """Half types are accumulated in float32: the average is exact."""
    model = {"w": jnp.asarray([1.0, 0.1, -3e35, 1e-30], jnp.bfloat16)}
    got = merging.average([model] * 1000)
    np.testing.assert_array_equal(got["w"], model["w"])

  @parameterized.parameters(
    ("ties", {"density": 0.0}, r"density must lie in \(0, 1\]; got 0"),
    ("ties", {"density": 1.5}, "density must lie"),
    ("ties", {"density": [0.5, np.nan]}, "density must lie"),
    ("ties", {"density": {".*": 0.5}}, "trim leaf by leaf with scope='leaf'"),
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
    ("magmax", {"scale": (0.5, 1.0)}, "scale must be one value for all models"),
    ("sce", {"scale": [0.5, 1.0]}, "scale must be one value for all models"),
    ("magmax", {"scale": "0.5"}, "scale must be a number for leaf 'w'; got '0"),
    ("magmax", {"dtype": jnp.int32}, "dtype must be floating-point; got int32"),
    ("ties", {"density": [0.5] * 3}, "got 3 values of density for 2 models"),
    ("dare", {"key": 0}, "key must be one PRNG key.*; got 0"),
    ("dare", {"key": jax.random.split(KEY)}, r"got key<fry> of shape \(2,\)"),
  )
  def test_bad(self, name, options, message):
    base, models = {"w": jnp.zeros(3)}, [{"w": jnp.ones(3)}] * 2
    with self.assertRaisesRegex(ValueError, message):
      getattr(merging, name)(base, models, **options)

  def test_too_few_values_for_a_stream(self):
    method = merging.ties_method(density=[0.2, 0.5])
    state = method.init({"w": jnp.zeros(3)})
    for _ in range(2):
      state = method.update(state, {"w": jnp.ones(3)})
    with self.assertRaisesRegex(
      ValueError, "got 2 values of density, but this is model 3"
    ):
      method.update(state, {"w": jnp.ones(3)})


if __name__ == "__main__":
  absltest.main()
