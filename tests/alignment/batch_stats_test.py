"""Tests of the statistics of batch normalisation, estimated anew."""

from __future__ import annotations

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import alignment, models


class _Net(nn.Module):
  """One dense layer and one batch normalisation, Flax's own."""

  momentum: float = 0.99

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dense(3, name="dense")(x)
    return nn.BatchNorm(
      use_running_average=not train,
      momentum=self.momentum,
      use_fast_variance=False,
      name="norm",
    )(x)


def _apply(model):
  def apply_fn(variables, batch):
    _, new = model.apply(variables, batch, train=True, mutable="batch_stats")
    return new["batch_stats"]

  return apply_fn


def _draw(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _case(momentum=0.9, offset=0.0):
  """Batches that differ in mean and scale, and the statistics of them all."""
  model = _Net(momentum)
  x = _draw((5, 8, 4)) * np.arange(1, 6, dtype=np.float32)[:, None, None]
  x += offset + np.arange(5, dtype=np.float32)[:, None, None]
  kernel, bias = _draw((4, 3), 1), _draw((3,), 2)
  ones = np.ones(3, np.float32)
  variables = {
    "params": {
      "dense": {"kernel": kernel, "bias": bias},
      "norm": {"scale": ones, "bias": ones},
    },
    "batch_stats": {"norm": {"mean": 7 * ones, "var": 9 * ones}},
  }
  hidden = np.float64(x.reshape(-1, 4)) @ kernel + bias
  return model, variables, x, hidden


class ResetTest(parameterized.TestCase):
  @parameterized.product(momentum=(0.0, 0.5, 0.99), stacked=(True, False))
  def test_statistics_of_all_the_data(self, momentum, stacked):
    model, variables, x, hidden = _case(momentum)
    found = alignment.reset_batch_stats(
      _apply(model), variables, x if stacked else iter(x)
    )
    stats = found["batch_stats"]["norm"]
    tolerance = 1e-6 / (1 - momentum)
    np.testing.assert_allclose(
      stats["mean"], hidden.mean(0), rtol=tolerance, atol=tolerance
    )
    np.testing.assert_allclose(stats["var"], hidden.var(0), rtol=tolerance)
    chex.assert_trees_all_equal(found["params"], variables["params"])
    chex.assert_trees_all_equal_shapes_and_dtypes(found, variables)
    # Evaluation then normalises the data.
    out = model.apply(found, x.reshape(-1, 4))
    np.testing.assert_allclose(np.mean(out, 0), np.ones(3), atol=1e-3)
    np.testing.assert_allclose(np.std(out, 0), np.ones(3), atol=1e-3)

  def test_batches_of_different_sizes(self):
    model, variables, x, hidden = _case()
    flat = x.reshape(-1, 4)
    found = alignment.reset_batch_stats(
      _apply(model), variables, [flat[:16], flat[16:18], flat[18:]]
    )["batch_stats"]["norm"]
    np.testing.assert_allclose(found["mean"], hidden.mean(0), rtol=1e-4)
    np.testing.assert_allclose(found["var"], hidden.var(0), rtol=1e-4)

  def test_large_statistics(self):
    """The momentum is found though the statistics are far above 1."""
    model, variables, x, hidden = _case(0.9, offset=1000.0)
    found = alignment.reset_batch_stats(_apply(model), variables, x)
    stats = found["batch_stats"]["norm"]
    np.testing.assert_allclose(stats["mean"], hidden.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], hidden.var(0), rtol=1e-3)

  def test_under_jit_and_vmap(self):
    model, variables, x, _ = _case()
    apply_fn = _apply(model)
    kernels = jnp.stack(
      [jnp.ones((4, 3)), variables["params"]["dense"]["kernel"]]
    )

    def reset(kernel):
      dense = {**variables["params"]["dense"], "kernel": kernel}
      params = {**variables["params"], "dense": dense}
      return alignment.reset_batch_stats(
        apply_fn, {**variables, "params": params}, x
      )["batch_stats"]

    together = jax.jit(jax.vmap(reset))(kernels)
    for i in range(2):
      chex.assert_trees_all_close(
        jax.tree.map(lambda leaf: leaf[i], together),  # noqa: B023
        reset(kernels[i]),
        rtol=1e-5,
        atol=1e-5,
      )

  def test_network_of_the_package(self):
    """Behind a first normalisation, the inputs are those of training mode."""
    model = models.CNN(widths=(3, 4), num_classes=2)
    x = _draw((3, 8, 4, 4, 2)) + np.arange(3).reshape(3, 1, 1, 1, 1)
    x = x.astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x[0])
    found = alignment.reset_batch_stats(
      _apply(model), variables, {"x": x}["x"]
    )["batch_stats"]

    seen = {}
    for batch in x:
      _, captured = model.apply(
        variables,
        batch,
        train=True,
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=lambda module, _: isinstance(module, nn.Conv),
      )
      for name, value in captured["intermediates"].items():
        if name.startswith("Conv"):
          seen.setdefault(name, []).append(np.float64(value["__call__"][0]))
    for name, values in seen.items():
      values = np.concatenate(values).reshape(-1, values[0].shape[-1])
      stats = found[name.replace("Conv", "Norm")]
      np.testing.assert_allclose(
        stats["mean"], values.mean(0), rtol=1e-4, atol=1e-5
      )
      np.testing.assert_allclose(stats["var"], values.var(0), rtol=1e-4)


class ErrorsTest(parameterized.TestCase):
  def test_evaluation_mode(self):
    model, variables, x, _ = _case()

    def apply_fn(variables, batch):
      return model.apply(variables, batch, mutable="batch_stats")[1][
        "batch_stats"
      ]

    with self.assertRaisesRegex(ValueError, "in training mode"):
      alignment.reset_batch_stats(apply_fn, variables, x)

  @parameterized.parameters(
    ({}, "have no batch_stats"),
    ({"n": {"mean": 1.0, "var": 1.0, "count": 1.0}}, "leaf 'n/count'"),
    ({"n": {"mean": 1.0}}, "has no 'n/var' beside it"),
  )
  def test_statistics(self, stats, message):
    stats = jax.tree.map(jnp.asarray, stats)
    with self.assertRaisesRegex(ValueError, message):
      alignment.reset_batch_stats(
        lambda variables, batch: stats, {"batch_stats": stats}, jnp.ones((1, 1))
      )

  @parameterized.product(stacked=(True, False), data=(True, False))
  def test_not_finite(self, stacked, data):
    model, variables, x, _ = _case()
    if data:
      x[3, 0] = np.nan
    else:
      variables["params"]["dense"]["bias"][1] = np.inf
    message = "has entries that are NaN" if data else "leaf 'dense/bias' of the"
    with self.assertRaisesRegex(ValueError, message):
      alignment.reset_batch_stats(
        _apply(model), variables, x if stacked else [*x]
      )

  @parameterized.parameters(([],), (np.zeros((0, 2, 4), np.float32),))
  def test_no_batches(self, batches):
    model, variables, _, _ = _case()
    with self.assertRaisesRegex(ValueError, "there is no batch"):
      alignment.reset_batch_stats(_apply(model), variables, batches)


if __name__ == "__main__":
  absltest.main()
