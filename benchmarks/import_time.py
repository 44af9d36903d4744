"""What `import jaxmerge` costs over `import jax`.

  python -m benchmarks.import_time

Each import is timed in a fresh process, the two in turn; the medians count.
"""

from __future__ import annotations

import statistics
import subprocess
import sys

from absl import app, flags

_REPEATS = flags.DEFINE_integer(
  "repeats", 15, "Processes per module.", lower_bound=1
)

_CODE = """
import time
start = time.perf_counter()
import {module}
print(time.perf_counter() - start)
"""


def seconds(module: str) -> float:
  """Times one import in a process of its own."""
  done = subprocess.run(
    [sys.executable, "-c", _CODE.format(module=module)],
    check=True,
    capture_output=True,
    text=True,
  )
  return float(done.stdout)


def main(argv: list[str]) -> None:
  """Prints the table."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  times: dict[str, list[float]] = {"jax": [], "jaxmerge": []}
  for module in times:
    seconds(module)  # Fills the file caches.
  for _ in range(_REPEATS.value):
    for module, values in times.items():
      values.append(seconds(module))
  medians = {m: statistics.median(values) for m, values in times.items()}
  print("| import | median seconds | minimum |")
  print("|---|---|---|")
  for module, values in times.items():
    print(f"| {module} | {medians[module]:.3f} | {min(values):.3f} |")
  print(
    f"\nimport jaxmerge over import jax: "
    f"{medians['jaxmerge'] - medians['jax']:+.3f} s"
  )


if __name__ == "__main__":
  app.run(main)
