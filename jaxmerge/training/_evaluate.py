"""Evaluation over a whole data set on the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.training import _devices, _state

PyTree = Any


@functools.lru_cache(maxsize=16)
def _compile(
  metric_fn: Callable[[PyTree, PyTree], PyTree],
  devices: tuple[jax.Device, ...],
  batch_size: int,
) -> Callable[..., PyTree]:
  """Compiles the sum of per-example metrics over rows, for all seeds."""

  def one(params: PyTree, data: PyTree, rows: jax.Array) -> PyTree:
    # Each device takes every n-th batch; rows below 0 are padding.
    rows = rows.reshape(-1, len(devices), batch_size)
    mine = rows[:, jax.lax.axis_index(_state.DEVICE_AXIS)]

    def body(index: jax.Array) -> PyTree:
      batch = jax.tree.map(lambda leaf: leaf[jnp.maximum(index, 0)], data)
      real = index >= 0

      def masked(values: jax.Array) -> jax.Array:
        mask = real.reshape(real.shape + (1,) * (values.ndim - 1))
        # A half type would lose the sum of many examples.
        if values.dtype.itemsize < 4:
          values = values.astype(jnp.float32)
        return jnp.where(mask, values, jnp.zeros_like(values)).sum(axis=0)

      return jax.tree.map(masked, metric_fn(params, batch))

    sums = jax.lax.map(body, mine)
    sums = jax.tree.map(lambda values: values.sum(axis=0), sums)
    return jax.lax.psum(sums, _state.DEVICE_AXIS)

  seeds = jax.vmap(one, in_axes=(0, None, None))
  return jax.pmap(seeds, axis_name=_state.DEVICE_AXIS, devices=devices)


def evaluate(
  metric_fn: Callable[[PyTree, PyTree], PyTree],
  params: PyTree,
  data: PyTree,
  *,
  batch_size: int = 1000,
  indices: Any = None,
  seed_axis: bool = False,
  devices: Sequence[jax.Device] | int | None = None,
) -> PyTree:
  """Means of per-example metrics over a data set, in one compiled call.

      result = 1/n * sum_i metric(params, example_i)

  Every example counts once, whatever the batch size and the number of
  devices.

  Args:
    metric_fn: `metric_fn(params, batch)` returns a pytree of arrays
      `[examples, ...]`. Keep one function object: each one compiles anew.
    params: any pytree.
    data: pytree of arrays `[examples, ...]`, or a `Replicated`.
    batch_size: examples that one device takes at a time.
    indices: int32 `[n]`, rows of `data` to use; None for all.
    seed_axis: the leaves of `params` have a leading axis of seeds.
    devices: as in `resolve_devices`; those of `data` if it is `Replicated`.

  Returns:
    The pytree of means, NumPy arrays; with `seed_axis` they have that axis.

  Raises:
    ValueError: there is no example to evaluate, or an index is out of range.

  >>> data = {"x": np.arange(5, dtype=np.float32)}
  >>> means = evaluate(lambda p, batch: p * batch["x"], jnp.float32(2), data)
  >>> float(means)
  4.0
  """
  if not isinstance(data, _devices.Replicated):
    data = _devices.replicate(data, devices)
  total = jax.tree.leaves(data.value)[0].shape[1]
  indices = np.asarray(np.arange(total) if indices is None else indices)
  if not indices.size:
    raise ValueError("There is no example to evaluate on.")
  if not 0 <= indices.min() <= indices.max() < total:
    raise ValueError(
      f"indices must lie in [0, {total}), got {indices.min()} to "
      f"{indices.max()}."
    )
  indices = indices.astype(np.int32)
  if not seed_axis:
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], params)
  count = len(data.devices)
  batch_size = min(batch_size, -(-len(indices) // count))
  padding = -len(indices) % (batch_size * count)
  rows = np.concatenate([indices, np.full(padding, -1, np.int32)])
  run = _compile(metric_fn, data.devices, batch_size)
  placed = _devices.replicate((params, rows), data.devices).value
  sums = _devices.first_replica(run(placed[0], data.value, placed[1]))
  means = jax.tree.map(lambda values: values / len(indices), sums)
  return means if seed_axis else jax.tree.map(lambda mean: mean[0], means)
