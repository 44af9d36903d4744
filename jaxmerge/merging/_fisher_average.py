"""The average of models, weighted by their Fisher information."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree
from jaxmerge.merging import (
  _leafwise,
  _leaves,
  _method,
  _sparsify,
  _values,
  _weights,
)

PyTree = Any
Array = jax.Array
Values = dict[str, Any]


class _Mean(NamedTuple):
  """A running mean.

  Unlike a quotient of sums it is exact for equal models, and a small Fisher
  times a small parameter does not underflow.

  Attributes:
    mean: The mean of the models so far.
    fisher: The sum of their weighted Fishers.
    weight: The sum of their weights.
  """

  mean: Array
  fisher: Array
  weight: Array


def _norm(fishers: Sequence[Array]) -> Array:
  """Euclidean norm; squares of small numbers do not underflow."""
  largest = functools.reduce(
    jnp.maximum, [jnp.max(one, initial=0) for one in fishers]
  )
  safe = jnp.where(largest == 0, 1, largest)
  total = sum(jnp.sum((one / safe) ** 2) for one in fishers)
  # The root of 0 has no gradient.
  return largest * jnp.sqrt(jnp.where(largest == 0, 1, total))


def _real(fisher: Array, leaf: Array) -> Array:
  return jnp.asarray(fisher).astype(jnp.real(leaf).dtype)


@functools.cache
def _rule(normalize: str | None) -> _leafwise.LeafRule:
  def init(base: Array, zero: Array) -> _Mean:
    real = jnp.real(base)
    return _Mean(
      mean=jnp.full_like(base, zero),
      fisher=jnp.full_like(real, jnp.real(zero)),
      weight=jnp.real(zero),
    )

  def prepare(
    bases: list[Array],
    leaves: list[Array],
    values: list[Values],
    statistics: list[Array],
  ) -> Array | None:
    del bases, values
    if not leaves:
      return None
    dtype = jnp.result_type(*(jnp.real(leaf) for leaf in leaves))
    return _norm([jnp.asarray(fisher).astype(dtype) for fisher in statistics])

  def update(
    accumulator: _Mean, base: Array, leaf: Array, step: _leafwise.Step
  ) -> _Mean:
    del base
    given = _real(step.statistics, leaf)
    fisher = jnp.maximum(given, step.values["floor"].astype(given.dtype))
    if normalize is not None:
      norm = _norm([given]) if normalize == "leaf" else step.prepared
      fisher = fisher / jnp.where(norm == 0, 1, norm).astype(fisher.dtype)
    weight = jnp.real(step.weight)
    fisher = weight * fisher
    total, weights = accumulator.fisher + fisher, accumulator.weight + weight
    # Models without information are averaged until there is one with some. The
    # choice comes before the division, lest the sum be rounded in other ways
    # where it is compiled alone.
    unknown = total == 0
    share = jnp.where(unknown, weight, fisher) / jnp.where(
      unknown, jnp.where(weights == 0, 1, weights), total
    )
    mean = accumulator.mean
    moved = mean + share.astype(leaf.dtype) * (leaf - mean)
    return _Mean(jnp.where(share == 1, leaf, moved), total, weights)

  def finalize(
    accumulator: _Mean, base: Array, values: Values, summary: Array | None
  ) -> Array:
    del values, summary
    return jnp.where(accumulator.weight == 0, base, accumulator.mean)

  return _leafwise.LeafRule(
    init,
    update,
    finalize,
    prepare=prepare if normalize == "vector" else None,
    statistics=_leafwise.Statistics("Fisher", "diagonal_fisher", _read),
  )


# So much above the largest Fisher is left for sums and weights.
_HEADROOM = 2.0**20


@jax.jit
def _extremes(fisher: Array) -> tuple[Array, Array, Array]:
  return (
    jnp.isfinite(fisher).all(),
    jnp.min(fisher, initial=0) >= 0,
    jnp.max(fisher, initial=0),
  )


def _read(
  statistics: PyTree,
  base: PyTree,
  merged: Sequence[_leaves.Leaf],
  names: tuple[str, str],
  allow_nonfinite: bool,
) -> list[Any]:
  tree.check_match(base, statistics, names=names, check_dtype=False)
  leaves = jax.tree.leaves(statistics)
  fishers = [leaves[leaf.place] for leaf in merged]
  flags = []
  for fisher, leaf in zip(fishers, merged, strict=True):
    if jnp.iscomplexobj(fisher):
      raise ValueError(
        f"leaf '{leaf.name}' of {names[1]} is complex; a Fisher is real"
      )
    if not _values.is_traced(fisher) and np.size(fisher):
      with jax.ensure_compile_time_eval():
        dtype = tree.accumulation_dtype(jax.tree.leaves(base)[leaf.place])
        limit = float(jnp.finfo(dtype).max) / _HEADROOM
        flags.append((*_extremes(fisher), limit, leaf.name))
  for is_finite, is_positive, largest, limit, leaf_name in flags:
    if not is_finite and not allow_nonfinite:
      raise ValueError(
        f"leaf '{leaf_name}' of {names[1]} holds NaN or infinity; mend it, or"
        " let it through with allow_nonfinite=True"
      )
    if is_finite and not is_positive:
      raise ValueError(
        f"leaf '{leaf_name}' of {names[1]} is negative somewhere; a Fisher is a"
        " mean of squares"
      )
    if is_finite and not largest <= limit:
      raise ValueError(
        f"leaf '{leaf_name}' of {names[1]} is {largest:.3g} somewhere, and sums"
        f" above {limit:.3g} may overflow; divide the Fishers of all models by"
        " one number"
      )
  return fishers


def _options(floor: Any, normalize: str | None) -> Values:
  _values.check_range(floor, "floor", 0, math.inf)
  _sparsify.check_choice(normalize, "normalize", (None, *_sparsify.SCOPES))
  return {"floor": floor}


def fisher_average_method(
  *,
  floor: Any = 1e-6,
  normalize: str | None = None,
  **options: Unpack[_leaves.MergeOptions],
) -> _method.MergeMethod:
  """The Fisher-weighted average as a method; see `fisher_average`.

  Args:
    floor: See `fisher_average`, as the rest.
    normalize: None, "vector" or "leaf".
    **options: See `MergeOptions`.

  Returns:
    A method whose ``update`` takes the model's Fisher as ``statistics``, and a
    weight that is not negative. Where all weights are 0 it gives the base.

  >>> method = fisher_average_method()
  >>> state = method.init({"w": 0.0})
  >>> state = method.update(state, {"w": 1.0}, statistics={"w": 3.0})
  >>> state = method.update(state, {"w": 5.0}, statistics={"w": 1.0})
  >>> print(method.finalize(state)["w"])
  2.0
  """
  values = _options(floor, normalize)
  method = _leafwise.leafwise_method(
    _rule(normalize), options=values, **options
  )
  return _weights.nonnegative(method)


def fisher_average(
  models: Sequence[PyTree],
  fishers: Sequence[PyTree],
  *,
  weights: Any = None,
  floor: Any = 1e-6,
  normalize: str | None = None,
  **options: Unpack[_leaves.MergeOptions],
) -> PyTree:
  r"""Averages models, each parameter weighted by its Fisher information.

  .. math::
    \theta = \frac{\sum_i \lambda_i F_i \theta_i}{\sum_i \lambda_i F_i},
    \quad F_i \leftarrow \frac{\max(F_i, \epsilon)}{\|F_i\|}

  entry by entry, which is the mode of the product of the Gaussian posteriors
  that have the models as means and the :math:`\lambda_i F_i` as precisions.
  Where all :math:`F_i` are zero the models are averaged with the weights
  alone.

  Args:
    models: One or more trees of the same structure, shapes and dtypes.
    fishers: :math:`F_i`, one for each model: a tree of its structure and
      shapes with entries that are not negative, as `diagonal_fisher` gives it.
      Leaves that are not merged are not looked at.
    weights: :math:`\lambda_i`, not negative, 1 by default; see
      `weighted_average`. A larger one favours its model.
    floor: :math:`\epsilon`, the least Fisher, so that a parameter without
      influence does not count as one that may take any value. A scalar, a
      prefix of the tree, a mapping from regular expressions, or one of these
      for each model: ``[1e-6, 0, 0]`` favours the first model where no Fisher
      is larger, as the authors' code does by default.
    normalize: Divide each Fisher by its Euclidean norm, so that no model
      dominates by the scale of its Fisher: that of the whole "vector", as the
      authors' code does by default, or that of each "leaf"; None leaves it as
      it is. The floor comes before. A Fisher of zero is left as it is.
    **options: See `MergeOptions`.

  Returns:
    The merged parameters, with the structure, shapes and dtypes of the models;
    leaves that are not merged are those of the first model.

  Raises:
    TreeMismatchError: If the models differ, or a Fisher from its model in
      structure or shape.
    ValueError: If there are no models, not one Fisher for each, a Fisher is
      negative or not finite, or weights are negative or sum to zero.

  References:
    Matena and Raffel, `Merging models with Fisher-weighted averaging
    <https://arxiv.org/abs/2111.09832>`_, 2021

  >>> models = [{"w": 1.0}, {"w": 5.0}]
  >>> print(fisher_average(models, [{"w": 3.0}, {"w": 1.0}])["w"])
  2.0
  """
  models = _method.check_models(models)
  values = _options(floor, normalize)
  _weights.check_sums(weights, models[0], len(models), allow_negative=False)
  return _leafwise.merge(
    _rule(normalize),
    models[0],
    models,
    weights,
    options=values,
    names=_weights.model_names(models),
    statistics=fishers,
    **options,
  )
