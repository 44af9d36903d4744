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
      \mathrm{tolerance} \cdot \max |f(\theta) - \bar f|

  for random permutations :math:`\sigma` of all groups, with :math:`\bar f` the
  mean of the outputs. :math:`\theta` is the given parameters with noise of a
  tenth of each leaf's root mean square (of 0.1 where it is zero), so that no
  two neurons are alike in a bias or a scale as they are initialised. Where it
  fails, each group is permuted alone, and with one axis more or less, to find
  the leaf that is wrong.

  Args:
    spec: The specification.
    apply_fn: The network on a fixed batch: ``apply_fn(params)`` returns a
      pytree of floating-point arrays. Any random inputs will do, several of
      them, so that the outputs differ.
    params: The parameters, which are not changed.
    key: PRNG key of the permutations, none of which is the identity, and of
      the noise; by default ``jax.random.key(0)``.
    trials: How often permutations are drawn, at least 1.
    tolerance: The largest difference that is taken for rounding.

  Returns:
    The largest difference that was seen, as a fraction of
    :math:`\max |f - \bar f|`.

  Raises:
    SpecError: If the specification does not fit the parameters, or the
      function changes; the message names the group and, where one axis makes
      the difference, the leaf.
    ValueError: If the outputs are not finite, constant, or there are none.

  References:
    Ainsworth et al., `Git Re-Basin: Merging models modulo permutation
    symmetries <https://arxiv.org/abs/2209.04836>`_, 2022

  >>> params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0], [4.0]])}
  >>> spec = {"hidden": (_spec.Axis("a", 1), _spec.Axis("b", 0, False))}
  >>> apply_fn = lambda p: jnp.tanh(jnp.eye(2, 1) @ p["a"]) @ p["b"]
  >>> check(spec, apply_fn, params) < 1e-6
  True
  """
  if trials < 1:
    raise ValueError(f"trials must be at least 1; got {trials}")
  _spec.group_sizes(spec, params)
  noise, key = jax.random.split(jax.random.key(0) if key is None else key)
  params = _perturbed(params, noise)
  compiled = jax.jit(apply_fn)
  expected = _outputs(compiled, params)
  if not expected.size or not np.isfinite(expected).all():
    raise ValueError(
      "apply_fn must return arrays that are finite and not empty, of the"
      " parameters with noise of a tenth of their size; got"
      f" {expected.size} entries, {np.isfinite(expected).sum()} of them finite"
    )
  scale = float(np.abs(expected - expected.mean()).max())
  if scale <= 1e-6 * np.abs(expected).max():
    raise ValueError(
      f"apply_fn returns a constant, {expected[0]:.3g} in all"
      f" {expected.size} entries, which would hide any change; run the network"
      " on several random inputs"
    )

  def error(
    spec: _spec.PermutationSpec, permutations: Mapping[str, jax.Array]
  ) -> float:
    moved = _spec.apply_permutations(spec, params, permutations)
    return float(np.abs(_outputs(compiled, moved) - expected).max()) / scale

  largest = 0.0
  for one in jax.random.split(key, trials):
    permutations = {
      group: _not_identity(permutation)
      for group, permutation in _spec.random_permutations(
        spec, params, one
      ).items()
    }
    found = error(spec, permutations)
    if not found <= tolerance:
      _explain(spec, params, permutations, error, found, tolerance)
    largest = max(largest, found)
  return largest


def _perturbed(params: PyTree, key: jax.Array) -> PyTree:
  """Parameters without two neurons that are alike; variances stay positive."""
  keys = iter(jax.random.split(key, max(1, len(jax.tree.leaves(params)))))

  def perturb(name: str, leaf: Any) -> Any:
    one = next(keys)
    if not tree.is_float(leaf) or not np.size(leaf):
      return leaf
    leaf = jnp.asarray(leaf)
    wide = leaf.astype(tree.accumulation_dtype(leaf))
    noise = 0.1 * jax.random.normal(one, wide.shape, wide.dtype)
    if name.split("/")[-1] == "var":
      return (wide * jnp.exp(noise)).astype(leaf.dtype)
    size = jnp.sqrt(jnp.square(jnp.abs(wide)).mean())
    size = jnp.where(size > 0, size, 1).astype(wide.dtype)
    return (wide + size * noise).astype(leaf.dtype)

  return tree.map_with_name(perturb, params)


def _not_identity(permutation: jax.Array) -> jax.Array:
  """The identity, which proves nothing, turned by one."""
  is_identity = (permutation == jnp.arange(permutation.size)).all()
  return jnp.where(is_identity, jnp.roll(permutation, 1), permutation)


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
