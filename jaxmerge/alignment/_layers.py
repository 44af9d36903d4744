"""Finding the chain of dense layers in the parameters of an MLP."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmerge import tree

PyTree = Any


def _natural(name: str) -> list[tuple[str, int]]:
  """A sort key that puts Dense_2 before Dense_10."""
  return [
    (text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", name)
  ]


def join(layer: str, leaf: str) -> str:
  """The name of a layer's leaf; the root has an empty name."""
  return f"{layer}/{leaf}" if layer else leaf


def _resolve(layer: str, known: Sequence[str], tree_name: str) -> str:
  for name in (layer, f"params/{layer}"):
    if name in known:
      return name
  raise ValueError(
    f"layer '{layer}' is not in {tree_name}; its dense layers are: "
    + (", ".join(known) or "(none)")
  )


def find_layers(
  params: PyTree, layers: Sequence[str] | None, tree_name: str
) -> list[DenseLayer]:
  """The dense layers from input to output; raises unless they form a chain."""
  names = tree.leaf_names(params)
  leaves = jax.tree.leaves(params)
  index = {name: i for i, name in enumerate(names)}
  known = sorted(
    (
      name.removesuffix("kernel").removesuffix("/")
      for name in names
      if name.split("/")[-1] == "kernel"
    ),
    key=_natural,
  )
  if layers is None:
    order = known
  else:
    order = [_resolve(layer, known, tree_name) for layer in layers]
    if len(set(order)) != len(order):
      raise ValueError(f"layers names a layer twice: {list(layers)}")
  if not order:
    raise ValueError(
      f"{tree_name} has no dense layer; a layer is a leaf 'kernel' of shape"
      " [inputs, outputs] and, beside it, at most a 'bias' of shape [outputs]"
    )
  found = [
    DenseLayer(name, index[join(name, "kernel")], index.get(join(name, "bias")))
    for name in order
  ]
  _check_leaves(names, found, layers is None, tree_name)
  _check_chain(leaves, found, tree_name)
  return found


def _check_leaves(
  names: Sequence[str],
  found: Sequence[DenseLayer],
  whole_tree: bool,
  tree_name: str,
) -> None:
  used = {i for layer in found for i in (layer.kernel, layer.bias)}
  for i, name in enumerate(names):
    # Outside of layers that were asked for, other leaves are left alone.
    inside = any(name.startswith(f"{layer.name}/") for layer in found)
    if i not in used and (whole_tree or inside):
      raise ValueError(
        f"leaf '{name}' of {tree_name} is neither the kernel nor the bias of a"
        " dense layer; pass only the dense layers, or name them in layers=[...]"
      )


def _check_chain(
  leaves: Sequence[Any], found: Sequence[DenseLayer], tree_name: str
) -> None:
  for layer in found:
    kernel = leaves[layer.kernel]
    if jnp.ndim(kernel) != 2 or not tree.is_float(kernel):
      raise ValueError(
        f"leaf '{join(layer.name, 'kernel')}' of {tree_name} must be"
        " floating-point of shape [inputs, outputs]; got shape"
        f" {jnp.shape(kernel)}; map a leading axis with jax.vmap"
      )
    outputs = kernel.shape[1]
    if layer.bias is not None and jnp.shape(leaves[layer.bias]) != (outputs,):
      raise ValueError(
        f"leaf '{join(layer.name, 'bias')}' of {tree_name} must have shape"
        f" ({outputs},), one entry for each output of the kernel; got"
        f" {jnp.shape(leaves[layer.bias])}"
      )
  for layer, following in zip(found[:-1], found[1:], strict=True):
    outputs = leaves[layer.kernel].shape[1]
    inputs = leaves[following.kernel].shape[0]
    if outputs != inputs:
      raise ValueError(
        f"the layers of {tree_name} do not form a chain: '{layer.name}' has"
        f" {outputs} outputs but '{following.name}' takes {inputs} inputs;"
        " name the layers from input to output in layers=[...]"
      )


class DenseLayer(NamedTuple):
  """Where a layer's leaves are among the leaves of the tree."""

  name: str
  kernel: int
  bias: int | None
