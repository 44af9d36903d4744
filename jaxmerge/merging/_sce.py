"""SCE: select, calculate, erase."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.merging import (
  _combine,
  _gathered,
  _leaves,
  _method,
  _threshold,
  _values,
)

PyTree = Any
Array = jax.Array


def _is_selected(leaves: Sequence[Array], keep: Array) -> Array:
  """Marks the entries that differ most from model to model."""
  # Models that agree have a variance of exactly zero when it is taken of
  # differences between them.
  shifted = [leaf - leaves[0] for leaf in leaves]
  mean = sum(shifted[1:], shifted[0]) / len(leaves)
  squares = [(one - mean) ** 2 for one in shifted]
  variance = sum(squares[1:], squares[0]) / len(leaves)
  least = _threshold.kth_largest_bits([variance], keep)
  return _threshold.magnitude_bits(variance) >= least


@functools.cache
def _rule(selects: bool) -> _gathered.GatherRule:
  def merge(
    base: Array,
    leaves: Sequence[Array],
    weights: Array,
    values: dict[str, Array],
  ) -> Array:
    taus = [leaf - base for leaf in leaves]
    if selects:
      kept = _is_selected(leaves, values["keep"])
      taus = [jnp.where(kept, tau, 0) for tau in taus]
    energies = jnp.stack([jnp.mean(tau**2) for tau in taus])
    total = jnp.broadcast_to(energies.sum(), energies.shape)
    coefficients = weights * _combine.divide(energies, total)
    is_up = sum(taus[1:], taus[0]) >= 0
    numerator, divisor = jnp.zeros_like(base), jnp.zeros_like(base)
    for tau, coefficient in zip(taus, coefficients, strict=True):
      agrees = jnp.where(is_up, tau > 0, tau < 0)
      numerator += jnp.where(agrees, coefficient * tau, 0)
      divisor += jnp.where(agrees, coefficient, 0)
    scale = values["scale"].astype(base.dtype)
    return base + scale * _combine.divide(numerator, divisor)

  return _gathered.GatherRule(merge)


def _counts(select_topk: Any) -> _leaves.PerLeaf:
  """How many entries of each leaf are selected."""

  def compute(base: PyTree, merged: Sequence[_leaves.Leaf]) -> list[np.uint32]:
    fractions = _values.per_leaf(select_topk, base, "select_topk")
    leaves = jax.tree.leaves(base)
    return [
      _threshold.keep_count(
        fractions[leaf.place], int(np.size(leaves[leaf.place]))
      )
      for leaf in merged
    ]

  return _leaves.PerLeaf(compute)


def _selects(select_topk: Any) -> bool:
  """Whether anything is left out; a traced fraction is refused later."""
  _values.check_range(select_topk, "select_topk", 0, 1, open_low=True)
  return any(
    _values.is_traced(one) or one < 1 for one in jax.tree.leaves(select_topk)
  )


def sce_method(
  *,
  select_topk: Any = 1.0,
  scale: Any = 1.0,
  **options: Unpack[_leaves.MergeOptions],
) -> _method.MergeMethod:
  """SCE as a method, which keeps all models until the end; see `sce`.

  Args:
    select_topk: See `sce`, as the rest.
    scale: Scale of the merged task vector.
    **options: See `MergeOptions`.

  Returns:
    The method.

  >>> method = sce_method()
  >>> state = method.init({"w": 0.0})
  >>> for value in (1.0, 2.0, -1.0):
  ...   state = method.update(state, {"w": value})
  >>> print(method.finalize(state)["w"])
  1.8
  """
  _selects(select_topk)
  merge = functools.partial(
    sce, select_topk=select_topk, scale=scale, **options
  )
  return _gathered.gathering_method(merge, **options)


def sce(
  base: PyTree,
  models: Sequence[PyTree],
  *,
  weights: Any = None,
  select_topk: Any = 1.0,
  scale: Any = 1.0,
  **options: Unpack[_leaves.MergeOptions],
) -> PyTree:
  r"""Selects by variance, calculates coefficients, and erases minorities.

  For each leaf on its own:

  .. math::
    \hat\tau_i &= \tau_i \cdot 1\{\mathrm{Var}_j(\tau_j)
      \text{ is in the top fraction}\} \\
    \eta_i &= \frac{w_i \|\hat\tau_i\|^2}{\sum_j \|\hat\tau_j\|^2} \\
    \theta &= \theta_0 + \lambda
      \frac{\sum_{i \in A} \eta_i \hat\tau_i}{\sum_{i \in A} \eta_i}, \quad
    A = \Big\{i : \mathrm{sgn}(\hat\tau_i)
      = \mathrm{sgn} \sum_j \hat\tau_j\Big\}

  with :math:`A` for each entry, and the positive sign where the sum is zero.

  mergekit counts the fraction among the entries whose variance is not zero,
  selects nothing where that rounds down to no entry, and gives all models one
  coefficient where the squares are tiny; none of this is done here.

  Args:
    base: :math:`\theta_0`, the parameters that all models were tuned from.
    models: One or more trees of the structure of the base.
    weights: :math:`w_i`, 1 by default; see `task_arithmetic`. They change the
      coefficients only, neither the selection nor the signs.
    select_topk: Fraction of each leaf that is selected, in (0, 1]: the
      ``int(select_topk * n)`` entries of the largest variance over the models,
      at least one, and all that equal the last of them. A scalar, a prefix of
      the tree, or a mapping from regular expressions.
    scale: :math:`\lambda`; see `magmax`.
    **options: See `MergeOptions`.

  Returns:
    The merged parameters, with the structure, shapes and dtypes of the base.

  Raises:
    TreeMismatchError: If a model differs from the base.
    ValueError: If there are no models or a value is out of its range.

  References:
    Wan et al., `FuseChat: Knowledge Fusion of Chat Models
    <https://arxiv.org/abs/2408.07990>`_, 2024

  >>> models = [{"w": 1.0}, {"w": 2.0}, {"w": -1.0}]
  >>> print(sce({"w": 0.0}, models)["w"])
  1.8
  """
  selects = _selects(select_topk)
  values = {"scale": scale}
  if selects:
    values["keep"] = _counts(select_topk)
  return _gathered.merge(
    _rule(selects),
    "sce",
    base,
    models,
    weights,
    options=values,
    **options,
  )
