"""Tests of what the spectral rules share: leaves as matrices, and all else."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import merging, tree

RULES = ("tsv_merge", "iso_c", "iso_cts")


def params(seed, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
  return {
    "a": {"kernel": draw(6, 5), "bias": draw(5)},
    "scalar": draw(),
    "one": [draw(1), None],
    "row": draw(1, 4),
    "empty": jnp.zeros((0, 2), dtype),
    "none": jnp.zeros((2, 0, 3), dtype),
    "steps": jnp.asarray(seed),
    "mask": jnp.asarray([seed % 2 == 0]),
    "key": jax.random.key(seed),
  }


def stream(name, base, models, **options):
  method = getattr(merging, f"{name}_method")(**options)
  state = method.init(base)
  for one in models:
    state = method.update(state, one)
  return method.finalize(state)


def equal(got, want):
  chex.assert_trees_all_equal_structs(got, want)
  for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    if jnp.issubdtype(jnp.asarray(one).dtype, jax.dtypes.prng_key):
      one, two = jax.random.key_data(one), jax.random.key_data(two)
    np.testing.assert_array_equal(np.asarray(one), np.asarray(two))


def floats(params):
  return tree.partition(params)[0]


class RulesTest(parameterized.TestCase):
  @parameterized.parameters(*RULES)
  def test_all_kinds_of_leaves(self, name):
    merge = getattr(merging, name)
    base, models = params(0), [params(i) for i in (1, 2, 3)]
    copies = jax.tree.map(lambda leaf: leaf + 0, floats((base, models)))
    chex.clear_trace_counter()
    jitted = jax.jit(chex.assert_max_traces(merge, n=1))
    got = merge(base, models)
    for _ in range(2):
      chex.assert_trees_all_close(
        floats(jitted(base, models)), floats(got), rtol=1e-5, atol=1e-5
      )
    equal(floats((base, models)), copies)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, base)
    chex.assert_tree_all_finite(floats(got))
    for leaf in ("steps", "mask", "key"):
      equal(got[leaf], base[leaf])
    # Streamed, leaf by leaf, and in another order.
    equal(stream(name, base, models), got)
    names, leaves = tree.leaf_names(base), jax.tree.leaves(base)
    for i, leaf in enumerate(names):
      one = lambda tree: {leaf: jax.tree.leaves(tree)[i]}  # noqa: B023, E731
      if tree.is_float(leaves[i]):
        equal(merge(one(base), [one(model) for model in models]), one(got))
    chex.assert_trees_all_close(
      floats(merge(base, models[::-1])), floats(got), rtol=1e-4, atol=1e-5
    )
    # No matrix: the mean.
    for leaf in (lambda x: x["a"]["bias"], lambda x: x["scalar"]):
      want = np.mean([np.asarray(leaf(model)) for model in models], axis=0)
      np.testing.assert_allclose(leaf(got), want, rtol=1e-5, atol=1e-6)
    # The base is a fixed point, bit for bit.
    equal(merge(base, [base] * 3), base)
    equal(stream(name, base, []), base)

  @parameterized.parameters(*RULES)
  def test_half_types_are_computed_in_float32(self, name):
    merge = getattr(merging, name)
    halves = {"b": jnp.bfloat16, "h": jnp.float16}
    base, *models = (
      {at: params(i)["a"]["kernel"].astype(halves[at]) for at in halves}
      for i in (0, 1, 2)
    )
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (base, models))
    got, want = merge(base, models), merge(*wide)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, base)
    equal(got, {at: want[at].astype(halves[at]) for at in halves})

  @parameterized.parameters(*RULES)
  def test_many_models_weights_and_selection(self, name):
    merge = getattr(merging, name)
    make = lambda seed: {  # noqa: E731
      "kernel": params(seed)["a"]["kernel"],
      "bias": params(seed)["a"]["bias"],
    }
    base, models = make(0), [make(i) for i in range(1, 20)]
    got = merge(base, models)
    chex.assert_tree_all_finite(got)
    equal(stream(name, base, models), got)
    models = models[:3]
    scaled = [
      jax.tree.map(lambda b, m, w=w: b + w * (m - b), base, model)
      for w, model in zip((2.0, 0.5, -1.0), models, strict=True)
    ]
    got = merge(base, models, weights=[2.0, {"kernel": 0.5, ".*": 0.5}, -1.0])
    chex.assert_trees_all_close(got, merge(base, scaled), rtol=1e-3, atol=1e-4)
    got = merge(base, models, select="bias", scale={"bias": 0.5, ".*": 1.0})
    equal(got["kernel"], base["kernel"])
    want = base["bias"] + 0.5 * (merge(base, models)["bias"] - base["bias"])
    np.testing.assert_allclose(got["bias"], want, rtol=1e-5)

  @parameterized.parameters(*RULES)
  def test_scale_is_differentiated_and_mapped(self, name):
    base, models = ({"w": params(i)["a"]["kernel"]} for i in (0, 1)), None
    base, model = base
    models = [model, jax.tree.map(lambda x: x[::-1], model)]
    merge = lambda scale: getattr(merging, name)(base, models, scale=scale)["w"]  # noqa: E731
    ends = merge(0.0), merge(1.0)
    gradient = jax.grad(lambda scale: merge(scale).sum())(0.5)
    np.testing.assert_allclose(gradient, (ends[1] - ends[0]).sum(), rtol=1e-4)
    mapped = jax.vmap(merge)(jnp.asarray([0.0, 1.0]))
    np.testing.assert_allclose(mapped, jnp.stack(ends), rtol=1e-5, atol=1e-6)

  @parameterized.parameters(*RULES)
  def test_sharded_stays_sharded(self, name):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("x"))
    apart = [
      {"w": np.random.default_rng(i).normal(size=(8, 3))} for i in (0, 1)
    ]
    apart = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), apart)
    base, model = jax.device_put(apart, sharding)
    got = getattr(merging, name)(base, [model, base])["w"]
    self.assertTrue(got.sharding.is_equivalent_to(sharding, 2))
    want = getattr(merging, name)(apart[0], [apart[1], apart[0]])["w"]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)

  @parameterized.parameters(*RULES)
  def test_errors(self, name):
    merge = getattr(merging, name)
    base, models = params(0), [params(1)]
    with self.assertRaisesRegex(ValueError, "models is empty"):
      merge(base, [])
    other = {**base, "row": jnp.ones(2)}
    with self.assertRaisesRegex(tree.TreeMismatchError, "'row'"):
      merge(base, [other])
    with self.assertRaisesRegex(tree.TreeMismatchError, "'row'"):
      stream(name, base, [other])
    bad = {**base, "scalar": jnp.asarray(jnp.nan)}
    with self.assertRaisesRegex(ValueError, "'scalar' of model 0 holds NaN"):
      merge(base, [bad])
    got = merge(base, [bad], allow_nonfinite=True)
    self.assertTrue(np.isnan(got["scalar"]))
    bad = {**base, "row": base["row"].at[0, 1].set(jnp.nan)}
    self.assertTrue(
      np.isnan(merge(base, [bad], allow_nonfinite=True)["row"]).any()
    )
    with self.assertRaisesRegex(ValueError, "got 2 weights for 1 models"):
      merge(base, models, weights=[1.0, 2.0])


class LayoutTest(parameterized.TestCase):
  """Leaves of many axes are what their matrices are."""

  def pair(self, *shape):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(3)]

  def same(self, name, leaf_name, leaves, matrices, **options):
    """Merges as leaves and as matrices, and expects the same."""
    merge = getattr(merging, name)
    wrap = lambda x: {"layer": {leaf_name: x}}  # noqa: E731
    base, *models = map(wrap, leaves)
    got = merge(base, models, **options)["layer"][leaf_name]
    base, *models = map(wrap, matrices)
    want = merge(base, models)["layer"][leaf_name]
    np.testing.assert_allclose(
      got.reshape(want.shape), want, rtol=1e-4, atol=1e-5
    )

  @parameterized.parameters(*RULES)
  def test_flax_kernels(self, name):
    leaves = self.pair(2, 1, 3, 4)
    matrices = [leaf.reshape(6, 4) for leaf in leaves]
    self.same(name, "kernel", leaves, matrices)
    self.same(name, "kernel", leaves, matrices, row_axes=-1)
    self.same(name, "kernel", leaves, matrices, row_axes={"kernel": 3})

  def test_attention(self):
    leaves = self.pair(6, 2, 2)
    base, *models = ({"query": {"kernel": leaf}} for leaf in leaves)
    got = merging.iso_c(base, models)["query"]["kernel"]
    base, *models = ({"w": leaf.reshape(6, 4)} for leaf in leaves)
    want = merging.iso_c(base, models)["w"]
    np.testing.assert_allclose(got.reshape(6, 4), want, rtol=1e-5, atol=1e-6)
    # Its bias [heads, head_dim] is no matrix.
    base, *models = ({"query": {"bias": leaf[0]}} for leaf in leaves)
    got = merging.iso_c(base, models)["query"]["bias"]
    want = (models[0]["query"]["bias"] + models[1]["query"]["bias"]) / 2
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)

  def test_other_layouts(self):
    leaves = self.pair(4, 3, 2, 1)
    matrices = [leaf.reshape(4, 6) for leaf in leaves]
    self.same("iso_c", "weight", leaves, matrices, row_axes=1)
    base, *models = ({"weight": leaf} for leaf in leaves)
    got = merging.tsv_merge(base, models, row_axes=0)["weight"]
    np.testing.assert_allclose(
      got, (leaves[1] + leaves[2]) / 2, rtol=1e-5, atol=1e-6
    )

  @parameterized.parameters(*RULES)
  def test_stacked_layers(self, name):
    merge = getattr(merging, name)
    leaves = self.pair(3, 6, 4)
    wrap = lambda x: {"kernel": x, "scale": x[..., 0]}  # noqa: E731
    base, *models = map(wrap, leaves)
    got = merge(base, models, stack_axes={"kernel|scale": 1})
    for i in range(3):
      base, *models = ({"kernel": leaf[i]} for leaf in leaves)
      want = merge(base, models)["kernel"]
      np.testing.assert_allclose(got["kernel"][i], want, rtol=1e-4, atol=1e-5)
    # [layers, features] is no matrix.
    mean = (leaves[1][..., 0] + leaves[2][..., 0]) / 2
    np.testing.assert_allclose(got["scale"], mean, rtol=1e-5, atol=1e-6)

  @parameterized.parameters(
    ({"row_axes": 2}, r"row_axes is 2 for leaf 'w' of shape \(2, 3\).*-1 to 1"),
    ({"row_axes": -2}, "row_axes is -2 for leaf 'w'"),
    ({"row_axes": 0.5}, "known integer, a number of axes; got 0.5"),
    ({"row_axes": {"v": 1}}, "row_axes has no value for leaf 'w'"),
    ({"stack_axes": -1}, "stack_axes is -1 for leaf 'w'"),
  )
  def test_errors(self, options, message):
    base = {"w": jnp.zeros((2, 3))}
    for name in RULES:
      with self.assertRaisesRegex(ValueError, message):
        getattr(merging, name)(base, [base], **options)
      with self.assertRaisesRegex(ValueError, message):
        stream(name, base, [base], **options)

  def test_traced_layout(self):
    base = {"w": jnp.zeros((2, 3))}
    with self.assertRaisesRegex(ValueError, "must be a known integer"):
      jax.jit(lambda rows: merging.iso_c(base, [base], row_axes=rows))(1)


if __name__ == "__main__":
  absltest.main()
