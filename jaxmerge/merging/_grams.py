"""Gram matrices of the inputs of a model's linear layers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree
from jaxmerge.merging import _examples, _leaves

PyTree = Any
Array = jax.Array
Mask = Callable[[PyTree], Array]

# After these an array holds the same numbers in the same order.
_SAME = (
  "convert_element_type",
  "copy",
  "copy_p",
  "reduce_precision",
  "reshape",
  "sharding_constraint",
  "squeeze",
  "stop_gradient",
)
# These run another program once, with the same operands.
_CALLS = (
  "checkpoint",
  "closed_call",
  "core_call",
  "custom_jvp_call",
  "custom_vjp_call",
  "jit",
  "pjit",
  "remat",
  "remat2",
)
# These run one another way, in which products are not looked for.
_OTHERS = ("cond", "scan", "shard_map", "while", "xla_pmap")


def gram_matrix(inputs: Array) -> Array:
  r"""Gram matrix of a layer's inputs: :math:`X^\top X`.

  Args:
    inputs: :math:`X`, shape ``[..., in]``; all but the last axis are rows.

  Returns:
    The matrix, shape ``[in, in]``, of at least float32, summed over the rows
    in full precision.

  Raises:
    ValueError: If the inputs have no axis or are not floating-point.

  >>> import jax.numpy as jnp
  >>> print(gram_matrix(jnp.array([[1.0, 2.0], [0.0, 1.0]])).tolist())
  [[1.0, 2.0], [2.0, 5.0]]
  """
  if not jnp.ndim(inputs):
    raise ValueError("inputs must have shape [..., in]; got a scalar")
  rows = _leaves.widen(inputs)
  rows = rows.reshape(-1, rows.shape[-1])
  # Accelerators multiply in less than float32 by default.
  return jnp.matmul(jnp.conj(rows.T), rows, precision=jax.lax.Precision.HIGHEST)


def _leads(shape: Sequence[int], axes: Sequence[int]) -> bool:
  """Whether some axes come before all others that are longer than 1."""
  others = [
    place for place, n in enumerate(shape) if n > 1 and place not in axes
  ]
  first = [place for place in axes if shape[place] > 1]
  return not first or not others or max(first) < min(others)


def _dot_rows(kernel: Array, inputs: Array, pairs: Any) -> Array | None:
  """The rows [n, in] that a kernel is multiplied with, or None."""
  pairs = sorted(pairs)
  axes = [axis for axis, _ in pairs]
  if not pairs or not _leads(kernel.shape, axes):
    return None
  count = len(pairs)
  inputs = jnp.moveaxis(
    inputs, [axis for _, axis in pairs], range(inputs.ndim - count, inputs.ndim)
  )
  return inputs.reshape(-1, math.prod(kernel.shape[axis] for axis in axes))


def _patch_rows(inputs: Array, kernel: Array, params: Any) -> Array | None:
  """The patches [n, in] that a kernel [..., in, out] is moved over, or None."""
  numbers = params["dimension_numbers"]
  last = kernel.ndim - 1
  if numbers.rhs_spec != (last, last - 1, *range(last - 1)):
    return None
  if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
    return None
  window = kernel.shape[:-2]
  patches = jax.lax.conv_general_dilated_patches(
    inputs.transpose(numbers.lhs_spec),
    window,
    params["window_strides"],
    params["padding"],
    lhs_dilation=params["lhs_dilation"],
    rhs_dilation=params["rhs_dilation"],
    precision=jax.lax.Precision.HIGHEST,
  )
  # Channels come before places in a patch, but after them in the kernel.
  channels, places = kernel.shape[-2], math.prod(window)
  patches = patches.reshape(len(patches), channels, places, -1)
  return patches.transpose(0, 3, 2, 1).reshape(-1, places * channels)


class _Watch:
  """Runs a program and adds up what the leaves of interest are multiplied with.

  Attributes:
    names: The names of the leaves.
    mask: Which rows count, where there are as many; or None.
    masked: Whether there has been such a layer.
    grams: The Gram matrices so far, by name.
  """

  def __init__(self, names: Sequence[str], mask: Array | None = None) -> None:
    self.names = names
    self.mask = mask
    self.masked = False
    self.grams: dict[str, Array] = {}

  def _add(self, leaf: int, rows: Array | None) -> None:
    if rows is None:
      return
    if self.mask is not None and len(rows) == len(self.mask):
      rows = jnp.where(self.mask[:, None], rows, jnp.zeros_like(rows))
      self.masked = True
    gram, name = gram_matrix(rows), self.names[leaf]
    if name in self.grams:
      gram = self.grams[name] + gram
    self.grams[name] = gram

  def _look(
    self, eqn: jex.JaxprEqn, values: list[Array], leaves: list[int | None]
  ) -> None:
    """Takes note of a product of a leaf and something that is none."""
    if len(leaves) != 2 or (leaves[0] is None) == (leaves[1] is None):
      return
    if eqn.primitive.name == "dot_general":
      contract, batch = eqn.params["dimension_numbers"]
      if batch[0]:
        return
      side = 0 if leaves[0] is not None else 1
      pairs = zip(contract[side], contract[1 - side], strict=True)
      leaf = leaves[side]
      assert leaf is not None
      self._add(leaf, _dot_rows(values[side], values[1 - side], pairs))
    elif eqn.primitive.name == "conv_general_dilated" and leaves[1] is not None:
      self._add(leaves[1], _patch_rows(values[0], values[1], eqn.params))

  def run(
    self,
    jaxpr: jex.Jaxpr,
    consts: Sequence[Any],
    args: Sequence[Any],
    leaves: Sequence[int | None],
  ) -> tuple[list[Any], list[int | None]]:
    """Evaluates a program.

    Args:
      jaxpr: The program.
      consts: Its constants.
      args: Its arguments.
      leaves: For each argument which leaf it is, None for anything else.

    Returns:
      The results, and which leaves they are.
    """
    values: dict[Any, Any] = {}
    tags: dict[Any, int | None] = {}

    def read(var: Any) -> Any:
      return var.val if isinstance(var, jex.Literal) else values[var]

    def tag(var: Any) -> int | None:
      return None if isinstance(var, jex.Literal) else tags.get(var)

    values.update(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))
    tags.update(zip(jaxpr.invars, leaves, strict=True))
    for eqn in jaxpr.eqns:
      name = eqn.primitive.name
      operands = [read(var) for var in eqn.invars]
      found = [tag(var) for var in eqn.invars]
      inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
      passed: Sequence[int | None] = [None] * len(eqn.outvars)
      if name in _CALLS and inner is not None:
        closed = isinstance(inner, jex.ClosedJaxpr)
        results, passed = self.run(
          inner.jaxpr if closed else inner,
          inner.consts if closed else (),
          operands,
          found,
        )
      else:
        if name in _OTHERS:
          self._refuse(name, operands, found)
        self._look(eqn, operands, found)
        bound = eqn.primitive.get_bind_params(eqn.params)
        results = eqn.primitive.bind(*operands, **bound)
        if not eqn.primitive.multiple_results:
          results = [results]
        if name in _SAME:
          passed = found[:1]
      values.update(zip(eqn.outvars, results, strict=True))
      tags.update(zip(eqn.outvars, passed, strict=True))
    return [read(var) for var in jaxpr.outvars], [
      tag(var) for var in jaxpr.outvars
    ]

  def _refuse(
    self, name: str, operands: list[Any], found: list[int | None]
  ) -> None:
    for operand, leaf in zip(operands, found, strict=True):
      if leaf is not None and np.ndim(operand) >= 2:
        raise ValueError(
          f"leaf '{self.names[leaf]}' is used within a {name}, where inputs"
          " are not seen; unroll it, or leave the leaf out with select"
        )


def _flat_mask(mask: Mask | None, batch: PyTree) -> Array | None:
  """Which rows of a batch count, `[n]`; None for all."""
  if mask is None:
    return None
  found = jnp.asarray(mask(batch))
  size = _examples.batch_size(batch, 0)
  if found.dtype != bool or found.ndim < 1 or len(found) != size:
    raise ValueError(
      f"mask must give bool [{size}, ...] for this batch; got {found.dtype}"
      f" {found.shape}"
    )
  return found.reshape(-1)


def _grams(
  fn: Callable[[PyTree, PyTree], Any],
  mask: Mask | None,
  static: _examples.Static,
  chosen: tuple[str | None, ...],
  arrays: list[Any],
  batch: PyTree,
) -> dict[str, Array]:
  """Gram matrices of one batch; `chosen` has the names of the arrays."""
  closed = jax.make_jaxpr(
    lambda arrays, batch: fn(_examples.join_arrays(arrays, static), batch)
  )(arrays, batch)
  inputs = jax.tree.leaves(batch)
  watch = _Watch([name or "" for name in chosen], _flat_mask(mask, batch))
  leaves = [None if name is None else i for i, name in enumerate(chosen)]
  watch.run(
    closed.jaxpr,
    closed.consts,
    [*arrays, *inputs],
    [*leaves, *[None] * len(inputs)],
  )
  if watch.mask is not None and watch.grams and not watch.masked:
    raise ValueError(
      f"mask has {len(watch.mask)} entries for a batch, but no layer has as"
      " many rows of inputs; give one for each row, as bool [b, tokens]"
    )
  return watch.grams


@functools.partial(
  jax.jit,
  static_argnames=("fn", "mask", "static", "chosen"),
  donate_argnames="sums",
)
def _add_batch(
  fn: Callable[[PyTree, PyTree], Any],
  mask: Mask | None,
  static: _examples.Static,
  chosen: tuple[str | None, ...],
  sums: dict[str, Array],
  arrays: list[Any],
  batch: PyTree,
) -> dict[str, Array]:
  found = _grams(fn, mask, static, chosen, arrays, batch)
  return jax.tree.map(jnp.add, sums, found)


def gram_matrices(
  fn: Callable[[PyTree, PyTree], Any],
  params: PyTree,
  batches: Iterable[PyTree],
  *,
  select: str | Callable[[str], bool] | None = None,
  reduction: str = "mean",
  mask: Mask | None = None,
) -> dict[str, Array]:
  r"""Gram matrices of the inputs of all linear layers of a model.

  .. math::
    G_l = \frac{1}{N} \sum_{i=1}^N X_{l,i}^\top X_{l,i}

  where the rows of :math:`X_{l,i}` are what example i has layer l multiply
  with its kernel. One batch is held at a time, and batches of one size share a
  compiled program.

  The layers are found in the program that JAX traces, so that models of any
  library will do: every product of a floating-point leaf ``[in, ..., out,
  ...]``, as it is or in another dtype or shape, where the axes that are summed
  over come first. So are the kernels of Flax's Dense, DenseGeneral, attention
  and Conv, and their likes in ``nnx``; for a convolution the rows are the
  patches ``[places * channels]``. Left out are kernels ``[out, in]``, as
  Equinox has them, those that are transposed, masked or added to before the
  product, layers of groups, and the look-up of embeddings; a layer within
  ``lax.scan``, ``cond`` or ``while_loop`` is an error.

  Args:
    fn: ``fn(params, batch)`` runs the model, and may return anything. Keep one
      function object: each one compiles anew.
    params: Any pytree.
    batches: Any pytrees of arrays with a leading axis of examples.
    select: Regular expression (``re.search``) or predicate of the names of the
      leaves to look at; by default all. A matrix has the square of a layer's
      width as its size.
    reduction: "mean" over the examples, or their "sum", which gives a model
      with more data more weight. Rows that belong to one example, as the
      tokens of a text, are summed.
    mask: ``mask(batch)``, traced by JAX, is a bool array ``[b, ...]`` of the
      rows that count, as the tokens of a text that are no padding. It is for
      the layers that have as many rows as it has entries, in its order,
      examples first; of others all count. By default all do. A mean is still
      over all examples. Keep one function object.

  Returns:
    The matrices ``[in, in]``, of at least float32, by the names of the kernels
    (see `jaxmerge.tree.leaf_names`). A kernel that is used several times has
    the sum of its uses.

  Raises:
    ValueError: If there is no example, or no layer, or the mask is not of its
      type or shape, or has as many entries as no layer has rows.

  References:
    Jin et al., `Dataless knowledge fusion by merging weights of language models
    <https://arxiv.org/abs/2212.09849>`_, 2022

  >>> import jax.numpy as jnp
  >>> linear = lambda params, x: x @ params["kernel"]
  >>> params = {"kernel": jnp.ones((2, 3))}
  >>> grams = gram_matrices(linear, params, [jnp.array([[1.0, 2.0]])])
  >>> print({name: gram.tolist() for name, gram in grams.items()})
  {'kernel': [[1.0, 2.0], [2.0, 4.0]]}
  """
  _examples.check_reduction(reduction)
  arrays, static = _examples.split_arrays(params)
  names = {
    leaf.place: leaf.name for leaf in _leaves.merged_leaves(params, select)
  }
  chosen = tuple(
    names.get(place)
    for place, other in enumerate(static.others)
    if other is None
  )
  count = 0
  sums: dict[str, Array] | None = None
  for number, batch in enumerate(batches):
    size = _examples.batch_size(batch, number)
    if not size:
      continue
    if sums is None:
      shapes = jax.eval_shape(
        functools.partial(_grams, fn, mask, static, chosen), arrays, batch
      )
      if not shapes:
        raise ValueError(
          "no leaf is the kernel of a linear layer; see gram_matrices for what"
          " is found, and gram_matrix for layers of your own"
        )
      sums = {
        name: jnp.zeros(gram.shape, gram.dtype) for name, gram in shapes.items()
      }
    sums = _add_batch(fn, mask, static, chosen, sums, arrays, batch)
    count += size
  _examples.check_any(count)
  assert sums is not None
  if reduction == "mean":
    sums = _examples.divide(sums, np.float32(count))
  return {name: sums[name] for name in tree.leaf_names(params) if name in sums}
