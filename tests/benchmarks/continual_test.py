"""The continual benchmark computes the same on both sides."""

from __future__ import annotations

import importlib.util
import inspect

import numpy as np
from absl.testing import absltest

from benchmarks import _continual_protocol, _jaxmerge_continual, continual

_HAS_TORCH = importlib.util.find_spec("torch") is not None


class ProtocolTest(absltest.TestCase):
  def test_steps(self):
    protocol = _continual_protocol.Protocol(capacity=5, epochs=2, batch_size=4)
    # Networks take 3 and 2 steps an epoch, the curve of 5 + 5 examples 3.
    self.assertEqual(_continual_protocol.num_steps(protocol, [9, 8]), 16)

  def test_is_the_strategys_own(self):
    # What the paper and the package take where nothing is said.
    from jaxmerge import continual as lib

    protocol = _continual_protocol.Protocol()
    curve = lib.Training(
      protocol.curve_learning_rate,
      protocol.final_learning_rate,
      momentum=protocol.momentum,
      weight_decay=protocol.weight_decay,
      epochs=protocol.epochs,
      batch_size=protocol.batch_size,
    )
    default = inspect.signature(lib.merges.curve).parameters["training"]
    self.assertEqual(curve, default.default)


class JaxmergeTest(absltest.TestCase):
  def test_compiles_once(self):
    runner = _jaxmerge_continual.Runner(_continual_protocol.smoke())
    first = runner.run([0, 1])
    self.assertEqual(first.accuracies.shape, (2, 2))
    self.assertGreater(first.accuracies.mean(), 0.2)
    self.assertGreater(first.programs_compiled, 0)
    self.assertGreater(first.compile_seconds["compile"], 0)
    second = runner.run([2, 3])
    self.assertEqual(second.epochs_compiled, 0)
    self.assertEqual(second.programs_compiled, 0)


class ReportTest(absltest.TestCase):
  def test_report(self):
    compiled = {
      "epochs_compiled": 9,
      "programs_compiled": 90,
      "compile_seconds": {"trace": 1.0, "compile": 2.0},
    }
    result = {
      "info": {
        "steps": 1000,
        "torch": {
          "network": "fused/gathered",
          "curve": "foreach/gathered",
          "threads": 1,
          "failed": {},
        },
      },
      "times": {"first": [4.0], "compiled": [1.0], "torch": [2.0]},
      "seconds": {"first": 4.0, "compiled": 1.0, "torch": 2.0},
      "accuracies": {
        name: [[0.5, 1.0]] for name in ("first", "compiled", "torch")
      },
      "one_seed": compiled,
      "ratios": {
        "first": {"ratio": 0.5, "range": (0.5, 0.5)},
        "compiled": {"ratio": 2.0, "range": (2.0, 2.0)},
      },
      "seeds": {"seeds": 5, "first": 9.0, "compiled": 6.0, **compiled},
    }
    self.assertIn(
      "jaxmerge, compiled: 2.00x, the other way 0.50x", continual.report(result)
    )
    self.assertIn(
      "| 5 | 9 | 90 | 3.00 | 9.00 | 6.00 |", continual.report_seeds(result)
    )


@absltest.skipUnless(
  _HAS_TORCH, "PyTorch is not installed: pip install -e '.[bench]'"
)
class TorchTest(absltest.TestCase):
  def test_both_sides_find_the_same(self):
    from benchmarks import _torch_continual

    # Whole batches, a buffer that holds everything and t = 0.5: nothing is
    # left to chance.
    protocol = _continual_protocol.smoke()._replace(
      capacity=10_000, batch_size=10_000, epochs=20
    )
    runner = _jaxmerge_continual.Runner(
      protocol, t_sampling="beta", concentration=1e8
    )
    ours = runner.run([0])
    self.assertGreater(ours.accuracies.mean(), 0.2)
    program = _torch_continual.Program(protocol)
    kernels = _continual_protocol.initial(program.image_size, 0)
    for variant in _torch_continual.VARIANTS:
      if variant.startswith("compiled"):
        continue  # Needs a C++ compiler.
      with self.subTest(variant):
        _, accuracies, merged = program.run(
          variant, variant, kernels, 0, lambda steps: [0.5] * steps
        )
        for i, weight in enumerate(merged):
          kernel = np.asarray(ours.params[f"Dense_{i}"]["kernel"][0])
          np.testing.assert_allclose(weight.numpy().T, kernel, atol=2e-4)
          self.assertGreater(np.abs(kernel - kernels[i]).max(), 0.01)
        np.testing.assert_allclose(accuracies, ours.accuracies[0], atol=0.02)


if __name__ == "__main__":
  absltest.main()
