"""What the epoch benchmark computes: networks, data and arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from jaxmerge import models

# MNIST's.
MEAN, STD = 0.1307, 0.3081


def layer_sizes(network: str, inputs: int = 784) -> tuple[int, ...]:
  """Returns the widths from the input to the logits."""
  model = models.get(network)
  return (inputs, *model.features, model.num_classes)


def epoch_flops(sizes: Sequence[int], examples: int) -> int:
  """Counts an epoch's arithmetic in the matrix products."""
  layers = [a * b for a, b in itertools.pairwise(sizes)]
  forward = weights = 2 * sum(layers)
  inputs = 2 * sum(layers[1:])
  return examples * (forward + weights + inputs)


def load_images(
  data: str, examples: int, data_dir: str | None
) -> tuple[np.ndarray, np.ndarray]:
  """Returns uint8 images [examples, 28, 28, 1] and labels."""
  if data == "mnist":
    from jaxmerge import data as data_lib

    train = data_lib.load("mnist", "train", data_dir=data_dir)
    return np.array(train.images[:examples]), np.array(train.labels[:examples])
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (examples, 28, 28, 1), dtype=np.uint8)
  return images, rng.integers(0, 10, examples, dtype=np.int32)


def random_ends(
  sizes: Sequence[int], seed: int = 0
) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """Draws two networks' kernels [in, out] with a variance of 1 / fan_in."""
  rng = np.random.default_rng(seed)
  first, second = (
    [
      (rng.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32)
      for shape in itertools.pairwise(sizes)
    ]
    for _ in range(2)
  )
  return first, second
