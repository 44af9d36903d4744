"""Activations of a network's layers, as functions of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

PyTree = Any

#: `activations_fn(params, batch) -> {layer: [..., channels]}`, in the order in
#: which the layers are computed. A layer's name is that of its leaves without
#: the last part: "Dense_0" for a leaf "Dense_0/kernel".
ActivationsFn = Callable[[PyTree, PyTree], Mapping[str, jax.Array]]


def flax_activations(
  module: nn.Module,
  *,
  kinds: Sequence[type[nn.Module]] = (nn.Dense, nn.DenseGeneral, nn.Conv),
  inputs: Callable[[PyTree], Any] = lambda batch: batch,
  layers: Sequence[str] | None = None,
  with_output: bool = False,
  **options: Any,
) -> ActivationsFn:
  """The outputs of the layers of a Flax linen module, by the layers' names.

  They are what the layers return: behind a dense layer or a convolution, that
  is before the nonlinearity.

  Args:
    module: The network.
    kinds: The classes of the layers to look at: those with kernels, or the
      normalisations, such as ``flax.linen.LayerNorm``, that stand before the
      nonlinearity.
    inputs: What of a batch the module is called with.
    layers: The names of the layers to return, for instance the groups of a
      permutation specification that are named as layers; None for all.
    with_output: Whether the layer whose output is the network's is among them.
    **options: Further arguments of the module's call, such as ``train=True``;
      and ``mutable`` of ``module.apply``.

  Returns:
    ``activations_fn(params, batch)``, where ``params`` is a tree of parameters
    or, with a key ``"params"``, of all the module's variables; the names are
    those of the leaves of either. Each array has shape ``[..., channels]``.
    Keep the function: another one compiles anew.

  Raises:
    ValueError: If a layer is called more than once, when the function is
      called, or no layer is of these kinds, or one of ``layers`` is not.

  >>> import jax.numpy as jnp
  >>> module = nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(2)])
  >>> params = module.init(jax.random.key(0), jnp.ones((4, 5)))["params"]
  >>> found = flax_activations(module)(params, jnp.ones((4, 5)))
  >>> {name: array.shape for name, array in found.items()}
  {'layers_0': (4, 3)}
  """
  kinds = tuple(kinds)

  def activations(params: PyTree, batch: PyTree) -> dict[str, jax.Array]:
    whole = isinstance(params, Mapping) and "params" in params
    variables = params if whole else {"params": params}
    found: dict[str, jax.Array] = {}

    def watch(
      call: Callable[..., Any],
      args: tuple[Any, ...],
      kwargs: dict[str, Any],
      context: nn.module.InterceptorContext,
    ) -> Any:
      value = call(*args, **kwargs)
      if context.method_name == "__call__" and isinstance(
        context.module, kinds
      ):
        path = (*(["params"] if whole else []), *context.module.path)
        name = "/".join(path)
        if name in found:
          raise ValueError(
            f"layer '{name}' is called more than once, so that its"
            " activations are not one array; write activations_fn by hand"
          )
        found[name] = value
      return value

    with nn.intercept_methods(watch):
      output = module.apply(variables, inputs(batch), **options)
    if not found:
      names = ", ".join(kind.__name__ for kind in kinds)
      raise ValueError(
        f"the module has no layer of the kinds {names}; name others in kinds"
      )
    if layers is not None:
      missing = [name for name in layers if name not in found]
      if missing:
        raise ValueError(
          f"layer '{missing[0]}' is not among the module's: {', '.join(found)}"
        )
      return {name: found[name] for name in found if name in layers}
    outputs = {id(leaf) for leaf in jax.tree.leaves(output)}
    return {
      name: value
      for name, value in found.items()
      if with_output or id(value) not in outputs
    }

  return activations
