"""Low-rank adapters of the kernels of a network."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmerge import tree as tree_lib

PyTree = Any
Adapters = dict[str, dict[str, jax.Array]]


class Lora(NamedTuple):
  r"""Low-rank adapters: which kernels have one, and how they are scaled.

  .. math:: W' = W + \frac{\alpha}{r} A B, \quad
    A \in \mathbb{R}^{in \times r}, \; B \in \mathbb{R}^{r \times out}

  Attributes:
    rank: r, at least 1.
    alpha: positive; by custom once or twice the rank.
    targets: regular expression (`re.search`) of the names of the kernels, as
      `jaxmerge.tree.leaf_names` gives them; the default has all kernels of
      attention in the package's transformers.

  References:
    Hu et al., `LoRA: low-rank adaptation of large language models
    <https://arxiv.org/abs/2106.09685>`_, 2021
  """

  rank: int = 8
  alpha: float = 16.0
  targets: str = r"(?i)(att|query|key|value|[qkv]_proj|out_proj).*kernel$"


def _num_in(name: str, shape: tuple[int, ...]) -> int:
  """How many axes of a kernel are its inputs'."""
  if len(shape) == 3:
    # Flax's attention has kernels [in, heads, dim] and [heads, dim, out], a
    # convolution [width, in, out].
    layer = "".join(name.split("/")[-2:-1])
    return 2 if layer == "out" or layer.startswith("Conv") else 1
  return max(1, len(shape) - 1)


def _sizes(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
  count = _num_in(name, shape)
  return math.prod(shape[:count]), math.prod(shape[count:])


def _targets(lora: Lora, params: PyTree) -> dict[str, tuple[int, ...]]:
  """Shapes of the kernels that have an adapter, by name."""
  names = tree_lib.leaf_names(params)
  leaves = jax.tree.leaves(params)
  try:
    re.compile(lora.targets)
  except re.error as error:
    raise ValueError(
      f"The targets {lora.targets!r} of the adapters are no regular expression"
      f" ({error})."
    ) from error
  found = {
    name: tuple(leaf.shape)
    for name, leaf in zip(names, leaves, strict=True)
    if re.search(lora.targets, name)
    and tree_lib.is_float(leaf)
    and leaf.ndim >= 2
  }
  if not found:
    raise ValueError(
      f"No kernel has a name that the targets {lora.targets!r} of the adapters"
      f" match. Choose others; the names are {', '.join(names[:6])}"
      f"{', ...' if len(names) > 6 else ''}."
    )
  return found


def lora_init(lora: Lora, key: jax.Array, params: PyTree) -> Adapters:
  """New adapters, which leave the network as it is.

  A is uniform in [-1/sqrt(in), 1/sqrt(in)], as PEFT has it, B is zero.

  Args:
    lora: the settings.
    key: PRNG key.
    params: the network's parameters.

  Returns:
    By the name of the kernel "a", ``[in, rank]``, and "b", ``[rank, out]``, of
    the kernel's dtype.

  Raises:
    ValueError: the settings are out of range, or no kernel is named so.

  >>> params = {"query": {"kernel": jnp.ones((4, 6))}}
  >>> adapters = lora_init(Lora(rank=2), jax.random.key(0), params)
  >>> {name: leaf.shape for name, leaf in adapters["query/kernel"].items()}
  {'a': (4, 2), 'b': (2, 6)}
  """
  if not isinstance(lora.rank, int) or lora.rank < 1 or not lora.alpha > 0:
    raise ValueError(
      "rank must be a whole number, at least 1, and alpha positive, got"
      f" {lora.rank} and {lora.alpha}."
    )
  shapes = _targets(lora, params)
  dtypes = dict(
    zip(
      tree_lib.leaf_names(params),
      (leaf.dtype for leaf in jax.tree.leaves(params)),
      strict=True,
    )
  )
  found = {}
  keys = jax.random.split(key, len(shapes))
  for one, (name, shape) in zip(keys, shapes.items(), strict=True):
    size, out = _sizes(name, shape)
    bound = size**-0.5
    found[name] = {
      "a": jax.random.uniform(
        one, (size, lora.rank), dtypes[name], -bound, bound
      ),
      "b": jnp.zeros((lora.rank, out), dtypes[name]),
    }
  return found


def lora_apply(lora: Lora, params: PyTree, adapters: Adapters) -> PyTree:
  """The network with its adapters in its kernels.

  Args:
    lora: the settings.
    params: the network's parameters.
    adapters: as `lora_init` makes them.

  Returns:
    Parameters of the structure, shapes and dtypes of ``params``; gradients with
    respect to both arguments flow.

  Raises:
    ValueError: an adapter is of no kernel, of one of another shape, or of
      another rank.

  >>> params = {"kernel": jnp.zeros((2, 2))}
  >>> adapters = {"kernel": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}
  >>> print(lora_apply(Lora(1, 2.0), params, adapters)["kernel"].tolist())
  [[2.0, 2.0], [2.0, 2.0]]
  """
  names = tree_lib.leaf_names(params)
  leaves, structure = jax.tree.flatten(params)
  unknown = sorted(set(adapters) - set(names))
  if unknown:
    raise ValueError(
      f"There are adapters of {unknown[0]!r}, which is no leaf of the network."
      " Give the network that they were made for."
    )
  scale = lora.alpha / lora.rank

  def one(name: str, leaf: jax.Array) -> jax.Array:
    if name not in adapters:
      return leaf
    a, b = adapters[name]["a"], adapters[name]["b"]
    size, out = _sizes(name, leaf.shape)
    if a.shape[0] != size or b.shape[1] != out:
      raise ValueError(
        f"The adapter of {name!r} is of a kernel [{a.shape[0]}, {b.shape[1]}],"
        f" but the network's is {list(leaf.shape)}."
      )
    if a.shape[1] != lora.rank or b.shape[0] != lora.rank:
      raise ValueError(
        f"The adapter of {name!r} has the rank {a.shape[1]}, the settings have"
        f" {lora.rank}: they must be those that it was made by."
      )
    product = jnp.asarray(scale, leaf.dtype) * (a @ b).astype(leaf.dtype)
    return leaf + product.reshape(leaf.shape)

  made = [one(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
  return jax.tree.unflatten(structure, made)
