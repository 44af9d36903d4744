"""Bezier simplices: what a curve is to two networks, for any number."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge import tree as tree_lib
from jaxmerge.curves import _curve

PyTree = Any


def pairs(num_models: int) -> list[tuple[int, int]]:
  """The pairs of models in the order of their control points."""
  return list(itertools.combinations(range(num_models), 2))


def simplex_weights(t: jax.Array, *, common: bool = True) -> jax.Array:
  """Weights of the control points of a Bezier simplex, see `BezierSimplex`.

  Args:
    t: barycentric coordinates `[models]`, not negative, sum 1; at least two.
    common: whether there is a control point common to all, which two models
      have not.

  Returns:
    float32: one weight a model, one a pair, and that of the common point;
    not negative, sum 1.

  Raises:
    ValueError: t is not a vector of at least two, or holds values that are
      negative or do not sum to 1 (traced ones are not checked).

  >>> weights = simplex_weights(jnp.array([0.5, 0.5]))
  >>> weights.tolist()
  [0.25, 0.25, 0.5]
  """
  t = jnp.asarray(t, jnp.float32)
  if t.ndim != 1 or len(t) < 2:
    raise ValueError(
      "t must hold the barycentric coordinates of at least 2 models, got "
      f"shape {t.shape}."
    )
  # NaN passes no comparison.
  if not isinstance(t, jax.core.Tracer) and not (
    bool((t >= 0).all()) and abs(float(t.sum()) - 1) <= 1e-5
  ):
    raise ValueError(
      f"t must hold coordinates that are not negative and sum to 1, got {t}."
    )
  first, second = jnp.array(pairs(len(t))).T
  edges = 2 * t[first] * t[second]
  if not common or len(t) == 2:
    return jnp.concatenate([t * t, edges])
  # 6 times the sum of all products of three coordinates: sums of products of
  # one and two, in turn, so that nothing is subtracted.
  ones = twos = threes = jnp.zeros((), jnp.float32)
  for one in t:
    threes, twos, ones = threes + twos * one, twos + ones * one, ones + one
  return jnp.concatenate(
    [t * t, edges * (t[first] + t[second]), 6 * threes[None]]
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BezierSimplex:
  r"""A Bezier simplex through n networks, bent by pairs and by a common point.

  Without the common point it is of degree 2,

      phi(t) = sum_i t_i^2 P_i + 2 sum_{i<j} t_i t_j P_ij

  with a control point P_ij for every pair. With it, it is of degree 3: the
  edges stay what they are (written in degree 3), and the inner control point
  of every three networks is C,

      phi(t) = sum_i t_i^2 P_i + 2 sum_{i<j} t_i t_j (t_i + t_j) P_ij
               + 6 sum_{i<j<k} t_i t_j t_k C

  t are barycentric coordinates, t_i >= 0 and sum_i t_i = 1. The edge between
  two networks is the Bezier curve of three control points between them, and
  so is the simplex of two networks, which has no common point. If C is the
  mean of P_ij, P_ik and P_jk for all three, the degree is 2.

  Attributes:
    points: a pytree whose leaves have a leading axis of control points: the
      networks, the pairs in the order (0, 1), (0, 2), ..., (1, 2), ..., and
      the common point if there is one. Make it with `BezierSimplex.through`.
    num_models: number of networks.

  References:
    Kobayashi et al., Bezier Simplex Fitting, 2018
    (https://arxiv.org/abs/1812.05222). Benton et al., Loss Surface Simplexes
    for Mode Connecting Volumes and Fast Ensembling, 2021
    (https://arxiv.org/abs/2102.13042).

  >>> simplex = BezierSimplex.through([{"w": 0.0}, {"w": 4.0}], [{"w": 8.0}])
  >>> float(simplex(jnp.array([0.5, 0.5]))["w"])
  5.0
  """

  points: PyTree
  num_models: int = dataclasses.field(metadata=dict(static=True))

  @classmethod
  def through(
    cls, models: Any, bends: Any, common: PyTree = None
  ) -> BezierSimplex:
    """Makes a simplex from its control points.

    Args:
      models: two or more pytrees of the same structure and shapes.
      bends: one pytree a pair of models, in the order (0, 1), (0, 2), ....
      common: the common control point, for three models and more; None for
        none.

    Returns:
      The simplex.

    Raises:
      ValueError: too few models, or another number of bends than pairs.
      TreeMismatchError: the points differ in structure, shape or dtype.
    """
    models, bends = list(models), list(bends)
    count = len(models)
    if count < 2:
      raise ValueError(f"A simplex needs at least 2 models, got {count}.")
    if len(bends) != math.comb(count, 2):
      raise ValueError(
        f"{count} models have {math.comb(count, 2)} pairs, got {len(bends)} "
        "bends."
      )
    if common is not None and count == 2:
      raise ValueError(
        "Two models have no common control point besides that of their pair."
      )
    inner = [] if common is None else [common]
    points = _curve.BezierCurve.through(*models, *bends, *inner).points
    return cls(points, count)

  @property
  def num_points(self) -> int:
    """Number of control points."""
    return int(jax.tree.leaves(self.points)[0].shape[0])

  @property
  def common(self) -> bool:
    """Whether there is a common control point."""
    return self.num_points > self.num_models + math.comb(self.num_models, 2)

  def point(self, index: int) -> PyTree:
    """Returns one control point, see `points` for their order."""
    return jax.tree.map(lambda leaf: leaf[index], self.points)

  def __call__(self, t: Any) -> PyTree:
    """Returns the parameters at `t`.

    Args:
      t: barycentric coordinates `[models]`; use `jax.vmap` for several.

    Returns:
      The weighted sum of the control points, leaf by leaf in the leaf's
      dtype, float32 within; leaves that are not floating-point come from the
      first model.

    Raises:
      ValueError: another number of coordinates than of models, or values
        that are negative or do not sum to 1 (traced ones are not checked).
    """
    t = jnp.asarray(t, jnp.float32)
    if t.shape != (self.num_models,):
      raise ValueError(
        f"t must hold {self.num_models} barycentric coordinates, got shape "
        f"{t.shape}."
      )
    points = [self.point(index) for index in range(self.num_points)]
    return tree_lib.weighted_sum(points, simplex_weights(t, common=self.common))
