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
  """Orthogonal directions, for one network; all leaves are arrays.

  Attributes:
    origin: what the coordinates are relative to.
    basis: leaves `[directions, ...]`. In each group of leaves the directions
      are orthogonal, and as long as the first one given; what degenerates is
      zero.
    rows: bool `[groups, directions]`, the directions that are left.
  """

  origin: PyTree
  basis: PyTree
  rows: jax.Array


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


def _by_group(groups: tuple[int, ...], parts: Sequence[jax.Array]) -> jax.Array:
  """Sums what the leaves have, group by group, `[groups, ...]`."""
  sums: list[Any] = [0.0] * (max(groups) + 1)
  for group, part in zip(groups, parts, strict=True):
    sums[group] += part
  return jnp.stack(sums)


def coordinates(
  groups: tuple[int, ...], basis: PyTree, vector: PyTree
) -> jax.Array:
  """Dot products of a vector and the directions, `[groups, directions]`.

  That of a gradient is the gradient with respect to the coefficients.
  """

  def one(rows: jax.Array, leaf: jax.Array) -> jax.Array:
    rows = rows.reshape(len(rows), -1).astype(jnp.float32)
    return rows @ leaf.reshape(-1).astype(jnp.float32)

  parts = jax.tree.leaves(jax.tree.map(one, basis, vector))
  return _by_group(groups, parts)


def moved(
  groups: tuple[int, ...], space: Subspace, coefficients: jax.Array
) -> PyTree:
  """`origin + sum_j coefficients[group, j] * basis_j`, leaf by leaf.

  Args:
    groups: number of the group of each leaf.
    space: the subspace.
    coefficients: float `[groups, directions]`.

  Returns:
    The parameters.
  """
  leaves, structure = jax.tree.flatten(space.origin)
  rows = jax.tree.leaves(space.basis)
  made = [
    leaf
    + jnp.tensordot(coefficients[group].astype(row.dtype), row, 1).astype(
      leaf.dtype
    )
    for group, leaf, row in zip(groups, leaves, rows, strict=True)
  ]
  return jax.tree.unflatten(structure, made)


@functools.partial(jax.jit, static_argnames="groups")
def _gram(groups: tuple[int, ...], vectors: PyTree) -> jax.Array:
  """`[groups, n, n]` of vectors with leaves `[n, ...]`."""

  def one(rows: jax.Array) -> jax.Array:
    rows = rows.reshape(len(rows), -1).astype(jnp.float32)
    return jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)

  return _by_group(groups, [one(leaf) for leaf in jax.tree.leaves(vectors)])


@functools.partial(jax.jit, static_argnames="groups", donate_argnames="vectors")
def _combined(
  groups: tuple[int, ...], vectors: PyTree, matrices: jax.Array
) -> PyTree:
  leaves, structure = jax.tree.flatten(vectors)
  made = [
    jnp.tensordot(matrices[group].astype(leaf.dtype), leaf, 1)
    for group, leaf in zip(groups, leaves, strict=True)
  ]
  return jax.tree.unflatten(structure, made)


def gram_schmidt(gram: np.ndarray, tolerance: float) -> np.ndarray:
  """Combinations of vectors that are orthonormal, by their Gram matrix.

  Args:
    gram: `[n, n]`.
    tolerance: a vector is dropped if what the ones before it leave of it is
      shorter than that, as a part of its own length.

  Returns:
    W `[n, n]`, lower triangular, with `W gram W^T` the identity; its rows are
    zero for the vectors that were dropped.

  >>> gram_schmidt(np.array([[4.0, 4.0], [4.0, 4.0]]), 0.01).tolist()
  [[0.5, 0.0], [0.0, 0.0]]
  """
  gram = np.asarray(gram, np.float64)
  found = np.zeros_like(gram)
  for i in range(len(gram)):
    row = np.zeros(len(gram))
    row[i] = 1.0
    for _ in range(2):  # Once is not enough where little is left.
      row -= (found @ gram @ row) @ found
    square = row @ gram @ row
    if square > tolerance**2 * gram[i, i] and gram[i, i] > 0:
      found[i] = row / np.sqrt(square)
  return found


def span(
  groups: tuple[int, ...],
  origin: PyTree,
  directions: Sequence[PyTree],
  tolerance: float = 0.02,
) -> Subspace:
  """The subspace that some directions span.

  The network's parameters are gone through twice, and a matrix of the number of
  directions is all that is made of them; the vectors are orthogonalised by
  Gram and Schmidt in the order given, group by group.

  Args:
    groups: number of the group of each leaf.
    origin: the parameters that the coordinates are relative to.
    directions: trees of its structure. The first one of each group has the
      length of all, so that a coefficient of 1 along it is that direction.
    tolerance: as in `gram_schmidt`.

  Returns:
    The subspace.
  """
  vectors = jax.tree.map(lambda *leaves: jnp.stack(leaves), *directions)
  first = np.asarray(_gram(groups, vectors))
  lengths = np.sqrt(first[:, 0, 0])
  weights = np.stack([gram_schmidt(one, tolerance) for one in first])
  vectors = _combined(groups, vectors, jnp.asarray(weights, jnp.float32))
  # Again, for what float32 sums have left.
  second = np.asarray(_gram(groups, vectors))
  again = np.stack([gram_schmidt(one, 0.5) for one in second])
  again *= lengths[:, None, None]
  basis = _combined(groups, vectors, jnp.asarray(again, jnp.float32))
  rows = np.einsum("gij,gij->gi", again, again) > 0
  return Subspace(origin, basis, jnp.asarray(rows))
