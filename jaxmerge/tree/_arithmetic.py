"""Vector-space arithmetic on the floating-point leaves of trees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.tree import _check, _partition

PyTree = Any
Scalar = jax.typing.ArrayLike


def accumulation_dtype(leaf: Any) -> Any:
  """The dtype to compute a leaf in: float32 for half types, else its own.

  Args:
    leaf: A floating-point leaf (see `is_float`).

  Returns:
    A NumPy dtype.

  Raises:
    ValueError: If the leaf is not floating-point.

  >>> accumulation_dtype(jnp.ones(2, jnp.bfloat16))
  dtype('float32')
  """
  if not _partition.is_float(leaf):
    raise ValueError(
      f"{type(leaf).__name__} leaf of dtype {_check.leaf_dtype(leaf)} is not"
      " floating-point; leave it out with jaxmerge.tree.partition"
    )
  dtype = np.dtype(_check.leaf_dtype(leaf))
  return np.dtype(np.float32) if dtype.itemsize < 4 else dtype


def _scalar(value: Scalar, name: str) -> Scalar:
  if jnp.ndim(value):
    raise ValueError(
      f"{name} must be a scalar; got an array of shape {jnp.shape(value)}"
    )
  return value


def _map_float(fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
  """Maps ``fn(*leaves in the accumulation dtype, dtype)``; keeps the dtype."""

  def on_leaf(leaf: Any, *others: Any) -> Any:
    if not _partition.is_float(leaf):
      return leaf
    dtype = accumulation_dtype(leaf)
    leaves = [jnp.asarray(x).astype(dtype) for x in (leaf, *others)]
    return fn(*leaves, dtype).astype(_check.leaf_dtype(leaf))

  return jax.tree.map(on_leaf, tree, *rest)


def add(a: PyTree, b: PyTree) -> PyTree:
  r"""Adds two trees: :math:`a + b`.

  Leaves keep their dtype. Integer, boolean and PRNG-key leaves, and whatever
  else is not a floating-point array, are those of ``a``.

  Args:
    a: A tree of arrays.
    b: A tree of the same structure, shapes and dtypes.

  Returns:
    The sum.

  Raises:
    TreeMismatchError: If the trees differ in structure, shape or dtype.

  >>> print(add({"w": 1.0}, {"w": 2.0})["w"])
  3.0
  """
  _check.check_match(a, b, names=["a", "b"])
  return _map_float(lambda x, y, dtype: x + y, a, b)


def sub(a: PyTree, b: PyTree) -> PyTree:
  r"""Subtracts two trees: :math:`a - b`.

  Leaves keep their dtype. Integer, boolean and PRNG-key leaves, and whatever
  else is not a floating-point array, are those of ``a``.

  Args:
    a: A tree of arrays.
    b: A tree of the same structure, shapes and dtypes.

  Returns:
    The difference.

  Raises:
    TreeMismatchError: If the trees differ in structure, shape or dtype.

  >>> print(sub({"w": 1.0}, {"w": 2.0})["w"])
  -1.0
  """
  _check.check_match(a, b, names=["a", "b"])
  return _map_float(lambda x, y, dtype: x - y, a, b)


def scale(tree: PyTree, factor: Scalar) -> PyTree:
  r"""Multiplies a tree with a scalar: :math:`c\,a`.

  Half types are multiplied in float32 and rounded once. Leaves that are not
  floating-point pass through.

  Args:
    tree: A tree of arrays.
    factor: A Python number or a scalar array, traced or not.

  Returns:
    The scaled tree, with the dtypes of ``tree``.

  Raises:
    ValueError: If the factor is not a scalar.

  >>> print(scale({"w": 3.0}, 0.5)["w"])
  1.5
  """
  _scalar(factor, "factor")
  return _map_float(
    lambda x, dtype: jnp.asarray(factor).astype(dtype) * x, tree
  )


def lerp(a: PyTree, b: PyTree, t: Scalar) -> PyTree:
  r"""Interpolates on the straight line: :math:`(1 - t)\,a + t\,b`.

  The ends are exact: ``t = 0`` gives ``a`` and ``t = 1`` gives ``b``. Half
  types are computed in float32 and rounded once. Leaves that are not
  floating-point are those of ``a``.

  Args:
    a: A tree of arrays, reached at ``t = 0``.
    b: A tree of the same structure, shapes and dtypes, reached at ``t = 1``.
    t: A Python number or a scalar array, traced or not; outside [0, 1] the
      line is extrapolated.

  Returns:
    The point on the line, with the dtypes of ``a``.

  Raises:
    TreeMismatchError: If the trees differ in structure, shape or dtype.
    ValueError: If ``t`` is not a scalar.

  >>> print(lerp({"w": 1.0}, {"w": 3.0}, 0.25)["w"])
  1.5
  """
  _check.check_match(a, b, names=["a", "b"])
  _scalar(t, "t")

  def on_leaf(x: jax.Array, y: jax.Array, dtype: Any) -> jax.Array:
    t_ = jnp.asarray(t).astype(dtype)
    return (1 - t_) * x + t_ * y

  return _map_float(on_leaf, a, b)


# Compiled leaf by leaf, so that XLA fuses the sum into one pass over memory
# outside of jit as well.
@jax.jit
def _weighted_sum_leaf(
  leaves: tuple[jax.Array, ...], weights: tuple[jax.Array, ...]
) -> jax.Array:
  dtype = accumulation_dtype(leaves[0])
  total = weights[0].astype(dtype) * leaves[0].astype(dtype)
  for leaf, weight in zip(leaves[1:], weights[1:], strict=True):
    total = total + weight.astype(dtype) * leaf.astype(dtype)
  return total.astype(leaves[0].dtype)


def weighted_sum(
  trees: Sequence[PyTree], weights: Sequence[Scalar] | jax.Array
) -> PyTree:
  r"""Sums trees with weights: :math:`\sum_i w_i\,a_i`.

  Each leaf is one fused elementwise expression; nothing is stacked. Half
  types are accumulated in float32 and rounded once. Leaves that are not
  floating-point are those of the first tree.

  Args:
    trees: One or more trees of the same structure, shapes and dtypes.
    weights: As many scalars, or an array of shape [n]; traced or not. They
      are not normalised.

  Returns:
    The weighted sum, with the dtypes of the first tree.

  Raises:
    TreeMismatchError: If the trees differ in structure, shape or dtype.
    ValueError: If there are no trees, or not as many weights as trees, or a
      weight that is not a scalar.

  >>> print(weighted_sum([{"w": 1.0}, {"w": 2.0}], [0.5, 0.25])["w"])
  1.0
  """
  trees = list(trees)
  if not trees:
    raise ValueError("weighted_sum needs at least one tree; got none")
  if isinstance(weights, (jax.Array, np.ndarray)) and weights.ndim != 1:
    raise ValueError(
      f"weights must have shape ({len(trees)},); got {weights.shape}"
    )
  if len(weights) != len(trees):
    raise ValueError(
      f"weighted_sum got {len(weights)} weights for {len(trees)} trees; give"
      " one weight for each tree"
    )
  weights = tuple(
    jnp.asarray(_scalar(weight, f"weight {i}"))
    for i, weight in enumerate(weights)
  )
  _check.check_match(*trees, names=[f"tree {i}" for i in range(len(trees))])

  def on_leaf(*leaves: Any) -> Any:
    if not _partition.is_float(leaves[0]):
      return leaves[0]
    return _weighted_sum_leaf(tuple(map(jnp.asarray, leaves)), weights)

  return jax.tree.map(on_leaf, *trees)


def dot(a: PyTree, b: PyTree) -> jax.Array:
  r"""Inner product of two trees: :math:`\sum_j \overline{a_j}\,b_j`.

  The sum runs over every scalar of every floating-point leaf and is taken in
  float32 for half types, else in the leaf's dtype. Other leaves are left out.

  Args:
    a: A tree of arrays.
    b: A tree of the same structure, shapes and dtypes.

  Returns:
    A scalar; float32 unless a leaf is wider.

  Raises:
    TreeMismatchError: If the trees differ in structure, shape or dtype.

  >>> print(dot({"u": 1.0, "v": 2.0}, {"u": 3.0, "v": 4.0}))
  11.0
  """
  _check.check_match(a, b, names=["a", "b"])
  terms = []
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    if _partition.is_float(x):
      dtype = accumulation_dtype(x)
      x, y = jnp.asarray(x).astype(dtype), jnp.asarray(y).astype(dtype)
      # Not jnp.vdot: a GPU would round its operands to TF32.
      terms.append(jnp.sum(jnp.conj(x) * y))
  dtype = np.result_type(np.float32, *(term.dtype for term in terms))
  total = jnp.zeros((), dtype)
  for term in terms:
    total = total + term.astype(dtype)
  return total


def norm(tree: PyTree) -> jax.Array:
  r"""Euclidean norm of a tree: :math:`\sqrt{\sum_j |a_j|^2}`.

  Args:
    tree: A tree of arrays. Leaves that are not floating-point are left out.

  Returns:
    A real scalar; float32 unless a leaf is wider.

  >>> print(norm({"u": 3.0, "v": 4.0}))
  5.0
  """
  return jnp.sqrt(jnp.real(dot(tree, tree)))
