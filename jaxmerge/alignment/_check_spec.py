"""The proof of a permutation specification: the function stays the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree
from jaxmerge.alignment import _spec

PyTree = Any


def check(
  spec: _spec.PermutationSpec,
  apply_fn: Callable[[PyTree], PyTree],
  params: PyTree,
  *,
  key: jax.Array | None = None,
  trials: int = 3,
  tolerance: float = 1e-5,
) -> float:
  r"""Verifies that permuted neurons leave the function of a network unchanged.

  .. math::
    \max |f(\sigma\theta) - f(\theta)| \le
      \mathrm{tolerance} \cdot \max(1, \max |f(\theta)|)

  for random permutations :math:`\sigma` of all groups. Where it fails, each
  group is permuted alone, and with one axis more or less, to find the leaf that
  is wrong.

  Args:
    spec: The specification.
    apply_fn: The network on a fixed batch: ``apply_fn(params)`` returns a
      pytree of floating-point arrays. Any random inputs will do.
    params: The parameters; random ones, so that no bias or scale is alike in
      all neurons, or the check cannot see that it is left out.
    key: PRNG key of the permutations; by default ``jax.random.key(0)``.
    trials: How often permutations are drawn, at least 1.
    tolerance: The largest difference that is taken for rounding.

  Returns:
    The largest difference that was seen, as a fraction of
    :math:`\max(1, \max |f|)`.

  Raises:
    SpecError: If the specification does not fit the parameters, or the
      function changes; the message names the group and, where one axis makes
      the difference, the leaf.
    ValueError: If the outputs are not finite, or there are none.

  References:
    Ainsworth et al., `Git Re-Basin: Merging models modulo permutation
    symmetries <https://arxiv.org/abs/2209.04836>`_, 2022

  >>> params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0], [4.0]])}
  >>> spec = {"hidden": (_spec.Axis("a", 1), _spec.Axis("b", 0, False))}
  >>> apply_fn = lambda p: jnp.maximum(jnp.ones((1, 1)) @ p["a"], 0) @ p["b"]
  >>> check(spec, apply_fn, params)
  0.0
  """
  if trials < 1:
    raise ValueError(f"trials must be at least 1; got {trials}")
  _spec.group_sizes(spec, params)
  compiled = jax.jit(apply_fn)
  expected = _outputs(compiled, params)
  if not expected.size or not np.isfinite(expected).all():
    raise ValueError(
      "apply_fn must return arrays that are finite and not empty; got"
      f" {expected.size} entries"
    )
  scale = max(1.0, float(np.abs(expected).max()))

  def error(
    spec: _spec.PermutationSpec, permutations: Mapping[str, jax.Array]
  ) -> float:
    moved = _spec.apply_permutations(spec, params, permutations)
    return float(np.abs(_outputs(compiled, moved) - expected).max()) / scale

  largest = 0.0
  key = jax.random.key(0) if key is None else key
  for one in jax.random.split(key, trials):
    permutations = _spec.random_permutations(spec, params, one)
    found = error(spec, permutations)
    if not found <= tolerance:
      _explain(spec, params, permutations, error, found, tolerance)
    largest = max(largest, found)
  return largest


def _outputs(
  apply_fn: Callable[[PyTree], PyTree], params: PyTree
) -> np.ndarray:
  leaves = jax.tree.leaves(apply_fn(params))
  return np.concatenate(
    [np.asarray(leaf, np.float64).ravel() for leaf in leaves] or [np.zeros(0)]
  )


def _explain(
  spec: _spec.PermutationSpec,
  params: PyTree,
  permutations: Mapping[str, jax.Array],
  error: Callable[[_spec.PermutationSpec, Mapping[str, jax.Array]], float],
  found: float,
  tolerance: float,
) -> None:
  """Raises with the group, and the leaf, that change the function."""
  for group, axes in spec.items():
    alone = {group: permutations[group]}
    if error({group: axes}, alone) <= tolerance:
      continue
    begin = f"permuting group '{group}' changes the function: "
    for axis in axes:
      rest = tuple(other for other in axes if other is not axis)
      if rest and error({group: rest}, alone) <= tolerance:
        raise _spec.SpecError(
          f"{begin}axis {axis.axis} of leaf '{axis.leaf}' does not belong to it"
        )
    for axis in _candidates(spec, params, group):
      if error({group: (*axes, axis)}, alone) <= tolerance:
        raise _spec.SpecError(
          f"{begin}axis {axis.axis} of leaf '{axis.leaf}' belongs to it and is"
          " missing"
        )
    leaves = ", ".join(f"'{axis.leaf}' axis {axis.axis}" for axis in axes)
    raise _spec.SpecError(
      f"{begin}more than one of its axes is wrong or missing; it has {leaves}"
    )
  raise _spec.SpecError(
    f"permuting all groups changes the function by {found:.2g}, though none"
    " does so alone: two groups meet in one leaf whose layout (outer, inner) is"
    " wrong, or the rounding is above the tolerance"
  )


def _candidates(
  spec: _spec.PermutationSpec, params: PyTree, group: str
) -> list[_spec.Axis]:
  """Axes of the group's size that belong to no group."""
  size = _spec.group_sizes(spec, params)[group]
  used = {
    (name, axis.axis % np.ndim(leaf))
    for name, leaf in zip(
      tree.leaf_names(params), jax.tree.leaves(params), strict=True
    )
    for _, axis in _spec.axes_by_leaf(spec).get(name, ())
  }
  return [
    _spec.Axis(name, place)
    for name, leaf in zip(
      tree.leaf_names(params), jax.tree.leaves(params), strict=True
    )
    for place, length in enumerate(jnp.shape(leaf))
    if length == size and (name, place) not in used
  ]
