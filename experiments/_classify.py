"""What studies of image classifiers share: normalisation, loss, accuracy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmerge import data as data_lib

PyTree = Any


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


def augmentation(
  padding: int, flip: bool
) -> Callable[[jax.Array, PyTree], PyTree] | None:
  """Random crop, then random horizontal flip, of one example.

  Args:
    padding: how many pixels an image is padded by before the crop; 0 for none.
    flip: whether images are flipped.

  Returns:
    `transform(key, example)` as `training.train` takes it, or None.
  """
  if not (padding or flip):
    return None

  def transform(key: jax.Array, example: PyTree) -> PyTree:
    crop_key, flip_key = jax.random.split(key)
    image = example["input"]
    if padding:
      offset = jax.random.randint(crop_key, (2,), 0, 2 * padding + 1)
      margin = ((padding, padding), (padding, padding), (0, 0))
      image = jax.lax.dynamic_slice(
        jnp.pad(image, margin), (offset[0], offset[1], 0), image.shape
      )
    if flip:
      image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
    return {**example, "input": image}

  return transform


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
