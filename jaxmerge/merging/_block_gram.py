"""Merges that are linear combinations of the models, from inner products.

Rules on the sphere treat all vectors of a space alike, whichever its
coordinates: they commute with rotations. So they are computed on vectors of n
entries that have the lengths and angles of the models, and what comes out is
expressed by the models. The models themselves are read twice: for their inner
products, and for the combination.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.merging import _by_block, _gathered, _reductions, _registry

Array = jax.Array

# Sums of so many products are in float32, sums of these in float64.
_ROW = 4096


@functools.partial(jax.jit, static_argnames="shape")
def _products(arrays: list[Array], shape: tuple[int, int]) -> Array:
  """Inner products of the first array and the others' differences from it."""
  first, *others = [array.astype(jnp.float32) for array in arrays]
  basis = [first, *(other - first for other in others)]
  rows = [one.reshape(shape) for one in basis]
  products = [
    rows[i] * rows[j] for i in range(len(rows)) for j in range(i, len(rows))
  ]
  # Two at least: a single reduction is slow.
  sums = _reductions.sums([*products, products[0]])
  return jnp.stack(sums[:-1])


def gram(blocks: _by_block.Blocks, count: int) -> np.ndarray:
  """Inner products of a leaf and of differences from it.

  Differences tell models apart that are almost equal, as fine-tuned ones are.

  Args:
    blocks: The leaf of the base (or the first model) and of the models.
    count: Number of these, n.

  Returns:
    Inner products, float64 [n, n], of the first and of the others less it.
  """
  total = np.zeros(count * (count + 1) // 2)
  for block in blocks:
    size = len(block.arrays[0])
    row = min(_ROW, size)
    found = _products(_by_block.on_device(block.arrays), (size // row, row))
    total += np.asarray(found, np.float64).sum(axis=1)
    block.release()
  products = np.zeros((count, count))
  products[np.triu_indices(count)] = total
  return products + np.triu(products, 1).T


@functools.cache
def combination_rule() -> _gathered.GatherRule:
  """Adds differences from the base by their weights."""

  def merge(
    base: Array, leaves: Any, weights: Array, values: _by_block.Values
  ) -> Array:
    # The base's own coefficient differs from 1 by very little or much; the
    # difference is told, so that it is not rounded away.
    merged = base + values["surplus"] * base
    for i, leaf in enumerate(leaves):
      merged = merged + weights[i] * (leaf - base)
    return merged

  return _gathered.GatherRule(merge)


def coefficients(
  method: _registry.RegisteredMethod,
  products: np.ndarray,
  has_base: bool,
  weights: Any,
) -> tuple[float, np.ndarray]:
  """What a method makes of models, as a combination of them.

  Args:
    method: A method on the sphere.
    products: What `gram` returned.
    has_base: Whether the first of them is the base, the others the models;
      else it is the first model.
    weights: One for each model, or None.

  Returns:
    What is added to the first's coefficient of 1, and the coefficients of the
    others' differences from it.
  """
  values, vectors = np.linalg.eigh(products)
  # The columns have the inner products.
  points = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
  first, steps = points[:, 0], points[:, 1:].T
  with jax.enable_x64(True):
    if has_base and method.info.needs_base:
      # Task vectors are all that counts: the base is the origin.
      base = {"leaf": np.zeros_like(first)}
      models = [{"leaf": step} for step in steps]
    else:
      base = None
      models = [{"leaf": first}, *({"leaf": first + step} for step in steps)]
    merged = np.asarray(
      method(base, models, weights=weights)["leaf"], np.float64
    )
  if base is None:
    merged = merged - first
  spread = points if base is None else points[:, 1:]
  # Directions that differ by rounding alone have no coefficients.
  found = np.linalg.lstsq(spread, merged, rcond=1e-10)[0]
  if base is None:
    return float(found[0]), found[1:]
  return 0.0, found
