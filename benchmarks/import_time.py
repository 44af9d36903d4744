"""What `import jaxmerge` costs over `import jax`.

  python -m benchmarks.import_time

Each import is timed in a fresh process, all in turn; the medians count.
"""

from __future__ import annotations

import statistics
import subprocess
import sys

from absl import app, flags

_REPEATS = flags.DEFINE_integer(
  "repeats", 15, "Processes per import.", lower_bound=1
)

_CODE = """
import time
start = time.perf_counter()
import {modules}
print(time.perf_counter() - start)
"""

_JAX = "jax"
_IMPORTS = (
  _JAX,
  "jax, jaxmerge",
  # What a user who only merges loads.
  "jax, jaxmerge.tree, jaxmerge.merging",
)


def seconds(modules: str) -> float:
  """Times one import statement in a process of its own."""
  done = subprocess.run(
    [sys.executable, "-c", _CODE.format(modules=modules)],
    check=True,
    capture_output=True,
    text=True,
  )
  return float(done.stdout)


def main(argv: list[str]) -> None:
  """Prints the table."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  times: dict[str, list[float]] = {modules: [] for modules in _IMPORTS}
  for modules in times:
    seconds(modules)  # Fills the file caches.
  for _ in range(_REPEATS.value):
    for modules, values in times.items():
      values.append(seconds(modules))
  base = statistics.median(times[_JAX])
  print("| import | median s | minimum s | over import jax, s |")
  print("|---|---|---|---|")
  for modules, values in times.items():
    median = statistics.median(values)
    print(
      f"| {modules} | {median:.3f} | {min(values):.3f} | {median - base:+.3f} |"
    )


if __name__ == "__main__":
  app.run(main)
