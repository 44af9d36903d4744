"""Compiling for the device at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

# Where seeds follow each other: a core gains nothing from a batch of small
# networks, and XLA lays out products without a batch axis better.
IN_TURN = frozenset({"cpu"})

# On a CPU XLA hands matrix products to YNNPACK, which at the sizes of small
# networks takes longer than XLA's own: BUILD_NOTES.md, "Speed".
OPTIONS: dict[str, dict[str, str | bool]] = {
  "cpu": {"xla_cpu_experimental_ynn_fusion_type": ""}
}


def _compile(
  lowered: jax.stages.Lowered, device: jax.Device
) -> jax.stages.Compiled:
  """Compiles with the options that XLA's release knows."""
  try:
    return lowered.compile(OPTIONS.get(device.platform))
  except jax.errors.JaxRuntimeError as error:
    if "No such compile option" not in str(error):
      raise
    return lowered.compile()


def compile_once(mapped: Any, device: jax.Device) -> Callable[..., Any]:
  """Compiles a function with the device's options, once for equal shapes.

  Args:
    mapped: what `jax.jit` or `jax.pmap` returned.
    device: the device, or one of them.

  Returns:
    A function of the same arguments.
  """
  executables: dict[Any, Callable[..., Any]] = {}

  def run(*args: Any) -> Any:
    leaves, treedef = jax.tree.flatten(args)
    signature = treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    if signature not in executables:
      executables[signature] = _compile(mapped.lower(*args), device)
    return executables[signature](*args)

  return run
