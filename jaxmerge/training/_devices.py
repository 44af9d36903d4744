"""Placing pytrees on the devices that a run uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.training import _state

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Replicated:
  """A pytree that lies whole on every device of a run.

  Make one with `replicate` and hand it to several runs: the transfer happens
  once.

  Attributes:
    value: the pytree; every leaf has a leading axis of devices.
    devices: the devices, in order.
  """

  value: PyTree
  devices: tuple[jax.Device, ...] = dataclasses.field(
    metadata=dict(static=True)
  )


def resolve_devices(
  devices: Sequence[jax.Device] | int | None = None,
) -> tuple[jax.Device, ...]:
  """Returns the devices named by a number, a sequence, or None for all.

  Args:
    devices: how many of the local devices, which ones, or None for all.

  Returns:
    A tuple of devices.

  Raises:
    ValueError: fewer devices are there than were asked for.

  >>> len(resolve_devices(1))
  1
  """
  local = jax.local_devices()
  if devices is None:
    return tuple(local)
  if isinstance(devices, int):
    if not 1 <= devices <= len(local):
      raise ValueError(
        f"{devices} devices were asked for, {len(local)} are there. Ask for "
        "fewer, or simulate more on a CPU with XLA_FLAGS="
        f"--xla_force_host_platform_device_count={devices}."
      )
    return tuple(local[:devices])
  if not devices:
    raise ValueError("The sequence of devices is empty.")
  return tuple(devices)


def replicate(
  tree: PyTree, devices: Sequence[jax.Device] | int | None = None
) -> Replicated:
  """Copies a pytree of arrays to every device.

  Args:
    tree: a pytree of arrays; typed PRNG keys are allowed.
    devices: as in `resolve_devices`.

  Returns:
    The pytree on the devices, to be handed to `fit` or `evaluate`.

  Raises:
    ValueError: fewer devices are there than were asked for.

  >>> replicate({"x": np.zeros(3)}, 1).value["x"].shape
  (1, 3)
  """
  chosen = resolve_devices(devices)
  mesh = jax.sharding.Mesh(np.array(chosen), (_state.DEVICE_AXIS,))
  sharding = jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec(_state.DEVICE_AXIS)
  )

  def put(leaf: Any) -> jax.Array:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(
      leaf.dtype, jax.dtypes.prng_key
    ):
      data = put(jax.random.key_data(leaf))
      return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    # A view: the copies are made device by device, not on the host.
    return jax.device_put(
      np.broadcast_to(host, (len(chosen), *host.shape)), sharding
    )

  return Replicated(jax.tree.map(put, tree), chosen)


def first_replica(tree: PyTree) -> PyTree:
  """Returns the first device's copy, as NumPy arrays.

  Args:
    tree: a pytree of arrays with a leading axis of devices.

  Returns:
    A pytree of NumPy arrays without that axis.

  >>> first_replica(replicate({"x": np.zeros(3)}, 1).value)["x"].shape
  (3,)
  """
  return jax.tree.map(
    lambda leaf: np.asarray(leaf.addressable_shards[0].data)[0], tree
  )
