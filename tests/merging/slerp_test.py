"""Tests of spherical interpolation, of two models and of many."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import merging, tree


def make(seed, dtype=jnp.float32, special=False):
  """Random parameters; those of special shapes take long to compile."""
  rng = np.random.default_rng(seed)
  params = {
    "kernel": jnp.asarray(rng.normal(size=(6, 5)), dtype),
    "bias": jnp.asarray(rng.normal(size=5), dtype),
    "steps": jnp.asarray(seed),
  }
  if special:
    params |= {
      "scalar": jnp.asarray(rng.normal(), dtype),
      "one": [jnp.asarray(rng.normal(size=1), dtype), None],
      "zeros": jnp.zeros((6, 5), dtype),
      "empty": jnp.zeros((0, 2), dtype),
    }
  return params


def wide(leaf):
  return np.asarray(leaf).astype(np.float64)


def arc(a, b, t, threshold=1 - 1e-9):
  """Slerp of two vectors by the textbook, lerp where it is undefined."""
  lengths = np.linalg.norm(a) * np.linalg.norm(b)
  cosine = np.sum(a * b) / lengths if lengths else 1.0
  if abs(cosine) > threshold:
    return (1 - t) * a + t * b
  angle = np.arccos(cosine)
  return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def along(fn, a, b, axes):
  """Applies a function of two vectors along some axes of two arrays."""
  others = [i for i in range(a.ndim) if i not in axes]
  order = [*others, *axes]
  shape = [a.shape[i] for i in order]
  one, two = (
    x.transpose(order).reshape(int(np.prod(shape[: len(others)])), -1)
    for x in (a, b)
  )
  result = np.stack([fn(u, v) for u, v in zip(one, two, strict=True)])
  return result.reshape(shape).transpose(np.argsort(order))


def check(got, expect, trees, dtype=jnp.float32, tolerance=2e-6):
  """Compares every leaf with an oracle on float64 arrays."""
  chex.assert_trees_all_equal_shapes_and_dtypes(got, trees[0])
  names = tree.leaf_names(trees[0])
  columns = zip(*map(jax.tree.leaves, trees), strict=True)
  for name, leaf, column in zip(
    names, jax.tree.leaves(got), columns, strict=True
  ):
    if name == "steps":
      np.testing.assert_array_equal(leaf, column[0])
    elif leaf.size:
      tolerance = max(tolerance, float(jnp.finfo(dtype).eps))
      want = expect(*map(wide, column))
      np.testing.assert_allclose(
        wide(leaf), want, rtol=tolerance, atol=tolerance, err_msg=name
      )


class SlerpTest(parameterized.TestCase):
  @parameterized.parameters(
    (0.0, "float32"),
    (0.3, "float32", True),
    (1.0, "float32"),
    (-0.5, "float32"),
    (0.3, "bfloat16"),
    (0.3, "float16"),
  )
  def test_against_numpy(self, t, dtype, jit=False):
    models = [make(seed, dtype, t == 0.0) for seed in (1, 2)]
    copies = jax.tree.map(lambda x: x, models)
    fn = functools.partial(merging.slerp, t=t)
    got = (jax.jit(fn) if jit else fn)(models)
    check(got, lambda a, b: arc(a, b, t), models, dtype)
    chex.assert_trees_all_equal(models, copies)

  def test_ends_are_the_models(self):
    models = [make(1), make(2)]
    for t in (0, 1):
      got = merging.slerp(models, t)
      np.testing.assert_allclose(
        got["kernel"], models[t]["kernel"], rtol=1e-5, atol=1e-6
      )

  def test_t_of_leaves(self):
    models = [make(1), make(2)]
    got = merging.slerp(models, {"kernel": 0.25, ".*": 0.5})
    check(
      got, lambda a, b: arc(a, b, 0.25 if a.shape == (6, 5) else 0.5), models
    )

  def test_threshold(self):
    first = {"w": jnp.asarray([1.0, 0.0])}
    second = {
      "w": jnp.asarray([2 * np.cos(0.02), 2 * np.sin(0.02)], jnp.float32)
    }
    linear = (wide(first["w"]) + wide(second["w"])) / 2
    round_ = arc(wide(first["w"]), wide(second["w"]), 0.5)
    self.assertGreater(np.abs(round_ - linear).max(), 1e-5)
    got = merging.slerp([first, second])["w"]
    np.testing.assert_allclose(got, linear, rtol=1e-6)
    got = merging.slerp([first, second], threshold=1)["w"]
    np.testing.assert_allclose(got, round_, rtol=3e-7)

  @parameterized.parameters(1e-1, 1e-2, 1e-3, 1e-4)
  def test_small_angles_are_exact(self, angle):
    """Length on the arc is 1; on the chord it is cos(angle / 2)."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(400, 2)))
    pair = [q[:, 0], np.cos(angle) * q[:, 0] + np.sin(angle) * q[:, 1]]
    models = [{"w": jnp.asarray(x, jnp.float32)} for x in pair]
    got = wide(merging.slerp(models, 0.25, threshold=1)["w"])
    want = np.cos(angle / 4) * q[:, 0] + np.sin(angle / 4) * q[:, 1]
    self.assertLess(np.linalg.norm(got - want), 3e-7)

  def test_zero_and_opposite_are_linear(self):
    a = {"w": jnp.asarray([1.0, -2.0])}
    zero = jax.tree.map(jnp.zeros_like, a)
    got = merging.slerp([zero, a], 0.25, threshold=1)["w"]
    np.testing.assert_allclose(got, 0.25 * a["w"], rtol=1e-6)
    got = merging.slerp([a, tree.scale(a, -3.0)], 0.25, threshold=1)["w"]
    np.testing.assert_allclose(got, 0 * a["w"], atol=1e-6)

  @parameterized.parameters(1e-25, 1e25)
  def test_any_size(self, size):
    models = [make(1), make(2)]
    want = tree.scale(merging.slerp(models, 0.3), size)
    got = merging.slerp([tree.scale(params, size) for params in models], 0.3)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6 * size)

  def test_complex_is_the_vector_of_its_parts(self):
    rng = np.random.default_rng(0)
    pairs = rng.normal(size=(2, 4, 2)).astype(np.float32)
    whole = merging.slerp([{"w": jnp.asarray(x)} for x in pairs], 0.3)["w"]
    got = merging.slerp(
      [{"w": jnp.asarray(x[:, 0] + 1j * x[:, 1])} for x in pairs], 0.3
    )["w"]
    np.testing.assert_allclose(
      np.stack([got.real, got.imag], -1), whole, rtol=1e-5, atol=1e-6
    )

  def test_map_and_gradient(self):
    models = [{"w": make(1)["kernel"]}, {"w": make(2)["kernel"]}]

    def merge(t):
      return merging.slerp(models, t)["w"]

    ts = jnp.asarray([0.0, 0.4, 1.0])
    np.testing.assert_allclose(
      jax.vmap(merge)(ts), [merge(t) for t in ts], rtol=1e-5, atol=1e-6
    )
    step = 1e-2
    got = jax.jacfwd(merge)(0.4)
    want = (merge(0.4 + step) - merge(0.4 - step)) / (2 * step)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)

  def test_bad_input(self):
    model = make(1)
    for count in (1, 3):
      with self.assertRaisesRegex(
        ValueError, f"slerp takes exactly 2 models; got {count}"
      ):
        merging.slerp([model] * count)
    with self.assertRaisesRegex(tree.TreeMismatchError, "'bias'.*model 1"):
      merging.slerp([model, {**model, "bias": jnp.ones(2)}])
    with self.assertRaisesRegex(ValueError, "'bias' of model 0 holds NaN"):
      merging.slerp([{**model, "bias": jnp.full(5, jnp.nan)}, model])
    with self.assertRaisesRegex(ValueError, "t is nan"):
      merging.slerp([model] * 2, np.nan)
    with self.assertRaisesRegex(ValueError, "threshold must lie in"):
      merging.slerp([model] * 2, threshold=1.5)
    method = merging.slerp_method()
    state = method.update(method.init(model), model)
    with self.assertRaisesRegex(ValueError, "slerp takes no weights; give"):
      method.update(state, model, 2.0)


class NuslerpTest(parameterized.TestCase):
  @parameterized.product(
    weights=[None, (1.0, 3.0), (2.0, -0.5)],
    with_base=[False, True],
    flatten=[True, False],
  )
  def test_against_numpy(self, weights, with_base, flatten):
    special = with_base and flatten
    base, *models = (make(seed, special=special) for seed in range(3))
    share = 0.5 if weights is None else weights[1] / sum(weights)

    def expect(o, a, b):
      o = o if with_base else np.zeros_like(o)
      fn = functools.partial(arc, t=share)
      axes = range(o.ndim) if flatten or not o.ndim else [o.ndim - 1]
      return o + along(fn, a - o, b - o, list(axes))

    got = merging.nuslerp(
      models, weights, base if with_base else None, flatten=flatten
    )
    first = base if with_base else models[0]
    check(
      got,
      lambda _, o, a, b: expect(o, a, b),
      [first, base, *models],
      tolerance=1e-5,
    )

  @parameterized.parameters(
    (-2, {"kernel": [0], "conv": [1], "bias": [0]}),
    ((-4, -3, -2), {"kernel": [0], "conv": [0, 1], "bias": [0]}),
    (5, {"kernel": [0, 1], "conv": [0, 1, 2], "bias": [0]}),
  )
  def test_axis(self, axis, leaves):
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 4), "conv": (3, 2, 4), "bias": (4,)}
    models = [
      {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32)
        for name, shape in shapes.items()
      }
      for _ in range(2)
    ]
    got = merging.nuslerp(models, [1, 2], flatten=False, axis=axis)
    for name, axes in leaves.items():
      want = along(
        functools.partial(arc, t=2 / 3), *(wide(m[name]) for m in models), axes
      )
      np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=1e-6)

  def test_bad_input(self):
    model = make(1)
    with self.assertRaisesRegex(ValueError, "nuslerp takes exactly 2 models"):
      merging.nuslerp([model] * 3)
    with self.assertRaisesRegex(ValueError, "weights sum to 0 for leaf"):
      merging.nuslerp([model] * 2, [1, -1])
    with self.assertRaisesRegex(ValueError, "got 3 weights for 2 models"):
      merging.nuslerp([model] * 2, [1, 1, 1])
    with self.assertRaisesRegex(tree.TreeMismatchError, "model 0"):
      merging.nuslerp([{**model, "bias": 1.0}, model], base=model)
    for axis in (1.5, (), "01", True, None):
      with self.assertRaisesRegex(ValueError, "axis must be an int"):
        merging.nuslerp([model] * 2, axis=axis)


class MultislerpTest(parameterized.TestCase):
  @parameterized.parameters(
    (None, False, True),
    ((1.0, 2.0, 3.0), False, True),
    ((2.0, -0.5, 1.0), True, True),
    ((1.0, 2.0, 3.0), True, False),
  )
  def test_against_numpy(self, weights, with_base, normalize_weights):
    base, *models = (make(seed, special=with_base) for seed in range(4))
    w = np.ones(3) if weights is None else np.asarray(weights)
    w = w / w.sum() if normalize_weights else w

    def expect(_, o, *leaves):
      o = o if with_base else np.zeros_like(o)
      taus = [leaf - o for leaf in leaves]
      if not any(tau.any() for tau in taus):
        return o
      norms = np.array([np.linalg.norm(tau) for tau in taus])
      m = sum(w_i * tau / n for w_i, tau, n in zip(w, taus, norms, strict=True))
      if np.linalg.norm(m) < 1e-9:
        return o + sum(w_i * tau for w_i, tau in zip(w, taus, strict=True))
      m = m / np.linalg.norm(m)
      # The tangents at the mean sum to zero.
      tangents = [
        tau / n - np.sum(m * tau / n) * m
        for tau, n in zip(taus, norms, strict=True)
      ]
      self.assertLess(
        np.abs(sum(x * y for x, y in zip(w, tangents, strict=True))).max(),
        1e-12,
      )
      return o + w @ norms * m

    got = merging.multislerp(
      models,
      weights,
      base if with_base else None,
      normalize_weights=normalize_weights,
    )
    first = base if with_base else models[0]
    check(got, expect, [first, base, *models], tolerance=1e-5)

  def test_equal_weights_of_two_equal_lengths_is_slerp(self):
    rng = np.random.default_rng(0)
    pair = rng.normal(size=(2, 9))
    pair /= np.linalg.norm(pair, axis=1, keepdims=True)
    models = [{"w": jnp.asarray(x, jnp.float32)} for x in pair]
    np.testing.assert_allclose(
      merging.multislerp(models)["w"], merging.slerp(models)["w"], rtol=1e-5
    )

  def test_cancelling_directions_are_linear(self):
    angles = 2 * np.pi * np.arange(3) / 3
    models = [
      {"w": length * jnp.asarray([np.cos(a), np.sin(a)], jnp.float32)}
      for a, length in zip(angles, (1.0, 2.0, 3.0), strict=True)
    ]
    want = merging.average(models)["w"]
    np.testing.assert_allclose(merging.multislerp(models)["w"], want, atol=1e-6)

  def test_bad_input(self):
    model = make(1)
    with self.assertRaisesRegex(ValueError, "weights sum to 0 for leaf"):
      merging.multislerp([model] * 2, [1, -1])
    merging.multislerp([model] * 2, [1, -1], normalize_weights=False)
    with self.assertRaisesRegex(ValueError, "eps must lie in"):
      merging.multislerp([model], eps=-1.0)
    with self.assertRaisesRegex(ValueError, "models is empty"):
      merging.multislerp([])


RULES = {
  "slerp": (merging.slerp, merging.slerp_method()),
  "nuslerp": (merging.nuslerp, merging.nuslerp_method()),
  "nuslerp_rows": (
    functools.partial(merging.nuslerp, flatten=False),
    merging.nuslerp_method(flatten=False),
  ),
  "multislerp": (merging.multislerp, merging.multislerp_method()),
}


class RulesTest(parameterized.TestCase):
  @parameterized.parameters(*RULES)
  def test_equal_models_are_a_fixed_point(self, name):
    model = make(1)
    got = RULES[name][0]([model] * 2)
    chex.assert_trees_all_close(got, model, rtol=1e-6)
    half = {"w": model["kernel"].astype(jnp.bfloat16)}
    chex.assert_trees_all_close(RULES[name][0]([half] * 2), half, rtol=1e-2)

  @parameterized.parameters(*RULES)
  def test_streamed_is_the_list(self, name):
    fn, method = RULES[name]
    models = [make(1), make(2)]
    state = method.init(models[0])
    chex.assert_trees_all_equal(method.finalize(state), models[0])
    for params in models:
      state = method.update(state, params)
    chex.assert_trees_all_equal(method.finalize(state), fn(models))

  @parameterized.parameters("nuslerp", "multislerp")
  def test_streamed_task_vectors_with_weights(self, name):
    base, *models = map(make, range(3))
    method = getattr(merging, f"{name}_method")(task_vectors=True)
    state = method.init(base)
    for params, weight in zip(models, (1.0, 2.0), strict=True):
      state = method.update(state, params, weight)
    want = getattr(merging, name)(models, [1.0, 2.0], base)
    chex.assert_trees_all_equal(method.finalize(state), want)
    # Weights that no list function lets through count as equal.
    state = method.init(base)
    for params, weight in zip(models, (1.0, -1.0), strict=True):
      state = method.update(state, params, weight)
    want = getattr(merging, name)(models, base=base)
    chex.assert_trees_all_close(method.finalize(state), want, rtol=1e-6)

  @parameterized.parameters("slerp", "nuslerp_rows", "multislerp")
  def test_gradients_are_finite(self, name):
    """At equal, opposite and zero leaves as well."""
    fn, _ = RULES[name]
    first = {
      "same": jnp.asarray([1.0, 2.0]),
      "opposite": jnp.asarray([1.0, 2.0]),
      "zeros": jnp.zeros(2),
      "half": jnp.zeros(2),
      "far": jnp.asarray([1.0, 2.0]),
    }
    second = {**first, "opposite": -first["same"], "half": first["same"]}
    second["far"] = jnp.asarray([-2.0, 0.5])

    def total(models):
      merged = jax.tree.leaves(fn(models))
      return sum(jnp.sum(leaf * (1 + leaf)) for leaf in merged)

    chex.assert_tree_all_finite(jax.jit(jax.grad(total))([first, second]))

  def test_gradients_of_weights(self):
    models = [{"w": make(1)["kernel"]}, {"w": make(2)["kernel"]}]
    for fn in (merging.nuslerp, merging.multislerp):

      def value(weights, fn=fn):
        return jnp.sum(fn(models, weights)["w"] ** 3)

      weights = jnp.asarray([0.4, 0.6])
      got = jax.jit(jax.grad(value))(weights)
      step = 1e-2
      want = [
        (value(weights + d) - value(weights - d)) / (2 * step)
        for d in step * jnp.eye(2)
      ]
      np.testing.assert_allclose(got, want, rtol=2e-2, atol=1e-3)


if __name__ == "__main__":
  absltest.main()
