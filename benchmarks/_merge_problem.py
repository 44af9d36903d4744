"""What the merge benchmark merges: trees like a transformer's."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
Array = jax.Array
Shapes = dict[str, Any]


def leaf_shapes(size: int) -> Shapes:
  """Shapes of a transformer of about so many parameters.

  Args:
    size: Number of parameters; 100e6 gives 12 layers of width 768, as BERT
      and GPT-2 have.

  Returns:
    A tree of shapes, an embedding and layers with attention and an MLP.
  """
  layers = 12 if size >= 50e6 else 6 if size >= 1e6 else 2
  multiple = 64 if size >= 20e6 else 8 if size >= 1e6 else 4
  # A layer has 12 d^2 parameters; the embedding has about a fifth.
  width = math.sqrt(0.8 * size / (12 * layers))
  d = multiple * max(1, round(width / multiple))
  layer = {
    "attention": {
      "qkv": {"kernel": (d, 3 * d), "bias": (3 * d,)},
      "out": {"kernel": (d, d), "bias": (d,)},
    },
    "mlp": {
      "up": {"kernel": (d, 4 * d), "bias": (4 * d,)},
      "down": {"kernel": (4 * d, d), "bias": (d,)},
    },
    "norm_1": {"scale": (d,), "bias": (d,)},
    "norm_2": {"scale": (d,), "bias": (d,)},
  }
  rows = max(1, round((size - layers * count(layer)) / d))
  return {
    "embedding": (rows, d),
    **{f"layer_{i}": layer for i in range(layers)},
  }


def _is_shape(x: Any) -> bool:
  return isinstance(x, tuple)


def count(shapes: Shapes) -> int:
  """Number of parameters."""
  leaves = jax.tree.leaves(shapes, is_leaf=_is_shape)
  return sum(math.prod(shape) for shape in leaves)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _leaf(
  pool: Array, start: Array, model: Array, shape: tuple[int, ...], dtype: str
) -> Array:
  size = math.prod(shape)
  base = jax.lax.dynamic_slice(pool, (start,), (size,))
  noise = jax.lax.dynamic_slice(pool, (start // 2 + 7919 * model,), (size,))
  change = jnp.where(model == 0, 0.0, 0.05) * noise
  return (0.02 * (base + change)).reshape(shape).astype(dtype)


class Models:
  """Models that differ from a base by small random changes.

  All are cut from one pool of random numbers, which costs the time to copy
  them. Model 0 is the base.
  """

  def __init__(self, size: int, dtype: str, seed: int = 0):
    self.shapes = leaf_shapes(size)
    self.size = count(self.shapes)
    self.dtype = dtype
    self.nbytes = self.size * jnp.dtype(dtype).itemsize
    rng = np.random.default_rng(seed)
    # Room for as many models as one asks for.
    numbers = rng.standard_normal(self.size + (1 << 20), np.float32)
    self._pool = jnp.asarray(numbers)

  def make(self, model: int) -> PyTree:
    """Makes one model; the same one for the same number."""
    start = 0

    def one(shape: tuple[int, ...]) -> Array:
      nonlocal start
      leaf = _leaf(
        self._pool, np.int32(start), np.int32(model), shape, self.dtype
      )
      start += math.prod(shape)
      return leaf

    params = jax.tree.map(one, self.shapes, is_leaf=_is_shape)
    return jax.block_until_ready(params)

  def fishers(self, number: int) -> Iterator[PyTree]:
    """Positive trees of the models' shapes."""
    square = jax.jit(lambda leaf: leaf * leaf)
    for i in range(1, number + 1):
      yield jax.tree.map(square, self.make(i))
