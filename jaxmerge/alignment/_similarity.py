"""How alike the neurons of two networks are, by their weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree
from jaxmerge.alignment import _finite, _spec

PyTree = Any
Select = str | Callable[[str], bool] | None

# A leaf with fewer entries a neuron is counted with others, even if that means
# to count it again: a matrix of similarities of its own would cost more.
_FEW_ENTRIES = 64

# How a leaf is read: where the group's neurons are, and for each other group
# on it which permutation to apply, and where.
_Layout = tuple[_spec.Axis, tuple[tuple[int, _spec.Axis], ...]]


class MatchingInfo(NamedTuple):
  """How a matching of neurons went.

  Attributes:
    permutations: For each group int32 of shape ``[n]``: the model's neuron that
      takes the place of the reference's, as `apply_permutations` takes them.
    objectives: float64 of shape ``[n_iters + 1]``: the objective of the start
      and after each iteration.
    converged: Whether the last iteration changed nothing.
    n_iters: Number of iterations.
  """

  permutations: dict[str, jax.Array]
  objectives: np.ndarray
  converged: bool
  n_iters: int


class Part(NamedTuple):
  """Leaves that count for a group, with the groups on their other axes.

  Attributes:
    leaves: Positions among the leaves of the tree.
    layouts: How each of them is read.
    others: Those other groups. Where the group itself is among them, both axes
      of a leaf belong to it.
  """

  leaves: tuple[int, ...]
  layouts: tuple[_Layout, ...]
  others: tuple[str, ...]


def counted_leaves(params: PyTree, select: Select) -> list[bool]:
  """For each leaf whether it counts when networks are compared.

  Args:
    params: Any pytree of arrays.
    select: A pattern or function of names, see `jaxmerge.tree.select`. By
      default all but running statistics: leaves in a collection
      ``batch_stats``, or named ``mean`` or ``var``.

  Returns:
    A bool for each leaf; False for those that are not floating-point.

  Raises:
    ValueError: If no leaf counts.
  """
  chosen = tree.select(params, is_weight if select is None else select)
  counted = [
    bool(is_chosen) and tree.is_float(leaf)
    for is_chosen, leaf in zip(
      jax.tree.leaves(chosen), jax.tree.leaves(params), strict=True
    )
  ]
  if not any(counted):
    raise ValueError(
      f"select={select!r} leaves no floating-point leaf to compare; the names"
      f" are: {', '.join(tree.leaf_names(params)[:5])}"
    )
  return counted


def is_weight(name: str) -> bool:
  """Whether a leaf of that name is none of running statistics.

  >>> is_weight("params/norm/scale"), is_weight("params/batch_stats/norm/mean")
  (True, False)
  """
  parts = name.split("/")
  return "batch_stats" not in parts and parts[-1] not in ("mean", "var")


def check_finite(**trees: PyTree) -> None:
  """Raises if a leaf has an entry that is NaN or infinite.

  Args:
    **trees: Pytrees of arrays that are not traced, by what the message calls
      them.

  Raises:
    TypeError: If a leaf is traced.
    ValueError: If an entry is not finite.
  """
  for name, params in trees.items():
    leaves = jax.tree.leaves(params)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
      raise TypeError(
        f"{name} is traced, but neurons are matched on the host; call this"
        " outside of jax.jit, jax.vmap and jax.grad"
      )
  for name, params in trees.items():
    leaf_name = _finite.first_bad(params)
    if leaf_name is not None:
      raise ValueError(
        f"leaf '{leaf_name}' of {name} has entries that are NaN or infinite;"
        " neurons cannot be compared by them"
      )


def widened(params: PyTree) -> PyTree:
  """Half types in float32, other leaves as they are.

  Args:
    params: Any pytree.

  Returns:
    A tree of the same structure.
  """
  return jax.tree.map(
    lambda leaf: (
      jnp.asarray(leaf).astype(tree.accumulation_dtype(leaf))
      if tree.is_float(leaf)
      else leaf
    ),
    params,
  )


def parts_of(
  spec: _spec.PermutationSpec, params: PyTree, counted: Sequence[bool]
) -> dict[str, list[Part]]:
  """For each group the leaves that count for it, by their other groups.

  Args:
    spec: The specification, which fits.
    params: The parameters.
    counted: For each leaf whether it counts.

  Returns:
    For each group parts that depend on different sets of other groups.
  """
  names = tree.leaf_names(params)
  shapes = [np.shape(leaf) for leaf in jax.tree.leaves(params)]
  by_leaf = _spec.axes_by_leaf(spec)
  found: dict[str, dict[tuple[str, ...], list[tuple[int, _spec.Axis]]]] = {
    group: {} for group in spec
  }
  for position, name in enumerate(names):
    if not counted[position]:
      continue
    pairs = by_leaf.get(name, [])
    for i, (group, axis) in enumerate(pairs):
      others = tuple(other for other, _ in pairs[:i] + pairs[i + 1 :])
      found[group].setdefault(tuple(sorted(others)), []).append(
        (position, axis)
      )

  def entries(position: int, axis: _spec.Axis) -> int:
    shape = shapes[position]
    return math.prod(shape) * axis.outer * axis.inner // shape[axis.axis]

  parts = {}
  for group, by_others in found.items():
    _join_small(group, by_others, entries)
    parts[group] = [
      _part(others, places, names, by_leaf)
      for others, places in by_others.items()
    ]
  return parts


def _join_small(
  group: str,
  by_others: dict[tuple[str, ...], list[tuple[int, _spec.Axis]]],
  entries: Callable[[int, _spec.Axis], int],
) -> None:
  """Adds parts with few entries to the largest one."""
  sizes = {
    others: sum(entries(*place) for place in places)
    for others, places in by_others.items()
    if group not in others
  }
  if len(sizes) < 2:
    return
  largest = max(sizes, key=lambda others: sizes[others])
  joined = [
    others
    for others, size in sizes.items()
    if others == largest or size < _FEW_ENTRIES
  ]
  places = [place for others in joined for place in by_others.pop(others)]
  union = tuple(sorted({other for others in joined for other in others}))
  by_others[union] = by_others.get(union, []) + places


def _part(
  others: tuple[str, ...],
  places: list[tuple[int, _spec.Axis]],
  names: list[str],
  by_leaf: Mapping[str, list[tuple[str, _spec.Axis]]],
) -> Part:
  unique = tuple(dict.fromkeys(others))
  layouts = tuple(
    (
      _nameless(axis),
      tuple(
        (unique.index(other), _nameless(place))
        for other, place in by_leaf[names[position]]
        if place is not axis
      ),
    )
    for position, axis in places
  )
  return Part(tuple(position for position, _ in places), layouts, others)


def _nameless(axis: _spec.Axis) -> _spec.Axis:
  """Equal for equal layers, so that they share what is compiled."""
  return axis._replace(leaf="", incoming=True)


def similarity(
  part: Part,
  references: Sequence[Any],
  models: Sequence[Any],
  permutations: Mapping[str, Any],
) -> jax.Array:
  r"""Similarities of a group's neurons by one part of the leaves.

  .. math::
    S_{gj} = \sum_{\mathrm{leaves}} \langle \theta^{\mathrm{ref}}_{g},
      (\sigma\theta)_{j} \rangle

  Args:
    part: The leaves.
    references: All leaves of the reference.
    models: All leaves of the model.
    permutations: The permutations of the other groups, at least.

  Returns:
    Shape ``[n, n]``, of at least float32: rows are the reference's neurons.
  """
  return _similarity(
    tuple(references[i] for i in part.leaves),
    tuple(models[i] for i in part.leaves),
    tuple(permutations[other] for other in dict.fromkeys(part.others)),
    part.layouts,
  )


@functools.partial(jax.jit, static_argnames="layouts")
def _similarity(
  references: tuple[Any, ...],
  models: tuple[Any, ...],
  permutations: tuple[Any, ...],
  layouts: tuple[_Layout, ...],
) -> jax.Array:
  totals = []
  vectors = []
  for reference, model, (axis, others) in zip(
    references, models, layouts, strict=True
  ):
    for index, other in others:
      model = _spec.take(model, other, permutations[index])
    dtype = tree.accumulation_dtype(reference)
    x, place = _spec.split_axis(jnp.asarray(reference).astype(dtype), axis)
    y, _ = _spec.split_axis(jnp.asarray(model).astype(dtype), axis)
    if x.size == x.shape[place]:
      vectors.append((x.reshape(-1), y.reshape(-1)))
      continue
    rest = [i for i in range(x.ndim) if i != place]
    totals.append(_products(x, y, rest))
  if vectors:
    # One product for all biases and scales.
    dtype = np.result_type(*(x.dtype for x, _ in vectors))
    x = jnp.stack([x.astype(dtype) for x, _ in vectors])
    y = jnp.stack([y.astype(dtype) for _, y in vectors])
    totals.append(_products(x, y, [0]))
  dtype = np.result_type(*(total.dtype for total in totals))
  return sum(
    (total.astype(dtype) for total in totals[1:]), totals[0].astype(dtype)
  )


def _products(x: jax.Array, y: jax.Array, axes: list[int]) -> jax.Array:
  return jnp.real(
    jnp.tensordot(
      jnp.conj(x), y, (axes, axes), precision=jax.lax.Precision.HIGHEST
    )
  )


def objective(
  spec: _spec.PermutationSpec,
  reference: PyTree,
  model: PyTree,
  counted: Sequence[bool],
  permutations: Mapping[str, Any] | None,
) -> float:
  """The inner product of a reference and a permuted model.

  Args:
    spec: The specification.
    reference: Parameters.
    model: Parameters.
    counted: For each leaf whether it counts.
    permutations: Of all groups, or None for the identity.

  Returns:
    The sum over the leaves.
  """
  by_leaf = _spec.axes_by_leaf(spec) if permutations is not None else {}
  rows = []
  for name, x, y, is_counted in zip(
    tree.leaf_names(reference),
    jax.tree.leaves(reference),
    jax.tree.leaves(model),
    counted,
    strict=True,
  ):
    if is_counted:
      pairs = by_leaf.get(name, [])
      rows.append(
        _row_products(
          x,
          y,
          tuple((permutations or {})[group] for group, _ in pairs),
          tuple(_nameless(axis) for _, axis in pairs),
        )
      )
  # Short sums in float32; the long one of their results in float64.
  return float(
    sum(np.sum(row, dtype=np.float64) for row in jax.device_get(rows))
  )


@functools.partial(jax.jit, static_argnames="axes")
def _row_products(
  x: Any,
  y: Any,
  permutations: tuple[Any, ...],
  axes: tuple[_spec.Axis, ...],
) -> jax.Array:
  for permutation, axis in zip(permutations, axes, strict=True):
    y = _spec.take(y, axis, permutation)
  dtype = tree.accumulation_dtype(x)
  x, y = (jnp.atleast_1d(jnp.asarray(leaf)).astype(dtype) for leaf in (x, y))
  return jnp.real(jnp.sum(jnp.conj(x) * y, axis=-1))
