r"""Exact transport against SciPy and POT, and Sinkhorn iterations a second.

  pip install -e ".[alignment]"
  python -m benchmarks.alignment_transport [--smoke] [--out=transport.json]

The costs are squared distances between the rows of two random kernels, as
alignment has them. All sides get the same cost and take turns in one process;
medians count. Between equally many points SciPy solves the assignment problem
and POT the transport problem; the package's time is that of `exact_plan`, from
the cost on the device to the plan there, alone and in a compiled program. POT
is given as many iterations as it needs: its own limit, 100,000, ends the
largest problem before the optimum.

A Sinkhorn iteration is one update of both potentials in the log domain, with
nothing looked at in between (one check of the error at the end).
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from scipy import optimize

from benchmarks import _turns
from jaxmerge import alignment

SIZES = ((400, 400), (1024, 1024), (4096, 4096), (800, 400), (1024, 400))
SINKHORN = (400, 1024, 4096)


def define_flags() -> None:
  """Defines the flags, for a run of this module alone."""
  flags.DEFINE_bool("smoke", False, "Small problems, for seconds.")
  flags.DEFINE_integer("repeats", 5, "Turns, at most.", lower_bound=1)
  flags.DEFINE_float(
    "budget", 30.0, "Seconds after which a side sits out the other turns."
  )
  flags.DEFINE_string("out", None, "Writes the JSON here, too.")


def make_cost(n: int, m: int, inputs: int = 784, seed: int = 0) -> np.ndarray:
  """Squared distances between n and m random neurons, float32."""
  rng = np.random.default_rng(seed)
  x, y = (rng.normal(size=(k, inputs)) / inputs**0.5 for k in (n, m))
  squares = np.square(x).sum(1)[:, None] + np.square(y).sum(1)[None]
  return np.maximum(squares - 2 * x @ y.T, 0).astype(np.float32)


def _seconds(fn: Callable[[], Any]) -> float:
  start = time.perf_counter()
  jax.block_until_ready(fn())
  return time.perf_counter() - start


def measure_exact(
  n: int, m: int, repeats: int, budget: float
) -> dict[str, Any]:
  """Seconds of every side for one problem, and how their costs agree."""
  import ot

  cost = make_cost(n, m)
  on_device = jnp.asarray(cost)
  a, b = np.full(n, 1 / n), np.full(m, 1 / m)
  wide = cost.astype(np.float64)
  compiled = jax.jit(alignment.exact_plan)
  sides: dict[str, Callable[[], Any]] = {
    "jaxmerge": lambda: alignment.exact_plan(on_device),
    "jitted": lambda: compiled(on_device),
    "pot": lambda: ot.emd(a, b, wide, numItermax=10**9),
  }
  if n == m:
    sides["scipy"] = lambda: optimize.linear_sum_assignment(cost)
  # Compiled, and POT imported, before it counts; without cost it is quick.
  for solve in (alignment.exact_plan, compiled):
    jax.block_until_ready(solve(jnp.zeros_like(on_device)))
  times = _turns.take_turns(
    {side: functools.partial(_seconds, fn) for side, fn in sides.items()},
    repeats,
    budget,
  )
  found = alignment.exact_plan(on_device) if max(n, m) <= 1024 else None
  seconds = {side: statistics.median(values) for side, values in times.items()}
  result: dict[str, Any] = {"n": n, "m": m, "times": times, "seconds": seconds}
  result["ratios"] = {
    side: seconds[side] / seconds["jaxmerge"]
    for side in ("pot", "scipy")
    if side in seconds
  }
  if found is not None:
    theirs = float((sides["pot"]() * wide).sum())
    result["cost"] = {"jaxmerge": float(found.cost), "pot": theirs}
  return result


def measure_sinkhorn(
  n: int, iterations: int, repeats: int, budget: float
) -> dict[str, Any]:
  """Iterations a second of the package and of POT."""
  import warnings

  import ot

  cost = make_cost(n, n)
  # jit, so that an error above the threshold is not reported.
  solve = jax.jit(
    functools.partial(
      alignment.sinkhorn_plan,
      epsilon=1e-2,
      max_iterations=iterations,
      threshold=1e-30,
    )
  )
  on_device = jnp.asarray(cost)
  weights = np.full(n, 1 / n, np.float32)
  relative = cost / cost.mean()

  def pot() -> np.ndarray:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      return ot.sinkhorn(
        weights,
        weights,
        relative,
        1e-2,
        method="sinkhorn_log",
        numItermax=iterations,
        stopThr=0,
      )

  sides: dict[str, Callable[[], Any]] = {
    "jaxmerge": lambda: solve(on_device),
    "pot": pot,
  }
  jax.block_until_ready(solve(on_device))
  times = _turns.take_turns(
    {side: functools.partial(_seconds, fn) for side, fn in sides.items()},
    repeats,
    budget,
  )
  rates = {
    side: iterations / statistics.median(values)
    for side, values in times.items()
  }
  return {
    "n": n,
    "iterations": iterations,
    "times": times,
    "rates": rates,
    "ratio": rates["jaxmerge"] / rates["pot"],
  }


def _hardware() -> str:
  model = platform.processor() or platform.machine()
  try:
    with open("/proc/cpuinfo") as file:
      found = re.search(r"model name\s*: (.*)", file.read())
    model = found[1] if found else model
  except OSError:
    pass
  return f"{len(os.sched_getaffinity(0))} cores, {model}"


def run(
  sizes: tuple[tuple[int, int], ...],
  sinkhorn: tuple[int, ...],
  repeats: int,
  budget: float,
) -> dict[str, Any]:
  """Measures and prints; returns what was measured.

  Args:
    sizes: Numbers of points of the exact problems.
    sinkhorn: Numbers of points for Sinkhorn.
    repeats: Turns, at most.
    budget: Seconds after which a side sits out the other turns.

  Returns:
    The results, "exact" and "sinkhorn".
  """
  results: dict[str, Any] = {"exact": [], "sinkhorn": []}
  rows = []
  for n, m in sizes:
    found = measure_exact(n, m, repeats, budget)
    results["exact"].append(found)
    seconds, ratios = found["seconds"], found["ratios"]
    rows.append(
      [f"{n} x {m}"]
      + [
        f"{seconds[side]:.4f}" if side in seconds else ""
        for side in ("jaxmerge", "jitted", "scipy", "pot")
      ]
      + [
        f"{ratios[side]:.2f}x" if side in ratios else ""
        for side in ("scipy", "pot")
      ]
    )
  header = ["exact", "jaxmerge s", "in jit s", "SciPy s", "POT s"]
  header += ["SciPy / jaxmerge", "POT / jaxmerge"]
  print(_turns.table(header, rows) + "\n", flush=True)
  rows = []
  for n in sinkhorn:
    iterations = 10 if n > 2000 else 100
    found = measure_sinkhorn(n, iterations, repeats, budget)
    results["sinkhorn"].append(found)
    rates = found["rates"]
    rows.append(
      [
        f"{n} x {n}",
        f"{rates['jaxmerge']:.0f}",
        f"{rates['pot']:.0f}",
        f"{found['ratio']:.1f}x",
      ]
    )
  header = ["Sinkhorn", "jaxmerge iterations/s", "POT iterations/s"]
  print(_turns.table([*header, "jaxmerge / POT"], rows) + "\n", flush=True)
  return results


def main(argv: list[str]) -> None:
  """Measures, prints the tables, then the JSON."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  hardware = f"{_hardware()}; jax {jax.__version__}"
  print(f"{hardware}\n", flush=True)
  if flags.FLAGS.smoke:
    results = run(((40, 40), (40, 20)), (40,), 2, 1.0)
  else:
    results = run(SIZES, SINKHORN, flags.FLAGS.repeats, flags.FLAGS.budget)
  text = json.dumps({"hardware": hardware} | results, indent=2)
  if flags.FLAGS.out:
    with open(flags.FLAGS.out, "w") as file:
      file.write(text + "\n")
  else:
    print(f"## JSON\n\n```json\n{text}\n```")


if __name__ == "__main__":
  define_flags()
  app.run(main)
