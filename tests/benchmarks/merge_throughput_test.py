"""The merge benchmark compares like with like, and counts right."""

from __future__ import annotations

import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from benchmarks import _merge_problem, _turns, merge_throughput
from jaxmerge import merging, tree

_HAS_TORCH = importlib.util.find_spec("torch") is not None
_SIZE = 3000


def _trees(problem, number):
  return [problem.make(i) for i in range(number + 1)]


class ProblemTest(parameterized.TestCase):
  @parameterized.parameters(2e4, 1e6, 25e6, 100e6)
  def test_size(self, size):
    shapes = _merge_problem.leaf_shapes(size)
    self.assertLess(abs(_merge_problem.count(shapes) - size), 0.01 * size)

  def test_models_are_small_changes_of_the_base(self):
    problem = _merge_problem.Models(_SIZE, "float32")
    base, first, second = _trees(problem, 2)
    tree.check_match(base, first, second)
    sizes = [leaf.size for leaf in jax.tree.leaves(base)]
    self.assertEqual(sum(sizes), problem.size)
    self.assertEqual(problem.nbytes, 4 * problem.size)
    again = problem.make(1)
    norm = lambda x: float(tree.norm(x))  # noqa: E731
    self.assertEqual(norm(tree.sub(again, first)), 0)
    for one, other in ((first, base), (second, base), (first, second)):
      change = norm(tree.sub(one, other)) / norm(base)
      self.assertGreater(change, 0.02)
      self.assertLess(change, 0.1)


class CountsTest(absltest.TestCase):
  def test_moved_bytes(self):
    rules = merge_throughput.RULES
    # Models, and the result; the base, or the Fisher of each model.
    for name, trees in (("average", 9), ("magmax", 10), ("fisher_average", 17)):
      moved = merge_throughput.moved_bytes(rules[name], 100, 8)
      self.assertEqual(moved, 100 * trees)

  def test_needed_bytes_grow_with_what_is_stacked(self):
    rules = merge_throughput.RULES
    need = lambda name, n: merge_throughput.needed_bytes(  # noqa: E731
      rules[name], 400, 100, n, True
    )
    self.assertEqual(need("average", 32), need("average", 2))
    self.assertGreater(need("ties_vector", 32), 32 * 400)
    self.assertGreater(merge_throughput.available_bytes(), 0)

  def test_summary(self):
    times = {"jaxmerge": [2.0, 1.0, 4.0], "copy": [1.0], "torch": [8.0, 3.0]}
    got = merge_throughput.summarize(times, {"jaxmerge": 300, "copy": 600})
    self.assertEqual(got["seconds"]["jaxmerge"], 2.0)
    self.assertEqual(got["rates"], {"jaxmerge": 150.0, "copy": 600.0})
    self.assertEqual(got["of_copy"], {"copy": 0.25})
    self.assertEqual(got["ratio"], 2.75)
    self.assertEqual(got["ratio_range"], [3.0, 4.0])

  def test_turns(self):
    order = []

    def side(name, seconds):
      return lambda: order.append(name) or seconds

    sides = {"a": side("a", 1.0), "b": side("b", 9.0)}
    times = _turns.take_turns(sides, 3, budget=5.0)
    self.assertEqual(times, {"a": [1.0] * 3, "b": [9.0]})
    self.assertEqual(order, ["a", "b", "a", "a"])

  def test_table(self):
    got = _turns.table(["a", "b"], [["1", "2"]])
    self.assertEqual(got, "| a | b |\n| --- | --- |\n| 1 | 2 |")

  def test_copies(self):
    problem = _merge_problem.Models(_SIZE, "bfloat16")
    models = _trees(problem, 2)[1:]
    copies = merge_throughput.Copies(models)
    copies.one_thread(2)
    as_bytes = lambda i: [  # noqa: E731
      np.asarray(leaf).view(np.uint16) for leaf in jax.tree.leaves(models[i])
    ]
    for got, want in zip(copies._targets[0], as_bytes(1), strict=True):
      np.testing.assert_array_equal(got, want)
    copies.two_threads(2)
    for i in range(2):
      for got, want in zip(copies._targets[i], as_bytes(i), strict=True):
        np.testing.assert_array_equal(got, want)


class RunTest(absltest.TestCase):
  def test_smoke(self):
    results = merge_throughput.run(
      {
        "methods": ["average", "ties_leaf"],
        "models": [2],
        "sizes": [_SIZE],
        "dtypes": ["float32"],
        "repeats": 2,
        "budget": 60.0,
        "torch_limit": 1e9 if _HAS_TORCH else 0,
        "streamed": ["average"],
      }
    )
    self.assertLen(results["cells"], 2)
    for cell in results["cells"]:
      self.assertEqual("torch" in cell["seconds"], _HAS_TORCH)
      numbers = [*cell["rates"].values(), *cell["of_copy"].values()]
      numbers += [*cell["seconds"].values(), cell.get("ratio", 1.0)]
      for number in numbers:
        self.assertGreater(number, 0)
        self.assertTrue(math.isfinite(number))
    (memory,) = results["memory"]
    self.assertGreaterEqual(memory["peak"], memory["before"])
    self.assertGreater(memory["before"], 0)


@absltest.skipUnless(
  _HAS_TORCH, "PyTorch is not installed: pip install -e '.[bench]'"
)
class TorchTest(parameterized.TestCase):
  @parameterized.product(
    name=("average", "magmax", "ties_leaf", "ties_vector", "fisher_average"),
    dtype=("float32", "bfloat16"),
  )
  def test_the_same_result(self, name, dtype):
    rule = merge_throughput.RULES[name]
    problem = _merge_problem.Models(_SIZE, dtype)
    base, *models = _trees(problem, 3)
    fishers = list(problem.fishers(3))
    want = rule.merge(base, models, fishers)
    got = merge_throughput.torch_merge(rule, base, models, fishers)()
    # A sum that is rounded otherwise may give a sign to what had none.
    wrong = 0
    for leaf_name, leaf in zip(
      tree.leaf_names(want), jax.tree.leaves(want), strict=True
    ):
      one = got[leaf_name].float().numpy()
      other = np.asarray(leaf, np.float32)
      self.assertEqual(str(got[leaf_name].dtype), f"torch.{dtype}")
      close = np.isclose(one, other, rtol=1e-2 if dtype == "bfloat16" else 1e-5)
      wrong += int((~close).sum())
    self.assertLessEqual(wrong, 0.001 * problem.size)

  def test_dare(self):
    from benchmarks import _torch_merge

    problem = _merge_problem.Models(_SIZE, "float32")
    base, *models = _trees(problem, 2)
    as_torch = merge_throughput.as_torch
    tensors = as_torch(base), [as_torch(params) for params in models]
    got = _torch_merge.dare(*tensors, density=1.0)
    want = merging.dare(base, models, jax.random.key(0), density=1.0)
    for name, leaf in zip(
      tree.leaf_names(want), jax.tree.leaves(want), strict=True
    ):
      np.testing.assert_allclose(got[name].numpy(), leaf, rtol=1e-5, atol=1e-7)
    # Half of one model's entries are dropped, the others count twice.
    sparse = _torch_merge.dare(tensors[0], tensors[1][:1])
    kept = 0
    for name, start in tensors[0].items():
      change = (sparse[name] - start).numpy()
      tau = (tensors[1][0][name] - start).numpy()
      is_kept = np.isclose(change, 2 * tau, rtol=1e-3, atol=1e-8)
      np.testing.assert_allclose(change[~is_kept], 0, atol=1e-8)
      kept += int(is_kept.sum())
    self.assertAlmostEqual(kept / problem.size, 0.5, delta=0.05)

  def test_tensors_share_the_memory(self):
    leaf = jnp.arange(64.0)
    tensor = merge_throughput.as_torch({"w": leaf})["w"]
    self.assertEqual(tensor.data_ptr(), leaf.unsafe_buffer_pointer())


if __name__ == "__main__":
  absltest.main()
