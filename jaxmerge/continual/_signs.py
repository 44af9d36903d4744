"""Sign alignment: the parameters are held at the signs of the start.

Reference: Sokar et al., Continual learning in vision-language models via
aligned model merging, 2025 (https://arxiv.org/abs/2506.03189).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmerge import merging
from jaxmerge import tree as tree_lib
from jaxmerge.continual import _problem

PyTree = Any
_RESETS = ("zero", "global")


class Signs(NamedTuple):
  """How often, and where, the signs of the start are restored.

  Attributes:
    period: number of steps between two alignments.
    fraction: the part of the entries, the largest ones of the start, whose
      signs are held, in (0, 1].
    scope: whether the fraction is of each "leaf", or of the "vector" as a
      whole. The two factors of an adapter are of different sizes: of the whole,
      the largest entries are nearly all in the one that begins at random.
    reset: what an entry of the other sign becomes: "zero", or "global" for
      what it was at the start.
  """

  period: int = 10
  fraction: float = 0.5
  scope: str = "leaf"
  reset: str = "zero"


def check(signs: Signs) -> None:
  """Raises ValueError where a setting is out of its range.

  >>> check(Signs())
  """
  if not isinstance(signs.period, int) or signs.period < 1:
    raise ValueError(
      f"period must be a whole number of steps, at least 1; got {signs.period}."
    )
  if not 0 < signs.fraction <= 1:
    raise ValueError(f"fraction must lie in (0, 1], got {signs.fraction}.")
  if signs.scope not in ("leaf", "vector"):
    raise ValueError(f"Unknown scope {signs.scope!r}. Choose leaf or vector.")
  if signs.reset not in _RESETS:
    raise ValueError(
      f"Unknown reset {signs.reset!r}. Choose {' or '.join(_RESETS)}."
    )


def data(
  problem: _problem.Problem,
  signs: Signs,
  start: PyTree,
  origin: PyTree,
  task: int,
) -> dict[str, PyTree]:
  """What the alignment of one task's training needs to know.

  Args:
    problem: the problem.
    signs: the settings.
    start: G, where the training starts, leaves with an axis of seeds.
    origin: what signs are relative to.
    task: number of the task; before the first one nothing has been learned that
      could be held.

  Returns:
    `sign`, int8, 0 where any will do; `origin`; `value` to reset to.
  """

  def largest(start: PyTree, origin: PyTree) -> PyTree:
    vector = tree_lib.sub(start, origin)
    kept = merging.keep(vector, signs.fraction, scope=signs.scope)
    return jax.tree.map(lambda leaf: jnp.sign(leaf).astype(jnp.int8), kept)

  if task:
    sign = _problem.per_seed(problem, largest, start, origin)
  else:
    sign = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.int8), start)
  return {
    "sign": sign,
    "origin": origin,
    "value": origin if signs.reset == "zero" else start,
  }
