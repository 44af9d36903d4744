"""Vision transformers."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmerge.models import _conv, _norms

POOLS = ("mean", "class")


class _Block(nn.Module):
  """Attention and a two-layer network, each behind a LayerNorm."""

  heads: int
  mlp_dim: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = nn.LayerNorm(name="Norm_0")(x)
    x = x + nn.MultiHeadDotProductAttention(
      self.heads, deterministic=True, name="Attention"
    )(y)
    y = nn.LayerNorm(name="Norm_1")(x)
    y = nn.Dense(self.mlp_dim, name="Dense_0")(y)
    y = nn.Dense(x.shape[-1], name="Dense_1")(nn.gelu(y))
    return x + y


class ViT(nn.Module):
  """A vision transformer for images ``[b, h, w, c]``.

  Patches are embedded by a convolution and get learned positions; blocks of
  attention and a two-layer network follow, each behind a LayerNorm and with a
  residual connection; a last LayerNorm, a pool over tokens, and a dense
  layer. Names: ``Patches`` (the convolution), ``positions``,
  ``class_token``, ``Block_i`` with ``Norm_0``, ``Attention`` (``query``,
  ``key``, ``value`` of shape ``[dim, heads, dim / heads]``, ``out``),
  ``Norm_1``, ``Dense_0`` and ``Dense_1``, then ``Norm_0`` and ``Dense_0``.

  Its convolutions have gradients of their own: forward-mode differentiation
  (``jax.jvp``, ``jax.jacfwd``, ``jax.hessian``) is not available.

  Attributes:
    patch: The side of a patch in pixels; it divides the images' sides.
    dim: The width of the residual stream.
    depth: The number of blocks.
    heads: The number of attention heads, a divisor of ``dim``.
    mlp_dim: The hidden width of the blocks' networks; None for ``4 dim``.
    num_classes: The number of logits.
    pool: ``"mean"`` for the mean over tokens, ``"class"`` for a learned
      token that is put before the patches.

  Raises:
    ValueError: If an attribute is unknown or out of its range.

  References:
    Dosovitskiy et al., `An image is worth 16x16 words
    <https://arxiv.org/abs/2010.11929>`_, 2021

  >>> import jax, jax.numpy as jnp
  >>> model = ViT(patch=4, dim=8, depth=1, heads=2, num_classes=3)
  >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
  >>> variables["params"]["Block_0"]["Attention"]["query"]["kernel"].shape
  (8, 2, 4)
  >>> model.apply(variables, jnp.zeros((5, 8, 8, 3))).shape
  (5, 3)
  """

  patch: int = 4
  dim: int = 192
  depth: int = 12
  heads: int = 3
  mlp_dim: int | None = None
  num_classes: int = 10
  pool: str = "mean"

  def __post_init__(self) -> None:
    """Validates the attributes."""
    sizes = (self.patch, self.dim, self.depth, self.heads, self.num_classes)
    if min(*sizes, self.mlp_dim or 1) < 1:
      raise ValueError(
        "ViT needs patch, dim, depth, heads and num_classes that are positive,"
        f" got {sizes}"
      )
    if self.dim % self.heads:
      raise ValueError(
        f"heads={self.heads} of ViT does not divide dim={self.dim}"
      )
    if self.pool not in POOLS:
      raise ValueError(
        f"unknown pool {self.pool!r} of ViT; choose one of {', '.join(POOLS)}"
      )
    super().__post_init__()

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Computes the logits.

    Args:
      x: Floating-point images, shape ``[b, h, w, c]``.

    Returns:
      The logits, shape ``[b, num_classes]``.
    """
    _norms.check_images("ViT", x)
    if x.shape[1] % self.patch or x.shape[2] % self.patch:
      raise ValueError(
        f"patches of side {self.patch} do not divide images of"
        f" {x.shape[1]} x {x.shape[2]}"
      )
    sides = (self.patch, self.patch)
    x = nn.Conv(
      self.dim,
      sides,
      sides,
      padding="VALID",
      conv_general_dilated=_conv.conv_general_dilated,
      name="Patches",
    )(x)
    x = x.reshape((x.shape[0], -1, self.dim))
    normal = nn.initializers.normal(0.02)
    if self.pool == "class":
      token = self.param("class_token", normal, (1, 1, self.dim))
      tokens = jnp.broadcast_to(token, (x.shape[0], 1, self.dim))
      x = jnp.concatenate([tokens.astype(x.dtype), x], axis=1)
    x = x + self.param("positions", normal, (1, *x.shape[1:]))
    for i in range(self.depth):
      x = _Block(self.heads, self.mlp_dim or 4 * self.dim, name=f"Block_{i}")(x)
    x = nn.LayerNorm(name="Norm_0")(x)
    x = x[:, 0] if self.pool == "class" else x.mean(1)
    return nn.Dense(self.num_classes, name="Dense_0")(x)
