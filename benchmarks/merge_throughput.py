r"""Merge rules against copying the same bytes, and against PyTorch.

  pip install -e ".[bench]" \
    --extra-index-url https://download.pytorch.org/whl/cpu
  python -m benchmarks.merge_throughput [--smoke] [--out=merge.json]

Merges lists of models that lie in memory, in trees like a transformer's, and
counts the bytes that must move: every model, base and Fisher read once, the
result written once, whatever a rule does more often. The copies move as many
bytes a second as they read and write: `numpy.copyto` of the same models, leaf
by leaf, into memory that is in use already, in one thread and in two. The
result of a merge lies in new memory, which the system has to clear first; what
that costs says `numpy.copy`. PyTorch computes the same rules on the same
arrays (benchmarks/_torch_merge.py). All sides take turns in one process;
medians count, and ratios are taken within a run.

Then come the streamed methods, each in a fresh process that makes one model
after the other: the most memory that it ever holds, for more and more models.

Big memory pages make new memory cheaper. With the GNU C library the same
command after `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` measures with them.

Without PyTorch the package and the copies are measured alone.
"""

from __future__ import annotations

import concurrent.futures
import functools
import gc
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags

from benchmarks import _merge_problem, _turns
from jaxmerge import merging

PyTree = Any

DTYPES = ("float32", "bfloat16")
STREAMED = ("average", "magmax", "ties_leaf", "dare")
# So many parameters of all models together PyTorch is asked to merge: its time
# grows in proportion.
TORCH_LIMIT = 400e6


def define_flags() -> None:
  """Defines the flags, for a run of this module alone."""
  flags.DEFINE_bool("smoke", False, "Tiny trees, for seconds.")
  flags.DEFINE_list("methods", None, "Rules; all by default.")
  flags.DEFINE_list("models", ["2", "8", "32"], "Numbers of models.")
  flags.DEFINE_list("sizes", ["25e6", "100e6"], "Parameters a model.")
  flags.DEFINE_list("dtypes", list(DTYPES), "Dtypes of the models.")
  flags.DEFINE_integer("repeats", 5, "Turns, at most.", lower_bound=1)
  flags.DEFINE_float(
    "budget", 6.0, "Seconds after which a side sits out the other turns."
  )
  flags.DEFINE_float(
    "torch_limit", TORCH_LIMIT, "Parameters, of all models, for PyTorch."
  )
  flags.DEFINE_integer(
    "threads", None, "PyTorch's threads; all cores by default.", lower_bound=1
  )
  flags.DEFINE_bool("memory", True, "Whether memory is measured.")
  flags.DEFINE_string("out", None, "Writes the JSON here, too.")


# --- Rules -------------------------------------------------------------------


class Rule(NamedTuple):
  """A merge rule as both libraries compute it.

  Attributes:
    merge: `merge(base, models, fishers) -> params`, the package's.
    method: The streamed method.
    torch: The name of the function of _torch_merge.py.
    takes: What it reads besides the models: "base", "fishers" or nothing.
    copies: How many float32 copies of all models PyTorch holds at a time.
  """

  merge: Callable[[PyTree, Sequence[PyTree], Sequence[PyTree]], PyTree]
  method: Callable[[], merging.MergeMethod]
  torch: str
  takes: str = ""
  copies: int = 0


def _key() -> jax.Array:
  return jax.random.key(0)


RULES = {
  "average": Rule(
    lambda base, models, fishers: merging.average(models),
    merging.average_method,
    "average",
  ),
  "magmax": Rule(
    lambda base, models, fishers: merging.magmax(base, models),
    merging.magmax_method,
    "magmax",
    "base",
  ),
  "ties_leaf": Rule(
    lambda base, models, fishers: merging.ties(base, models, scope="leaf"),
    functools.partial(merging.ties_method, scope="leaf"),
    "ties_leaf",
    "base",
  ),
  "ties_vector": Rule(
    lambda base, models, fishers: merging.ties(base, models),
    merging.ties_method,
    "ties_vector",
    "base",
    4,
  ),
  "dare": Rule(
    lambda base, models, fishers: merging.dare(base, models, _key()),
    lambda: merging.dare_method(_key()),
    "dare",
    "base",
  ),
  "fisher_average": Rule(
    lambda base, models, fishers: merging.fisher_average(models, fishers),
    merging.fisher_average_method,
    "fisher_average",
    "fishers",
  ),
}


def moved_bytes(rule: Rule, nbytes: int, num_models: int) -> int:
  """Bytes that a merge has to read and to write."""
  trees = num_models + 1
  if rule.takes == "base":
    trees += 1
  if rule.takes == "fishers":
    trees += num_models
  return trees * nbytes


def needed_bytes(
  rule: Rule, nbytes: int, size: int, num_models: int, torch: bool
) -> int:
  """Memory that a side needs besides the models and their base."""
  trees = 3 + (num_models if rule.takes == "fishers" else 0)
  copies = rule.copies if torch else 1 if rule.copies else 0
  wide = 4 * size * (2 + num_models * copies if torch else 2 + copies)
  return trees * nbytes + wide


def available_bytes() -> int:
  """Memory that is free, as far as the system says."""
  try:
    with open("/proc/meminfo") as file:
      found = re.search(r"MemAvailable:\s+(\d+) kB", file.read())
  except OSError:
    found = None
  return int(found[1]) * 1024 if found else 1 << 62


# --- Sides -------------------------------------------------------------------


def _seconds(fn: Callable[[], Any]) -> float:
  start = time.perf_counter()
  result = jax.block_until_ready(fn())
  seconds = time.perf_counter() - start
  del result
  return seconds


def _as_bytes(leaf: jax.Array) -> np.ndarray:
  # NumPy copies the integers of a width alike; it knows no bfloat16.
  return np.asarray(leaf).view(f"uint{8 * leaf.dtype.itemsize}")


class Copies:
  """NumPy copies of models; one for each dtype and size."""

  def __init__(self, models: Sequence[PyTree]):
    self._models = [
      [_as_bytes(leaf) for leaf in jax.tree.leaves(params)] for params in models
    ]
    # Filled, so that the memory is there.
    self._targets = [
      [np.full_like(leaf, 1) for leaf in self._models[0]] for _ in range(2)
    ]
    self._pool = concurrent.futures.ThreadPoolExecutor(2)

  def _copy(self, start: int, step: int, number: int) -> None:
    for leaves in self._models[start:number:step]:
      for target, leaf in zip(self._targets[start], leaves, strict=True):
        np.copyto(target, leaf)

  def one_thread(self, number: int) -> None:
    """Copies so many models into one place, one after the other."""
    self._copy(0, 1, number)

  def two_threads(self, number: int) -> None:
    """Copies every other model in each of two threads, to a place each."""
    list(self._pool.map(lambda i: self._copy(i, 2, number), range(2)))

  def new_memory(self) -> list[np.ndarray]:
    """Copies one model into new memory."""
    return [leaf.copy() for leaf in self._models[0]]


def as_torch(params: PyTree) -> Any:
  """The leaves by name as PyTorch's tensors, in the same memory."""
  import torch

  from jaxmerge import tree

  return {
    name: torch.from_dlpack(leaf)
    for name, leaf in zip(
      tree.leaf_names(params), jax.tree.leaves(params), strict=True
    )
  }


def torch_merge(
  rule: Rule,
  base: PyTree,
  models: Sequence[PyTree],
  fishers: Sequence[PyTree],
) -> Callable[[], Any]:
  """The rule in PyTorch, ready to be called."""
  from benchmarks import _torch_merge

  fn = getattr(_torch_merge, rule.torch)
  tensors = [as_torch(params) for params in models]
  if rule.takes == "base":
    return functools.partial(fn, as_torch(base), tensors)
  if rule.takes == "fishers":
    return functools.partial(fn, tensors, [as_torch(one) for one in fishers])
  return functools.partial(fn, tensors)


def measure(
  rule: Rule,
  problem: _merge_problem.Models,
  trees: Sequence[PyTree],
  copies: Copies,
  number: int,
  *,
  repeats: int,
  budget: float,
  torch_limit: float,
) -> dict[str, Any]:
  """Times one rule on the base and the models that follow it."""
  result: dict[str, Any] = {}
  need = functools.partial(
    needed_bytes, rule, problem.nbytes, problem.size, number
  )
  free = 0.9 * available_bytes()
  if need(False) > free:
    return {"skipped": f"needs {need(False) / 1e9:.1f} GB more"}
  base, models = trees[0], trees[1 : number + 1]
  fishers = list(problem.fishers(number)) if rule.takes == "fishers" else []
  sides: dict[str, Callable[[], Any]] = {
    "copy": functools.partial(copies.one_thread, number),
    "copy_2": functools.partial(copies.two_threads, number),
    "copy_new": copies.new_memory,
    "jaxmerge": lambda: rule.merge(base, models, fishers),
  }
  if torch_limit == 0:
    pass
  elif number * problem.size > torch_limit:
    result["torch_skipped"] = f"more than {torch_limit:g} parameters"
  elif need(True) > free:
    result["torch_skipped"] = f"needs {need(True) / 1e9:.1f} GB more"
  else:
    sides["torch"] = torch_merge(rule, base, models, fishers)
  # Compiles, and fills the caches.
  for name in ("copy", "jaxmerge"):
    _seconds(sides[name])
  times = _turns.take_turns(
    {name: functools.partial(_seconds, fn) for name, fn in sides.items()},
    repeats,
    budget,
  )
  return result | summarize(
    times,
    {
      "jaxmerge": moved_bytes(rule, problem.nbytes, number),
      "copy": 2 * number * problem.nbytes,
      "copy_2": 2 * number * problem.nbytes,
      "copy_new": 2 * problem.nbytes,
    },
  )


def summarize(
  times: dict[str, list[float]], nbytes: dict[str, int]
) -> dict[str, Any]:
  """Medians, rates in bytes a second, and ratios."""
  seconds = {name: statistics.median(values) for name, values in times.items()}
  rates = {name: count / seconds[name] for name, count in nbytes.items()}
  result: dict[str, Any] = {
    "times": times,
    "seconds": seconds,
    "rates": rates,
    "of_copy": {
      name: rates["jaxmerge"] / rates[name] for name in rates if "copy" in name
    },
  }
  if "torch" in times:
    result["ratio"] = seconds["torch"] / seconds["jaxmerge"]
    # Sides that sat out have fewer turns.
    turns = [
      theirs / ours
      for theirs, ours in zip(times["torch"], times["jaxmerge"], strict=False)
    ]
    result["ratio_range"] = [min(turns), max(turns)]
  return result


# --- Memory ------------------------------------------------------------------


def peak_bytes() -> int:
  """The most memory that this process has held."""
  try:
    # Not getrusage, which starts from what the parent held.
    with open("/proc/self/status") as file:
      found = re.search(r"VmHWM:\s+(\d+) kB", file.read())
  except OSError:
    found = None
  if found:
    return int(found[1]) * 1024
  import resource

  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if platform.system() == "Darwin" else 1024 * peak


def stream(
  pipe: connection.Connection, name: str, size: int, dtype: str, number: int
) -> None:
  """Merges models that are made one at a time; sends the peak of memory."""
  problem = _merge_problem.Models(size, dtype)
  method = RULES[name].method()
  before = peak_bytes()
  start = time.perf_counter()
  state = method.init(problem.make(0))
  for i in range(1, number + 1):
    state = method.update(state, problem.make(i), donate=True)
  jax.block_until_ready(method.finalize(state))
  pipe.send(
    {
      "before": before,
      "peak": peak_bytes(),
      "seconds": time.perf_counter() - start,
      "nbytes": problem.nbytes,
    }
  )


def measure_memory(
  name: str, size: int, dtype: str, number: int
) -> dict[str, Any]:
  """Streams so many models in a process of its own."""
  context = multiprocessing.get_context("spawn")
  ours, theirs = context.Pipe()
  process = context.Process(
    target=stream, args=(theirs, name, size, dtype, number), daemon=True
  )
  process.start()
  theirs.close()
  try:
    return ours.recv()
  except EOFError:
    raise SystemExit("error: a measuring process failed, see above") from None
  finally:
    process.join()


# --- Report ------------------------------------------------------------------


def _report_cell(label: Sequence[str], cell: dict[str, Any]) -> list[str]:
  if "skipped" in cell:
    return [*label, f"skipped: {cell['skipped']}", *[""] * 7]
  times, rates, of_copy = (
    cell["times"]["jaxmerge"],
    cell["rates"],
    cell["of_copy"],
  )
  torch = cell.get("torch_skipped", "")
  ratio = ""
  if "ratio" in cell:
    low, high = cell["ratio_range"]
    torch = f"{cell['seconds']['torch']:.3f}"
    ratio = f"{cell['ratio']:.1f}x ({low:.1f} - {high:.1f})"
  return [
    *label,
    f"{cell['seconds']['jaxmerge']:.3f} ({min(times):.3f} - {max(times):.3f})",
    f"{rates['jaxmerge'] / 1e9:.1f}",
    f"{rates['copy'] / 1e9:.1f}",
    *(f"{100 * of_copy[side]:.0f}%" for side in ("copy", "copy_2", "copy_new")),
    torch,
    ratio,
  ]


HEADER = (
  "rule",
  "models",
  "jaxmerge s (range)",
  "GB/s",
  "copy GB/s",
  "of copy",
  "of 2 threads",
  "of new memory",
  "PyTorch s",
  "PyTorch / jaxmerge",
)


def _hardware() -> str:
  model = platform.processor() or platform.machine()
  try:
    with open("/proc/cpuinfo") as file:
      found = re.search(r"model name\s*: (.*)", file.read())
    model = found[1] if found else model
  except OSError:
    pass
  return f"{len(os.sched_getaffinity(0))} cores, {model}"


def run(settings: dict[str, Any]) -> dict[str, Any]:
  """Measures and prints; returns what was measured.

  Args:
    settings: "methods", "models", "sizes", "dtypes", "repeats", "budget",
      "torch_limit" (0 for no PyTorch), as the flags, and "streamed", the
      methods whose memory is measured.

  Returns:
    The same with the results, "memory" and "cells".
  """
  results: dict[str, Any] = {**settings, "cells": [], "memory": []}
  sizes, counts = settings["sizes"], sorted(settings["models"])
  # First, while this process is small.
  if settings["streamed"]:
    rows = []
    for name in settings["streamed"]:
      for number in counts:
        found = measure_memory(name, sizes[0], settings["dtypes"][0], number)
        peak = found["peak"] - found["before"]
        results["memory"].append({"method": name, "models": number} | found)
        rows.append(
          [
            name,
            str(number),
            f"{found['peak'] / 2**20:.0f}",
            f"{peak / 2**20:.0f}",
            f"{peak / found['nbytes']:.1f}",
            f"{found['seconds']:.2f}",
          ]
        )
    header = ["streamed", "models", "peak MiB", "more than before"]
    header += ["in models", "seconds, making the models included"]
    print(f"## Memory: {sizes[0]:g} parameters, {settings['dtypes'][0]}\n")
    print(_turns.table(header, rows) + "\n", flush=True)
  for size in sizes:
    for dtype in settings["dtypes"]:
      problem = _merge_problem.Models(size, dtype)
      free = 0.9 * available_bytes()
      # Room for the base, the targets of the copies, and results.
      room = int(free / problem.nbytes) - 8
      fitting = [number for number in counts if number <= room]
      rows = []
      print(f"## {problem.size / 1e6:.2f} million parameters, {dtype}\n")
      for number in counts[len(fitting) :]:
        nbytes = (number + 8) * problem.nbytes
        print(
          f"{number} models are skipped: with copies and results they need"
          f" {nbytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free\n"
        )
      if not fitting:
        continue
      trees = [problem.make(i) for i in range(fitting[-1] + 1)]
      copies = Copies(trees[1:])
      for name in settings["methods"]:
        for number in fitting:
          cell = measure(
            RULES[name],
            problem,
            trees,
            copies,
            number,
            repeats=settings["repeats"],
            budget=settings["budget"],
            torch_limit=settings["torch_limit"],
          )
          gc.collect()
          label = {"method": name, "models": number}
          results["cells"].append(
            label | {"size": problem.size, "dtype": dtype} | cell
          )
          rows.append(_report_cell([name, str(number)], cell))
      print(_turns.table(HEADER, rows) + "\n", flush=True)
      del trees, copies, problem
      gc.collect()
  return results


def main(argv: list[str]) -> None:
  """Measures, prints the tables, then the JSON."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  names = flags.FLAGS.methods or list(RULES)
  for name in names:
    if name not in RULES:
      raise app.UsageError(f"--methods: {name!r} is none of {', '.join(RULES)}")
  has_torch = importlib.util.find_spec("torch") is not None
  settings: dict[str, Any] = {
    "methods": names,
    "models": [int(value) for value in flags.FLAGS.models],
    "sizes": [int(float(value)) for value in flags.FLAGS.sizes],
    "dtypes": flags.FLAGS.dtypes,
    "repeats": flags.FLAGS.repeats,
    "budget": flags.FLAGS.budget,
    "torch_limit": flags.FLAGS.torch_limit if has_torch else 0,
    "streamed": [name for name in names if name in STREAMED],
  }
  if not flags.FLAGS.memory:
    settings["streamed"] = []
  if flags.FLAGS.smoke:
    settings |= {"sizes": [20_000], "models": [2], "repeats": 2}
    settings |= {"dtypes": ["float32"], "streamed": ["average"]}
  threads = flags.FLAGS.threads or len(os.sched_getaffinity(0))
  versions = f"jax {jax.__version__}, numpy {np.__version__}"
  if has_torch:
    import torch

    torch.set_num_threads(threads)
    versions += f", torch {torch.__version__} with {threads} threads"
  else:
    print("PyTorch is not installed: pip install -e '.[bench]'\n")
  tunables = os.environ.get("GLIBC_TUNABLES", "none")
  hardware = f"{_hardware()}; {versions}; GLIBC_TUNABLES: {tunables}"
  print(f"{hardware}\n", flush=True)
  results = {"hardware": hardware} | run(settings)
  text = json.dumps(results, indent=2)
  if flags.FLAGS.out:
    with open(flags.FLAGS.out, "w") as file:
      file.write(text + "\n")
  else:
    print(f"## JSON\n\n```json\n{text}\n```")


if __name__ == "__main__":
  define_flags()
  app.run(main)
