"""The plane through three networks."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree as tree_lib
from jaxmerge.curves import _curve

PyTree = Any

# Of float32: what is left of c - a may be roundings alone.
_COLLINEAR = 1e-5
# Roundings of three networks, and of one that is computed from two of them.
_ROUNDINGS = 2.0


def _wide(params: PyTree) -> PyTree:
  """Half types as float32: differences of networks are small."""
  return jax.tree.map(
    lambda leaf: (
      jnp.asarray(leaf).astype(tree_lib.accumulation_dtype(leaf))
      if tree_lib.is_float(leaf)
      else leaf
    ),
    params,
  )


def _rounding(points: PyTree, index: int) -> float:
  """By how much a network may be moved by rounding, leaf by leaf."""
  squares = 0.0
  for leaf in jax.tree.leaves(points):
    if tree_lib.is_float(leaf):
      norm = float(tree_lib.norm(_wide(leaf[index])))
      squares += (float(jnp.finfo(leaf.dtype).eps) * norm) ** 2
  return _ROUNDINGS * math.sqrt(squares)


@dataclasses.dataclass(frozen=True)
class Plane:
  """The plane through three networks a, b and c, with an orthonormal basis.

      u = (b - a) / ||b - a||
      v = (c - a - <c - a, u> u) / ||c - a - <c - a, u> u||
      params(x, y) = a + x u + y v

  Neither u nor v is kept: the networks of a plane are weighted sums of a, b
  and c, so that these three are met exactly. Make one with `Plane.through`.

  Attributes:
    points: a pytree whose leaves have a leading axis of a, b and c.
    width: ||b - a||, the x of b.
    shift: <c - a, u>, the x of c.
    height: the distance of c from the line through a and b, the y of c.

  References:
    Garipov et al., Loss Surfaces, Mode Connectivity, and Fast Ensembling of
    DNNs, 2018 (https://arxiv.org/abs/1802.10026).

  >>> plane = Plane.through(
  ...   {"w": jnp.array([0.0, 0.0, 1.0])},
  ...   {"w": jnp.array([2.0, 0.0, 1.0])},
  ...   {"w": jnp.array([1.0, 4.0, 1.0])},
  ... )
  >>> plane.params(1.0, 2.0)["w"].tolist()
  [1.0, 2.0, 1.0]
  """

  points: PyTree
  width: float
  shift: float
  height: float

  @classmethod
  def through(cls, a: PyTree, b: PyTree, c: PyTree) -> Plane:
    """Makes the plane through three networks.

    All floating-point leaves count, running statistics among them: give
    ``params`` alone, with a `prepare` of `plane_values` that adds statistics.

    Args:
      a: the origin, any pytree of arrays.
      b: where the first axis points to.
      c: the third one; of a curve, its bend.

    Returns:
      The plane.

    Raises:
      TreeMismatchError: the networks differ in structure, shape or dtype.
      ValueError: the three lie on a straight line (or are no further off it
        than rounding), are not finite, or complex.
    """
    tree_lib.check_match(a, b, c, names=("a", "b", "c"))
    for name, leaf in zip(
      tree_lib.leaf_names(a), jax.tree.leaves(a), strict=True
    ):
      if jnp.iscomplexobj(leaf):
        raise ValueError(
          f"Leaf '{name}' is complex: a plane needs real parameters."
        )
    points = _curve.BezierCurve.through(a, b, c).points
    a, b, c = map(_wide, (a, b, c))
    first, second = tree_lib.sub(b, a), tree_lib.sub(c, a)
    width, length = float(tree_lib.norm(first)), float(tree_lib.norm(second))
    if not math.isfinite(width + length):
      raise ValueError(
        f"||b - a|| is {width} and ||c - a|| is {length}: the networks hold "
        "values that are not finite. No plane goes through them."
      )
    shift = float(tree_lib.dot(first, second)) / width if width else 0.0
    # Its own norm: length^2 - shift^2 would cancel.
    height = 0.0
    if width:
      rest = tree_lib.weighted_sum([second, first], [1.0, -shift / width])
      height = float(tree_lib.norm(rest))
    rounding = max(_rounding(points, index) for index in range(3))
    if height <= max(_COLLINEAR * max(length, width), rounding):
      raise ValueError(
        "a, b and c lie on a straight line: no plane is determined "
        f"(||b - a|| is {width:g}, ||c - a|| is {length:g}, and c is "
        f"{height:g} off the line through a and b). Choose another c."
      )
    return cls(points, width, shift, height)

  def _point(self, index: int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[index], self.points)

  def weights(self, x: Any, y: Any) -> np.ndarray:
    """Weights of a, b and c at coordinates, in float64.

    Args:
      x: along u, any shape.
      y: along v, the same shape.

    Returns:
      `[..., 3]`; their sum is 1.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    third = y / self.height
    second = (x - third * self.shift) / self.width
    return np.stack([1 - second - third, second, third], axis=-1)

  def params(self, x: float, y: float) -> PyTree:
    """The network at coordinates.

    Args:
      x: along u, in units of distance between parameters.
      y: along v.

    Returns:
      `a + x u + y v`; leaves that are not floating-point are those of a.
    """
    points = [self._point(index) for index in range(3)]
    weights = jnp.asarray(self.weights(x, y), jnp.float32)
    return tree_lib.weighted_sum(points, weights)

  def coordinates(self, params: PyTree) -> tuple[float, float]:
    """The coordinates of a network, or of its projection onto the plane.

    Args:
      params: a network of the same structure, shapes and dtypes.

    Returns:
      x and y.

    Raises:
      TreeMismatchError: it differs in structure, shape or dtype.
    """
    a = self._point(0)
    tree_lib.check_match(a, params, names=("plane", "params"))
    a, b, c = (_wide(self._point(index)) for index in range(3))
    offset = tree_lib.sub(_wide(params), a)
    x = float(tree_lib.dot(offset, tree_lib.sub(b, a))) / self.width
    # v by itself, not <offset, c - a> - shift x, which would cancel.
    share = self.shift / self.width
    v = tree_lib.weighted_sum([c, b, a], [1.0, -share, share - 1.0])
    return x, float(tree_lib.dot(offset, v)) / self.height

  def axes(
    self, points: int = 21, margin: float = 0.25
  ) -> tuple[np.ndarray, np.ndarray]:
    """Even grids over the rectangle that the three networks span.

    Args:
      points: number of points on each axis, at least 2.
      margin: how far the axes go beyond 0 and beyond `width` or `height`, as
        a share of these.

    Returns:
      xs and ys, float64 `[points]`.

    Raises:
      ValueError: fewer than two points.
    """
    if points < 2:
      raise ValueError(f"An axis needs at least 2 points, got {points}.")
    unit = np.linspace(-margin, 1 + margin, points)
    return unit * self.width, unit * self.height
