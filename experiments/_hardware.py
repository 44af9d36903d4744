"""What a run ran on."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform

import jax

import jaxmerge

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "ott-jax")


def _processor() -> str:
  try:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
      if line.startswith("model name"):
        return line.split(":", 1)[1].strip()
  except OSError:
    pass
  return platform.processor() or platform.machine()


def hardware(devices: int) -> str:
  """Describes the machine in a line.

  Args:
    devices: number of devices used.

  Returns:
    For instance "1 x cpu, AMD EPYC, 2 cores".
  """
  kind = jax.devices()[0].device_kind
  return f"{devices} x {kind}, {_processor()}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
  """Returns the versions of Python and of the packages that matter."""
  found = {
    "python": platform.python_version(),
    "jaxmerge": jaxmerge.__version__,
  }
  for name in _PACKAGES:
    found[name] = importlib.metadata.version(name)
  return found
