"""Fusion of MLPs by optimal transport."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmerge import tree
from jaxmerge.alignment import (
  _exact,
  _ground_cost,
  _layers,
  _permute,
  _plan,
  _sinkhorn,
)

PyTree = Any

_SOLVERS = ("exact", "sinkhorn")


class AlignmentInfo(NamedTuple):
  """How well an alignment went, for each hidden layer from the input on.

  Attributes:
    plans: Transport plans, each of shape [n, n]: rows are the reference's
      neurons, columns the model's, every row and column sums to 1/n.
    permutations: Integers of shape [n] for each layer: the model's neuron
      that takes the place of the reference's. None with Sinkhorn.
    cost: Shape [layers], the transport costs: the mean squared distance
      between matched neurons.
    converged: Bools of shape [layers]: whether the solver reached its
      tolerance.
    n_iters: Integers of shape [layers], iterations; 0 with exact transport.
    errors: Shape [layers], the sum of the absolute differences of the plan's
      row and column sums from 1/n.
  """

  plans: tuple[jax.Array, ...]
  permutations: tuple[jax.Array, ...] | None
  cost: jax.Array
  converged: jax.Array
  n_iters: jax.Array
  errors: jax.Array


def _find_both(
  reference: PyTree, model: PyTree, layers: Sequence[str] | None
) -> list[_layers.DenseLayer]:
  found = _layers.find_layers(reference, layers, "reference")
  other = _layers.find_layers(model, layers, "model")
  if len(found) != len(other):
    raise tree.TreeMismatchError(
      f"reference has {len(found)} dense layers but model has {len(other)}"
      f" ('{max(found, other, key=len)[min(len(found), len(other))].name}' is"
      " one too many); alignment needs equal depths"
    )
  leaves, other_leaves = jax.tree.leaves(reference), jax.tree.leaves(model)
  for a, b in zip(found, other, strict=True):
    shape = leaves[a.kernel].shape
    other_shape = other_leaves[b.kernel].shape
    if shape != other_shape:
      raise tree.TreeMismatchError(
        f"leaf '{_layers.join(a.name, 'kernel')}' has shape {shape} in"
        f" reference but {other_shape} in model; alignment needs equal widths"
      )
  tree.check_match(reference, model, names=["reference", "model"])
  return found


def align_mlp(
  reference: PyTree,
  model: PyTree,
  *,
  solver: str = "exact",
  layers: Sequence[str] | None = None,
  epsilon: float = 1e-2,
  max_iterations: int = 2000,
  threshold: float = 1e-3,
) -> tuple[PyTree, AlignmentInfo]:
  r"""Aligns the hidden neurons of an MLP to those of a reference.

  Layer by layer from the input on, with :math:`P_l` the transport plan of
  layer l, n its width, and the identity for the network's inputs and outputs:

  .. math::
    \hat W_l = n P_{l-1} W_l, \quad
    C_{gj} = \|W^{\mathrm{ref}}_{l,:g} - \hat W_{l,:j}\|^2
      + (b^{\mathrm{ref}}_{l,g} - b_{l,j})^2, \quad
    \tilde W_l = \hat W_l (n P_l)^T, \quad \tilde b_l = n P_l b_l

  where :math:`P_l` has minimal cost :math:`\langle P_l, C \rangle`. The bias
  is one more incoming edge and moves with its neuron. With exact transport
  the plans are permutations and the function of the network is unchanged;
  with Sinkhorn neurons are mixed, and it changes.

  Both solvers work under ``jax.jit`` and under ``jax.vmap``, such as over a
  leading axis of seeds.

  Args:
    reference: Parameters of an MLP: dense layers with a ``kernel`` of shape
      [inputs, outputs] and, or not, a ``bias`` of shape [outputs]; a Linen
      dict, with or without ``{"params": ...}`` around it, or an nnx.State.
    model: Parameters of the same structure, shapes and dtypes.
    solver: ``"exact"`` or ``"sinkhorn"``.
    layers: Names of the layers from input to output, the output layer last;
      other leaves are then left alone. By default all layers in the natural
      order of their names, ``Dense_2`` before ``Dense_10``; there may then be
      no other leaves. The layers must be joined by elementwise activations
      only.
    epsilon: Sinkhorn's entropy relative to the mean cost; positive.
    max_iterations: Sinkhorn's largest number of iterations; positive.
    threshold: Sinkhorn's tolerance on the marginals; positive.

  Returns:
    The aligned parameters of ``model``, and the plans with their diagnostics.

  Raises:
    TreeMismatchError: If depths, widths, or anything else of the two trees
      differ.
    ValueError: If the solver is unknown, or the layers do not form a chain.

  References:
    Singh and Jaggi, `Model fusion via optimal transport
    <https://arxiv.org/abs/1910.05653>`_, 2020

  >>> from jaxmerge.alignment import permute_mlp
  >>> reference = {
  ...   "Dense_0": {"kernel": jnp.array([[1.0, 2.0]])},
  ...   "Dense_1": {"kernel": jnp.array([[3.0], [4.0]])},
  ... }
  >>> aligned, info = align_mlp(reference, permute_mlp(reference, [[1, 0]]))
  >>> print(aligned["Dense_0"]["kernel"], info.permutations[0])
  [[1. 2.]] [1 0]
  """
  if solver not in _SOLVERS:
    raise ValueError(
      f"unknown solver {solver!r}; choose one of " + ", ".join(_SOLVERS)
    )
  found = _find_both(reference, model, layers)
  targets, leaves = jax.tree.leaves(reference), jax.tree.leaves(model)
  plans: list[_plan.TransportPlan] = []
  for layer in found[:-1]:
    target, edges = targets[layer.kernel], leaves[layer.kernel]
    dtype = tree.accumulation_dtype(target)
    target, edges = _rows(target, dtype), _rows(edges, dtype)
    if plans:
      edges = _follow(plans[-1], edges)
    if layer.bias is not None:
      target = jnp.concatenate([target, _rows(targets[layer.bias], dtype)])
      edges = jnp.concatenate([edges, _rows(leaves[layer.bias], dtype)])
    cost = _ground_cost.squared_distances(target.T, edges.T)
    plans.append(
      _exact.exact_plan(cost)
      if solver == "exact"
      else _sinkhorn.sinkhorn_plan(
        cost,
        epsilon=epsilon,
        max_iterations=max_iterations,
        threshold=threshold,
      )
    )
  info = _info(plans, solver)
  if info.permutations is not None:
    return _permute.take_neurons(model, found, info.permutations), info
  return _transport_neurons(model, found, plans), info


def ot_fusion(
  reference: PyTree,
  model: PyTree,
  *,
  weight: jax.typing.ArrayLike = 0.5,
  solver: str = "exact",
  layers: Sequence[str] | None = None,
  epsilon: float = 1e-2,
  max_iterations: int = 2000,
  threshold: float = 1e-3,
) -> tuple[PyTree, AlignmentInfo]:
  r"""Aligns an MLP to a reference, then averages: OT fusion.

  .. math::
    \theta = (1 - w)\,\theta^{\mathrm{ref}} + w\,\tilde\theta

  with :math:`\tilde\theta` the model aligned by `align_mlp`. The result is in
  the order of the reference's neurons.

  Args:
    reference: Parameters of an MLP, as `align_mlp` takes them.
    model: Parameters of the same structure, shapes and dtypes.
    weight: The weight :math:`w` of the model, a scalar, traced or not; the
      reference has the rest. 1/t for the t-th model of a running average.
    solver: ``"exact"`` or ``"sinkhorn"``.
    layers: As for `align_mlp`.
    epsilon: As for `align_mlp`.
    max_iterations: As for `align_mlp`.
    threshold: As for `align_mlp`.

  Returns:
    The fused parameters, and the plans with their diagnostics.

  Raises:
    TreeMismatchError: If depths, widths, or anything else of the two trees
      differ.
    ValueError: If the solver is unknown, the layers do not form a chain, or
      the weight is not a scalar.

  References:
    Singh and Jaggi, `Model fusion via optimal transport
    <https://arxiv.org/abs/1910.05653>`_, 2020

  >>> from jaxmerge.alignment import permute_mlp
  >>> reference = {
  ...   "Dense_0": {"kernel": jnp.array([[1.0, 2.0]])},
  ...   "Dense_1": {"kernel": jnp.array([[3.0], [4.0]])},
  ... }
  >>> params, _ = ot_fusion(reference, permute_mlp(reference, [[1, 0]]))
  >>> print(params["Dense_0"]["kernel"])
  [[1. 2.]]
  """
  if jnp.ndim(weight):
    raise ValueError(f"weight must be a scalar; got shape {jnp.shape(weight)}")
  aligned, info = align_mlp(
    reference,
    model,
    solver=solver,
    layers=layers,
    epsilon=epsilon,
    max_iterations=max_iterations,
    threshold=threshold,
  )
  return tree.lerp(reference, aligned, weight), info


def _rows(leaf: Any, dtype: Any) -> jax.Array:
  """A kernel as it is and a bias as one row."""
  return jnp.atleast_2d(jnp.asarray(leaf).astype(dtype))


def _follow(plan: _plan.TransportPlan, rows: Any) -> jax.Array:
  """Brings rows into the reference's order: n P rows."""
  rows = jnp.asarray(rows)
  if plan.permutation is not None:
    return rows[plan.permutation]
  dtype = max(
    plan.plan.dtype, tree.accumulation_dtype(rows), key=lambda d: d.itemsize
  )
  return jnp.matmul(
    plan.plan.astype(dtype) * plan.plan.shape[0],
    rows.astype(dtype),
    precision=jax.lax.Precision.HIGHEST,
  )


def _transport_neurons(
  params: PyTree,
  found: Sequence[_layers.DenseLayer],
  plans: Sequence[_plan.TransportPlan],
) -> PyTree:
  treedef: Any = jax.tree.structure(params)
  leaves = jax.tree.leaves(params)
  dtypes = [leaves[layer.kernel].dtype for layer in found]
  for layer, plan in zip(found[:-1], plans, strict=True):
    leaves[layer.kernel] = _follow(plan, leaves[layer.kernel].T).T
    if layer.bias is not None:
      bias = jnp.asarray(leaves[layer.bias])
      leaves[layer.bias] = _follow(plan, bias).astype(bias.dtype)
  for layer, plan in zip(found[1:], plans, strict=True):
    leaves[layer.kernel] = _follow(plan, leaves[layer.kernel])
  # Rounded once, after both sides of a kernel have been moved.
  for layer, dtype in zip(found, dtypes, strict=True):
    leaves[layer.kernel] = leaves[layer.kernel].astype(dtype)
  return treedef.unflatten(leaves)


def _info(plans: Sequence[_plan.TransportPlan], solver: str) -> AlignmentInfo:
  def stack(values: list[jax.Array], dtype: Any) -> jax.Array:
    return jnp.stack(values) if values else jnp.zeros(0, dtype)

  return AlignmentInfo(
    plans=tuple(plan.plan for plan in plans),
    permutations=tuple(
      plan.permutation for plan in plans if plan.permutation is not None
    )
    if solver == "exact"
    else None,
    cost=stack([plan.cost for plan in plans], jnp.float32),
    converged=stack([plan.converged for plan in plans], jnp.bool_),
    n_iters=stack([plan.n_iters for plan in plans], jnp.int32),
    errors=stack([plan.error for plan in plans], jnp.float32),
  )
