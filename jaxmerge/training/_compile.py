"""Compiling for the device at hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from jaxmerge.training import _state

# Where seeds follow each other: a core gains nothing from a batch of small
# networks, and XLA lays out products without a batch axis better.
IN_TURN = frozenset({"cpu"})

# On a CPU XLA hands matrix products to YNNPACK, which at the sizes of small
# networks takes longer than XLA's own: BUILD_NOTES.md, "Speed".
OPTIONS: dict[str, dict[str, str | bool]] = {
  "cpu": {"xla_cpu_experimental_ynn_fusion_type": ""}
}
# Networks of more parameters have larger products: YNNPACK takes a tenth less.
_LARGE = 8_000_000


def _num_params(tree: Any) -> int:
  """Parameters of one seed; leaves have axes of devices and seeds."""
  if isinstance(tree, _state.TrainState):
    tree = tree.params
  return sum(math.prod(leaf.shape[2:]) for leaf in jax.tree.leaves(tree))


def _compile(
  lowered: jax.stages.Lowered, device: jax.Device, size: int
) -> jax.stages.Compiled:
  """Compiles with the options that XLA's release knows."""
  if size > _LARGE:
    return lowered.compile()
  try:
    return lowered.compile(OPTIONS.get(device.platform))
  except jax.errors.JaxRuntimeError as error:
    if "No such compile option" not in str(error):
      raise
    return lowered.compile()


def compile_once(mapped: Any, device: jax.Device) -> Callable[..., Any]:
  """Compiles a function with the device's options, once for equal shapes.

  Args:
    mapped: what `jax.jit` or `jax.pmap` returned; its first argument is a
      `TrainState` or parameters, with axes of devices and seeds.
    device: the device, or one of them.

  Returns:
    A function of the same arguments.
  """
  executables: dict[Any, Callable[..., Any]] = {}

  def run(*args: Any) -> Any:
    leaves, treedef = jax.tree.flatten(args)
    signature = treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    if signature not in executables:
      executables[signature] = _compile(
        mapped.lower(*args), device, _num_params(args[0])
      )
    return executables[signature](*args)

  return run
