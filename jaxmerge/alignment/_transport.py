"""Transport of a network's neurons by plans, through a specification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmerge import tree
from jaxmerge.alignment import _plan, _spec

PyTree = Any

OUTGOING = ("source", "target")


class Move(NamedTuple):
  """How the n neurons of a group are made of the model's m.

  Attributes:
    permutation: Shape [n], where each is one of the model's, or None.
    incoming: Shape [n, m], for the leaves before the neurons.
    outgoing: Shape [n, m], for the leaves behind them.
  """

  permutation: jax.Array | None
  incoming: jax.Array
  outgoing: jax.Array


def make_move(
  plan: jax.Array, permutation: jax.Array | None, outgoing: str
) -> Move:
  """The move of a plan, its sums taken as they are."""

  def over(plan: jax.Array, axis: int) -> jax.Array:
    sums = jnp.sum(plan, axis=axis, keepdims=True)
    # A neuron without mass becomes, or gives, nothing.
    return jnp.where(sums > 0, plan / jnp.where(sums > 0, sums, 1), 0)

  before = over(plan, 1)
  behind = over(plan, 0) if outgoing == "source" else before
  return Move(permutation, before, behind)


def move_leaf(leaf: Any, moves: Sequence[tuple[_spec.Axis, Move]]) -> jax.Array:
  """Moves axes of a leaf; rounded to its dtype once, at the end."""
  dtype = jnp.asarray(leaf).dtype
  for axis, move in moves:
    if move.permutation is not None:
      leaf = _spec.take(leaf, axis, move.permutation)
    else:
      leaf = _mix(leaf, axis, move.incoming if axis.incoming else move.outgoing)
  return jnp.asarray(leaf).astype(dtype)


def _mix(leaf: Any, axis: _spec.Axis, matrix: jax.Array) -> jax.Array:
  """Makes n neurons of m along an axis, in the wider of both dtypes."""
  array, place = _spec.split_axis(leaf, axis)
  dtype = max(
    matrix.dtype, tree.accumulation_dtype(array), key=lambda d: d.itemsize
  )
  mixed = jnp.tensordot(
    matrix.astype(dtype),
    array.astype(dtype),
    axes=(1, place),
    precision=jax.lax.Precision.HIGHEST,
  )
  shape = list(jnp.shape(leaf))
  shape[axis.axis] = axis.outer * matrix.shape[0] * axis.inner
  return jnp.moveaxis(mixed, 0, place).reshape(shape)


def move_tree(
  spec: _spec.PermutationSpec, params: PyTree, moves: Mapping[str, Move]
) -> PyTree:
  """Moves all leaves; those without a group are as they are."""
  by_leaf = _spec.axes_by_leaf(spec)

  def move(name: str, leaf: Any) -> Any:
    mine = [
      (axis, moves[group])
      for group, axis in by_leaf.get(name, ())
      if group in moves
    ]
    return move_leaf(leaf, mine) if mine else leaf

  return tree.map_with_name(move, params)


def check_floating(spec: _spec.PermutationSpec, params: PyTree) -> None:
  """Raises where a leaf with neurons cannot be mixed."""
  by_leaf = _spec.axes_by_leaf(spec)
  for name, leaf in zip(
    tree.leaf_names(params), jax.tree.leaves(params), strict=True
  ):
    if name in by_leaf and not tree.is_float(leaf):
      raise ValueError(
        f"leaf '{name}' of group '{by_leaf[name][0][0]}' must be"
        f" floating-point to be transported; got {jnp.asarray(leaf).dtype};"
        " leave it out of the specification"
      )


def check_outgoing(outgoing: str) -> None:
  """Raises ValueError unless the name is known."""
  if outgoing not in OUTGOING:
    raise ValueError(
      f"unknown outgoing {outgoing!r}; choose one of {', '.join(OUTGOING)}"
    )


def apply_plans(
  spec: _spec.PermutationSpec,
  params: PyTree,
  plans: Mapping[str, jax.typing.ArrayLike],
  *,
  marginals: Mapping[str, tuple[jax.typing.ArrayLike, jax.typing.ArrayLike]]
  | None = None,
  outgoing: str = "source",
  tolerance: float = 1e-3,
) -> PyTree:
  r"""Brings the neurons of a network into another order and number.

  With the plan :math:`P` of a group, of shape ``[n, m]``, and its sums
  :math:`a = P 1`, :math:`b = P^T 1`:

  .. math::
    W'_{\mathrm{in}} = \mathrm{diag}(1/a)\, P\, W_{\mathrm{in}}, \quad
    W'_{\mathrm{out}} = P\, \mathrm{diag}(1/b)\, W_{\mathrm{out}}

  along the axes that come into the neurons and those that lead on. A new neuron
  is a mean of old ones, and an old one's outgoing weights are shared out among
  the new: so a network whose neurons are made into several copies keeps its
  function. Singh and Jaggi divide by a on both sides (``outgoing="target"``),
  which is the same for equal widths and uniform marginals; else it multiplies
  what a layer passes on by the ratio of the widths.

  Args:
    spec: The specification.
    params: Any pytree of arrays, m neurons a group.
    plans: For each group a plan of shape ``[n, m]``; a group that is left out
      stays as it is. Traced ones are not checked.
    marginals: For each group the pair of marginals that its plan must have;
      uniform ones by default.
    outgoing: ``"source"`` or ``"target"``, the marginal that outgoing weights
      are divided by.
    tolerance: As for `check_plan`.

  Returns:
    A tree of the same structure and dtypes, n neurons a group.

  Raises:
    SpecError: If the specification does not fit the parameters.
    ValueError: If a plan has another shape or does not sum to its marginals,
      is of a group that is not there, or ``outgoing`` is unknown.

  References:
    Singh and Jaggi, `Model fusion via optimal transport
    <https://arxiv.org/abs/1910.05653>`_, 2020

  >>> from jaxmerge.alignment import Axis
  >>> params = {"a": jnp.array([[3.0]]), "b": jnp.array([[4.0]])}
  >>> spec = {"hidden": (Axis("a", 1), Axis("b", 0, incoming=False))}
  >>> wide = apply_plans(spec, params, {"hidden": jnp.full((2, 1), 0.5)})
  >>> print(wide["a"], wide["b"].T)
  [[3. 3.]] [[2. 2.]]
  """
  sizes = _spec.group_sizes(spec, params)
  check_outgoing(outgoing)
  check_floating(spec, params)
  marginals = marginals or {}
  moves = {}
  for group in (*plans, *marginals):
    if group not in sizes:
      raise ValueError(
        f"got a plan or marginals of group '{group}', which the specification"
        f" does not have; its groups are {', '.join(sizes)}"
      )
  for group, plan in plans.items():
    if jnp.ndim(plan) != 2 or jnp.shape(plan)[1] != sizes[group]:
      raise ValueError(
        f"the plan of group '{group}' must have shape (n, {sizes[group]}), a"
        f" column for each neuron in params; got {jnp.shape(plan)}"
      )
    if not _plan.is_traced(plan):
      try:
        _plan.check_plan(
          plan, *marginals.get(group, (None, None)), tolerance=tolerance
        )
      except ValueError as error:
        raise ValueError(f"group '{group}': {error}") from error
    moves[group] = make_move(jnp.asarray(plan), None, outgoing)
  return move_tree(spec, params, moves)
