"""TIES: trim, elect sign, merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import jax

from jaxmerge.merging import (
  _combine,
  _leafwise,
  _leaves,
  _method,
  _sparsify,
  _task_vectors,
  _values,
)

PyTree = Any


def check_elect(elect: str, merge: str, zero_sign: str) -> None:
  """Raises for options of the sign election that are unknown."""
  _sparsify.check_choice(elect, "elect", ("mass", "count"))
  _sparsify.check_choice(merge, "merge", ("mean", "sum", "max"))
  _sparsify.check_choice(zero_sign, "zero_sign", ("majority", "positive"))


def agreeing(
  variant: str, normalize: bool, elect: str, zero_sign: str
) -> _combine.Combiner:
  """A sum, or the sum or mean of the entries that agree in sign."""
  _sparsify.check_choice(variant, "variant", ("linear", "ties"))
  merge = "mean" if normalize else "sum"
  check_elect(elect, merge, zero_sign)
  if variant == "linear":
    return _combine.total(normalize)
  return _combine.elected(elect, merge, zero_sign, "leaf")


def check_options(
  density: Any, scope: str, elect: str, merge: str, zero_sign: str
) -> None:
  """Raises for options of `ties` that are unknown or out of their range."""
  _values.check_range(density, "density", 0, 1, open_low=True)
  _sparsify.check_choice(scope, "scope", _sparsify.SCOPES)
  check_elect(elect, merge, zero_sign)
  entries = density if isinstance(density, (list, tuple)) else [density]
  if scope == "vector" and not jax.tree_util.all_leaves(entries):
    raise ValueError(
      "densities differ from leaf to leaf, but the threshold is one of the"
      " whole vector; trim leaf by leaf with scope='leaf'"
    )


def _rule(
  density: Any, scope: str, elect: str, merge: str, zero_sign: str
) -> _leafwise.LeafRule:
  check_options(density, scope, elect, merge, zero_sign)
  return _task_vectors.task_vector_rule(
    _combine.elected(elect, merge, zero_sign, scope),
    _sparsify.magnitude(scope),
  )


def ties_method(
  *,
  density: Any = 0.2,
  scale: Any = 1.0,
  scope: str = "vector",
  elect: str = "mass",
  merge: str = "mean",
  zero_sign: str = "majority",
  **options: Unpack[_leaves.MergeOptions],
) -> _method.MergeMethod:
  """TIES as a method; see `ties`.

  Args:
    density: See `ties`, as the rest.
    scale: Scale of the merged task vector.
    scope: "vector" or "leaf".
    elect: "mass" or "count".
    merge: "mean", "sum" or "max".
    zero_sign: "majority" or "positive".
    **options: See `MergeOptions`.

  Returns:
    The method.

  >>> method = ties_method(density=1.0)
  >>> state = method.init({"w": 0.0})
  >>> for value in (1.0, 3.0, -2.0):
  ...   state = method.update(state, {"w": value})
  >>> print(method.finalize(state)["w"])
  2.0
  """
  return _leafwise.leafwise_method(
    _rule(density, scope, elect, merge, zero_sign),
    options={"density": density, "scale": scale},
    **options,
  )


def ties(
  base: PyTree,
  models: Sequence[PyTree],
  *,
  weights: Any = None,
  density: Any = 0.2,
  scale: Any = 1.0,
  scope: str = "vector",
  elect: str = "mass",
  merge: str = "mean",
  zero_sign: str = "majority",
  **options: Unpack[_leaves.MergeOptions],
) -> PyTree:
  r"""Trims task vectors, elects a sign per parameter, and merges what agrees.

  .. math::
    \hat\tau_i = \mathrm{top}_k(\tau_i), \quad
    \gamma = \mathrm{sgn} \sum_i w_i \hat\tau_i, \quad
    \theta = \theta_0 + \lambda
      \frac{\sum_{i \in A} w_i \hat\tau_i}{\sum_{i \in A} |w_i|}, \quad
    A = \{i : \mathrm{sgn}(w_i \hat\tau_i) = \gamma\}

  Args:
    base: :math:`\theta_0`, the parameters that all models were tuned from.
    models: One or more trees of the structure of the base.
    weights: :math:`w_i`, 1 by default; see `task_arithmetic`.
    density: Fraction of a task vector that is kept, in (0, 1]: the
      ``int(density * n)`` largest magnitudes, at least one, and all that equal
      the last of them. A sequence gives each model its own.
    scale: :math:`\lambda`; see `magmax`.
    scope: Trim the "vector" as a whole, as the paper does, or each "leaf", as
      mergekit does. With "leaf" densities may differ from leaf to leaf, and a
      checkpoint can be merged leaf by leaf.
    elect: The sign with the larger "mass", or the larger "count".
    merge: "mean" of the entries that agree, their "sum", or their "max".
    zero_sign: Where the vote is zero: the sign of the "majority" of the
      elected signs (of the vector, or of the leaf), as in the paper's code, or
      "positive", as in mergekit.
    **options: See `MergeOptions`.

  Returns:
    The merged parameters, with the structure, shapes and dtypes of the base.

  Raises:
    TreeMismatchError: If a model differs from the base.
    ValueError: If there are no models, an option is unknown or a value is out
      of its range.

  References:
    Yadav et al., `TIES-Merging: Resolving interference when merging models
    <https://arxiv.org/abs/2306.01708>`_, 2023

  >>> models = [{"w": 1.0}, {"w": 3.0}, {"w": -2.0}]
  >>> print(ties({"w": 0.0}, models, density=1.0)["w"])
  2.0
  """
  return _leafwise.merge(
    _rule(density, scope, elect, merge, zero_sign),
    base,
    models,
    weights,
    options={"density": density, "scale": scale},
    **options,
  )
