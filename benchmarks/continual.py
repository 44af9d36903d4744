r"""Mode Path Fusion over MNIST's tasks, against a plain PyTorch program.

  pip install -e ".[bench]" \
    --extra-index-url https://download.pytorch.org/whl/cpu
  python -m benchmarks.continual --data_dir=FOLDER [--out=continual.json]
  python -m benchmarks.continual --smoke

Times one seed of the paper's Table 2 protocol: MNIST in five tasks of two
classes, MLPNET (784-400-200-100-10, no biases), every network from the same
theta_0 for 10 epochs at batch 32, 500 stored examples a task, from the second
task on a quadratic curve of 10 epochs on all that is stored, whose middle is
the merged network; the test set by task at the end. Here that is the strategy
"mpf"; on the other side a loop in PyTorch of the same mathematics, from the
same theta_0. The random orders, stored examples and t differ, so that
accuracies agree within noise alone.

Each side lives in a process of its own and sleeps while another is timed; the
sides take turns, a turn has a seed of its own, and medians count. "first" is
the first run of a fresh process, which compiles; "compiled" a later run. To
PyTorch's advantage: its data are normalised float tensors before the clock
starts (here raw bytes are put on the device and normalised batch by batch
while it runs), there is no DataLoader, and the fastest ways to train a network
and to fit a curve, of all in `_torch_continual.VARIANTS` and one thread or all
cores, are found before. Neither clock counts imports, reading the data or
drawing theta_0.

Then come five seeds at once in one process: what they compile, and how long
they take.

Without PyTorch the package is measured alone.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import statistics
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks import _continual_protocol, _turns, _worker

Answer = dict[str, Any]


def define_flags() -> None:
  """Defines the flags, for a run of this module alone."""
  flags.DEFINE_bool("smoke", False, "Digits and few epochs, for seconds.")
  flags.DEFINE_string(
    "data_dir", None, "Folder of prepared TFDS sets with MNIST."
  )
  flags.DEFINE_integer("repeats", 3, "Turns.", lower_bound=1)
  flags.DEFINE_integer("seeds", 5, "Seeds at once; 1 skips.", lower_bound=1)
  flags.DEFINE_multi_integer(
    "threads", None, "PyTorch's threads to try; 1 and all cores by default."
  )
  flags.DEFINE_string("out", None, "Writes the JSON here, too.")


# --- Workers -----------------------------------------------------------------


def jaxmerge_run(
  pipe: connection.Connection, protocol: _continual_protocol.Protocol
) -> None:
  """Answers a list of seeds with a run's measurements."""
  import jax

  # What an earlier process compiled must not count.
  jax.config.update("jax_enable_compilation_cache", False)
  from benchmarks import _jaxmerge_continual

  runner = _jaxmerge_continual.Runner(protocol)
  pipe.send({"version": jax.__version__, "sizes": runner.sizes})
  while (seeds := pipe.recv()) is not None:
    found = runner.run(seeds)._asdict()
    del found["params"]
    pipe.send(found | {"accuracies": found["accuracies"].tolist()})


def torch_run(
  pipe: connection.Connection,
  protocol: _continual_protocol.Protocol,
  threads: list[int],
) -> None:
  """Finds the fastest variants; answers a seed with a run's measurements."""
  import torch

  from benchmarks import _torch_continual

  program = _torch_continual.Program(protocol)

  def theta(seed: int) -> list[np.ndarray]:
    return _continual_protocol.initial(program.image_size, seed)

  trials: dict[str, tuple[float, float]] = {}
  failed: dict[str, str] = {}
  for count in threads:
    torch.set_num_threads(count)
    for variant in _torch_continual.VARIANTS:
      try:
        # The first compiles and fills caches.
        seconds = [program.trial(variant, theta(0)) for _ in range(4)][1:]
      except Exception as error:  # torch.compile needs a C++ compiler.
        if not variant.startswith("compiled"):
          raise
        failed[variant] = str(error).strip().partition("\n")[0]
        continue
      trials[f"{variant}/{count}"] = (
        min(one[0] for one in seconds),
        min(one[1] for one in seconds),
      )
  best = [min(trials, key=lambda name: trials[name][i]) for i in (0, 1)]
  # A process keeps its number of threads; networks take most of the time.
  count = int(best[0].rpartition("/")[2])
  torch.set_num_threads(count)
  network, curve = (
    min(
      (name for name in trials if name.endswith(f"/{count}")),
      key=lambda name: trials[name][i],
    ).rpartition("/")[0]
    for i in (0, 1)
  )
  pipe.send(
    {
      "version": torch.__version__,
      "trials": trials,
      "failed": failed,
      "threads": count,
      "network": network,
      "curve": curve,
    }
  )
  while (seed := pipe.recv()) is not None:
    took, accuracies, _ = program.run(network, curve, theta(seed), seed)
    pipe.send({"seconds": took, "accuracies": [accuracies.tolist()]})


def _fresh(
  protocol: _continual_protocol.Protocol, seeds: list[int], runs: int
) -> list[Answer]:
  """The first runs of a fresh process."""
  with _worker.worker(jaxmerge_run, protocol) as one:
    return [one.ask(seeds) for _ in range(runs)]


# --- Measurement -------------------------------------------------------------


def measure(
  protocol: _continual_protocol.Protocol,
  repeats: int,
  threads: list[int] | None,
) -> dict[str, Any]:
  """Measures one seed, the sides in turns.

  Args:
    protocol: The protocol.
    repeats: Number of turns.
    threads: PyTorch's threads to try; None for no PyTorch.

  Returns:
    Times, medians, ratios, accuracies and counts of programs.
  """
  answers: dict[str, list[Answer]] = {}
  info: dict[str, Any] = {}

  def timed(name: str, ask: Callable[[int], Answer]) -> Callable[[], float]:
    def one() -> float:
      got = answers.setdefault(name, [])
      got.append(ask(len(got)))
      return got[-1]["seconds"]

    return one

  with _worker.worker(jaxmerge_run, protocol) as ours:
    info["jax"] = ours.info["version"]
    info["steps"] = _continual_protocol.num_steps(protocol, ours.info["sizes"])
    ours.ask([repeats])  # Compiles.
    sides = {
      "first": timed("first", lambda seed: _fresh(protocol, [seed], 1)[0]),
      "compiled": timed("compiled", lambda seed: ours.ask([seed])),
    }
    if threads is None:
      times = _turns.take_turns(sides, repeats)
    else:
      with _worker.worker(torch_run, protocol, threads) as theirs:
        info["torch"] = theirs.info
        theirs.ask(repeats)  # Fills the caches.
        sides["torch"] = timed("torch", theirs.ask)
        times = _turns.take_turns(sides, repeats)
  seconds = {name: statistics.median(values) for name, values in times.items()}
  result: dict[str, Any] = {
    "info": info,
    "times": times,
    "seconds": seconds,
    "accuracies": {
      name: [answer["accuracies"][0] for answer in given]
      for name, given in answers.items()
    },
    "one_seed": {
      name: answers["first"][0][name]
      for name in ("epochs_compiled", "programs_compiled", "compile_seconds")
    },
  }
  if "torch" in times:
    result["ratios"] = {
      name: {
        "ratio": seconds["torch"] / seconds[name],
        "range": _range(times["torch"], times[name]),
      }
      for name in ("first", "compiled")
    }
  return result


def measure_seeds(
  protocol: _continual_protocol.Protocol, seeds: int
) -> dict[str, Any]:
  """Measures several seeds at once, in a fresh process, and once more."""
  first, second = _fresh(protocol, list(range(seeds)), 2)
  return first | {
    "seeds": seeds,
    "first": first.pop("seconds"),
    "compiled": second["seconds"],
  }


def _range(theirs: list[float], ours: list[float]) -> tuple[float, float]:
  turns = [a / b for a, b in zip(theirs, ours, strict=True)]
  return min(turns), max(turns)


# --- Report ------------------------------------------------------------------

_TITLES = {
  "first": "jaxmerge, with compilation",
  "compiled": "jaxmerge, compiled",
  "torch": "PyTorch",
}


def report(result: dict[str, Any]) -> str:
  """The table of one seed, and the ratios."""
  rows = []
  for name, times in result["times"].items():
    means = [100 * float(np.mean(one)) for one in result["accuracies"][name]]
    rows.append(
      [
        _TITLES[name],
        f"{result['seconds'][name]:.2f}",
        f"{min(times):.2f} - {max(times):.2f}",
        f"{result['seconds'][name] / result['info']['steps'] * 1e6:.0f}",
        f"{np.mean(means):.2f}",
        f"{min(means):.2f} - {max(means):.2f}",
      ]
    )
  header = ["one seed", "median s", "range s", "us a step"]
  header += ["accuracy, %", "range"]
  text = [_turns.table(header, rows), ""]
  for name, found in result.get("ratios", {}).items():
    low, high = found["range"]
    text.append(
      f"PyTorch / {_TITLES[name]}: {found['ratio']:.2f}x, the other way "
      f"{1 / found['ratio']:.2f}x (single turns {low:.2f} - {high:.2f})"
    )
  torch = result["info"].get("torch")
  if torch:
    text.append(
      f"PyTorch's fastest: networks {torch['network']}, curves "
      f"{torch['curve']}, {torch['threads']} threads"
    )
    for variant, reason in torch["failed"].items():
      text.append(f"{variant} is not available: {reason}")
  return "\n".join(text)


def report_seeds(result: dict[str, Any]) -> str:
  """The table of what is compiled for one seed and for several."""
  counts = {1: result["one_seed"]}
  if "seeds" in result:
    counts[result["seeds"]["seeds"]] = result["seeds"]
  rows = []
  for seeds, found in counts.items():
    several = found if seeds > 1 else result["seconds"]
    rows.append(
      [
        str(seeds),
        str(found["epochs_compiled"]),
        str(found["programs_compiled"]),
        f"{sum(found['compile_seconds'].values()):.2f}",
        f"{several['first']:.2f}",
        f"{several['compiled']:.2f}",
      ]
    )
  header = ["seeds", "epochs compiled", "programs compiled"]
  header += ["trace, lower and compile s", "first s", "compiled s"]
  return _turns.table(header, rows)


def main(argv: list[str]) -> None:
  """Measures, prints the tables, then the JSON."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  given = flags.FLAGS
  has_torch = importlib.util.find_spec("torch") is not None
  if not has_torch:
    print("PyTorch is not installed: pip install -e '.[bench]'\n")
  cores = len(os.sched_getaffinity(0))
  threads = sorted(set(given.threads or (1, cores))) if has_torch else None
  protocol = _continual_protocol.Protocol(data_dir=given.data_dir)
  if given.smoke:
    protocol = _continual_protocol.smoke()
    threads = threads and threads[:1]
  print(
    f"{protocol.dataset}, {cores} cores, medians of {given.repeats}\n",
    flush=True,
  )
  result = {
    "python": platform.python_version(),
    "cores": cores,
    "dataset": protocol.dataset,
  } | measure(protocol, 1 if given.smoke else given.repeats, threads)
  print(report(result) + "\n", flush=True)
  seeds = min(given.seeds, 2) if given.smoke else given.seeds
  if seeds > 1:
    result["seeds"] = measure_seeds(protocol, seeds)
  print(report_seeds(result) + "\n")
  text = json.dumps(result, indent=2)
  if given.out:
    with open(given.out, "w") as file:
      file.write(text + "\n")
  else:
    print(f"## JSON\n\n```json\n{text}\n```")


if __name__ == "__main__":
  define_flags()
  app.run(main)
