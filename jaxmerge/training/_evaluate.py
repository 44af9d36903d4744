"""Evaluation over a whole data set on the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.training import _compile, _devices, _state

PyTree = Any


@functools.lru_cache(maxsize=16)
def _compile_sums(
  metric_fn: Callable[[PyTree, PyTree], PyTree],
  devices: tuple[jax.Device, ...],
  batch_size: int,
  prepare: Callable[..., PyTree] | None,
) -> Callable[..., PyTree]:
  """Compiles the sum of per-example metrics over rows, for all seeds."""

  def over_rows(params: PyTree, data: PyTree, rows: jax.Array) -> PyTree:
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
    return jax.tree.map(lambda values: values.sum(axis=0), sums)

  def one(
    params: PyTree, variants: PyTree, data: PyTree, rows: jax.Array
  ) -> PyTree:
    if variants is not None and prepare is not None:
      sums = jax.lax.map(
        lambda variant: over_rows(prepare(params, variant), data, rows),
        variants,
      )
    else:
      ready = params if prepare is None else prepare(params)
      sums = over_rows(ready, data, rows)
    return jax.lax.psum(sums, _state.DEVICE_AXIS)

  def seeds(
    params: PyTree, variants: PyTree, data: PyTree, rows: jax.Array
  ) -> PyTree:
    def seed(params: PyTree) -> PyTree:
      return one(params, variants, data, rows)

    if devices[0].platform in _compile.IN_TURN:
      return jax.lax.map(seed, params)
    return jax.vmap(seed)(params)

  mapped = jax.pmap(seeds, axis_name=_state.DEVICE_AXIS, devices=devices)
  return _compile.compile_once(mapped, devices[0])


def evaluate(
  metric_fn: Callable[[PyTree, PyTree], PyTree],
  params: PyTree,
  data: PyTree,
  *,
  batch_size: int = 1000,
  indices: Any = None,
  seed_axis: bool = False,
  devices: Sequence[jax.Device] | int | None = None,
  prepare: Callable[..., PyTree] | None = None,
  variants: PyTree = None,
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
    prepare: `prepare(params) -> what metric_fn gets`, called once within the
      program, before the first batch: BatchNorm statistics estimated anew,
      say. Keep one function object, as of `metric_fn`.
    variants: pytree of arrays `[variants, ...]`; then it is
      `prepare(params, variant)`, and the means are taken for every variant.

  Returns:
    The pytree of means, NumPy arrays; with `seed_axis` they have that axis,
    and with `variants` theirs, behind it.

  Raises:
    ValueError: there is no example to evaluate, an index is out of range, or
      there are variants but nothing is prepared of them.

  >>> data = {"x": np.arange(5, dtype=np.float32)}
  >>> means = evaluate(lambda p, batch: p * batch["x"], jnp.float32(2), data)
  >>> float(means)
  4.0
  """
  if variants is not None and prepare is None:
    raise ValueError(
      "variants need prepare(params, variant), which makes of a variant what "
      "metric_fn gets."
    )
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
  run = _compile_sums(metric_fn, data.devices, batch_size, prepare)
  placed = _devices.replicate((params, variants, rows), data.devices).value
  params, variants, rows = placed
  sums = _devices.first_replica(run(params, variants, data.value, rows))
  means = jax.tree.map(lambda values: values / len(indices), sums)
  return means if seed_axis else jax.tree.map(lambda mean: mean[0], means)
