"""Curves through parameter space, as pytrees of control points."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from jaxmerge import tree as tree_lib

PyTree = Any


def bernstein_weights(t: jax.Array | float, num_points: int) -> jax.Array:
  """Weights of the control points of a Bezier curve at `t`.

      w_i(t) = C(n, i) t^i (1 - t)^(n - i),    i = 0..n, n = num_points - 1

  Computed by repeated interpolation, as in de Casteljau's scheme: only
  convex combinations, so that no power overflows or cancels in float32.

  Args:
    t: scalar in [0, 1].
    num_points: number of control points, at least 2.

  Returns:
    float32 `[num_points]`; not negative, sum 1.

  >>> bernstein_weights(0.5, 3).tolist()
  [0.25, 0.5, 0.25]
  """
  t = jnp.asarray(t, jnp.float32)
  weights = [jnp.ones((), jnp.float32)]
  for _ in range(num_points - 1):
    left = [(1 - t) * weight for weight in weights]
    right = [t * weight for weight in weights]
    inner = [a + b for a, b in zip(left[1:], right[:-1], strict=True)]
    weights = [left[0], *inner, right[-1]]
  return jnp.stack(weights)


def hat_weights(t: jax.Array | float, num_points: int) -> jax.Array:
  """Weights of the vertices of a polygonal chain at `t`.

      w_i(t) = max(0, 1 - |n t - i|),    i = 0..n, n = num_points - 1

  Args:
    t: scalar in [0, 1].
    num_points: number of vertices, at least 2.

  Returns:
    float32 `[num_points]`; not negative, sum 1, at most two above 0.

  >>> hat_weights(0.25, 3).tolist()
  [0.5, 0.5, 0.0]
  """
  t = jnp.asarray(t, jnp.float32)
  vertices = jnp.arange(num_points, dtype=jnp.float32)
  return jnp.maximum(0.0, 1 - jnp.abs((num_points - 1) * t - vertices))


@dataclasses.dataclass(frozen=True)
class _Curve:
  """A curve with control points, a pytree; see the two kinds below.

  Attributes:
    points: a pytree whose leaves have a leading axis of control points.
  """

  points: PyTree

  # Of the control points: `weights(t, num_points)`.
  weights: ClassVar[Any]

  @classmethod
  def through(cls, *points: PyTree) -> Self:
    """Makes a curve from its control points, in order, ends included.

    Args:
      *points: two or more pytrees of the same structure and shapes.

    Returns:
      The curve.

    Raises:
      ValueError: fewer than two points.
      TreeMismatchError: the points differ in structure, shape or dtype.
    """
    if len(points) < 2:
      raise ValueError(
        f"A curve needs at least 2 control points, got {len(points)}."
      )
    tree_lib.check_match(*points)
    stacked = jax.tree.map(
      lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]),
      *points,
    )
    return cls(stacked)

  @property
  def num_points(self) -> int:
    """Number of control points, ends included."""
    return int(jax.tree.leaves(self.points)[0].shape[0])

  def point(self, index: int) -> PyTree:
    """Returns one control point.

    Args:
      index: number of the point; negative counts from the end.

    Returns:
      A pytree of parameters.
    """
    return jax.tree.map(lambda leaf: leaf[index], self.points)

  def __call__(self, t: jax.Array | float) -> PyTree:
    """Returns the parameters at `t`.

    Args:
      t: scalar in [0, 1]; use `jax.vmap` for several.

    Returns:
      `sum_i w_i(t) point_i`, leaf by leaf in the leaf's dtype, float32
      within; leaves that are not floating-point come from the first point.
    """
    points = [self.point(index) for index in range(self.num_points)]
    return evaluate_curve(type(self), points, t)


def evaluate_curve(
  kind: type[_Curve], points: Sequence[PyTree], t: jax.Array | float
) -> PyTree:
  """Weighted sum of separate control points, without stacking them."""
  return tree_lib.weighted_sum(points, kind.weights(t, len(points)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BezierCurve(_Curve):
  """A Bezier curve of any degree.

      phi(t) = sum_i C(n, i) t^i (1 - t)^(n - i) point_i

  With three points, "three bends": (1-t)^2 W1 + 2t(1-t) theta + t^2 W2.

  Attributes:
    points: a pytree whose leaves have a leading axis of n + 1 control
      points. Make it from separate pytrees with `BezierCurve.through`.

  References:
    Garipov et al., Loss Surfaces, Mode Connectivity, and Fast Ensembling of
    DNNs, 2018.

  >>> curve = BezierCurve.through({"w": 0.0}, {"w": 2.0}, {"w": 0.0})
  >>> float(curve(0.5)["w"])
  1.0
  """

  weights: ClassVar = staticmethod(bernstein_weights)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PolyChain(_Curve):
  """A polygonal chain: straight segments between its control points.

      phi(t) = sum_i max(0, 1 - |n t - i|) point_i

  Attributes:
    points: a pytree whose leaves have a leading axis of n + 1 control
      points. Make it from separate pytrees with `PolyChain.through`.

  References:
    Garipov et al., Loss Surfaces, Mode Connectivity, and Fast Ensembling of
    DNNs, 2018.

  >>> chain = PolyChain.through({"w": 0.0}, {"w": 2.0}, {"w": 0.0})
  >>> float(chain(0.25)["w"])
  1.0
  """

  weights: ClassVar = staticmethod(hat_weights)


_KINDS: dict[str, type[BezierCurve | PolyChain]] = {
  "bezier": BezierCurve,
  "polychain": PolyChain,
}


def get(kind: str) -> type[BezierCurve | PolyChain]:
  """Returns the class of a kind of curve.

  Args:
    kind: "bezier" or "polychain".

  Returns:
    `BezierCurve` or `PolyChain`.

  Raises:
    ValueError: the kind is unknown.

  >>> get("polychain").__name__
  'PolyChain'
  """
  if kind not in _KINDS:
    raise ValueError(
      f"Unknown kind {kind!r}. Choose one of {', '.join(sorted(_KINDS))}."
    )
  return _KINDS[kind]
