"""Sparsifiers: which entries of a task vector are kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmerge.merging import _draws, _leafwise, _threshold

Array = jax.Array
Values = dict[str, Any]

SCOPES = ("vector", "leaf")
RESCALES = (None, "density", "l1", "l2", "linf")


class Sparsifier(NamedTuple):
  """How a task vector is sparsified; see `_leafwise.LeafRule`.

  Attributes:
    apply: `apply(tau, step) -> tau`, on one leaf.
    derive: As in a `LeafRule`.
    prepare: `prepare(taus, values) -> prepared`, of the whole task vector.
    spreads: As in a `LeafRule`.
  """

  apply: Callable[[Array, _leafwise.Step], Array]
  derive: Callable[[Values, int, int], Values] | None = None
  prepare: Callable[[list[Array], list[Values]], Any] | None = None
  spreads: bool = False


def check_choice(value: Any, name: str, choices: tuple[Any, ...]) -> None:
  """Raises unless an option is one of its choices."""
  if value not in choices:
    raise ValueError(
      f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}"
    )


def _rescale(tau: Array, kept: Array, how: str | None, density: Any) -> Array:
  """Makes up for what was dropped."""
  if how is None:
    return kept
  if how == "density":
    return kept / density.astype(kept.dtype)
  norms: dict[str, Callable[[Array], Array]] = {
    "l1": lambda x: jnp.abs(x).sum(),
    "l2": lambda x: jnp.sqrt((jnp.abs(x) ** 2).sum()),
    "linf": lambda x: jnp.abs(x).max(initial=0),
  }
  before, after = norms[how](tau), norms[how](kept)
  is_zero = after == 0
  factor = jnp.where(is_zero, 1, before / jnp.where(is_zero, 1, after))
  return kept * factor.astype(kept.dtype)


def _per_model(values: Values, name: str, compute: Callable[..., Any]) -> Any:
  """Computes from a value that may be a list of one value a model."""
  value = values[name]
  if isinstance(value, list):
    return [compute(one) for one in value]
  return compute(value)


@functools.cache
def magnitude(scope: str, rescale: str | None = None) -> Sparsifier:
  """Keeps the largest magnitudes: of each leaf, or of the whole vector."""

  def derive(values: Values, size: int, total: int) -> Values:
    among = total if scope == "vector" else size
    keep = _per_model(
      values, "density", lambda one: _threshold.keep_count(one, among)
    )
    return {**values, "keep": keep}

  def prepare(taus: list[Array], values: list[Values]) -> Array | None:
    if not taus:
      return None
    return _threshold.kth_largest_bits(taus, values[0]["keep"])

  def apply(tau: Array, step: _leafwise.Step) -> Array:
    least = step.prepared
    if scope == "leaf":
      least = _threshold.kth_largest_bits([tau], step.values["keep"])
    bits = _threshold.magnitude_bits(tau, least.dtype)
    kept = jnp.where(bits >= least, tau, 0)
    return _rescale(tau, kept, rescale, step.values["density"])

  return Sparsifier(apply, derive, prepare if scope == "vector" else None)


@functools.cache
def random(rescale: str | None = "density") -> Sparsifier:
  """Keeps each entry with probability `density`."""

  def apply(tau: Array, step: _leafwise.Step) -> Array:
    assert step.key is not None
    density = step.values["density"]
    is_kept = _draws.bernoulli(step.key, tau.shape, density)
    return _rescale(tau, jnp.where(is_kept, tau, 0), rescale, density)

  return Sparsifier(apply)


@functools.cache
def by_rank(rescale: str | None, axis: int) -> Sparsifier:
  """Keeps an entry with a probability that grows with its magnitude's rank."""

  def apply(tau: Array, step: _leafwise.Step) -> Array:
    assert step.key is not None
    along = axis if tau.ndim >= 2 else -1
    rows = tau.reshape(1) if tau.ndim == 0 else tau
    ranks = jnp.abs(rows).argsort(axis=along).argsort(axis=along)
    last = max(rows.shape[along] - 1, 1)
    # One entry alone has the middle rank.
    middle = 0.5 if rows.shape[along] == 1 else 0.0
    rank = ranks.astype(rows.dtype) / last + middle
    width = step.values["epsilon"].astype(rows.dtype)
    probability = step.values["density"].astype(rows.dtype) + width * (
      rank - 0.5
    )
    is_kept = _draws.uniform(step.key, rows.shape) < probability
    kept = jnp.where(is_kept, rows, 0)
    if rescale == "density":
      kept = kept / probability
    else:
      kept = _rescale(rows, kept, rescale, None)
    return kept.reshape(tau.shape)

  return Sparsifier(apply)


@functools.cache
def middle(rescale: str | None = None) -> Sparsifier:
  """Drops each leaf's largest magnitudes, and its smallest."""

  def derive(values: Values, size: int, total: int) -> Values:
    del total
    densities, gammas = values["density"], values["gamma"]
    count = max(
      len(value) if isinstance(value, list) else 1
      for value in (densities, gammas)
    )
    as_list = lambda value: (  # noqa: E731
      value if isinstance(value, list) else [value] * count
    )
    found = [
      _breadcrumb_counts(float(density), float(gamma), size)
      for density, gamma in zip(
        as_list(densities), as_list(gammas), strict=True
      )
    ]
    outliers, reach = (list(column) for column in zip(*found, strict=True))
    if not isinstance(densities, list) and not isinstance(gammas, list):
      return {**values, "outliers": outliers[0], "reach": reach[0]}
    return {**values, "outliers": outliers, "reach": reach}

  def apply(tau: Array, step: _leafwise.Step) -> Array:
    bits = _threshold.magnitude_bits(tau)
    outliers, reach = step.values["outliers"], step.values["reach"]
    largest = _threshold.kth_largest_bits([tau], jnp.maximum(outliers, 1))
    least = _threshold.kth_largest_bits([tau], reach)
    is_kept = (bits >= least) & ((bits < largest) | (outliers == 0))
    kept = jnp.where(is_kept, tau, 0)
    return _rescale(tau, kept, rescale, step.values["density"])

  return Sparsifier(apply, derive)


def _breadcrumb_counts(
  density: float, gamma: float, size: int
) -> tuple[Any, Any]:
  """How many outliers are dropped, and up to which rank entries are kept."""
  keep = int(_threshold.keep_count(density, size))
  outliers = min(int(gamma * size), size - keep)
  return (
    jnp.uint32(outliers),
    jnp.uint32(outliers + keep),
  )
