"""Subspaces of a parameter space that a few directions span."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree as tree_lib

PyTree = Any

GRANULARITIES = ("global", "layer", "leaf")


class Subspace(NamedTuple):
  """What some directions span, for one network; all leaves are arrays.

  The axes of the coordinates are orthogonal, though the vectors are not: they
  are combined when they are used, so that no copy of them has to be made.

  Attributes:
    origin: what the coordinates are relative to.
    vectors: the directions, leaves `[directions, ...]`.
    weights: `[groups, directions, directions]`; coordinate i of a group goes
      along `sum_j weights[group, i, j] * vectors_j`, which is vector i less its
      projections on those before it; rows of zeros for what degenerates.
    gram: `[groups, directions, directions]`, dot products of the vectors.
  """

  origin: PyTree
  vectors: PyTree
  weights: jax.Array
  gram: jax.Array


def group_names(params: PyTree, granularity: str) -> tuple[str, ...]:
  """The group that each leaf belongs to.

  Args:
    params: the parameters.
    granularity: "global" for one group; "layer" for one for each layer, that
      is, leaves whose names agree up to the first part that has a number, or,
      where none has one, in all but the last part; "leaf" for one for each
      leaf.

  Returns:
    A name for each leaf, in the order of `jax.tree.leaves`.

  >>> params = {"Dense_0": {"bias": 0.0, "kernel": 0.0}, "head": {"bias": 0.0}}
  >>> group_names(params, "layer")
  ('Dense_0', 'Dense_0', 'head')
  """
  names = tree_lib.leaf_names(params)
  if granularity == "leaf":
    return tuple(names)
  if granularity == "global":
    return ("all",) * len(names)
  if granularity != "layer":
    raise ValueError(
      f"Unknown granularity {granularity!r}. Choose one of "
      f"{', '.join(GRANULARITIES)}."
    )

  def layer(name: str) -> str:
    parts = name.split("/")
    for place, part in enumerate(parts[:-1]):
      if re.search(r"\d", part):
        return "/".join(parts[: place + 1])
    return "/".join(parts[:-1]) or name

  return tuple(layer(name) for name in names)


def group_numbers(names: Sequence[str]) -> tuple[int, ...]:
  """Numbers of the groups from 0 on, in the order of their first leaves.

  >>> group_numbers(("b", "a", "b"))
  (0, 1, 0)
  """
  order = list(dict.fromkeys(names))
  return tuple(order.index(name) for name in names)


# Accelerators multiply in less than float32 by default, and directions that are
# nearly parallel have large weights of both signs.
_small = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def _by_group(groups: tuple[int, ...], parts: Sequence[jax.Array]) -> jax.Array:
  """Sums what the leaves have, group by group, `[groups, ...]`."""
  sums: list[Any] = [0.0] * (max(groups) + 1)
  for group, part in zip(groups, parts, strict=True):
    sums[group] += part
  return jnp.stack(sums)


def _dots(
  groups: tuple[int, ...], vectors: PyTree, vector: PyTree
) -> jax.Array:
  """Dot products of a vector and several, `[groups, n]`."""

  def one(rows: jax.Array, leaf: jax.Array) -> jax.Array:
    # Sums, not a product of matrices: each vector is read once.
    products = rows.astype(jnp.float32) * leaf.astype(jnp.float32)[None]
    return products.sum(axis=tuple(range(1, rows.ndim)))

  parts = jax.tree.leaves(jax.tree.map(one, vectors, vector))
  return _by_group(groups, parts)


def coordinates(
  groups: tuple[int, ...], space: Subspace, vector: PyTree
) -> jax.Array:
  """Dot products of a vector and the coordinates' axes, `[groups, n]`.

  That of a gradient is the gradient with respect to the coefficients.
  """
  dots = _dots(groups, space.vectors, vector)
  return _small("gij,gj->gi", space.weights, dots)


def moved(
  groups: tuple[int, ...], space: Subspace, coefficients: jax.Array
) -> PyTree:
  """The parameters that have these coefficients.

  Args:
    groups: number of the group of each leaf.
    space: the subspace.
    coefficients: float `[groups, n]`.

  Returns:
    The parameters.
  """
  shares = _small("gi,gij->gj", coefficients, space.weights)
  leaves, structure = jax.tree.flatten(space.origin)
  vectors = jax.tree.leaves(space.vectors)
  made = []
  for group, leaf, rows in zip(groups, leaves, vectors, strict=True):
    total = leaf.astype(jnp.float32)
    for number in range(len(rows)):
      total += shares[group, number] * rows[number].astype(jnp.float32)
    made.append(total.astype(leaf.dtype))
  return jax.tree.unflatten(structure, made)


@functools.partial(jax.jit, static_argnames="groups")
def _gram(groups: tuple[int, ...], vectors: PyTree) -> jax.Array:
  """`[seeds, groups, n, n]` of vectors with leaves `[seeds, n, ...]`."""

  def products(rows: jax.Array) -> jax.Array:
    rows = rows.astype(jnp.float32)
    axes = tuple(range(1, rows.ndim))
    return jax.lax.dot_general(
      rows, rows, ((axes, axes), ((), ())), jax.lax.Precision.HIGHEST
    )

  def one(vectors: PyTree) -> jax.Array:
    return _by_group(groups, [products(r) for r in jax.tree.leaves(vectors)])

  return jax.vmap(one)(vectors)


def gram_schmidt(gram: np.ndarray, tolerance: float) -> np.ndarray:
  """Combinations of vectors that are orthogonal, by their Gram matrix.

  Args:
    gram: `[n, n]`.
    tolerance: a vector is dropped if what the ones before it leave of it is
      shorter than that, as a part of its own length.

  Returns:
    W `[n, n]`, lower triangular, with `W gram W^T` diagonal: row i has 1 at i,
    or is zero where the vector was dropped.

  >>> gram_schmidt(np.array([[4.0, 2.0], [2.0, 4.0]]), 0.01).tolist()
  [[1.0, 0.0], [-0.5, 1.0]]
  """
  gram = np.asarray(gram, np.float64)
  found = np.zeros_like(gram)
  squares = np.ones(len(gram))
  for i in range(len(gram)):
    row = np.zeros(len(gram))
    row[i] = 1.0
    for _ in range(2):  # Once is not enough where little is left.
      row -= ((found @ gram @ row) / squares) @ found
    square = row @ gram @ row
    if square > tolerance**2 * gram[i, i] and gram[i, i] > 0:
      found[i], squares[i] = row, square
  return found


def span(
  groups: tuple[int, ...],
  origin: PyTree,
  vectors: PyTree,
  tolerance: float = 0.02,
) -> Subspace:
  """The subspace that some directions span.

  They are orthogonalised by Gram and Schmidt in their order, group by group,
  by the matrix of their dot products: what is made is of the size of their
  number.

  Args:
    groups: number of the group of each leaf.
    origin: the parameters that the coordinates are relative to, leaves
      `[seeds, ...]`.
    vectors: the directions, leaves `[seeds, directions, ...]`. An axis is as
      long as what is left of its vector, so that a coefficient of 1 goes as far
      as the vector does, and no step of an optimizer far beyond where it came
      from.
    tolerance: as in `gram_schmidt`; what float32 sums leave of the dot products
      is below it, and nothing else is.

  Returns:
    The subspaces, leaves with an axis of seeds.
  """
  gram = _gram(groups, vectors)
  weights = np.stack(
    [
      np.stack([gram_schmidt(one, tolerance) for one in seed])
      for seed in np.asarray(gram, np.float64)
    ]
  )
  return Subspace(origin, vectors, jnp.asarray(weights, jnp.float32), gram)


def lengths(space: Subspace) -> np.ndarray:
  """Lengths of the directions, float64 `[..., directions]`."""
  squares = np.asarray(space.gram, np.float64).sum(axis=-3)
  return np.sqrt(np.diagonal(squares, axis1=-2, axis2=-1))


def cosines(space: Subspace, coefficients: np.ndarray) -> np.ndarray:
  """Cosines of the way that coefficients go and of each direction.

  Args:
    space: the subspace.
    coefficients: `[..., groups, n]`.

  Returns:
    float64 `[..., directions]`, 0 for what is 0.
  """
  gram, weights, shares = (
    np.asarray(values, np.float64)
    for values in (space.gram, space.weights, coefficients)
  )
  shares = np.einsum("...gi,...gij->...gj", shares, weights)
  dots = np.einsum("...gi,...gij->...gj", shares, gram)
  # Rounding of what is almost nothing must not be negative.
  square = np.maximum(np.einsum("...gi,...gi->...", shares, dots), 0.0)
  scale = np.sqrt(square)[..., None] * lengths(space)
  return dots.sum(axis=-2) / np.where(scale > 0, scale, 1.0)


def kept(space: Subspace) -> np.ndarray:
  """Which directions do not degenerate, bool `[..., groups, directions]`."""
  return np.asarray(jnp.abs(space.weights).max(axis=-1) > 0)
