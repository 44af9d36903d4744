"""Tests of the alignment and the fusion of MLPs."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import linen as nn
from flax import nnx
from scipy import optimize

from jaxmerge import alignment, tree

WIDTHS = (12, 16)
INPUTS, CLASSES = 7, 4


class Mlp(nn.Module):
  use_bias: bool = True

  @nn.compact
  def __call__(self, x):
    for width in WIDTHS:
      x = nn.relu(
        nn.Dense(width, self.use_bias, bias_init=nn.initializers.normal(1.0))(x)
      )
    return nn.Dense(CLASSES, self.use_bias)(x)


def init(seed, use_bias=True):
  return Mlp(use_bias).init(jax.random.key(seed), jnp.ones((1, INPUTS)))


def forward(params, x):
  """A forward pass in float64, so that only the library rounds."""
  params = params.get("params", params)
  for i in range(len(WIDTHS) + 1):
    layer = params[f"Dense_{i}"]
    x = x @ np.asarray(layer["kernel"], np.float64)
    x = x + np.asarray(layer.get("bias", 0.0), np.float64)
    if i < len(WIDTHS):
      x = np.maximum(x, 0)
  return x


def random_permutations(seed):
  rng = np.random.default_rng(seed)
  return [rng.permutation(width) for width in WIDTHS]


def add_noise(params, seed, size):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: x + jnp.asarray(size * rng.normal(size=x.shape), x.dtype), params
  )


INPUT = np.random.default_rng(9).normal(size=(20, INPUTS))


class PermuteMlpTest(parameterized.TestCase):
  @parameterized.parameters(True, False)
  def test_function_is_preserved(self, use_bias):
    params = init(0, use_bias)
    moved = alignment.permute_mlp(params, random_permutations(1))
    chex.assert_trees_all_equal_shapes_and_dtypes(moved, params)
    self.assertFalse(
      np.array_equal(
        moved["params"]["Dense_0"]["kernel"],
        params["params"]["Dense_0"]["kernel"],
      )
    )
    np.testing.assert_allclose(
      forward(moved, INPUT), forward(params, INPUT), atol=1e-12
    )
    apply = Mlp(use_bias).apply
    np.testing.assert_allclose(
      apply(moved, jnp.asarray(INPUT, jnp.float32)),
      apply(params, jnp.asarray(INPUT, jnp.float32)),
      atol=1e-5,
    )

  def test_composition_with_the_inverse(self):
    params = init(0)
    permutations = random_permutations(1)
    moved = alignment.permute_mlp(params, permutations)
    back = alignment.permute_mlp(moved, [np.argsort(p) for p in permutations])
    chex.assert_trees_all_equal(back, params)

  def test_traced_permutations(self):
    params, permutations = init(0), random_permutations(1)
    got = jax.jit(alignment.permute_mlp)(params, permutations)
    chex.assert_trees_all_equal(
      got, alignment.permute_mlp(params, permutations)
    )

  def test_natural_order_of_layers(self):
    # Dense_10 before Dense_2 would be no chain.
    params = {
      f"Dense_{i}": {"kernel": jnp.ones((3 + i, 4 + i))} for i in range(12)
    }
    moved = alignment.permute_mlp(params, [range(n) for n in range(4, 15)])
    chex.assert_trees_all_equal(moved, params)

  @parameterized.parameters(
    ([[0]], "got 1 permutations for 2 hidden layers"),
    ([np.arange(12)] * 2, "layer 'params/Dense_1' is not one of its 16"),
    ([[0] * 12, np.arange(16)], "each of 0 to 11 once"),
    ([np.arange(12.0), np.arange(16)], "'params/Dense_0'"),
  )
  def test_bad_permutations(self, permutations, message):
    with self.assertRaisesRegex(ValueError, message):
      alignment.permute_mlp(init(0), permutations)


class AlignMlpTest(parameterized.TestCase):
  @parameterized.product(use_bias=[True, False], wrapped=[True, False])
  def test_a_known_permutation_is_recovered(self, use_bias, wrapped):
    reference = init(0, use_bias)
    if not wrapped:
      reference = reference["params"]
    permutations = random_permutations(1)
    moved = alignment.permute_mlp(reference, permutations)
    aligned, info = alignment.align_mlp(reference, moved)
    chex.assert_trees_all_equal(aligned, reference)
    for got, permutation in zip(info.permutations, permutations, strict=True):
      np.testing.assert_array_equal(got, np.argsort(permutation))
    np.testing.assert_array_equal(info.cost, np.zeros(2))
    np.testing.assert_array_equal(info.converged, [True] * 2)
    for plan, width in zip(info.plans, WIDTHS, strict=True):
      np.testing.assert_allclose(plan.sum(0), np.full(width, 1 / width))
      np.testing.assert_allclose(plan.sum(1), np.full(width, 1 / width))

  @parameterized.parameters(True, False)
  def test_of_a_noisy_copy(self, use_bias):
    reference = init(0, use_bias)
    noisy = add_noise(reference, 2, 0.02)
    moved = alignment.permute_mlp(noisy, random_permutations(1))
    aligned, _ = alignment.align_mlp(reference, moved)
    chex.assert_trees_all_equal(aligned, noisy)

  @parameterized.parameters(True, False)
  def test_exact_alignment_keeps_the_function(self, use_bias):
    reference, model = init(0, use_bias), init(1, use_bias)
    aligned, info = alignment.align_mlp(reference, model)
    np.testing.assert_allclose(
      forward(aligned, INPUT), forward(model, INPUT), atol=1e-5
    )
    self.assertTrue(np.all(info.cost > 0))
    chex.assert_trees_all_equal(
      aligned, alignment.permute_mlp(model, info.permutations)
    )

  def test_layer_by_layer_against_scipy(self):
    reference, model = init(0)["params"], init(1)["params"]
    _, info = alignment.align_mlp(reference, model)
    before = np.arange(INPUTS)
    for i in range(len(WIDTHS)):
      target, source = reference[f"Dense_{i}"], model[f"Dense_{i}"]
      kernel = np.asarray(source["kernel"])[before]
      cost = np.square(
        np.asarray(target["kernel"])[:, :, None] - kernel[:, None, :]
      ).sum(0)
      cost += np.square(
        np.asarray(target["bias"])[:, None] - np.asarray(source["bias"])
      )
      rows, before = optimize.linear_sum_assignment(cost)
      np.testing.assert_array_equal(info.permutations[i], before)
      np.testing.assert_allclose(
        info.cost[i], cost[rows, before].mean(), rtol=1e-5
      )

  def test_the_bias_alone_decides(self):
    def params(bias):
      return {
        "Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.asarray(bias)},
        "Dense_1": {"kernel": jnp.eye(3)},
      }

    _, info = alignment.align_mlp(
      params([1.0, 2.0, 3.0]), params([3.1, 1.1, 2.1])
    )
    np.testing.assert_array_equal(info.permutations[0], [1, 2, 0])

  def test_vmap_over_seeds(self):
    references, models = [init(0), init(1)], [init(2), init(3)]
    stack = functools.partial(jax.tree.map, lambda *x: jnp.stack(x))
    aligned, info = jax.jit(jax.vmap(alignment.align_mlp))(
      stack(*references), stack(*models)
    )
    self.assertEqual(info.converged.shape, (2, 2))
    for i in range(2):
      one, one_info = alignment.align_mlp(references[i], models[i])
      got = jax.tree.map(lambda x: x[i], aligned)  # noqa: B023
      chex.assert_trees_all_equal(got, one)
      np.testing.assert_allclose(info.cost[i], one_info.cost, rtol=1e-6)

  def test_jit_is_traced_once_and_equals_no_jit(self):
    fn = jax.jit(chex.assert_max_traces(alignment.align_mlp, n=1))
    for seed in range(3):
      aligned, info = fn(init(0), init(seed))
      expected, expected_info = alignment.align_mlp(init(0), init(seed))
      chex.assert_trees_all_equal(aligned, expected)
      chex.assert_trees_all_equal(info.permutations, expected_info.permutations)

  @parameterized.parameters(True, False)
  def test_sinkhorn_approaches_exact(self, use_bias):
    reference = init(0, use_bias)
    moved = alignment.permute_mlp(
      add_noise(reference, 2, 0.01), random_permutations(1)
    )
    exact, exact_info = alignment.align_mlp(reference, moved)
    got, info = alignment.align_mlp(
      reference, moved, solver="sinkhorn", epsilon=1e-3, max_iterations=10_000
    )
    np.testing.assert_array_equal(info.converged, [True] * 2)
    self.assertIsNone(info.permutations)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, moved)
    chex.assert_trees_all_close(got, exact, atol=1e-3)
    for plan, exact_plan in zip(info.plans, exact_info.plans, strict=True):
      np.testing.assert_allclose(plan, exact_plan, atol=1e-3)

  def test_sinkhorn_follows_the_formula(self):
    reference, model = init(0)["params"], init(1)["params"]
    got, info = alignment.align_mlp(
      reference, model, solver="sinkhorn", epsilon=0.5
    )
    before = np.eye(INPUTS)
    for i, width in enumerate((*WIDTHS, CLASSES)):
      after = np.eye(CLASSES)
      if i < len(WIDTHS):
        after = np.asarray(info.plans[i], np.float64) * width
      np.testing.assert_allclose(
        got[f"Dense_{i}"]["kernel"],
        before @ model[f"Dense_{i}"]["kernel"] @ after.T,
        atol=1e-5,
      )
      np.testing.assert_allclose(
        got[f"Dense_{i}"]["bias"],
        after @ model[f"Dense_{i}"]["bias"],
        atol=1e-5,
      )
      before = after

  def test_sinkhorn_reports_that_it_did_not_converge(self):
    _, info = jax.jit(
      functools.partial(
        alignment.align_mlp, solver="sinkhorn", epsilon=1e-3, max_iterations=1
      )
    )(init(0), init(1))
    np.testing.assert_array_equal(info.converged, [False] * 2)
    np.testing.assert_array_equal(info.n_iters, [1] * 2)
    self.assertTrue(np.all(info.errors > 1e-3))

  @parameterized.parameters("exact", "sinkhorn")
  def test_half_types_keep_their_dtype(self, solver):
    reference, model = jax.tree.map(
      lambda x: x.astype(jnp.bfloat16), (init(0), init(1))
    )
    got, info = alignment.align_mlp(reference, model, solver=solver)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, model)
    self.assertEqual(info.cost.dtype, jnp.float32)

  def test_layers_by_name(self):
    reference, model = (
      {
        "head": {"kernel": jax.random.normal(jax.random.key(seed), (4, 4))},
        "body": {"kernel": jax.random.normal(jax.random.key(9 + seed), (4, 4))},
        "norm": {"scale": jnp.ones(4)},
        "steps": jnp.asarray(seed),
      }
      for seed in range(2)
    )
    aligned, info = alignment.align_mlp(
      reference, model, layers=["body", "head"]
    )
    x = jax.random.normal(jax.random.key(5), (6, 4))

    def apply(p):
      return nn.relu(x @ p["body"]["kernel"]) @ p["head"]["kernel"]

    np.testing.assert_allclose(apply(aligned), apply(model), atol=1e-5)
    self.assertLen(info.plans, 1)
    self.assertEqual(int(aligned["steps"]), 1)
    wrapped = [{"params": p} for p in (reference, model)]
    again, _ = alignment.align_mlp(*wrapped, layers=["body", "head"])
    chex.assert_trees_all_equal(again["params"], aligned)

  def test_nnx_state(self):
    class Net(nnx.Module):
      def __init__(self, rngs):
        self.linear1 = nnx.Linear(3, 5, rngs=rngs)
        self.linear2 = nnx.Linear(5, 2, rngs=rngs)

      def __call__(self, x):
        return self.linear2(nnx.relu(self.linear1(x)))

    graph, reference = nnx.split(Net(nnx.Rngs(0)))
    _, model = nnx.split(Net(nnx.Rngs(1)))
    aligned, _ = alignment.align_mlp(reference, model)
    x = jnp.asarray(INPUT[:, :3], jnp.float32)
    np.testing.assert_allclose(
      nnx.merge(graph, aligned)(x), nnx.merge(graph, model)(x), atol=1e-5
    )

  def test_without_hidden_layers(self):
    params = {"Dense_0": {"kernel": jnp.ones((3, 2))}}
    aligned, info = alignment.align_mlp(params, params)
    chex.assert_trees_all_equal(aligned, params)
    self.assertEqual(info.plans, ())
    self.assertEqual(info.converged.shape, (0,))


class OtFusionTest(parameterized.TestCase):
  @parameterized.parameters("exact", "sinkhorn")
  def test_average_of_reference_and_aligned(self, solver):
    reference, model = init(0), init(1)
    got, info = alignment.ot_fusion(reference, model, weight=0.3, solver=solver)
    aligned, _ = alignment.align_mlp(reference, model, solver=solver)
    expected = jax.tree.map(lambda x, y: 0.7 * x + 0.3 * y, reference, aligned)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)
    self.assertLen(info.plans, 2)

  def test_of_permuted_copies_is_the_reference(self):
    reference = init(0)
    moved = alignment.permute_mlp(reference, random_permutations(3))
    got, _ = alignment.ot_fusion(reference, moved)
    chex.assert_trees_all_close(got, reference, rtol=1e-6)
    naive = tree.lerp(reference, moved, 0.5)
    self.assertGreater(
      np.abs(forward(naive, INPUT) - forward(reference, INPUT)).max(), 0.1
    )

  def test_output_layer_keeps_its_outputs(self):
    reference = init(0)["params"]
    model = jax.tree.map(lambda x: x, reference)
    order = np.asarray([1, 0, 2, 3])
    model["Dense_2"] = jax.tree.map(lambda x: x[..., order], model["Dense_2"])
    aligned, _ = alignment.align_mlp(reference, model)
    chex.assert_trees_all_equal(aligned, model)

  def test_traced_weight_and_vmap(self):
    stack = functools.partial(jax.tree.map, lambda *x: jnp.stack(x))
    references, models = stack(init(0), init(1)), stack(init(2), init(3))
    fn = jax.jit(
      jax.vmap(
        lambda a, b, w: alignment.ot_fusion(a, b, weight=w)[0],
        in_axes=(0, 0, None),
      )
    )
    got = fn(references, models, 0.25)
    one, _ = alignment.ot_fusion(init(1), init(3), weight=0.25)
    chex.assert_trees_all_close(
      jax.tree.map(lambda x: x[1], got), one, rtol=1e-5, atol=1e-6
    )

  def test_gradient_holds_the_plan(self):
    reference, model = init(0), init(1)

    def loss(model):
      fused, _ = alignment.ot_fusion(reference, model, weight=0.25)
      return sum(x.sum() for x in jax.tree.leaves(fused))

    for grad in jax.tree.leaves(jax.grad(loss)(model)):
      np.testing.assert_allclose(grad, np.full(grad.shape, 0.25))

  def test_weight_is_a_scalar(self):
    with self.assertRaisesRegex(ValueError, r"weight must be a scalar; got"):
      alignment.ot_fusion(init(0), init(1), weight=jnp.ones(2))


def dense(*shape, bias=None):
  layer = {"kernel": jnp.ones(shape)}
  return layer if bias is None else layer | {"bias": jnp.ones(bias)}


class ErrorTest(parameterized.TestCase):
  two = {"Dense_0": dense(2, 3), "Dense_1": dense(3, 4)}

  def test_unknown_solver(self):
    with self.assertRaisesRegex(
      ValueError, "unknown solver 'emd'; choose one of exact, sinkhorn"
    ):
      alignment.align_mlp(self.two, self.two, solver="emd")

  def test_depth(self):
    three = self.two | {"Dense_2": dense(4, 5)}
    for a, b, n, m in ((self.two, three, 2, 3), (three, self.two, 3, 2)):
      with self.assertRaisesRegex(
        tree.TreeMismatchError,
        f"reference has {n} dense layers but model has {m} .'Dense_2' is one",
      ):
        alignment.align_mlp(a, b)

  def test_width(self):
    wide = {"Dense_0": dense(2, 5), "Dense_1": dense(5, 4)}
    with self.assertRaisesRegex(
      tree.TreeMismatchError,
      r"leaf 'Dense_0/kernel' has shape \(2, 3\) in reference but \(2, 5\) in"
      " model; alignment needs equal widths",
    ):
      alignment.align_mlp(self.two, wide)

  def test_bias_in_one_only(self):
    other = self.two | {"Dense_1": dense(3, 4, bias=4)}
    with self.assertRaisesRegex(
      tree.TreeMismatchError, "'Dense_1/bias' is in model but missing from"
    ):
      alignment.align_mlp(self.two, other)

  def test_dtype(self):
    other = jax.tree.map(lambda x: x.astype(jnp.float16), self.two)
    with self.assertRaisesRegex(tree.TreeMismatchError, "has dtype float32"):
      alignment.align_mlp(self.two, other)

  @parameterized.parameters(
    ({"a": dense(2, 3), "b": dense(4, 5)}, "'a' has 3 outputs but 'b' takes 4"),
    ({"a": dense(2, 3, bias=4)}, r"'a/bias' .* must have shape \(3,\)"),
    ({"a": dense(3, 3, 2, 2)}, r"'a/kernel' .* got shape \(3, 3, 2, 2\)"),
    ({"a": {"kernel": jnp.ones((2, 2), jnp.int32)}}, "must be floating-point"),
    ({"a": dense(2, 3), "n": {"scale": jnp.ones(3)}}, "leaf 'n/scale' of ref"),
    ({}, "reference has no dense layer"),
  )
  def test_no_chain(self, params, message):
    with self.assertRaisesRegex(ValueError, message):
      alignment.align_mlp(params, params)

  @parameterized.parameters(
    (["Dense_0", "Dense_9"], "layer 'Dense_9' is not in reference; .* Dense_1"),
    (["Dense_0", "Dense_0"], "names a layer twice"),
    (["Dense_1", "Dense_0"], "do not form a chain"),
    ([], "no dense layer"),
  )
  def test_layers(self, layers, message):
    with self.assertRaisesRegex(ValueError, message):
      alignment.align_mlp(self.two, self.two, layers=layers)


if __name__ == "__main__":
  absltest.main()
