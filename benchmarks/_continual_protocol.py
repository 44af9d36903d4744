"""The protocol of the continual benchmark: settings, data, initial networks."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from benchmarks import _problem
from jaxmerge import data as data_lib

NETWORK = "mlpnet"


class Protocol(NamedTuple):
  """One run of MNIST's row of the paper's Table 2.

  Attributes:
    dataset: Name of the set.
    data_dir: Folder of prepared TFDS sets.
    num_tasks: Tasks that the classes are cut into.
    capacity: Stored examples of each task.
    epochs: Epochs of every network and every curve.
    batch_size: Examples a step, at most as many as there are.
    learning_rate: Of the networks, at the start.
    curve_learning_rate: Of the curves, at the start.
    final_learning_rate: Of both, from nine tenths on.
    momentum: Of SGD.
    weight_decay: Of SGD, in the gradient.
  """

  dataset: str = "mnist"
  data_dir: str | None = None
  num_tasks: int = 5
  capacity: int = 500
  epochs: int = 10
  batch_size: int = 32
  learning_rate: float = 0.01
  curve_learning_rate: float = 0.07
  final_learning_rate: float = 7e-5
  momentum: float = 0.9
  weight_decay: float = 5e-4


def smoke() -> Protocol:
  """The same on two tasks of the embedded digits, for seconds."""
  return Protocol("digits", num_tasks=2, capacity=100, epochs=2)


def load(protocol: Protocol) -> tuple[data_lib.Dataset, data_lib.Dataset]:
  """Loads the training and the test set."""
  train, test = (
    data_lib.load(protocol.dataset, split, data_dir=protocol.data_dir)
    for split in ("train", "test")
  )
  return train, test


def normalization(
  protocol: Protocol, images: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """The factor and the offset that normalise raw images."""
  mean, std = data_lib.normalization(
    protocol.dataset, data_dir=protocol.data_dir
  )
  largest = 255 if np.issubdtype(images.dtype, np.integer) else 1
  return 1 / (largest * np.asarray(std)), -np.asarray(mean) / np.asarray(std)


def initial(image_size: int, seed: int) -> list[np.ndarray]:
  """Draws theta_0: kernels [in, out] with a variance of 1 / fan_in."""
  return _problem.random_ends(_problem.layer_sizes(NETWORK, image_size), seed)[
    0
  ]


def num_steps(protocol: Protocol, sizes: list[int]) -> int:
  """Counts the optimizer steps of a run.

  Args:
    protocol: The protocol.
    sizes: Number of training examples of each task.

  Returns:
    The steps of all networks and of all curves.
  """
  stored = itertools.accumulate(min(n, protocol.capacity) for n in sizes)
  runs = [*sizes, *list(stored)[1:]]
  return protocol.epochs * sum(
    -(-n // min(protocol.batch_size, n)) for n in runs
  )
