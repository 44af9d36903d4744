"""Alignment of a network to a reference by optimal transport."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree
from jaxmerge.alignment import (
  _derive_spec,
  _exact,
  _ground_cost,
  _plan,
  _similarity,
  _sinkhorn,
  _spec,
  _transport,
)

PyTree = Any
ByGroup = Mapping[str, jax.typing.ArrayLike]

SOLVERS = ("exact", "sinkhorn", "unbalanced")
KINDS = ("weights", "activations")


class TransportInfo(NamedTuple):
  """How well an alignment by transport went, in the order of the groups.

  Attributes:
    plans: For each group the transport plan, shape [n, m]: rows are the
      reference's neurons, columns the model's.
    permutations: For each group integers of shape [n]: the model's neuron that
      takes the place of the reference's; None unless all plans are
      permutations.
    cost: Shape [groups], the transport costs: the mean squared distance between
      matched neurons.
    converged: Bools of shape [groups]: whether the solver reached its
      tolerance.
    n_iters: Integers of shape [groups], iterations; 0 with exact transport.
    errors: Shape [groups], the sum of the absolute differences of the plan's
      row and column sums from its marginals.
  """

  plans: dict[str, jax.Array]
  permutations: dict[str, jax.Array] | None
  cost: jax.Array
  converged: jax.Array
  n_iters: jax.Array
  errors: jax.Array


def ot_align(
  reference: PyTree,
  model: PyTree,
  spec: _spec.PermutationSpec | None = None,
  *,
  by: str = "weights",
  solver: str = "exact",
  activations: tuple[ByGroup, ByGroup] | None = None,
  importance: tuple[ByGroup, ByGroup] | None = None,
  outgoing: str = "source",
  epsilon: float = 1e-2,
  tau_a: float = 0.99,
  tau_b: float = 0.99,
  max_iterations: int = 2000,
  threshold: float = 1e-3,
  strict: bool = False,
) -> tuple[PyTree, TransportInfo]:
  r"""Aligns the neurons of a network to those of a reference, of any width.

  Group after group, in the order of the layers, with the cost between
  neuron g of the reference and neuron j of the model

  .. math::
    C_{gj} = \sum_k \|W^{\mathrm{ref}}_{k,g} - \hat W_{k,j}\|^2
    \quad \mathrm{or} \quad
    C_{gj} = \frac1E \sum_e (x^{\mathrm{ref}}_{e,g} - x_{e,j})^2

  where k runs over the leaves that come into the neurons, of all layers that
  produce them, and :math:`\hat W` has been moved along the groups before it; or
  over the activations of E examples. The plan of least cost moves the group's
  leaves as `apply_plans` says. With exact transport, equal widths and no
  ``importance`` the plans are permutations and the function is unchanged.

  By weights the order of the groups matters: a group that a leaf leads on from
  comes before the one that it comes into. In cycles, such as residual streams
  with their blocks, the order is that of the specification: a leaf whose other
  axis belongs to the same or a later group cannot be compared yet and does not
  count, nor do statistics (leaves in a collection ``batch_stats``, or named
  ``mean`` or ``var``).

  It works under ``jax.jit`` and under ``jax.vmap``, such as over a leading axis
  of seeds. Costs and moves are in float32 for half types.

  Args:
    reference: Parameters that give the order and the widths.
    model: Parameters of the same structure and dtypes; shapes may differ along
      the axes of the groups.
    spec: The specification of both; by default `derive_spec` of the reference.
    by: ``"weights"`` or ``"activations"``.
    solver: ``"exact"``, ``"sinkhorn"`` or ``"unbalanced"``, see `exact_plan`
      and `sinkhorn_plan`.
    activations: With ``by="activations"``, for each group those of the
      reference and those of the model on the same inputs, shapes ``[..., n]``
      and ``[..., m]``.
    importance: For each group non-negative weights of the neurons of both, as
      from `activation_norms`; scaled to sum 1, they are the marginals of the
      plans. Groups that are left out have uniform ones.
    outgoing: As for `apply_plans`.
    epsilon: As for `sinkhorn_plan`.
    tau_a: As for `sinkhorn_plan`; with ``"unbalanced"`` only.
    tau_b: As for `sinkhorn_plan`; with ``"unbalanced"`` only.
    max_iterations: As for `sinkhorn_plan`.
    threshold: As for `sinkhorn_plan`.
    strict: As for `sinkhorn_plan`: not to converge is an error, not a warning.

  Returns:
    The model's aligned parameters, in the reference's shapes, and the plans
    with their diagnostics. Neither input is changed.

  Raises:
    SpecError: If the specification does not fit the reference or the model.
    TreeMismatchError: If the trees differ in more than their widths.
    ValueError: If an option is unknown, activations or importance do not fit
      the groups, no leaf of a group can be compared, or one is complex.
    ImportError: If POT is needed and not there, see `exact_plan`.
    ConvergenceError: With ``strict``, if a plan did not converge.

  References:
    Singh and Jaggi, `Model fusion via optimal transport
    <https://arxiv.org/abs/1910.05653>`_, 2020

  >>> from jaxmerge.alignment import apply_permutations, derive_spec
  >>> reference = {
  ...   "Dense_0": {"kernel": jnp.array([[1.0, 2.0]])},
  ...   "Dense_1": {"kernel": jnp.array([[3.0], [4.0]])},
  ... }
  >>> moved = apply_permutations(
  ...   derive_spec(reference), reference, {"Dense_0": [1, 0]}
  ... )
  >>> aligned, info = ot_align(reference, moved)
  >>> print(aligned["Dense_0"]["kernel"], info.permutations["Dense_0"])
  [[1. 2.]] [1 0]
  """
  for name, value, known in (
    ("solver", solver, SOLVERS),
    ("by", by, KINDS),
  ):
    if value not in known:
      raise ValueError(
        f"unknown {name} {value!r}; choose one of {', '.join(known)}"
      )
  _transport.check_outgoing(outgoing)
  if solver != "unbalanced":
    tau_a = tau_b = 1.0
  _sinkhorn.check_options(epsilon, tau_a, tau_b, max_iterations, threshold)
  if (by == "activations") != (activations is not None):
    raise ValueError(
      "activations=(of the reference, of the model) are needed with"
      f" by='activations', and only there; got by={by!r}"
    )
  if spec is None:
    spec = _derive_spec.derive_spec(reference)
  sizes = check_trees(spec, reference, model)
  _check_real(spec, reference)
  columns = _columns(activations, sizes) if activations is not None else {}
  marginals = _marginals(importance or ({}, {}), sizes)

  leaves, others = (
    dict(zip(tree.leaf_names(x), jax.tree.leaves(x), strict=True))
    for x in (reference, model)
  )
  moves: dict[str, _transport.Move] = {}
  plans: dict[str, _plan.TransportPlan] = {}
  for group in _in_order(spec):
    if by == "activations":
      x, y = columns[group]
      cost = _ground_cost.squared_distances(x, y) / x.shape[1]
    else:
      x, y = _incoming(spec, group, leaves, others, moves)
      cost = _ground_cost.squared_distances(x, y)
    a, b = marginals[group]
    if solver == "exact":
      plan = _exact.exact_plan(cost, a, b)
    else:
      # Reported below, with the group's name.
      plan = _sinkhorn.solve(
        cost,
        *_plan.check_marginals(cost, a, b),
        epsilon,
        tau_a,
        tau_b,
        max_iterations,
        threshold,
      )
    _plan.report(plan, f"group '{group}': ", strict)
    plans[group] = plan
    moves[group] = _transport.make_move(plan.plan, plan.permutation, outgoing)
  return _transport.move_tree(spec, model, moves), _info(
    {group: plans[group] for group in spec}
  )


def _check_real(spec: _spec.PermutationSpec, params: PyTree) -> None:
  """Raises where a leaf with neurons is complex."""
  named = _spec.axes_by_leaf(spec)
  for name, leaf in zip(
    tree.leaf_names(params), jax.tree.leaves(params), strict=True
  ):
    if name in named and jnp.iscomplexobj(leaf):
      raise ValueError(
        f"leaf '{name}' of group '{named[name][0][0]}' is complex"
        f" ({jnp.asarray(leaf).dtype}), which transport has no cost for; give"
        " its real and imaginary parts as leaves of their own, or use"
        " weight_matching"
      )


def _in_order(spec: _spec.PermutationSpec) -> list[str]:
  """The groups, each behind those that lead to it.

  Groups in a cycle stay in the order of the specification, together.
  """
  following: dict[str, set[str]] = {group: set() for group in spec}
  for pairs in _spec.axes_by_leaf(spec).values():
    for before, axis in pairs:
      if not axis.incoming:
        following[before] |= {
          group for group, other in pairs if other.incoming and group != before
        }

  def reached(start: str) -> set[str]:
    found: set[str] = set()
    stack = [start]
    while stack:
      new = following[stack.pop()] - found
      found |= new
      stack += new
    return found

  reach = {group: reached(group) for group in spec}
  order: list[str] = []
  while len(order) < len(spec):
    left = [group for group in spec if group not in order]
    # The first that nothing leads to but what it leads to itself.
    first = next(
      group
      for group in left
      if all(other in reach[group] for other in left if group in reach[other])
    )
    order += [
      group
      for group in left
      if group == first or (group in reach[first] and first in reach[group])
    ]
  return order


def activation_norms(activations: ByGroup) -> dict[str, jax.Array]:
  r"""How much each neuron does: the root mean square of its activations.

  Args:
    activations: For each group an array of shape ``[..., n]``.

  Returns:
    For each group float32 of shape ``[n]``, for ``importance`` of `ot_align`.

  >>> print(activation_norms({"hidden": jnp.array([[3.0, 0.0], [3.0, 0.0]])}))
  {'hidden': Array([3., 0.], dtype=float32)}
  """
  norms = {}
  for group, values in activations.items():
    x = jnp.asarray(values)
    x = x.reshape(-1, x.shape[-1]).astype(tree.accumulation_dtype(x))
    norms[group] = jnp.sqrt(jnp.mean(jnp.square(x), axis=0))
  return norms


def check_trees(
  spec: _spec.PermutationSpec, reference: PyTree, model: PyTree
) -> dict[str, tuple[int, int]]:
  """Checks that two trees differ in their widths at most.

  Args:
    spec: The specification of both.
    reference: Parameters.
    model: Parameters.

  Returns:
    For each group the number of neurons in both.

  Raises:
    SpecError: If the specification does not fit one of them.
    TreeMismatchError: If they differ in more; the message names the leaf.
  """
  names = ["reference", "model"]
  treedef: Any = jax.tree.structure(reference)
  if treedef != jax.tree.structure(model):
    tree.check_match(reference, model, names=names)
  by_leaf = _spec.axes_by_leaf(spec)
  for name, leaf, other in zip(
    tree.leaf_names(reference),
    jax.tree.leaves(reference),
    jax.tree.leaves(model),
    strict=True,
  ):
    shape, other_shape = jnp.shape(leaf), jnp.shape(other)
    free = {axis.axis % max(1, len(shape)) for _, axis in by_leaf.get(name, ())}
    fixed, other_fixed = (
      [None if i in free else n for i, n in enumerate(x)]
      for x in (shape, other_shape)
    )
    if fixed != other_fixed:
      raise tree.TreeMismatchError(
        f"leaf '{name}' has shape {shape} in reference but {other_shape} in"
        " model; only the axes of a group may differ in length: give networks"
        " of one architecture, or a specification with that axis"
      )
  sizes = [_spec.group_sizes(spec, x) for x in (reference, model)]
  # Shapes are settled; the dtypes are left.
  tree.check_match(
    *(
      jax.tree.map(
        lambda leaf: (
          jax.ShapeDtypeStruct((), leaf.dtype)
          if hasattr(leaf, "dtype")
          else leaf
        ),
        x,
      )
      for x in (reference, model)
    ),
    names=names,
  )
  _transport.check_floating(spec, reference)
  return {group: (n, sizes[1][group]) for group, n in sizes[0].items()}


def _incoming(
  spec: _spec.PermutationSpec,
  group: str,
  leaves: Mapping[str, Any],
  others: Mapping[str, Any],
  moves: Mapping[str, _transport.Move],
) -> tuple[jax.Array, jax.Array]:
  """The incoming weights of both networks' neurons, one row a neuron."""
  by_leaf = _spec.axes_by_leaf(spec)
  pairs = []
  for axis in spec[group]:
    if not axis.incoming or not _similarity.is_weight(axis.leaf):
      continue
    rest = [pair for pair in by_leaf[axis.leaf] if pair[1] is not axis]
    if any(before not in moves for before, _ in rest):
      continue
    moved = _transport.move_leaf(
      _widened(others[axis.leaf]),
      [(other_axis, moves[before]) for before, other_axis in rest],
    )
    pairs.append(
      (
        _spec.rows(_widened(leaves[axis.leaf]), axis),
        _spec.rows(moved, axis),
      )
    )
  if not pairs:
    raise ValueError(
      f"no leaf that comes into group '{group}' can be compared: their other"
      " axes belong to groups that come later, or to this one; put the groups"
      " in the order of the layers, or align by='activations'"
    )
  dtype = np.result_type(*(x.dtype for x, _ in pairs))
  x, y = (
    jnp.concatenate([side.astype(dtype) for side in sides], axis=1)
    for sides in zip(*pairs, strict=True)
  )
  return x, y


def _widened(leaf: Any) -> jax.Array:
  return jnp.asarray(leaf).astype(tree.accumulation_dtype(leaf))


def _columns(
  activations: tuple[ByGroup, ByGroup], sizes: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[jax.Array, jax.Array]]:
  """For each group the activations of both networks, one row a neuron."""
  found = {}
  for group, pair in _both(activations, sizes, "activations", True).items():
    for values, n, who in zip(
      pair, sizes[group], ("reference", "model"), strict=True
    ):
      shape = jnp.shape(values)
      if len(shape) < 2 or shape[-1] != n or not np.prod(shape):
        raise ValueError(
          f"activations of group '{group}' of the {who} must have shape"
          f" [..., {n}], a column for each neuron; got {shape}"
        )
    x, y = (_widened(v).reshape(-1, jnp.shape(v)[-1]).T for v in pair)
    if x.shape[1] != y.shape[1]:
      raise ValueError(
        f"activations of group '{group}' are of {x.shape[1]} examples in the"
        f" reference but {y.shape[1]} in the model; take them on the same batch"
      )
    dtype = np.result_type(x.dtype, y.dtype)
    found[group] = x.astype(dtype), y.astype(dtype)
  return found


def _marginals(
  importance: tuple[ByGroup, ByGroup], sizes: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[jax.Array | None, jax.Array | None]]:
  """For each group the marginals of both networks, None for uniform ones."""
  found: dict[str, tuple[jax.Array | None, jax.Array | None]] = dict.fromkeys(
    sizes, (None, None)
  )
  for group, pair in _both(importance, sizes, "importance", False).items():
    sides = []
    for values, n, who in zip(
      pair, sizes[group], ("reference", "model"), strict=True
    ):
      begin = f"importance of group '{group}' of the {who} must"
      if jnp.shape(values) != (n,):
        raise ValueError(f"{begin} have shape ({n},); got {jnp.shape(values)}")
      if not _plan.is_traced(values):
        array = np.asarray(values, np.float64)
        if not (np.isfinite(array).all() and array.min() >= 0 and array.any()):
          raise ValueError(
            f"{begin} be finite and not negative, and not all zero"
          )
      weights = _widened(values)
      sides.append(weights / jnp.sum(weights))
    found[group] = sides[0], sides[1]
  return found


def _both(
  pair: tuple[ByGroup, ByGroup],
  sizes: Mapping[str, tuple[int, int]],
  what: str,
  needs_all: bool,
) -> dict[str, tuple[jax.typing.ArrayLike, jax.typing.ArrayLike]]:
  """Brings two mappings together, which must have the same groups."""
  if not (
    isinstance(pair, (tuple, list))
    and len(pair) == 2
    and all(isinstance(side, Mapping) for side in pair)
  ):
    raise ValueError(
      f"{what} must be a pair, of the reference and of the model, each a"
      " mapping from groups to arrays"
    )
  first, second = pair
  unknown = sorted((set(first) | set(second)) - set(sizes))
  if unknown:
    raise ValueError(
      f"{what} name group '{unknown[0]}', which the specification does not"
      f" have; its groups are {', '.join(sizes)}"
    )
  wanted = set(sizes) if needs_all else set(first) | set(second)
  for side, who in ((first, "reference"), (second, "model")):
    missing = sorted(wanted - set(side))
    if missing:
      raise ValueError(
        f"{what} of the {who} lack group '{missing[0]}'; give an array for each"
        " group, of both networks"
      )
  return {
    group: (first[group], second[group]) for group in sizes if group in wanted
  }


def _info(plans: Mapping[str, _plan.TransportPlan]) -> TransportInfo:
  def stack(name: str, dtype: Any) -> jax.Array:
    values = [getattr(plan, name) for plan in plans.values()]
    return jnp.stack(values) if values else jnp.zeros(0, dtype)

  permutations = {
    group: plan.permutation
    for group, plan in plans.items()
    if plan.permutation is not None
  }
  return TransportInfo(
    plans={group: plan.plan for group, plan in plans.items()},
    permutations=permutations if len(permutations) == len(plans) else None,
    cost=stack("cost", jnp.float32),
    converged=stack("converged", jnp.bool_),
    n_iters=stack("n_iters", jnp.int32),
    errors=stack("error", jnp.float32),
  )
