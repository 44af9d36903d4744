"""A function of many weighted sums of the same trees, in one program."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from jaxmerge import tree as tree_lib

PyTree = Any
Array = jax.Array

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
# Of one operand, linear in it, and no more than a copy.
_MOVES = (
  "broadcast_in_dim",
  "convert_element_type",
  "copy",
  "copy_p",
  "reshape",
  "squeeze",
  "transpose",
)


class _Value:
  """What a variable of the program holds while it is taken apart.

  A value is fixed (the same for all sums: `array`), linear (the weighted sum
  of `stack`, one array a tree), or neither: then an equation makes it later.

  Attributes:
    array: of a fixed value.
    stack: of a linear value, `[trees, ...]`, made when first asked for.
    source: equation and operand that a linear value is moved by, None for a
      leaf or a product.
    product: whether a product has been taken already, so that the stack is
      there and the sum is of what the product gave.
  """

  def __init__(
    self,
    array: Any = None,
    stack: Callable[[], Array] | None = None,
    source: tuple[jex.JaxprEqn, _Value] | None = None,
    product: bool = False,
  ) -> None:
    self.array = array
    self.linear = stack is not None
    self.stack = functools.cache(stack) if stack is not None else None
    self.source = source
    self.product = product

  @property
  def fixed(self) -> bool:
    return self.array is not None


def _bind(eqn: jex.JaxprEqn, operands: Sequence[Any]) -> Sequence[Any]:
  bound = eqn.primitive.get_bind_params(eqn.params)
  results = eqn.primitive.bind(*operands, **bound)
  return results if eqn.primitive.multiple_results else [results]


def _is_wide(aval: Any) -> bool:
  """Whether sums before and after a linear function round alike."""
  return bool(jnp.issubdtype(aval.dtype, jnp.inexact)) and (
    aval.dtype.itemsize >= 4
  )


class _Apart:
  """Takes a program apart: what is the same for all sums is done at once.

  A product of a fixed and a linear value is taken once for every tree, and
  the sums are formed of the products: sum_i w_i (x W_i) = x (sum_i w_i W_i).
  """

  def __init__(self, num_trees: int, num_sums: int) -> None:
    self._num_trees = num_trees
    self._worthwhile = num_trees < num_sums
    self._later: list[tuple[jex.JaxprEqn, list[_Value], list[_Value]]] = []

  def run(
    self, jaxpr: jex.Jaxpr, consts: Sequence[Any], args: Sequence[_Value]
  ) -> list[_Value]:
    """Does what can be done before the weights are known."""
    values: dict[Any, _Value] = {}

    def read(var: Any) -> _Value:
      return _Value(var.val) if isinstance(var, jex.Literal) else values[var]

    values.update(
      zip(jaxpr.constvars, (_Value(const) for const in consts), strict=True)
    )
    values.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
      operands = [read(var) for var in eqn.invars]
      inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
      results: Sequence[_Value]
      if all(operand.fixed for operand in operands):
        found = _bind(eqn, [operand.array for operand in operands])
        results = [_Value(array) for array in found]
      elif eqn.primitive.name in _CALLS and inner is not None:
        closed = isinstance(inner, jex.ClosedJaxpr)
        results = self.run(
          inner.jaxpr if closed else inner,
          inner.consts if closed else (),
          operands,
        )
      else:
        linear = self._linear(eqn, operands)
        results = [linear or _Value() for _ in eqn.outvars]
        if linear is None:
          self._later.append((eqn, operands, list(results)))
      values.update(zip(eqn.outvars, results, strict=True))
    return [read(var) for var in jaxpr.outvars]

  def _linear(self, eqn: jex.JaxprEqn, operands: list[_Value]) -> _Value | None:
    """The linear value that an equation makes, None if it makes none."""
    if not self._worthwhile or not all(
      operand.fixed or operand.linear for operand in operands
    ):
      return None
    avals: list[Any] = [var.aval for var in (*eqn.invars, *eqn.outvars)]
    if not all(_is_wide(aval) for aval in avals):
      return None
    name, linear = eqn.primitive.name, [one.linear for one in operands]
    products = any(operand.product for operand in operands)
    moved = name in _MOVES and len(operands) == 1
    if name == "dot_general":
      contract = eqn.params["dimension_numbers"][0][0]
      terms = math.prod(avals[0].shape[axis] for axis in contract)
      # As many terms are added up for a sum as there are trees.
      good = sum(linear) == 1 and terms > self._num_trees
      products = True
    elif name in ("add", "sub"):
      good = products and all(linear)
    elif name in ("mul", "div"):
      good = products and sum(linear) == 1 and (name == "mul" or linear[0])
    else:
      good = moved
    if not good:
      return None

    def stack() -> Array:
      axes = [0 if operand.linear else None for operand in operands]
      arrays = [
        operand.stack() if operand.stack is not None else operand.array
        for operand in operands
      ]
      return jax.vmap(lambda *each: _bind(eqn, each)[0], axes)(*arrays)

    source = (eqn, operands[0]) if moved and not products else None
    return _Value(stack=stack, source=source, product=products)

  def make_stacks(self, outputs: Sequence[_Value]) -> None:
    """Makes what is summed; within a loop it would be made at every turn."""
    needed = [one for _, operands, _ in self._later for one in operands]
    for value in (*needed, *outputs):
      while value.source is not None:
        value = value.source[1]
      if value.stack is not None:
        value.stack()

  def finish(self, outputs: Sequence[_Value], weights: Array) -> list[Array]:
    """Does the rest for one weighted sum."""
    known: dict[_Value, Array] = {}

    def get(value: _Value) -> Array:
      if value.fixed:
        return value.array
      if value not in known:
        assert value.stack is not None
        if value.source is not None:
          eqn, operand = value.source
          known[value] = _bind(eqn, [get(operand)])[0]
        else:
          known[value] = tree_lib.weighted_sum(
            [value.stack()[index] for index in range(self._num_trees)], weights
          )
      return known[value]

    for eqn, operands, results in self._later:
      found = _bind(eqn, [get(operand) for operand in operands])
      known.update(zip(results, found, strict=True))
    return [get(output) for output in outputs]


def map_sums(
  fn: Callable[[PyTree, PyTree], PyTree],
  points: PyTree,
  weights: Array,
  batch: PyTree,
  at_once: int = 1,
) -> PyTree:
  """A function at many weighted sums of trees, `fn(sum_i w_i point_i, batch)`.

  What does not depend on the weights is computed once, and so are products of
  a leaf with what does not depend on them, a layer of the network's inputs
  say: x (sum_i w_i W_i) = sum_i w_i (x W_i), so that 61 points of a curve of
  three control points cost three such products and not 61. Leaves of half
  types, which are rounded when summed, are summed before they are used.

  Args:
    fn: the function, traced once.
    points: a pytree whose leaves have a leading axis of n trees.
    weights: `[sums, n]`.
    batch: pytree of arrays, the function's other argument.
    at_once: how many sums are computed at a time.

  Returns:
    What the function returns, leaves `[sums, ...]`.

  >>> points = {"w": jnp.array([[[1.0]], [[3.0]]])}
  >>> weights = jnp.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
  >>> fn = lambda params, x: jax.nn.relu(x @ params["w"])[0, 0]
  >>> map_sums(fn, points, weights, jnp.array([[2.0]])).tolist()
  [2.0, 4.0, 6.0]
  """
  first = jax.tree.map(lambda leaf: leaf[0], points)
  closed, shape = jax.make_jaxpr(fn, return_shape=True)(first, batch)
  num_sums, num_trees = weights.shape
  apart = _Apart(num_trees, num_sums)

  def as_value(leaf: Array) -> _Value:
    if not tree_lib.is_float(leaf):
      return _Value(leaf[0])
    return _Value(stack=lambda: leaf)

  outputs = apart.run(
    closed.jaxpr,
    closed.consts,
    [
      *map(as_value, jax.tree.leaves(points)),
      *map(_Value, jax.tree.leaves(batch)),
    ],
  )
  apart.make_stacks(outputs)
  results = jax.lax.map(
    lambda row: apart.finish(outputs, row), weights, batch_size=at_once
  )
  return jax.tree.unflatten(jax.tree.structure(shape), results)
