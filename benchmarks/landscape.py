r"""Profiles and planes against the same loops in PyTorch.

  pip install -e ".[bench]" \
    --extra-index-url https://download.pytorch.org/whl/cpu
  python -m benchmarks.landscape [--smoke] [--out=landscape.json]

Loss and accuracy of MLPNET (784-400-200-100-10, no biases) on as many examples
as MNIST's test set has, at 61 points of a Bezier curve and at 21 x 21 points of
the plane through its control points. PyTorch's loop forms a network for every
point and runs it on every batch. All sides take turns in one process, after a
first turn that compiles and is not counted; medians count, and ratios are
taken within a turn, against PyTorch's fastest batch size. Inputs are drawn
from a normal distribution, or MNIST's with --data_dir: the arithmetic is the
same.

Without PyTorch the package is measured alone.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from benchmarks import _jaxmerge_epoch, _problem, _turns
from jaxmerge import curves, models, training

NETWORK = "mlpnet"


def define_flags() -> None:
  """Defines the flags, for a run of this module alone."""
  flags.DEFINE_bool("smoke", False, "Few examples, for seconds.")
  flags.DEFINE_integer("examples", 10_000, "Number of examples.", lower_bound=1)
  flags.DEFINE_integer("repeats", 5, "Turns.", lower_bound=1)
  flags.DEFINE_list(
    "torch_batches", ["1000", "10000"], "PyTorch's batch sizes."
  )
  flags.DEFINE_integer(
    "threads", None, "PyTorch's threads; all cores by default.", lower_bound=1
  )
  flags.DEFINE_string(
    "data_dir", None, "Folder of prepared TFDS sets with MNIST."
  )
  flags.DEFINE_string("out", None, "Writes the JSON here, too.")


def load(examples: int, data_dir: str | None) -> tuple[np.ndarray, np.ndarray]:
  """Returns normalized images [examples, 784] and labels."""
  if data_dir is None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(examples, 784)).astype(np.float32)
    return images, rng.integers(0, 10, examples, dtype=np.int32)
  from jaxmerge import data as data_lib

  test = data_lib.load("mnist", "test", data_dir=data_dir)
  pixels = np.asarray(test.images[:examples], np.float32).reshape(-1, 784)
  normalized = (pixels / 255 - _problem.MEAN) / _problem.STD
  return normalized.astype(np.float32), np.asarray(
    test.labels[:examples], np.int32
  )


def draw_points() -> list[list[np.ndarray]]:
  """Draws the kernels of a curve's start, bend and end."""
  sizes = _problem.layer_sizes(NETWORK)
  start, end = _problem.random_ends(sizes)
  return [start, _problem.random_ends(sizes, seed=1)[0], end]


@functools.cache
def _metric() -> Callable[[Any, Any], dict[str, jax.Array]]:
  net = models.get(NETWORK)

  def metric(params: Any, batch: Any) -> dict[str, jax.Array]:
    logits = jnp.asarray(net.apply({"params": params}, batch["input"]))
    hits = logits.argmax(axis=-1) == batch["label"]
    return {
      "loss": optax.softmax_cross_entropy_with_integer_labels(
        logits, batch["label"]
      ),
      "accuracy": hits.astype(jnp.float32),
    }

  return metric


class Problem:
  """The two tasks, on the package's side and on PyTorch's.

  Attributes:
    weights: By task, the weights of the control points, [sums, 3].
  """

  def __init__(
    self, images: np.ndarray, labels: np.ndarray, grid: int, side: int
  ):
    self._images, self._labels = images, labels
    self._kernels = draw_points()
    self._data = training.replicate({"input": images, "label": labels}, 1)
    start, bend, end = map(_jaxmerge_epoch.as_params, self._kernels)
    self._grid = grid
    self._curve = curves.BezierCurve.through(start, bend, end)
    self._plane = curves.Plane.through(start, end, bend)
    self._axes = self._plane.axes(side)
    ts = jnp.linspace(0, 1, grid)
    on_curve = jax.vmap(lambda t: curves.bernstein_weights(t, 3))(ts)
    # The plane's order of control points is start, end, bend.
    on_plane = self._plane.weights(*np.meshgrid(*self._axes)).reshape(-1, 3)
    self.weights = {
      "profile": np.asarray(on_curve),
      "plane": on_plane[:, [0, 2, 1]],
    }

  def jaxmerge(self, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Losses and accuracies through the package."""
    if task == "profile":
      _, means = curves.profile(_metric(), self._curve, self._data, self._grid)
    else:
      found = curves.plane_values(
        _metric(),
        self._plane,
        {"test": self._data},
        *self._axes,
        chunk=len(self.weights[task]),
      )
      means = found.values["test"]
    return np.ravel(means["loss"]), np.ravel(means["accuracy"])

  def torch(self, task: str, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses and accuracies in PyTorch."""
    import torch

    from benchmarks import _torch_landscape

    return _torch_landscape.evaluate_sums(
      [[torch.from_numpy(kernel) for kernel in one] for one in self._kernels],
      self.weights[task],
      torch.from_numpy(self._images),
      torch.from_numpy(self._labels).to(torch.int64),
      batch_size,
    )


def _seconds(fn: Callable[[], Any]) -> float:
  start = time.perf_counter()
  fn()
  return time.perf_counter() - start


def summarize(times: dict[str, list[float]]) -> dict[str, Any]:
  """Medians, and PyTorch's fastest against the package within turns."""
  seconds = {name: statistics.median(values) for name, values in times.items()}
  result: dict[str, Any] = {"times": times, "seconds": seconds}
  others = [name for name in times if name != "jaxmerge"]
  if others:
    best = min(others, key=seconds.__getitem__)
    turns = [
      theirs / ours
      for theirs, ours in zip(times[best], times["jaxmerge"], strict=True)
    ]
    result |= {
      "best": best,
      "ratio": seconds[best] / seconds["jaxmerge"],
      "ratio_range": [min(turns), max(turns)],
    }
  return result


def run(problem: Problem, batches: list[int], repeats: int) -> dict[str, Any]:
  """Measures both tasks.

  Args:
    problem: The tasks.
    batches: PyTorch's batch sizes; empty for no PyTorch.
    repeats: Number of turns.

  Returns:
    By task, times, medians and ratios, and the product rate before it.
  """
  results = {}
  for task in ("profile", "plane"):
    sides: dict[str, Callable[[], Any]] = {
      "jaxmerge": functools.partial(problem.jaxmerge, task)
    }
    for size in batches:
      sides[f"torch {size}"] = functools.partial(problem.torch, task, size)
    # Compiles, and fills the caches; both must find the same.
    found = {name: fn() for name, fn in sides.items()}
    for losses, _ in found.values():
      np.testing.assert_allclose(losses, found["jaxmerge"][0], rtol=1e-3)
    rate = 2 * 2048**3 / _jaxmerge_epoch.matmul_seconds(2048)
    times = _turns.take_turns(
      {name: functools.partial(_seconds, fn) for name, fn in sides.items()},
      repeats,
    )
    results[task] = summarize(times) | {"product_flops": rate}
  return results


def report(results: dict[str, Any], problem: Problem) -> str:
  """The table of the results."""
  header = ["task", "points", "jaxmerge s (range)", "PyTorch s", "its batch"]
  header += ["PyTorch / jaxmerge (single turns)", "product rate, GFLOP/s"]
  rows = []
  for task, cell in results.items():
    ours = cell["times"]["jaxmerge"]
    row = [
      task,
      str(len(problem.weights[task])),
      f"{cell['seconds']['jaxmerge']:.2f} ({min(ours):.2f} - {max(ours):.2f})",
    ]
    if "best" in cell:
      low, high = cell["ratio_range"]
      row += [
        f"{cell['seconds'][cell['best']]:.2f}",
        cell["best"].split()[1],
        f"{cell['ratio']:.1f}x ({low:.1f} - {high:.1f})",
      ]
    else:
      row += ["", "", ""]
    rows.append([*row, f"{cell['product_flops'] / 1e9:.0f}"])
  return _turns.table(header, rows)


def main(argv: list[str]) -> None:
  """Measures, prints the table, then the JSON."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  has_torch = importlib.util.find_spec("torch") is not None
  examples = 200 if flags.FLAGS.smoke else flags.FLAGS.examples
  images, labels = load(examples, flags.FLAGS.data_dir)
  problem = Problem(
    images, labels, *((5, 3) if flags.FLAGS.smoke else (61, 21))
  )
  threads = flags.FLAGS.threads or len(os.sched_getaffinity(0))
  versions = f"jax {jax.__version__}"
  if has_torch:
    import torch

    torch.set_num_threads(threads)
    versions += f", torch {torch.__version__} with {threads} threads"
  else:
    print("PyTorch is not installed: pip install -e '.[bench]'\n")
  print(
    f"{len(images)} examples, {len(os.sched_getaffinity(0))} cores; "
    f"{versions}\n",
    flush=True,
  )
  batches = (
    [int(size) for size in flags.FLAGS.torch_batches] if has_torch else []
  )
  results = run(
    problem, batches, 2 if flags.FLAGS.smoke else flags.FLAGS.repeats
  )
  print(report(results, problem) + "\n")
  text = json.dumps(results, indent=2)
  if flags.FLAGS.out:
    with open(flags.FLAGS.out, "w") as file:
      file.write(text + "\n")
  else:
    print(f"## JSON\n\n```json\n{text}\n```")


if __name__ == "__main__":
  define_flags()
  app.run(main)
