"""An epoch of Mode Path Fusion through the package's own `fit_curve`."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmerge import curves, models

# The rate stays constant over the first half of so many epochs: enough for any
# number of repeats.
MANY = 100_000


class Stop(Exception):
  """Raised by `on_epoch` to end a run."""


def make_loss(
  network: str, mean: float, std: float
) -> Callable[[Any, Any, Any], jax.Array]:
  """Returns cross entropy on uint8 images, one loss an example."""
  module = models.get(network)

  def loss_fn(params: Any, batch: Any, key: Any) -> jax.Array:
    del key
    images = batch["input"].astype(jnp.float32)
    images = (images / 255 - mean) / std
    logits = module.apply({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, batch["label"]
    )

  return loss_fn


def as_params(
  kernels: Sequence[np.ndarray],
) -> dict[str, dict[str, jax.Array]]:
  """Names kernels [in, out] as `jaxmerge.models.MLP` does."""
  return {
    f"Dense_{i}": {"kernel": jnp.asarray(kernel)}
    for i, kernel in enumerate(kernels)
  }


def run_epochs(
  network: str,
  images: np.ndarray,
  labels: np.ndarray,
  ends: tuple[Sequence[np.ndarray], Sequence[np.ndarray]],
  *,
  batch_size: int,
  mean: float,
  std: float,
  on_epoch: Callable[[], None],
  devices: int = 1,
  learning_rate: float = 0.01,
  momentum: float = 0.9,
  weight_decay: float = 5e-4,
) -> None:
  """Fits a curve until `on_epoch`, called after each epoch, raises `Stop`."""
  try:
    curves.fit_curve(
      make_loss(network, mean, std),
      as_params(ends[0]),
      as_params(ends[1]),
      {"input": images, "label": labels.astype(np.int32)},
      key=jax.random.key(0),
      learning_rate=learning_rate,
      final_learning_rate=learning_rate,
      momentum=momentum,
      weight_decay=weight_decay,
      epochs=MANY,
      batch_size=batch_size,
      devices=devices,
      on_epoch=lambda record: on_epoch(),
    )
  except Stop:
    pass


@functools.cache
def _operands(n: int) -> tuple[jax.Array, jax.Array]:
  first, second = jax.random.key(0), jax.random.key(1)
  return jax.random.uniform(first, (n, n)), jax.random.uniform(second, (n, n))


@jax.jit
def _product(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.matmul(a, b, precision="highest")


def matmul_seconds(n: int, repeats: int = 5) -> float:
  """Times an [n, n] float32 product: the best of a few."""
  a, b = _operands(n)
  _product(a, b).block_until_ready()
  best = float("inf")
  for _ in range(repeats):
    start = time.perf_counter()
    _product(a, b).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return best
