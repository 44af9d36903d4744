r"""One curve epoch of Mode Path Fusion against PyTorch and the hardware.

  pip install -e ".[bench]" \
    --extra-index-url https://download.pytorch.org/whl/cpu
  python -m benchmarks.mpf_epoch [--data=mnist] [--output=mpf_epoch.json]

Times an epoch of `jaxmerge.curves.fit_curve` and the same mathematics as an
in-memory PyTorch loop, of which every variant is tried and the fastest counts,
and measures the rate of float32 matrix products. Each side lives in a process
of its own and sleeps while another is timed; the sides take turns, and medians
count. Then come the times against batch size, width and number of devices.

Arithmetic is that of the matrix products alone: with P parameters, 2P a example
forwards, 2P for the gradients of the weights, and 2P less the first layer's
share for those of the inputs.

Without PyTorch the package and the hardware are measured alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import Any

from absl import app, flags

from benchmarks import _problem, _turns, _worker

SECTIONS = ("epoch", "batch", "width", "devices")
NETWORKS = ("mlpnet", "mlplarge", "mlphuge")
BATCH_SIZES = (32, 64, 128, 256, 512)
DEVICE_COUNTS = (1, 2, 4)
MATMUL_SIZES = (1024, 2048)
# The first epochs compile, allocate and fill caches.
WARM_UP = 2

_DATA = flags.DEFINE_enum(
  "data",
  "synthetic",
  ["synthetic", "mnist"],
  "Random images of MNIST's shape, or MNIST.",
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "TFDS folder of --data=mnist")
_EXAMPLES = flags.DEFINE_integer(
  "examples", 60_000, "Examples in an epoch.", lower_bound=1, upper_bound=60_000
)
_REPEATS = flags.DEFINE_integer("repeats", 7, "Timed turns.", lower_bound=1)
_THREADS = flags.DEFINE_integer(
  "threads", None, "PyTorch's threads; all cores by default.", lower_bound=1
)
_SECTIONS = flags.DEFINE_multi_enum(
  "section", list(SECTIONS), SECTIONS, "What to measure; may be repeated."
)
_OUTPUT = flags.DEFINE_string("output", None, "Writes the JSON here, too.")


# --- Workers -----------------------------------------------------------------
# Each sends a description of itself when it is warm; see `_worker.Worker`.


def jaxmerge_epoch(
  pipe: connection.Connection,
  network: str,
  batch_size: int,
  devices: int,
  source: tuple[str, int, str | None],
) -> None:
  """Answers every request with the seconds of one more epoch."""
  import jax

  # Before the first use; other platforms have the devices that they have.
  jax.config.update("jax_num_cpu_devices", devices)
  from benchmarks import _jaxmerge_epoch

  available = len(jax.local_devices())
  if available < devices:
    pipe.send({"missing": f"{available} of {devices} devices"})
    return
  images, labels = _problem.load_images(*source)
  warm = 0
  start = 0.0

  def on_epoch() -> None:
    nonlocal warm, start
    seconds = time.perf_counter() - start
    warm += 1
    if warm < WARM_UP:
      return
    if warm == WARM_UP:
      device = jax.local_devices()[0]
      pipe.send({"version": jax.__version__, "device": device.device_kind})
    else:
      pipe.send(seconds)
    if pipe.recv() is None:
      raise _jaxmerge_epoch.Stop
    start = time.perf_counter()

  _jaxmerge_epoch.run_epochs(
    network,
    images,
    labels,
    _problem.random_ends(_problem.layer_sizes(network)),
    batch_size=batch_size,
    mean=_problem.MEAN,
    std=_problem.STD,
    devices=devices,
    on_epoch=on_epoch,
  )


def torch_epoch(
  pipe: connection.Connection,
  sizes: Sequence[int],
  batch_size: int,
  variants: Sequence[str] | None,
  threads: int,
  source: tuple[str, int, str | None],
) -> None:
  """Answers a variant's name with its seconds, a number with a product's."""
  import torch

  from benchmarks import _torch_epoch

  torch.set_num_threads(threads)
  images, labels = _problem.load_images(*source)
  raw = torch.from_numpy(images.reshape(len(images), -1))
  normalized = _torch_epoch.normalize(raw, _problem.MEAN, _problem.STD)
  targets = torch.from_numpy(labels).to(torch.int64)
  epochs: dict[str, Any] = {}
  failed: dict[str, str] = {}
  for variant in variants or _torch_epoch.VARIANTS:
    try:
      epoch = _torch_epoch.Epoch(
        variant,
        raw if variant.endswith("uint8") else normalized,
        targets,
        _problem.random_ends(sizes),
        batch_size=batch_size,
        mean=_problem.MEAN,
        std=_problem.STD,
      )
      for _ in range(WARM_UP):
        epoch.run()
    except Exception as error:  # torch.compile needs a C++ compiler.
      if not variant.startswith("compiled"):
        raise
      failed[variant] = str(error).strip().partition("\n")[0]
      continue
    epochs[variant] = epoch
  pipe.send(
    {
      "version": torch.__version__,
      "threads": torch.get_num_threads(),
      "variants": list(epochs),
      "failed": failed,
    }
  )
  while (request := pipe.recv()) is not None:
    if isinstance(request, int):
      pipe.send(_torch_epoch.matmul_seconds(request))
    else:
      pipe.send(epochs[request].run())


def jax_matmul(pipe: connection.Connection) -> None:
  """Answers a size n with the seconds of an [n, n] product in JAX."""
  from benchmarks import _jaxmerge_epoch

  for n in MATMUL_SIZES:
    _jaxmerge_epoch.matmul_seconds(n)
  pipe.send({})
  while (n := pipe.recv()) is not None:
    pipe.send(_jaxmerge_epoch.matmul_seconds(n))


# --- Sections ----------------------------------------------------------------


def _point(
  network: str,
  batch_size: int,
  devices: int,
  variant: str | None,
  setting: dict[str, Any],
) -> dict[str, Any]:
  """Measures jaxmerge, and PyTorch if a variant is named, at one point."""
  source, repeats = setting["source"], setting["repeats"]
  with contextlib.ExitStack() as stack:
    ours = stack.enter_context(
      _worker.worker(jaxmerge_epoch, network, batch_size, devices, source)
    )
    if "missing" in ours.info:
      return {"missing": ours.info["missing"]}
    sides: dict[str, Callable[[], float]] = {"jaxmerge": ours.seconds}
    if variant is not None:
      theirs = stack.enter_context(
        _worker.worker(
          torch_epoch,
          _problem.layer_sizes(network),
          batch_size,
          [variant],
          setting["threads"],
          source,
        )
      )
      if variant in theirs.info["variants"]:
        sides["torch"] = functools.partial(theirs.seconds, variant)
    times = _turns.take_turns(sides, repeats)
  result: dict[str, Any] = {
    "seconds": {
      name: statistics.median(values) for name, values in times.items()
    },
    "times": times,
  }
  flops = _problem.epoch_flops(
    _problem.layer_sizes(network), setting["examples"]
  )
  result["rate"] = flops / result["seconds"]["jaxmerge"]
  if "torch" in times:
    result["ratio"] = result["seconds"]["torch"] / result["seconds"]["jaxmerge"]
  return result


def measure_epoch(setting: dict[str, Any]) -> dict[str, Any]:
  """Measures MLPNET at batch 128: every variant, and the matrix products."""
  source, repeats = setting["source"], setting["repeats"]
  sizes = _problem.layer_sizes("mlpnet")
  with contextlib.ExitStack() as stack:
    ours = stack.enter_context(
      _worker.worker(jaxmerge_epoch, "mlpnet", 128, 1, source)
    )
    products = stack.enter_context(_worker.worker(jax_matmul))
    sides: dict[str, Callable[[], float]] = {"jaxmerge": ours.seconds}
    for n in MATMUL_SIZES:
      sides[f"matmul/jax/{n}"] = functools.partial(products.seconds, n)
    info: dict[str, Any] = {"jax": ours.info["version"], **ours.info}
    del info["version"]
    if setting["torch"]:
      theirs = stack.enter_context(
        _worker.worker(
          torch_epoch,
          sizes,
          128,
          None,
          setting["threads"],
          source,
        )
      )
      info["torch"] = theirs.info["version"]
      info["failed"] = theirs.info["failed"]
      for variant in theirs.info["variants"]:
        sides[f"torch/{variant}"] = functools.partial(theirs.seconds, variant)
      for n in MATMUL_SIZES:
        sides[f"matmul/torch/{n}"] = functools.partial(theirs.seconds, n)
    times = _turns.take_turns(sides, repeats)
  medians = {name: statistics.median(values) for name, values in times.items()}
  rates = {
    name: 2 * int(name.rpartition("/")[2]) ** 3 / seconds
    for name, seconds in medians.items()
    if name.startswith("matmul/")
  }
  fastest = max(rates, key=lambda name: rates[name])
  rate = _problem.epoch_flops(sizes, setting["examples"]) / medians["jaxmerge"]
  result: dict[str, Any] = {
    "info": info,
    "times": times,
    "seconds": medians,
    "matmul_rates": rates,
    "matmul_rate": rates[fastest],
    "rate": rate,
    "rate_fraction": rate / rates[fastest],
  }
  variants = [name for name in medians if name.startswith("torch/")]
  if variants:
    best = min(variants, key=lambda name: medians[name])
    turns = [
      theirs / ours
      for theirs, ours in zip(times[best], times["jaxmerge"], strict=True)
    ]
    result["torch_best"] = best.partition("/")[2]
    result["ratio"] = medians[best] / medians["jaxmerge"]
    result["ratio_range"] = [min(turns), max(turns)]
  return result


# --- Report ------------------------------------------------------------------


def _report_epoch(result: dict[str, Any], flops: int) -> str:
  rows = []
  for name, seconds in sorted(
    result["seconds"].items(), key=lambda item: item[1]
  ):
    if name.startswith("matmul/"):
      continue
    times = result["times"][name]
    rows.append(
      [
        name,
        f"{seconds:.3f}",
        f"{min(times):.3f} - {max(times):.3f}",
        f"{flops / seconds / 1e9:.0f}",
      ]
    )
  text = ["## One epoch: mlpnet, batch 128\n"]
  text.append(_turns.table(["side", "median s", "range s", "GFLOP/s"], rows))
  for variant, reason in result["info"].get("failed", {}).items():
    text.append(f"\ntorch/{variant} is not available: {reason}")
  rates = [
    [name.removeprefix("matmul/"), f"{rate / 1e9:.0f}"]
    for name, rate in result["matmul_rates"].items()
  ]
  text.append("\n" + _turns.table(["float32 product", "GFLOP/s"], rates) + "\n")
  if "ratio" in result:
    low, high = result["ratio_range"]
    text.append(
      f"PyTorch's best ({result['torch_best']}) / jaxmerge: "
      f"{result['ratio']:.2f}x in time (single turns {low:.2f} - {high:.2f})"
    )
  text.append(
    "jaxmerge's arithmetic / the machine's float32 product: "
    f"{100 * result['rate_fraction']:.0f}%"
  )
  return "\n".join(text)


def _report_points(title: str, key: str, points: dict[str, Any]) -> str:
  rows = []
  for value, point in points.items():
    if "missing" in point:
      rows.append([value, f"only {point['missing']}", "", "", ""])
      continue
    seconds = point["seconds"]
    rows.append(
      [
        value,
        f"{seconds['jaxmerge']:.3f}",
        f"{point['rate'] / 1e9:.0f}",
        f"{seconds['torch']:.3f}" if "torch" in seconds else "",
        f"{point['ratio']:.2f}x" if "ratio" in point else "",
      ]
    )
  header = [key, "jaxmerge s", "GFLOP/s", "PyTorch s", "ratio"]
  return f"\n## {title}\n\n{_turns.table(header, rows)}"


def main(argv: list[str]) -> None:
  """Measures, prints the tables, then the JSON."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  has_torch = importlib.util.find_spec("torch") is not None
  if not has_torch:
    print("PyTorch is not installed: pip install -e '.[bench]'\n")
  threads = _THREADS.value or len(os.sched_getaffinity(0))
  setting = {
    "source": (_DATA.value, _EXAMPLES.value, _DATA_DIR.value),
    "data": _DATA.value,
    "examples": _EXAMPLES.value,
    "repeats": _REPEATS.value,
    "threads": threads,
    "torch": has_torch,
  }
  results: dict[str, Any] = {
    "python": platform.python_version(),
    "cores": len(os.sched_getaffinity(0)),
    **{k: v for k, v in setting.items() if k != "source"},
  }
  print(
    f"{results['cores']} cores, {threads} PyTorch threads, "
    f"{_EXAMPLES.value} examples ({_DATA.value}), "
    f"medians of {_REPEATS.value}\n"
  )
  sections = set(_SECTIONS.value)
  # What is fastest at the usual size stands for PyTorch at the others.
  best = "foreach/float32" if has_torch else None
  if "epoch" in sections:
    results["epoch"] = measure_epoch(setting)
    best = results["epoch"].get("torch_best")
    flops = _problem.epoch_flops(
      _problem.layer_sizes("mlpnet"), _EXAMPLES.value
    )
    print(_report_epoch(results["epoch"], flops), flush=True)
  if "batch" in sections:
    results["batch"] = {
      str(size): _point("mlpnet", size, 1, best, setting)
      for size in BATCH_SIZES
      if size <= _EXAMPLES.value
    }
    print(
      _report_points("Batch size: mlpnet", "batch", results["batch"]),
      flush=True,
    )
  if "width" in sections:
    results["width"] = {
      name: _point(name, 128, 1, best, setting) for name in NETWORKS
    }
    print(
      _report_points("Width: batch 128", "network", results["width"]),
      flush=True,
    )
  if "devices" in sections:
    results["devices"] = {
      str(count): _point("mlpnet", 128, count, None, setting)
      for count in DEVICE_COUNTS
    }
    print(
      _report_points(
        "Devices: mlpnet, batch 128 in all", "devices", results["devices"]
      ),
      flush=True,
    )
  text = json.dumps(results, indent=2)
  print(f"\n## JSON\n\n```json\n{text}\n```")
  if _OUTPUT.value:
    with open(_OUTPUT.value, "w") as file:
      file.write(text + "\n")


if __name__ == "__main__":
  app.run(main)
