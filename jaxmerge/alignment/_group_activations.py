"""Activations of the groups of a specification, from those of layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree
from jaxmerge.alignment import _spec

PyTree = Any


def group_activations(
  spec: _spec.PermutationSpec,
  params: PyTree,
  activations: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
  """What each group's neurons do, from the outputs of the layers before them.

  A group whose neurons are the outputs of several layers, as the channels of a
  residual stream, gets the outputs of all of them, one after the other, each
  less the channels' means and divided by the layer's root mean square: else
  what differs from layer to layer would hide what differs from neuron to
  neuron. One whose neurons have several outputs, as attention heads, gets each
  of them.

  Args:
    spec: The specification.
    params: The parameters whose activations they are.
    activations: For each layer, by its name, an array ``[..., channels]`` (with
      as many last axes as the kernel has for its outputs), as
      `flax_activations` gives them. A layer's name is that of its kernel
      without ``/kernel``.

  Returns:
    For each group an array ``[examples, n]``, whose rows are examples,
    positions and layers; what `activation_matching` and `ot_align` take.

  Raises:
    SpecError: If the specification does not fit the parameters.
    ValueError: If no layer before a group is among the activations, or one has
      other channels than its kernel.

  >>> params = {"a": {"kernel": jnp.ones((2, 3))}, "b": jnp.ones((3, 4))}
  >>> spec = {
  ...   "hidden": (
  ...     _spec.Axis("a/kernel", 1),
  ...     _spec.Axis("b", 0, incoming=False),
  ...   )
  ... }
  >>> group_activations(spec, params, {"a": jnp.ones((5, 3))})["hidden"].shape
  (5, 3)
  """
  _spec.group_sizes(spec, params)
  shapes = {
    name: np.shape(leaf)
    for name, leaf in zip(
      tree.leaf_names(params), jax.tree.leaves(params), strict=True
    )
  }
  found = {}
  for group, axes in spec.items():
    parts = []
    for axis in axes:
      layer, _, last = axis.leaf.rpartition("/")
      if not axis.incoming or last != "kernel" or layer not in activations:
        continue
      # Axes are counted from the end, where activations and kernel agree.
      shape = shapes[axis.leaf]
      place = axis.axis % len(shape) - len(shape)
      values = activations[layer]
      if values.ndim < -place or values.shape[place:] != shape[place:]:
        raise ValueError(
          f"the activations of layer '{layer}' have shape {values.shape}, but"
          f" its kernel '{axis.leaf}' has shape {shape}; they must end alike"
        )
      parts.append(_spec.rows(values, axis._replace(axis=place)).T)
    if not parts:
      layers = [axis.leaf for axis in axes if axis.incoming]
      raise ValueError(
        f"group '{group}' has no layer with activations; its neurons come from"
        f" {', '.join(layers)}, and there are activations of"
        f" {', '.join(activations)}"
      )
    if len(parts) > 1:
      parts = [_standardize(part) for part in parts]
    found[group] = jnp.concatenate(parts)
  return found


def _standardize(rows: jax.Array) -> jax.Array:
  """Takes off the columns' means, and the scale of the whole."""
  rows = rows.astype(tree.accumulation_dtype(rows))
  rows = rows - rows.mean(axis=0, keepdims=True)
  scale = jnp.sqrt(jnp.mean(jnp.square(rows)))
  return rows / jnp.where(scale > 0, scale, 1)
