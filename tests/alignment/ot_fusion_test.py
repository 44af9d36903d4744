"""Tests of the alignment and the fusion of networks by transport."""

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
from jaxmerge.alignment import Axis
from tests.alignment import _networks

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


def permute(params, permutations, spec=None):
  spec = spec or alignment.derive_spec(params)
  return alignment.apply_permutations(
    spec, params, dict(zip(spec, permutations, strict=True))
  )


class OtAlignTest(parameterized.TestCase):
  @parameterized.product(use_bias=[True, False], wrapped=[True, False])
  def test_a_known_permutation_is_recovered(self, use_bias, wrapped):
    reference = init(0, use_bias)
    if not wrapped:
      reference = reference["params"]
    permutations = random_permutations(1)
    moved = permute(reference, permutations)
    aligned, info = alignment.ot_align(reference, moved)
    chex.assert_trees_all_equal(aligned, reference)
    for got, permutation in zip(
      info.permutations.values(), permutations, strict=True
    ):
      np.testing.assert_array_equal(got, np.argsort(permutation))
    np.testing.assert_array_equal(info.cost, np.zeros(2))
    np.testing.assert_array_equal(info.converged, [True] * 2)
    for plan, width in zip(info.plans.values(), WIDTHS, strict=True):
      np.testing.assert_allclose(plan.sum(0), np.full(width, 1 / width))
      np.testing.assert_allclose(plan.sum(1), np.full(width, 1 / width))

  @parameterized.parameters(True, False)
  def test_of_a_noisy_copy(self, use_bias):
    reference = init(0, use_bias)
    noisy = add_noise(reference, 2, 0.02)
    moved = permute(noisy, random_permutations(1))
    aligned, _ = alignment.ot_align(reference, moved)
    chex.assert_trees_all_equal(aligned, noisy)

  @parameterized.parameters(True, False)
  def test_exact_alignment_keeps_the_function(self, use_bias):
    reference, model = init(0, use_bias), init(1, use_bias)
    aligned, info = alignment.ot_align(reference, model)
    np.testing.assert_allclose(
      forward(aligned, INPUT), forward(model, INPUT), atol=1e-5
    )
    self.assertTrue(np.all(info.cost > 0))
    chex.assert_trees_all_equal(
      aligned, permute(model, info.permutations.values())
    )

  def test_layer_by_layer_against_scipy(self):
    reference, model = init(0)["params"], init(1)["params"]
    _, info = alignment.ot_align(reference, model)
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
      np.testing.assert_array_equal(info.permutations[f"Dense_{i}"], before)
      np.testing.assert_allclose(
        info.cost[i], cost[rows, before].mean(), rtol=1e-5
      )

  def test_the_bias_alone_decides(self):
    def params(bias):
      return {
        "Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.asarray(bias)},
        "Dense_1": {"kernel": jnp.eye(3)},
      }

    _, info = alignment.ot_align(
      params([1.0, 2.0, 3.0]), params([3.1, 1.1, 2.1])
    )
    np.testing.assert_array_equal(info.permutations["Dense_0"], [1, 2, 0])

  def test_vmap_over_seeds(self):
    references, models = [init(0), init(1)], [init(2), init(3)]
    stack = functools.partial(jax.tree.map, lambda *x: jnp.stack(x))
    aligned, info = jax.jit(jax.vmap(alignment.ot_align))(
      stack(*references), stack(*models)
    )
    self.assertEqual(info.converged.shape, (2, 2))
    for i in range(2):
      one, one_info = alignment.ot_align(references[i], models[i])
      got = jax.tree.map(lambda x: x[i], aligned)  # noqa: B023
      chex.assert_trees_all_equal(got, one)
      np.testing.assert_allclose(info.cost[i], one_info.cost, rtol=1e-6)

  def test_jit_is_traced_once_and_equals_no_jit(self):
    fn = jax.jit(chex.assert_max_traces(alignment.ot_align, n=1))
    for seed in range(3):
      aligned, info = fn(init(0), init(seed))
      expected, expected_info = alignment.ot_align(init(0), init(seed))
      chex.assert_trees_all_equal(aligned, expected)
      chex.assert_trees_all_equal(info.permutations, expected_info.permutations)

  @parameterized.parameters(True, False)
  def test_sinkhorn_approaches_exact(self, use_bias):
    reference = init(0, use_bias)
    moved = permute(add_noise(reference, 2, 0.01), random_permutations(1))
    exact, exact_info = alignment.ot_align(reference, moved)
    got, info = alignment.ot_align(
      reference, moved, solver="sinkhorn", epsilon=1e-3, max_iterations=10_000
    )
    np.testing.assert_array_equal(info.converged, [True] * 2)
    self.assertIsNone(info.permutations)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, moved)
    chex.assert_trees_all_close(got, exact, atol=1e-3)
    chex.assert_trees_all_close(info.plans, exact_info.plans, atol=1e-3)

  def test_sinkhorn_reports_that_it_did_not_converge(self):
    _, info = jax.jit(
      functools.partial(
        alignment.ot_align, solver="sinkhorn", epsilon=1e-3, max_iterations=1
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
    got, info = alignment.ot_align(reference, model, solver=solver)
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
    spec = alignment.derive_spec(reference, layers=["body", "head"])
    aligned, info = alignment.ot_align(reference, model, spec)
    x = jax.random.normal(jax.random.key(5), (6, 4))

    def apply(p):
      return nn.relu(x @ p["body"]["kernel"]) @ p["head"]["kernel"]

    np.testing.assert_allclose(apply(aligned), apply(model), atol=1e-5)
    self.assertEqual(list(info.plans), ["body"])
    self.assertEqual(int(aligned["steps"]), 1)

  def test_nnx_state(self):
    class Net(nnx.Module):
      def __init__(self, rngs):
        self.linear1 = nnx.Linear(3, 5, rngs=rngs)
        self.linear2 = nnx.Linear(5, 2, rngs=rngs)

      def __call__(self, x):
        return self.linear2(nnx.relu(self.linear1(x)))

    graph, reference = nnx.split(Net(nnx.Rngs(0)))
    _, model = nnx.split(Net(nnx.Rngs(1)))
    aligned, _ = alignment.ot_align(reference, model)
    x = jnp.asarray(INPUT[:, :3], jnp.float32)
    np.testing.assert_allclose(
      nnx.merge(graph, aligned)(x), nnx.merge(graph, model)(x), atol=1e-5
    )

  def test_without_hidden_layers(self):
    params = {"Dense_0": {"kernel": jnp.ones((3, 2))}}
    aligned, info = alignment.ot_align(params, params)
    chex.assert_trees_all_equal(aligned, params)
    self.assertEqual(info.plans, {})
    self.assertEqual(info.converged.shape, (0,))


class OtFusionTest(parameterized.TestCase):
  @parameterized.parameters("exact", "sinkhorn")
  def test_average_of_reference_and_aligned(self, solver):
    reference, model = init(0), init(1)
    got, info = alignment.ot_fusion(reference, model, weight=0.3, solver=solver)
    aligned, _ = alignment.ot_align(reference, model, solver=solver)
    expected = jax.tree.map(lambda x, y: 0.7 * x + 0.3 * y, reference, aligned)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)
    self.assertLen(info.plans, 2)

  def test_of_permuted_copies_is_the_reference(self):
    reference = init(0)
    moved = permute(reference, random_permutations(3))
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
    aligned, _ = alignment.ot_align(reference, model)
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


def widen(params, owners):
  """Makes neurons into several copies, by hand: owners[l][g] is g's origin."""
  params = params.get("params", params)
  wide = {}
  before, counts = np.arange(INPUTS), np.ones(INPUTS)
  for i in range(len(WIDTHS) + 1):
    layer = params[f"Dense_{i}"]
    after = owners[i] if i < len(WIDTHS) else np.arange(CLASSES)
    # The copies of a neuron share its outgoing weights.
    kernel = np.asarray(layer["kernel"])[before] / counts[before][:, None]
    wide[f"Dense_{i}"] = {
      "kernel": jnp.asarray(kernel[:, after], jnp.float32),
      "bias": layer["bias"][after],
    }
    before, counts = after, np.bincount(after)
  return wide


def activations(params, x):
  """Of the hidden layers, by group; before the ReLU, so that none is dead."""
  params = params.get("params", params)
  found = {}
  for i in range(len(WIDTHS)):
    layer = params[f"Dense_{i}"]
    x = x @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
    found[f"Dense_{i}"] = jnp.asarray(x, jnp.float32)
    x = np.maximum(x, 0)
  return found


class WidthsTest(parameterized.TestCase):
  """Networks whose neurons are copies of those of a smaller one."""

  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(3)
    self.small = init(0)["params"]
    self.owners = [rng.permutation(np.repeat(np.arange(n), 2)) for n in WIDTHS]
    self.wide = widen(self.small, self.owners)
    np.testing.assert_allclose(
      forward(self.wide, INPUT), forward(self.small, INPUT), atol=1e-5
    )

  @parameterized.parameters("weights", "activations")
  def test_a_widened_copy_is_recovered(self, by):
    options = {}
    if by == "activations":
      acts = activations(self.wide, INPUT), activations(self.small, INPUT)
      options["activations"] = acts
    for jit in (False, True):
      align = functools.partial(alignment.ot_align, by=by, **options)
      align = jax.jit(align) if jit else align
      got, info = align(self.wide, self.small)
      chex.assert_trees_all_close(got, self.wide, atol=1e-6)
      self.assertIsNone(info.permutations)
      np.testing.assert_allclose(info.cost, np.zeros(2), atol=1e-9)
      for owners, plan in zip(self.owners, info.plans.values(), strict=True):
        expected = np.eye(len(owners) // 2)[owners] / len(owners)
        np.testing.assert_allclose(plan, expected, atol=1e-7)
    # And back: the copies are taken together again.
    back, _ = alignment.ot_align(
      self.small,
      self.wide,
      by=by,
      **({"activations": acts[::-1]} if options else {}),
    )
    chex.assert_trees_all_close(back, self.small, atol=1e-6)

  def test_outgoing_target_multiplies(self):
    got, _ = alignment.ot_align(self.wide, self.small, outgoing="target")
    chex.assert_trees_all_close(got["Dense_0"], self.wide["Dense_0"], atol=1e-6)
    np.testing.assert_allclose(
      got["Dense_2"]["kernel"], 2 * self.wide["Dense_2"]["kernel"], atol=1e-6
    )
    same = [
      alignment.ot_align(self.small, init(1)["params"], outgoing=outgoing)[0]
      for outgoing in ("source", "target")
    ]
    chex.assert_trees_all_equal(*same)

  def test_uneven_widths(self):
    # One copy of the first, three of the second, and so on; importance says so.
    counts = [np.arange(n) % 3 + 1 for n in WIDTHS]
    owners = [np.repeat(np.arange(len(c)), c) for c in counts]
    wide = widen(self.small, owners)
    groups = ("Dense_0", "Dense_1")
    importance = (
      {g: np.ones(len(o)) for g, o in zip(groups, owners, strict=True)},
      dict(zip(groups, counts, strict=True)),
    )
    importance = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), importance)
    got, _ = alignment.ot_align(wide, self.small, importance=importance)
    chex.assert_trees_all_close(got, wide, atol=1e-5)

  def test_general_plans_against_the_formula(self):
    reference, model = self.wide, init(1)["params"]
    rng = np.random.default_rng(0)
    importance = tuple(
      {
        f"Dense_{i}": jnp.asarray(rng.random(k * n) + 0.1, jnp.float32)
        for i, n in enumerate(WIDTHS)
      }
      for k in (2, 1)
    )
    for solver in ("exact", "sinkhorn", "unbalanced"):
      got, info = alignment.ot_align(
        reference, model, solver=solver, importance=importance, epsilon=0.3
      )
      before = np.eye(INPUTS)
      for i in range(len(WIDTHS) + 1):
        after = behind = np.eye(CLASSES)
        if i < len(WIDTHS):
          plan = np.asarray(info.plans[f"Dense_{i}"], np.float64)
          a, b = (side[f"Dense_{i}"] for side in importance)
          if solver == "exact":
            np.testing.assert_allclose(plan.sum(1), a / a.sum(), atol=1e-6)
            np.testing.assert_allclose(plan.sum(0), b / b.sum(), atol=1e-6)
          after = plan / plan.sum(1, keepdims=True)
          behind = plan / plan.sum(0)
        kernel = np.asarray(model[f"Dense_{i}"]["kernel"], np.float64)
        np.testing.assert_allclose(
          got[f"Dense_{i}"]["kernel"], before @ kernel @ after.T, atol=1e-5
        )
        np.testing.assert_allclose(
          got[f"Dense_{i}"]["bias"],
          after @ model[f"Dense_{i}"]["bias"],
          atol=1e-5,
        )
        before = behind

  def test_vmap(self):
    stack = functools.partial(jax.tree.map, lambda *x: jnp.stack(x))
    models = [init(1)["params"], init(2)["params"]]
    got, _ = jax.jit(jax.vmap(alignment.ot_align, (None, 0)))(
      self.wide, stack(*models)
    )
    one, _ = alignment.ot_align(self.wide, models[1])
    chex.assert_trees_all_close(
      jax.tree.map(lambda x: x[1], got), one, atol=1e-6
    )

  def test_fusion(self):
    got, _ = alignment.ot_fusion(self.wide, self.small, weight=0.4)
    chex.assert_trees_all_close(got, self.wide, atol=1e-6)


class ActivationsTest(parameterized.TestCase):
  def test_recovers_a_permutation(self):
    reference = init(0)
    permutations = random_permutations(2)
    moved = permute(reference, permutations)
    acts = activations(reference, INPUT), activations(moved, INPUT)
    aligned, info = alignment.ot_align(
      reference, moved, by="activations", activations=acts
    )
    chex.assert_trees_all_equal(aligned, reference)
    for got, permutation in zip(
      info.permutations.values(), permutations, strict=True
    ):
      np.testing.assert_array_equal(got, np.argsort(permutation))

  def test_cost_is_the_mean_square(self):
    reference, model = init(0), init(1)
    # Positions of a convolution are further examples.
    acts = [
      {k: v.reshape(4, 5, -1) for k, v in activations(p, INPUT).items()}
      for p in (reference, model)
    ]
    _, info = alignment.ot_align(
      reference, model, by="activations", activations=acts
    )
    for i, (group, permutation) in enumerate(info.permutations.items()):
      x, y = (np.asarray(side[group]).reshape(20, -1) for side in acts)
      cost = np.square(x[:, :, None] - y[:, None]).mean(0)
      rows, columns = optimize.linear_sum_assignment(cost)
      np.testing.assert_array_equal(permutation, columns)
      np.testing.assert_allclose(
        info.cost[i], cost[rows, columns].mean(), rtol=1e-5
      )

  def test_norms(self):
    acts = activations(init(0), INPUT)
    for group, norms in alignment.activation_norms(acts).items():
      np.testing.assert_allclose(
        norms, np.sqrt(np.square(acts[group]).mean(0)), rtol=1e-5
      )


class SpecTest(parameterized.TestCase):
  """Specifications beyond chains of dense layers."""

  def residual(self, seed, width=5):
    draw = lambda i, *shape: jax.random.normal(  # noqa: E731
      jax.random.fold_in(jax.random.key(seed), i), shape
    )
    return {
      "stem": draw(0, 4, width),
      "up": draw(1, width, 6),
      "down": draw(2, 6, width),
      "head": draw(3, width, 2),
    }

  def apply(self, p, x):
    x = jnp.maximum(x @ p["stem"], 0)
    x = x + jnp.maximum(x @ p["up"], 0) @ p["down"]
    return x @ p["head"]

  spec = {
    "stream": (
      Axis("stem", 1),
      Axis("up", 0, incoming=False),
      Axis("down", 1),
      Axis("head", 0, incoming=False),
    ),
    "inner": (Axis("up", 1), Axis("down", 0, incoming=False)),
  }

  def test_residual(self):
    reference, model = self.residual(0), self.residual(1)
    aligned, info = alignment.ot_align(reference, model, self.spec)
    x = jax.random.normal(jax.random.key(5), (6, 4))
    np.testing.assert_allclose(
      self.apply(aligned, x), self.apply(model, x), atol=1e-4
    )
    # The stream by the stem alone, the inner group by the moved "up".
    cost = lambda x, y: np.square(x[:, :, None] - y[:, None]).sum(0)  # noqa: E731
    stream = optimize.linear_sum_assignment(
      cost(np.asarray(reference["stem"]), np.asarray(model["stem"]))
    )[1]
    np.testing.assert_array_equal(info.permutations["stream"], stream)
    inner = optimize.linear_sum_assignment(
      cost(np.asarray(reference["up"]), np.asarray(model["up"])[stream])
    )[1]
    np.testing.assert_array_equal(info.permutations["inner"], inner)

  def test_several_producers_sum(self):
    spec = {"inner": self.spec["inner"], "stream": self.spec["stream"]}
    spec["inner"] = (*spec["inner"], Axis("extra", 1))
    reference, model = (
      self.residual(seed) | {"extra": jnp.tile(jnp.arange(6.0), (3, 1))}
      for seed in range(2)
    )
    # "inner" is decided by "extra" alone, which is in order.
    _, info = alignment.ot_align(reference, model, spec)
    np.testing.assert_array_equal(info.permutations["inner"], range(6))
    cost = sum(
      np.square(
        np.asarray(reference[name])[:, :, None]
        - np.asarray(model[name])[:, None]
      ).sum(0)
      for name in ("stem", "down")
    )
    rows, columns = optimize.linear_sum_assignment(cost)
    np.testing.assert_array_equal(info.permutations["stream"], columns)
    np.testing.assert_allclose(
      info.cost[1], cost[rows, columns].mean(), rtol=1e-5
    )

  def test_order_of_groups(self):
    spec = {"inner": self.spec["inner"], "stream": self.spec["stream"]}
    with self.assertRaisesRegex(ValueError, "no leaf that comes into group"):
      alignment.ot_align(self.residual(0), self.residual(1), spec)

  def test_order_of_a_chain(self):
    sizes = (4, 6, 5, 7, 3)
    reference, model = (_networks.mlp(sizes, seed)[0] for seed in (0, 1))
    spec = _networks.mlp(sizes)[1]
    want, info = alignment.ot_align(reference, model, spec)
    for names in (list(spec)[::-1], ["hidden_1", "hidden_0", "hidden_2"]):
      turned = {group: spec[group] for group in names}
      got, found = alignment.ot_align(reference, model, turned)
      chex.assert_trees_all_equal(got, want)
      chex.assert_trees_all_equal(found.permutations, info.permutations)
      # Diagnostics are in the order that was given.
      np.testing.assert_array_equal(
        found.cost, [info.cost[list(spec).index(name)] for name in names]
      )

  def test_cycle_between_chains(self):
    """The groups of a cycle keep their order, between what is around it."""

    def draw(seed):
      more = jax.random.normal(jax.random.key(seed), (2, 4))
      return self.residual(seed) | {"first": more}

    first = (Axis("first", 1), Axis("stem", 0, incoming=False))
    reference, model = draw(0), draw(1)
    want, _ = alignment.ot_align(
      reference, model, {"first": first, **self.spec}
    )
    got, _ = alignment.ot_align(reference, model, {**self.spec, "first": first})
    chex.assert_trees_all_equal(got, want)

  def test_statistics_anywhere(self):
    """Statistics in a collection below do not count, nor a leaf "mean"."""
    for name in ("net/batch_stats/scale", "norm/mean"):
      outer, *inner = name.split("/")
      leaf = 1e6 * jnp.arange(3.0)
      for part in inner[::-1]:
        leaf = {part: leaf}
      spec = {
        "hidden": (Axis("a", 1), Axis(name, 0), Axis("b", 0, incoming=False))
      }
      params = {"a": jnp.eye(3), "b": jnp.ones((3, 2)), outer: leaf}
      other = {**params, "a": jnp.eye(3)[:, ::-1]}
      _, info = alignment.ot_align(params, other, spec)
      np.testing.assert_array_equal(info.permutations["hidden"], [2, 1, 0])

  def test_complex(self):
    params = {"a": jnp.ones((2, 3), jnp.complex64), "b": jnp.ones((3, 1))}
    spec = {"hidden": (Axis("a", 1), Axis("b", 0, incoming=False))}
    with self.assertRaisesRegex(
      ValueError, "leaf 'a' of group 'hidden' is com"
    ):
      alignment.ot_align(params, params, spec)

  def test_blocks_and_batch_stats(self):
    # A convolution, its statistics, and flattened images, of two widths.
    def params(width, seed):
      rng = np.random.default_rng(seed)
      draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
      return {
        "batch_stats": {"norm": {"mean": 1e6 * draw(width)}},
        "conv": {"kernel": draw(2, 2, 1, width)},
        "dense": {"kernel": draw(3 * width, 2)},
      }

    spec = {
      "conv": (
        Axis("conv/kernel", -1),
        Axis("batch_stats/norm/mean", 0),
        Axis("dense/kernel", 0, incoming=False, outer=3),
      )
    }
    reference, model = params(4, 0), params(3, 1)
    got, info = alignment.ot_align(reference, model, spec)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, reference)
    self.assertLess(float(info.cost[0]), 1e3)
    plan = np.asarray(info.plans["conv"])
    np.testing.assert_allclose(
      got["dense"]["kernel"].reshape(3, 4, 2),
      np.einsum(
        "gj,ojk->ogk", plan * 3, model["dense"]["kernel"].reshape(3, 3, 2)
      ),
      atol=1e-5,
    )
    np.testing.assert_allclose(
      got["batch_stats"]["norm"]["mean"],
      4 * plan @ model["batch_stats"]["norm"]["mean"],
      rtol=1e-5,
    )


class ApplyPlansTest(parameterized.TestCase):
  spec = {"hidden": (Axis("a", 1), Axis("b", 0, incoming=False))}
  params = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 1)), "c": jnp.arange(2)}

  def test_permutation_matrices(self):
    params = init(0)["params"]
    permutations = random_permutations(1)
    plans = {
      f"Dense_{i}": np.eye(len(p), dtype=np.float32)[p] / len(p)
      for i, p in enumerate(permutations)
    }
    spec = alignment.derive_spec(params)
    chex.assert_trees_all_close(
      alignment.apply_plans(spec, params, plans),
      permute(params, permutations),
      rtol=1e-6,
    )
    chex.assert_trees_all_equal(alignment.apply_plans(spec, params, {}), params)
    # The inverse of what ot_align gives back.
    wide = init(3)["params"]
    aligned, info = alignment.ot_align(wide, params)
    chex.assert_trees_all_close(
      alignment.apply_plans(spec, params, info.plans), aligned, rtol=1e-6
    )

  def test_marginals(self):
    plan = jnp.array([[0.2, 0.1, 0.0], [0.0, 0.0, 0.7]])
    with self.assertRaisesRegex(
      ValueError, "group 'hidden': column 2 of the plan sums to 0.7"
    ):
      alignment.apply_plans(self.spec, self.params, {"hidden": plan})
    got = alignment.apply_plans(
      self.spec,
      self.params,
      {"hidden": plan},
      marginals={"hidden": (plan.sum(1), plan.sum(0))},
    )
    np.testing.assert_allclose(got["a"], np.ones((2, 2)), rtol=1e-6)
    np.testing.assert_allclose(got["b"], [[2.0], [1.0]], rtol=1e-6)
    self.assertIs(got["c"], self.params["c"])

  def test_half_types_are_rounded_once(self):
    params = jax.tree.map(
      lambda x: x.astype(jnp.bfloat16), {"a": jnp.ones((1, 3)), "b": jnp.eye(3)}
    )
    got = alignment.apply_plans(
      self.spec, params, {"hidden": jnp.full((2, 3), 1 / 6)}
    )
    self.assertEqual(got["a"].dtype, jnp.bfloat16)
    np.testing.assert_array_equal(got["a"], np.ones((1, 2)))

  @parameterized.parameters(
    ({"hidden": np.ones((3, 2))}, {}, r"must have shape \(n, 3\), .*\(3, 2\)"),
    ({"other": np.ones((3, 3))}, {}, "of group 'other', which the spec"),
    ({}, {"outgoing": "both"}, "unknown outgoing 'both'; choose one of source"),
  )
  def test_errors(self, plans, options, message):
    with self.assertRaisesRegex(ValueError, message):
      alignment.apply_plans(self.spec, self.params, plans, **options)

  def test_integers(self):
    spec = {"hidden": (Axis("c", 0),)}
    with self.assertRaisesRegex(ValueError, "leaf 'c' .* floating-point"):
      alignment.apply_plans(spec, self.params, {"hidden": np.eye(2) / 2})


def dense(*shape, bias=None):
  layer = {"kernel": jnp.ones(shape)}
  return layer if bias is None else layer | {"bias": jnp.ones(bias)}


class ErrorTest(parameterized.TestCase):
  two = {"Dense_0": dense(2, 3), "Dense_1": dense(3, 4)}
  acts = {"Dense_0": jnp.ones((5, 3))}

  @parameterized.parameters(
    ({"solver": "emd"}, "unknown solver 'emd'; choose one of exact, sinkhorn"),
    ({"by": "name"}, "unknown by 'name'; choose one of weights, activations"),
    ({"outgoing": "no"}, "unknown outgoing 'no'"),
    ({"epsilon": 0}, "epsilon must be positive"),
    ({"solver": "unbalanced", "tau_b": 2.0}, "tau_b must lie in"),
    ({"by": "activations"}, "activations=.* are needed with"),
    ({"activations": (acts, acts)}, "only there; got by='weights'"),
    ({"importance": acts}, "importance must be a pair"),
    ({"importance": ({"x": np.ones(3)}, {})}, "importance name group 'x'"),
    (
      {"importance": ({"Dense_0": np.ones(3)}, {})},
      "importance of the model lack group 'Dense_0'",
    ),
    (
      {"importance": ({"Dense_0": np.ones(3)}, {"Dense_0": np.ones(2)})},
      r"'Dense_0' of the model must have shape \(3,\); got \(2,\)",
    ),
    (
      {"importance": ({"Dense_0": np.zeros(3)}, {"Dense_0": np.ones(3)})},
      "'Dense_0' of the reference must be finite and not negative, and not",
    ),
    (
      {"by": "activations", "activations": ({}, acts)},
      "activations of the reference lack group 'Dense_0'",
    ),
    (
      {
        "by": "activations",
        "activations": (acts, {"Dense_0": jnp.ones((5, 2))}),
      },
      r"of the model must have shape \[..., 3\]",
    ),
    (
      {
        "by": "activations",
        "activations": (acts, {"Dense_0": jnp.ones((4, 3))}),
      },
      "of 5 examples in the reference but 4 in the model",
    ),
  )
  def test_options(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      alignment.ot_align(self.two, self.two, **options)

  def test_depth(self):
    three = self.two | {"Dense_2": dense(4, 5)}
    for a, b, there, missing in (
      (self.two, three, "model", "reference"),
      (three, self.two, "reference", "model"),
    ):
      with self.assertRaisesRegex(
        tree.TreeMismatchError,
        f"leaf 'Dense_2/kernel' is in {there} but missing from {missing}",
      ):
        alignment.ot_align(a, b)

  def test_outputs(self):
    other = self.two | {"Dense_1": dense(3, 5)}
    with self.assertRaisesRegex(
      tree.TreeMismatchError,
      r"leaf 'Dense_1/kernel' has shape \(3, 4\) in reference but \(3, 5\) in"
      " model; only the axes of a group may differ",
    ):
      alignment.ot_align(self.two, other)

  def test_widths_that_disagree(self):
    other = {"Dense_0": dense(2, 5), "Dense_1": dense(6, 4)}
    with self.assertRaisesRegex(alignment.SpecError, "5 neurons .* but 6 in"):
      alignment.ot_align(self.two, other)

  def test_dtype(self):
    other = jax.tree.map(lambda x: x.astype(jnp.float16), self.two)
    with self.assertRaisesRegex(tree.TreeMismatchError, "has dtype float32"):
      alignment.ot_align(self.two, other)

  def test_not_finite(self):
    other = self.two | {"Dense_0": {"kernel": jnp.full((2, 3), jnp.nan)}}
    with self.assertWarnsRegex(RuntimeWarning, "'Dense_0': .* is not finite"):
      alignment.ot_align(self.two, other)
    with self.assertRaisesRegex(alignment.ConvergenceError, "not finite"):
      alignment.ot_align(self.two, other, strict=True)


if __name__ == "__main__":
  absltest.main()
