"""The epoch benchmark compares like with like, and counts right."""

from __future__ import annotations

import importlib.util
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from benchmarks import _jaxmerge_epoch, _problem
from jaxmerge import training

_SIZES = (784, 400, 200, 100, 10)
_HAS_TORCH = importlib.util.find_spec("torch") is not None


class ProblemTest(absltest.TestCase):
  def test_layer_sizes(self):
    self.assertEqual(_problem.layer_sizes("mlpnet"), _SIZES)

  def test_flops_match_the_compiler(self):
    examples = 32
    kernels, _ = _problem.random_ends(_SIZES)
    images, labels = _problem.load_images("synthetic", examples, None)
    loss_fn = _jaxmerge_epoch.make_loss("mlpnet", 0.1, 0.3)
    batch = {"input": jnp.asarray(images), "label": jnp.asarray(labels)}
    gradient = jax.jit(jax.grad(lambda p: loss_fn(p, batch, None).mean()))
    compiled = gradient.lower(_jaxmerge_epoch.as_params(kernels)).compile()
    flops = _problem.epoch_flops(_SIZES, examples)
    counted = compiled.cost_analysis()["flops"]
    # The compiler also counts what is not a matrix product.
    self.assertLess(flops, counted)
    self.assertLess(counted, 1.02 * flops)

  def test_ends_are_reproducible(self):
    first, second = _problem.random_ends((4, 3, 2))
    again, _ = _problem.random_ends((4, 3, 2))
    self.assertEqual([w.shape for w in first], [(4, 3), (3, 2)])
    np.testing.assert_array_equal(first[0], again[0])
    self.assertGreater(np.abs(first[0] - second[0]).max(), 0.0)


class JaxmergeTest(absltest.TestCase):
  def test_runs_until_stopped(self):
    images, labels = _problem.load_images("synthetic", 40, None)
    calls = []

    def on_epoch():
      calls.append(None)
      if len(calls) == 3:
        raise _jaxmerge_epoch.Stop

    _jaxmerge_epoch.run_epochs(
      "mlpnet",
      images,
      labels,
      _problem.random_ends(_SIZES),
      batch_size=16,
      mean=_problem.MEAN,
      std=_problem.STD,
      on_epoch=on_epoch,
    )
    self.assertLen(calls, 3)


@absltest.skipUnless(
  _HAS_TORCH, "PyTorch is not installed: pip install -e '.[bench]'"
)
class TorchTest(parameterized.TestCase):
  @parameterized.product(
    step=("autograd", "fused", "foreach"),
    data=("float32", "float32-shuffled", "uint8"),
  )
  def test_steps_are_those_of_the_formula(self, step, data):
    import torch

    from benchmarks import _torch_epoch

    images, labels = _problem.load_images("synthetic", 24, None)
    ends = _problem.random_ends((784, 400, 200, 100, 10))
    rate, momentum, decay = 0.05, 0.9, 5e-4
    raw = torch.from_numpy(images.reshape(24, 784))
    normalized = _torch_epoch.normalize(raw, _problem.MEAN, _problem.STD)
    targets = torch.from_numpy(labels).to(torch.int64)
    epoch = _torch_epoch.Epoch(
      f"{step}/{data}",
      raw if data == "uint8" else normalized,
      targets,
      ends,
      batch_size=8,
      mean=_problem.MEAN,
      std=_problem.STD,
      learning_rate=rate,
      momentum=momentum,
      weight_decay=decay,
    )
    points = (0.2, 0.7, 0.45)
    for t in points:
      epoch.train_step(normalized, targets, t)

    loss_fn = _jaxmerge_epoch.make_loss("mlpnet", _problem.MEAN, _problem.STD)
    start, end = map(_jaxmerge_epoch.as_params, ends)
    batch = {"input": jnp.asarray(images), "label": jnp.asarray(labels)}

    def loss(bend, t):
      phi = jax.tree.map(
        lambda a, b, c: (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c,
        start,
        bend,
        end,
      )
      return loss_fn(phi, batch, None).mean()

    bend = jax.tree.map(lambda a, c: (a + c) / 2, start, end)
    trace = jax.tree.map(jnp.zeros_like, bend)
    for t in points:
      gradient = jax.grad(loss)(bend, t)
      trace = jax.tree.map(
        lambda m, g, w: momentum * m + g + decay * w, trace, gradient, bend
      )
      bend = jax.tree.map(lambda w, m: w - rate * m, bend, trace)
    for i, weight in enumerate(epoch.bend):
      np.testing.assert_allclose(
        weight.detach().numpy().T, bend[f"Dense_{i}"]["kernel"], atol=2e-5
      )

  @parameterized.parameters("float32", "float32-shuffled", "uint8")
  def test_an_epoch_visits_every_example_once(self, data):
    import torch

    from benchmarks import _torch_epoch

    raw = torch.arange(20, dtype=torch.uint8)[:, None].repeat(1, 784)
    images = raw if data == "uint8" else _torch_epoch.normalize(raw, 0.0, 1.0)
    epoch = _torch_epoch.Epoch(
      f"autograd/{data}",
      images,
      torch.arange(20),
      _problem.random_ends((784, 10)),
      batch_size=8,
      mean=0.0,
      std=1.0,
    )
    batches = list(epoch.batches())
    steps = training.plan_epoch(20, 8, 1).steps
    self.assertEqual([len(y) for _, y in batches], [8, 8, 4])
    self.assertLen(batches, steps)
    labels = [int(label) for label in itertools.chain(*(y for _, y in batches))]
    self.assertCountEqual(labels, range(20))
    for x, y in batches:
      np.testing.assert_allclose(
        x[:, 0].numpy() * 255, y.numpy(), rtol=1e-5, atol=1e-4
      )


if __name__ == "__main__":
  absltest.main()
