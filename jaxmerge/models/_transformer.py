"""What the pre-trained transformers have in common."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

Activation = Callable[[jax.Array], jax.Array]


def _quick_gelu(x: jax.Array) -> jax.Array:
  return x * jax.nn.sigmoid(1.702 * x)


# By the names in Hugging Face's config.json.
_ACTIVATIONS: dict[str, Activation] = {
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
  "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
  "quick_gelu": _quick_gelu,
  "relu": jax.nn.relu,
}


def activation(name: str) -> Activation:
  """An activation by its name in a config.json.

  Args:
    name: "gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu" or "relu".

  Returns:
    The function.

  Raises:
    ValueError: the name is unknown.

  >>> print(activation("quick_gelu")(jnp.array([0.0, 100.0])))
  [  0. 100.]
  """
  if name not in _ACTIVATIONS:
    raise ValueError(
      f"unknown activation {name!r}; choose one of {', '.join(_ACTIVATIONS)}"
    )
  return _ACTIVATIONS[name]


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  heads: int,
  mask: jax.Array | None,
  causal: bool = False,
) -> jax.Array:
  """Softmax attention, the softmax in float32.

  Args:
    query: ``[b, n, dim]``.
    key: ``[b, n, dim]``.
    value: ``[b, n, dim]``.
    heads: the number of heads, a divisor of dim.
    mask: bool ``[b, n]``, the tokens that may be looked at, or ``[b, n, n]``,
      those that each may look at, at least one of each; None for all.
    causal: whether a token sees those before it and itself alone.

  Returns:
    ``[b, n, dim]``.
  """
  # jax.nn.dot_product_attention has no gradient in half types where types are
  # not promoted implicitly.
  split = (*query.shape[:-1], heads, query.shape[-1] // heads)
  query, key, value = (x.reshape(split) for x in (query, key, value))
  scores = jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(jnp.float32)
  seen = jnp.ones(scores.shape[-2:], bool)[None, None]
  if causal:
    seen = jnp.tril(seen)
  if mask is not None:
    seen = seen & (mask[:, None, None, :] if mask.ndim == 2 else mask[:, None])
  scores = jnp.where(seen, scores * split[-1] ** -0.5, -jnp.inf)
  weights = jax.nn.softmax(scores).astype(value.dtype)
  found = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
  return found.reshape(*found.shape[:2], -1)


def layer_norm(x: jax.Array, epsilon: float, name: str) -> jax.Array:
  """A LayerNorm in float32, its variance in two passes, as PyTorch has it.

  Args:
    x: ``[..., dim]``; the result has its dtype.
    epsilon: is added to the variance.
    name: of the module, in the compact method that calls this.

  Returns:
    ``[..., dim]``.
  """
  norm = nn.LayerNorm(epsilon, use_fast_variance=False, name=name)
  return norm(x.astype(jnp.float32)).astype(x.dtype)


def unit(vectors: jax.Array) -> jax.Array:
  """Scales vectors to the length 1.

  Args:
    vectors: ``[..., dim]``.

  Returns:
    float32 ``[..., dim]``.

  >>> print(unit(jnp.array([3.0, 4.0])))
  [0.6 0.8]
  """
  vectors = vectors.astype(jnp.float32)
  squares = (vectors**2).sum(axis=-1, keepdims=True)
  return vectors * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))


def check_sizes(network: str, heads: int, dim: int, **sizes: int) -> None:
  """Raises ValueError where a size is not positive, or heads do not divide."""
  for name, size in (("heads", heads), ("dim", dim), *sizes.items()):
    if size < 1:
      raise ValueError(f"{name} of {network} must be positive, got {size}")
  if dim % heads:
    raise ValueError(f"heads={heads} of {network} does not divide dim={dim}")
