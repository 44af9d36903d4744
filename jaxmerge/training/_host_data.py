"""Training examples that the host makes anew for every epoch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

import jax

from jaxmerge.training import _devices

PyTree = Any


@dataclasses.dataclass(frozen=True)
class HostData:
  """Examples that are made on the host, epoch by epoch.

  While the devices work on an epoch, a thread makes the examples of the next
  one and sends them: decoding and augmentation of images take no time where
  they take less than the training.

  Attributes:
    make: `make(epoch) -> pytree of arrays [examples, ...]`, the same for the
      same epoch, whenever it is called.
    examples: number of examples.
  """

  make: Callable[[int], PyTree]
  examples: int


def prefetched(
  data: HostData, epochs: range, devices: Sequence[jax.Device]
) -> Iterator[_devices.Replicated]:
  """The examples of each epoch on the devices, made one epoch ahead.

  Args:
    data: makes them.
    epochs: which epochs.
    devices: the devices.

  Yields:
    The examples.

  Raises:
    ValueError: an epoch has another number of examples.
  """

  def make(epoch: int) -> _devices.Replicated:
    made = data.make(epoch)
    for leaf in jax.tree.leaves(made):
      if len(leaf) != data.examples:
        raise ValueError(
          f"make({epoch}) returned {len(leaf)} examples, not the"
          f" {data.examples} that HostData.examples says."
        )
    return _devices.replicate(made, devices)

  with futures.ThreadPoolExecutor(1) as pool:
    ahead = None
    for epoch in epochs:
      now = pool.submit(make, epoch) if ahead is None else ahead
      ready = now.result()
      ahead = pool.submit(make, epoch + 1) if epoch + 1 in epochs else None
      yield ready
