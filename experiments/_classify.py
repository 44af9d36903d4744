"""What studies of image classifiers share: normalisation, loss, accuracy."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmerge import data as data_lib


def normalizer(
  dataset: str, images: np.ndarray, data_dir: str | None
) -> Callable[[jax.Array], jax.Array]:
  """Makes the function that normalises a batch of images on the device.

  Args:
    dataset: name of the set, whose mean and standard deviation are used.
    images: some of its images, for their dtype.
    data_dir: folder of prepared TFDS sets, None for the default one.

  Returns:
    A function of images `[b, h, w, c]`; float32 of the same shape.
  """
  mean, std = data_lib.normalization(dataset, data_dir=data_dir)
  # Integer images count 0..255.
  largest = 255 if np.issubdtype(images.dtype, np.integer) else 1
  factor, shift = 1 / (largest * std), -mean / std

  def normalize(images: jax.Array) -> jax.Array:
    scale, offset = (
      jnp.asarray(value, jnp.float32).reshape(1, 1, 1, -1)
      for value in (factor, shift)
    )
    return images.astype(jnp.float32) * scale + offset

  return normalize


def metrics(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
  """Loss and accuracy of every example.

  Args:
    logits: float32 `[b, classes]`.
    labels: integers `[b]`.

  Returns:
    Cross-entropy "loss" in nats and "accuracy" (0 or 1), float32 `[b]`.
  """
  hits = logits.argmax(axis=-1).astype(labels.dtype) == labels
  return {
    "loss": optax.softmax_cross_entropy_with_integer_labels(logits, labels),
    "accuracy": hits.astype(jnp.float32),
  }
