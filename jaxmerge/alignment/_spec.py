"""Permutation specifications: which axes share one hidden dimension."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree

PyTree = Any


class Axis(NamedTuple):
  """One axis of one leaf that runs over the neurons of a group.

  An axis may hold each of the n neurons in several places: it has length
  ``outer * n * inner`` and is laid out as ``[outer, n, inner]``. So are the
  inputs of a dense layer behind flattened images (``outer`` places of ``n``
  channels) and the outputs of a projection onto ``n`` heads of width ``inner``.

  Attributes:
    leaf: The leaf's name, see `jaxmerge.tree.leaf_names`.
    axis: The number of the axis; negative counts from the end.
    incoming: Whether the leaf lies before the neurons: it holds the edges that
      come into them, their biases, or the scales of their normalisation. Those
      that are not lead from the neurons to the next layer.
    outer: How often the neurons are repeated as a whole.
    inner: How many entries each neuron has in a row.
  """

  leaf: str
  axis: int
  incoming: bool = True
  outer: int = 1
  inner: int = 1


#: For each group of neurons, by a name of its own, where they appear.
PermutationSpec = Mapping[str, tuple[Axis, ...]]


class SpecError(ValueError):
  """A permutation specification does not fit the parameters."""


def group_sizes(spec: PermutationSpec, params: PyTree) -> dict[str, int]:
  """Checks that a specification fits parameters; counts the neurons.

  Args:
    spec: The specification.
    params: Any pytree of arrays (or of what has a shape).

  Returns:
    The number of neurons of each group.

  Raises:
    SpecError: If a leaf is not there, an axis is no integer or out of range,
      outer or inner is no positive integer, the axes of a group do not agree
      about its size, or an axis is listed twice.

  >>> params = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 4))}
  >>> spec = {"hidden": (Axis("a", 1), Axis("b", 0, incoming=False))}
  >>> group_sizes(spec, params)
  {'hidden': 3}
  """
  shapes = dict(
    zip(
      tree.leaf_names(params),
      [np.shape(leaf) for leaf in jax.tree.leaves(params)],
      strict=True,
    )
  )
  used: dict[tuple[str, int], str] = {}
  sizes = {}
  for group, axes in spec.items():
    if not axes:
      raise SpecError(f"group '{group}' has no axes; leave it out")
    found = [(_size(group, axis, shapes, used), axis) for axis in axes]
    size, first = found[0]
    for other, axis in found[1:]:
      if other != size:
        raise SpecError(
          f"group '{group}' has {size} neurons in leaf '{first.leaf}' of shape"
          f" {shapes[first.leaf]} (axis {first.axis}) but {other} in"
          f" '{axis.leaf}' of shape {shapes[axis.leaf]} (axis {axis.axis});"
          " give axes of one size, or outer and inner"
        )
    sizes[group] = size
  return sizes


def _size(
  group: str,
  axis: Axis,
  shapes: Mapping[str, tuple[int, ...]],
  used: dict[tuple[str, int], str],
) -> int:
  """Number of neurons along an axis, which is noted as used."""
  if axis.leaf not in shapes:
    names = list(shapes)
    raise SpecError(
      f"group '{group}' names leaf '{axis.leaf}', which the parameters do not"
      f" have; they have {', '.join(names[:5])}"
      + (", ..." if len(names) > 5 else "")
    )
  shape = shapes[axis.leaf]
  begin = f"group '{group}': axis {axis.axis} of leaf '{axis.leaf}'"
  if not _is_integer(axis.axis):
    raise SpecError(f"{begin} is no integer; give the number of the axis")
  if not all(
    _is_integer(times) and times >= 1 for times in (axis.outer, axis.inner)
  ):
    raise SpecError(
      f"{begin}: outer and inner must be positive integers; got {axis.outer}"
      f" and {axis.inner}"
    )
  if not -len(shape) <= axis.axis < len(shape):
    raise SpecError(
      f"group '{group}' names axis {axis.axis} of leaf '{axis.leaf}', which has"
      f" shape {shape}"
    )
  place = axis.leaf, axis.axis % len(shape)
  if place in used:
    raise SpecError(
      f"axis {place[1]} of leaf '{axis.leaf}' is in group '{used[place]}' and"
      f" again in group '{group}'; an axis belongs to one group, once"
    )
  used[place] = group
  length, times = shape[axis.axis], axis.outer * axis.inner
  if not length or length % times:
    raise SpecError(
      f"{begin} of shape {shape} is no multiple of outer * inner ="
      f" {axis.outer} * {axis.inner}"
    )
  return length // times


def _is_integer(value: Any) -> bool:
  return isinstance(value, numbers.Integral)


def split_axis(leaf: Any, axis: Axis) -> tuple[jax.Array, int]:
  """Reshapes a leaf so that the neurons have an axis of their own.

  Args:
    leaf: An array.
    axis: Which of its axes is meant.

  Returns:
    The array with the axis as ``[outer, n, inner]``, and which axis is n.

  >>> array, place = split_axis(jnp.ones((2, 12)), Axis("w", 1, inner=3))
  >>> array.shape, place
  ((2, 1, 4, 3), 2)
  """
  leaf = jnp.asarray(leaf)
  place = axis.axis % leaf.ndim
  shape = leaf.shape
  split = (axis.outer, -1, axis.inner)
  return leaf.reshape((*shape[:place], *split, *shape[place + 1 :])), place + 1


def rows(leaf: Any, axis: Axis) -> jax.Array:
  """All that a leaf holds of each neuron, as one row a neuron.

  Args:
    leaf: An array.
    axis: Where its neurons are.

  Returns:
    Shape ``[n, entries]``.

  >>> print(rows(jnp.array([[1, 2, 3], [4, 5, 6]]), Axis("w", 1)))
  [[1 4]
   [2 5]
   [3 6]]
  """
  array, place = split_axis(leaf, axis)
  array = jnp.moveaxis(array, place, 0)
  return array.reshape(array.shape[0], -1)


def take(leaf: Any, axis: Axis, permutation: jax.Array) -> jax.Array:
  """Reorders the neurons along an axis: neuron g becomes permutation[g].

  Args:
    leaf: An array.
    axis: Where its neurons are.
    permutation: Integers of shape ``[n]``.

  Returns:
    An array of the same shape and dtype.

  >>> print(take(jnp.arange(6), Axis("w", 0, inner=2), jnp.array([2, 0, 1])))
  [4 5 0 1 2 3]
  """
  # Without what tells layers of one shape apart, so that they share it.
  return _take(leaf, permutation, axis._replace(leaf="", incoming=True))


@functools.partial(jax.jit, static_argnums=2)
def _take(leaf: Any, permutation: jax.Array, axis: Axis) -> jax.Array:
  array, place = split_axis(leaf, axis)
  return jnp.take(array, permutation, axis=place).reshape(np.shape(leaf))


def axes_by_leaf(
  spec: PermutationSpec,
) -> dict[str, list[tuple[str, Axis]]]:
  """Turns a specification around: for each leaf its groups and axes.

  Args:
    spec: The specification.

  Returns:
    For each leaf that it names, pairs of a group and an axis.

  >>> axes_by_leaf({"hidden": (Axis("w", 1),)})["w"][0][0]
  'hidden'
  """
  found: dict[str, list[tuple[str, Axis]]] = {}
  for group, axes in spec.items():
    for axis in axes:
      found.setdefault(axis.leaf, []).append((group, axis))
  return found


def apply_permutations(
  spec: PermutationSpec,
  params: PyTree,
  permutations: Mapping[str, jax.typing.ArrayLike],
) -> PyTree:
  r"""Reorders the neurons of a network without changing its function.

  Neuron g of a group in the result is neuron :math:`\sigma(g)` in ``params``,
  in all leaves at once. For an MLP with kernels ``[inputs, outputs]``:

  .. math::
    W_l \leftarrow W_l[\sigma_{l-1}, \sigma_l], \quad
    b_l \leftarrow b_l[\sigma_l]

  Args:
    spec: The specification.
    params: Any pytree of arrays.
    permutations: For each group integers of shape ``[n]``, a permutation of 0
      to n - 1; a group that is left out keeps its order. Traced ones are not
      checked.

  Returns:
    A tree of the same structure, shapes and dtypes; leaves without a group are
    those of ``params``.

  Raises:
    SpecError: If the specification does not fit the parameters.
    ValueError: If a permutation is none, or of a group that is not there.

  >>> params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0], [4.0]])}
  >>> spec = {"hidden": (Axis("a", 1), Axis("b", 0, incoming=False))}
  >>> print(apply_permutations(spec, params, {"hidden": [1, 0]})["a"])
  [[2. 1.]]
  """
  sizes = group_sizes(spec, params)
  moves = {
    group: _checked(group, permutation, sizes)
    for group, permutation in permutations.items()
  }
  by_leaf = axes_by_leaf(spec)

  def move(name: str, leaf: Any) -> Any:
    for group, axis in by_leaf.get(name, ()):
      if group in moves:
        leaf = take(leaf, axis, moves[group])
    return leaf

  return tree.map_with_name(move, params)


def _checked(
  group: str, permutation: Any, sizes: Mapping[str, int]
) -> jax.Array:
  if group not in sizes:
    raise ValueError(
      f"got a permutation of group '{group}', which the specification does not"
      f" have; its groups are {', '.join(sizes)}"
    )
  n = sizes[group]
  if not isinstance(permutation, jax.core.Tracer):
    values = np.asarray(permutation)
    is_integer = np.issubdtype(values.dtype, np.integer)
    if not is_integer or not np.array_equal(np.sort(values), np.arange(n)):
      raise ValueError(
        f"the permutation of group '{group}' is not one of its {n} neurons;"
        f" give each of 0 to {n - 1} once"
      )
  elif permutation.shape != (n,):
    raise ValueError(
      f"the permutation of group '{group}' must have shape ({n},); got"
      f" {permutation.shape}"
    )
  return jnp.asarray(permutation)


def identity_permutations(
  spec: PermutationSpec, params: PyTree
) -> dict[str, jax.Array]:
  """The permutations that leave everything as it is.

  Args:
    spec: The specification.
    params: Parameters that it fits.

  Returns:
    For each group int32 of shape ``[n]``.

  Raises:
    SpecError: If the specification does not fit the parameters.

  >>> spec = {"hidden": (Axis("w", 0),)}
  >>> print(identity_permutations(spec, {"w": jnp.ones(3)})["hidden"])
  [0 1 2]
  """
  sizes = group_sizes(spec, params)
  return {group: jnp.arange(n, dtype=jnp.int32) for group, n in sizes.items()}


def random_permutations(
  spec: PermutationSpec, params: PyTree, key: jax.Array
) -> dict[str, jax.Array]:
  """Draws a permutation of each group, all equally likely.

  Args:
    spec: The specification.
    params: Parameters that it fits.
    key: PRNG key.

  Returns:
    For each group int32 of shape ``[n]``.

  Raises:
    SpecError: If the specification does not fit the parameters.

  >>> spec = {"hidden": (Axis("w", 0),)}
  >>> drawn = random_permutations(spec, {"w": jnp.ones(3)}, jax.random.key(0))
  >>> sorted(drawn["hidden"].tolist())
  [0, 1, 2]
  """
  start = identity_permutations(spec, params)
  keys = jax.random.split(key, max(1, len(start)))
  return {
    group: jax.random.permutation(one, order)
    for one, (group, order) in zip(keys, start.items(), strict=False)
  }
