"""Permuting the hidden neurons of an MLP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.alignment import _layers

PyTree = Any


def permute_mlp(
  params: PyTree,
  permutations: Sequence[jax.typing.ArrayLike],
  *,
  layers: Sequence[str] | None = None,
) -> PyTree:
  r"""Reorders hidden neurons without changing the network's function.

  .. math::
    W_l \leftarrow W_l[\sigma_{l-1}, \sigma_l], \quad
    b_l \leftarrow b_l[\sigma_l]

  with the identity for the network's inputs and outputs: neuron g of the
  result is neuron :math:`\sigma_l(g)` of ``params``.

  Args:
    params: Parameters of an MLP, as `align_mlp` takes them.
    permutations: For each hidden layer, integers of shape [n]: a permutation
      of 0 to n-1. Traced ones are not checked.
    layers: As for `align_mlp`.

  Returns:
    The parameters of the reordered network.

  Raises:
    ValueError: If the layers do not form a chain, or the permutations do not
      fit them.

  >>> params = {
  ...   "Dense_0": {"kernel": jnp.array([[1.0, 2.0]])},
  ...   "Dense_1": {"kernel": jnp.array([[3.0], [4.0]])},
  ... }
  >>> print(permute_mlp(params, [[1, 0]])["Dense_0"]["kernel"])
  [[2. 1.]]
  """
  found = _layers.find_layers(params, layers, "params")
  leaves = jax.tree.leaves(params)
  hidden = found[:-1]
  if len(permutations) != len(hidden):
    raise ValueError(
      f"got {len(permutations)} permutations for {len(hidden)} hidden layers;"
      " give one for each layer but the last"
    )
  moves = []
  for layer, permutation in zip(hidden, permutations, strict=True):
    n = leaves[layer.kernel].shape[1]
    if not isinstance(permutation, jax.core.Tracer):
      values = np.asarray(permutation)
      is_integer = np.issubdtype(values.dtype, np.integer)
      if not is_integer or not np.array_equal(np.sort(values), np.arange(n)):
        raise ValueError(
          f"the permutation of layer '{layer.name}' is not one of its {n}"
          f" neurons; give each of 0 to {n - 1} once"
        )
    moves.append(jnp.asarray(permutation))
  return take_neurons(params, found, moves)


def take_neurons(
  params: PyTree,
  found: Sequence[_layers.DenseLayer],
  permutations: Sequence[jax.Array],
) -> PyTree:
  """Applies one permutation for each of the layers but the last."""
  treedef: Any = jax.tree.structure(params)
  leaves = jax.tree.leaves(params)
  for layer, permutation in zip(found[:-1], permutations, strict=True):
    leaves[layer.kernel] = jnp.asarray(leaves[layer.kernel])[:, permutation]
    if layer.bias is not None:
      leaves[layer.bias] = jnp.asarray(leaves[layer.bias])[permutation]
  for layer, permutation in zip(found[1:], permutations, strict=True):
    leaves[layer.kernel] = jnp.asarray(leaves[layer.kernel])[permutation]
  return treedef.unflatten(leaves)
