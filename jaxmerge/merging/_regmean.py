"""RegMean: the layers whose outputs are nearest to those of all models."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree
from jaxmerge.merging import (
  _leafwise,
  _leaves,
  _method,
  _values,
  _weights,
)

PyTree = Any
Array = jax.Array
Values = dict[str, Any]

# So often the ridge grows tenfold where it is too small for the rounding.
_MAX_GROWTH = 12


class _Moments(NamedTuple):
  """What is kept of the models so far.

  The products are those with the differences from the mean: their rounding is
  what the solution's is made of, and equal models leave them zero.

  Attributes:
    mean: The weighted mean of the models.
    weight: The sum of their weights.
    gram: The sum of their weighted Gram matrices. Before the first model it is
      a zero of no shape; None for a leaf without Gram matrices.
    product: The sum of their weighted Gram matrices times their differences
      from the mean; likewise.
  """

  mean: Array
  weight: Array
  gram: Array | None
  product: Array | None


def _matmul(a: Array, b: Array) -> Array:
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _reduced(gram: Array, alpha: Array) -> Array:
  """Entries off the diagonal times alpha."""
  diagonal = jnp.eye(len(gram), dtype=bool)
  return jnp.where(diagonal, gram, alpha * gram)


def _solve(gram: Array, product: Array, ridge: Array) -> Array:
  """Solves for the correction, in units where the diagonal is one."""
  diagonal = jnp.real(jnp.diagonal(gram))
  positive = diagonal > 0
  scale = jnp.where(
    positive, jax.lax.rsqrt(jnp.where(positive, diagonal, 1)), 1
  )
  scaled = scale[:, None] * gram * scale[None, :]
  identity = jnp.eye(len(gram), dtype=gram.dtype)

  def factor(matrix: Array, ridge: Array) -> Array:
    return jnp.linalg.cholesky(matrix + ridge * identity)

  # The search for the ridge is no part of the gradient.
  known = jax.lax.stop_gradient(scaled)

  def fails(carry: tuple[Array, Array]) -> Array:
    count, ridge = carry
    is_bad = ~jnp.isfinite(factor(known, ridge)).all()
    return is_bad & (count < _MAX_GROWTH)

  def grow(carry: tuple[Array, Array]) -> tuple[Array, Array]:
    count, ridge = carry
    return count + 1, jnp.maximum(10 * ridge, jnp.finfo(ridge.dtype).eps)

  start = (jnp.zeros((), jnp.int32), jax.lax.stop_gradient(ridge))
  _, least = jax.lax.while_loop(fails, grow, start)
  lower = factor(scaled, ridge + (least - jax.lax.stop_gradient(ridge)))
  right = scale[:, None] * product
  return scale[:, None] * jax.scipy.linalg.cho_solve((lower, True), right)


@functools.cache
def _rule() -> _leafwise.LeafRule:
  def init(base: Array, zero: Array) -> _Moments:
    return _Moments(jnp.full_like(base, zero), zero, zero, zero)

  def update(
    accumulator: _Moments, base: Array, leaf: Array, step: _leafwise.Step
  ) -> _Moments:
    del base
    mean, weight, gram, product = accumulator
    weight = weight + step.weight
    difference = leaf - mean
    change = step.weight / jnp.where(weight == 0, 1, weight) * difference
    mean = jnp.where(step.weight == weight, leaf, mean + change)
    if step.statistics is None:
      return _Moments(mean, weight, None, None)
    assert gram is not None and product is not None
    alpha = step.values["alpha"].astype(leaf.dtype)
    one = jnp.asarray(step.statistics).astype(leaf.dtype)
    one = step.weight * _reduced(one, alpha)
    matrix = (len(one), -1)
    gram = jnp.broadcast_to(gram, one.shape) + one
    difference, change = difference.reshape(matrix), change.reshape(matrix)
    product = jnp.broadcast_to(product, difference.shape)
    # The old products are those with the differences from the old mean.
    product = product + _matmul(one, difference) - _matmul(gram, change)
    return _Moments(mean, weight, gram, product)

  def finalize(
    accumulator: _Moments, base: Array, values: Values, summary: Array | None
  ) -> Array:
    del summary
    mean, weight, gram, product = accumulator
    if gram is not None and gram.ndim and product is not None:
      ridge = values["ridge"].astype(jnp.real(base).dtype)
      mean = mean + _solve(gram, product, ridge).reshape(mean.shape)
    return jnp.where(weight == 0, base, mean)

  return _leafwise.LeafRule(
    init,
    update,
    finalize,
    statistics=_leafwise.Statistics("Gram matrices", "gram_matrices", _read),
  )


@jax.jit
def _is_sound(gram: Array) -> tuple[Array, Array, Array]:
  """Whether a matrix is finite, may be X^T X by its signs, and by its rest."""
  if not jnp.issubdtype(gram.dtype, jnp.inexact):
    gram = gram.astype(jnp.float32)
  eps = jnp.finfo(gram.dtype).eps
  gram = _leaves.widen(gram)
  diagonal = jnp.diagonal(gram).real
  root = jnp.sqrt(jnp.maximum(diagonal, 0))
  # The rounding of sums of products, in whatever order they were added.
  slack = 8 * float(eps) ** 0.5
  # By Cauchy and Schwarz no entry is larger; products of roots stay in range.
  bound = (1 + slack) * root[:, None] * root[None, :]
  lopsided = jnp.abs(gram - jnp.conj(gram.T))
  return (
    jnp.isfinite(gram).all(),
    jnp.min(diagonal) >= 0,
    jnp.all((jnp.abs(gram) <= bound) & (lopsided <= slack * bound)),
  )


def _widths(shape: tuple[int, ...]) -> list[int]:
  """The numbers of inputs that a kernel may have: products of first axes."""
  products = [int(np.prod(shape[: count + 1])) for count in range(len(shape))]
  # A kernel that is summed over as a whole has one output.
  return list(dict.fromkeys(products))


def _read(
  statistics: Any,
  base: PyTree,
  merged: Sequence[_leaves.Leaf],
  names: tuple[str, str],
  allow_nonfinite: bool,
) -> list[Any]:
  if not isinstance(statistics, Mapping):
    raise ValueError(
      f"{names[1]} must map names of leaves to matrices; got"
      f" {type(statistics).__name__}; collect them with gram_matrices"
    )
  known = tree.leaf_names(base)
  for name in statistics:
    if name not in known:
      raise ValueError(
        f"{names[1]} has an entry for '{name}', which is no leaf of"
        f" {names[0]}; the leaves are {', '.join(known[:5])}"
        + (", ..." if len(known) > 5 else "")
      )
  leaves = jax.tree.leaves(base)
  entries, flags = [], []
  for leaf in merged:
    gram = statistics.get(leaf.name)
    shape = np.shape(leaves[leaf.place])
    if gram is not None and shape and 0 not in shape:
      widths = _widths(shape)
      if np.shape(gram) not in [(width, width) for width in widths]:
        raise tree.TreeMismatchError(
          f"leaf '{leaf.name}' has shape {shape} in {names[0]} but a matrix of"
          f" shape {np.shape(gram)} in {names[1]}; give [in, in], with in ="
          f" {' or '.join(map(str, widths))}"
        )
      if not _values.is_traced(gram):
        with jax.ensure_compile_time_eval():
          flags.append((*_is_sound(jnp.asarray(gram)), leaf.name))
      entries.append(gram)
    elif gram is not None and not shape:
      raise tree.TreeMismatchError(
        f"leaf '{leaf.name}' has shape () in {names[0]} but a matrix of shape"
        f" {np.shape(gram)} in {names[1]}; leave it out"
      )
    else:
      entries.append(None)
  for is_finite, is_positive, is_gram, leaf_name in flags:
    if not is_finite and not allow_nonfinite:
      raise ValueError(
        f"leaf '{leaf_name}' of {names[1]} holds NaN or infinity; mend it, or"
        " let it through with allow_nonfinite=True"
      )
    if is_finite and not is_positive:
      raise ValueError(
        f"leaf '{leaf_name}' of {names[1]} is negative on its diagonal; a Gram"
        " matrix is X^T X"
      )
    if is_finite and not is_gram:
      raise ValueError(
        f"leaf '{leaf_name}' of {names[1]} is not symmetric, or larger off its"
        " diagonal than a Gram matrix X^T X can be; collect it with"
        " gram_matrices"
      )
  return entries


def _options(alpha: Any, ridge: Any) -> Values:
  _values.check_range(alpha, "alpha", 0, 1)
  _values.check_range(ridge, "ridge", 0, math.inf)
  return {"alpha": alpha, "ridge": ridge}


def _check_same(
  leaf: str, shape: tuple[int, ...] | None, first: tuple[int, ...] | None
) -> None:
  """Raises unless a model's matrix for a leaf is of the first model's shape."""
  if shape != first:
    kinds = ["none" if one is None else str(one) for one in (first, shape)]
    raise ValueError(
      f"leaf '{leaf}' has a Gram matrix of shape {kinds[0]} in the first model"
      f" but {kinds[1]} in a later one; give all models matrices for the same"
      " leaves"
    )


def _shape(statistics: Mapping[str, Any], leaf: str) -> tuple[int, ...] | None:
  gram = statistics.get(leaf)
  return None if gram is None else np.shape(gram)


def regmean_method(
  *,
  alpha: Any = 0.9,
  ridge: Any = 1e-5,
  **options: Unpack[_leaves.MergeOptions],
) -> _method.MergeMethod:
  """RegMean as a method; see `regmean`.

  Args:
    alpha: See `regmean`, as the rest.
    ridge: Added to the diagonal.
    **options: See `MergeOptions`.

  Returns:
    A method whose ``update`` takes the model's Gram matrices as ``statistics``,
    and a weight that is not negative. The first model decides which leaves have
    matrices: from then on the structure of the state is fixed. Where all
    weights are 0 it gives the base.

  >>> import jax.numpy as jnp
  >>> method = regmean_method(alpha=1.0)
  >>> state = method.init({"kernel": jnp.zeros((1, 1))})
  >>> for value, gram in ((1.0, 3.0), (5.0, 1.0)):
  ...   params = {"kernel": jnp.full((1, 1), value)}
  ...   grams = {"kernel": jnp.full((1, 1), gram)}
  ...   state = method.update(state, params, statistics=grams)
  >>> print(method.finalize(state)["kernel"].round(4))
  [[2.]]
  """
  method = _leafwise.leafwise_method(
    _rule(), options=_options(alpha, ridge), **options
  )

  def update(
    state: _leafwise.LeafwiseState,
    params: PyTree,
    weight: Any = 1.0,
    statistics: Any = None,
    *,
    donate: bool = False,
  ) -> _leafwise.LeafwiseState:
    merged = _leaves.merged_leaves(state.base, options.get("select"))
    for leaf, one in zip(merged, state.accumulators, strict=True):
      is_first = one.gram is not None and not one.gram.ndim
      if isinstance(statistics, Mapping) and not is_first and one.mean.size:
        first = None if one.gram is None else one.gram.shape
        _check_same(leaf.name, _shape(statistics, leaf.name), first)
    return method.update(state, params, weight, statistics, donate=donate)

  return _weights.nonnegative(method._replace(update=update))


def regmean(
  models: Sequence[PyTree],
  grams: Sequence[Mapping[str, Array]],
  *,
  weights: Any = None,
  alpha: Any = 0.9,
  ridge: Any = 1e-5,
  **options: Unpack[_leaves.MergeOptions],
) -> PyTree:
  r"""Merges linear layers so that their outputs are nearest to the models'.

  .. math::
    W = \Bigl(\sum_i w_i \tilde G_i\Bigr)^{-1} \sum_i w_i \tilde G_i W_i, \quad
    \tilde G_i = \alpha G_i + (1 - \alpha) \mathrm{diag}(G_i), \quad
    G_i = X_i^\top X_i

  With :math:`\alpha = 1` this is the kernel with the least sum of squared
  differences :math:`\sum_i w_i \|X_i W - X_i W_i\|^2`. It is computed as a
  correction of the average,

  .. math::
    W = \bar W + \Bigl(\sum_i w_i \tilde G_i\Bigr)^{-1}
      \sum_i w_i \tilde G_i (W_i - \bar W),

  so that the average remains where no model has inputs, and equal models are
  exactly a fixed point. Leaves without a Gram matrix, biases among them, are
  averaged.

  Args:
    models: One or more trees of the same structure, shapes and dtypes.
    grams: :math:`G_i`, one mapping for each model from names of leaves to
      matrices ``[in, in]``, as `gram_matrices` gives it, for the same leaves in
      all of them. The kernel has shape ``[in, out]``, or several axes for
      either, those of the inputs first.
    weights: :math:`w_i`, not negative, 1 by default; see `weighted_average`.
    alpha: :math:`\alpha`, in [0, 1]: how much the entries off the diagonal
      count. A scalar, a prefix of the tree, a mapping from regular expressions,
      or one of these for each model. The paper takes 0.9, and 0.1 where that
      does badly.
    ridge: What is added to the diagonal of the sum of matrices once that is
      scaled to ones, as a matrix without an inverse needs. Where it is too
      small for the rounding of a dtype, it grows tenfold until it is not. A
      scalar, a prefix or a mapping.
    **options: See `MergeOptions`.

  Returns:
    The merged parameters, with the structure, shapes and dtypes of the models;
    leaves that are not merged are those of the first model.

  Raises:
    TreeMismatchError: If the models differ, or a matrix does not fit its leaf.
    ValueError: If there are no models, not one mapping for each, a name is
      unknown, a matrix is not finite or missing in some models, or weights are
      negative or sum to zero.

  References:
    Jin et al., `Dataless knowledge fusion by merging weights of language models
    <https://arxiv.org/abs/2212.09849>`_, 2022

  >>> import jax.numpy as jnp
  >>> models = [{"kernel": jnp.full((1, 1), value)} for value in (1.0, 5.0)]
  >>> grams = [{"kernel": jnp.full((1, 1), value)} for value in (3.0, 1.0)]
  >>> print(regmean(models, grams)["kernel"].round(4))
  [[2.]]
  """
  models = _method.check_models(models)
  _weights.check_sums(weights, models[0], len(models), allow_negative=False)
  found = _method.per_model_statistics(grams, len(models))
  for one in found[1:]:
    if not isinstance(found[0], Mapping) or not isinstance(one, Mapping):
      continue  # Refused below.
    for leaf in {**found[0], **one}:
      _check_same(leaf, _shape(one, leaf), _shape(found[0], leaf))
  return _leafwise.merge(
    _rule(),
    models[0],
    models,
    weights,
    options=_options(alpha, ridge),
    names=_weights.model_names(models),
    statistics=grams,
    **options,
  )
