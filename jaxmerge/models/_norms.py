"""Normalisation layers of the convolutional networks, by name."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

#: What the attribute `norm` of a network may be.
NORMS = ("batch", "group", "layer", "none")


def check_norm(network: str, norm: str, widths: set[int], groups: int) -> None:
  """Raises unless the norm is known and its groups divide the widths."""
  if norm not in NORMS:
    raise ValueError(
      f"unknown norm {norm!r} of {network}; choose one of {', '.join(NORMS)}"
    )
  for width in sorted(widths):
    if norm == "group" and (groups < 1 or width % groups):
      raise ValueError(
        f"num_groups={groups} of {network} does not divide its {width}"
        " channels; choose a divisor of every width"
      )


def check_images(network: str, x: jax.Array) -> None:
  """Raises unless x is a batch of images."""
  if x.ndim != 4:
    raise ValueError(
      f"{network} takes images of shape [b, height, width, channels]; got"
      f" shape {x.shape}"
    )


def apply_norm(
  kind: str,
  x: jax.Array,
  train: bool,
  mask: jax.Array | None,
  *,
  num_groups: int,
  axis_name: str | None,
  name: str,
) -> jax.Array:
  """Applies the layer of a kind, as a submodule of the calling module."""
  if kind == "batch":
    return BatchNorm(axis_name, name=name)(x, train, mask)
  if kind == "group":
    return jnp.asarray(nn.GroupNorm(num_groups, name=name)(x))
  if kind == "layer":
    return jnp.asarray(nn.LayerNorm(name=name)(x))
  return x


class BatchNorm(nn.Module):
  r"""Batch normalisation that can leave examples out.

  .. math::
    \mu = \frac{\sum_i m_i x_i}{\sum_i m_i}, \quad
    \sigma^2 = \frac{\sum_i m_i x_i^2}{\sum_i m_i} - \mu^2, \quad
    y = \gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

  per channel, over examples and positions. Its variables are those of
  ``flax.linen.BatchNorm``, and so are its results. What is added: with
  ``axis_name`` the sums run over all devices, so that a device whose examples
  are partly or all left out counts for as much as it holds; Flax averages the
  devices' means, whatever their numbers of examples.

  Attributes:
    axis_name: The mapped axis of devices that share a batch, or None.
    momentum: The share of the old running statistics in the new ones.
    epsilon: Added to the variance.

  References:
    Ioffe and Szegedy, `Batch normalization
    <https://arxiv.org/abs/1502.03167>`_, 2015

  >>> import jax, jax.numpy as jnp
  >>> x = jnp.array([[1.0], [3.0], [100.0]])
  >>> layer = BatchNorm()
  >>> variables = layer.init(jax.random.key(0), x)
  >>> mask = jnp.array([1.0, 1.0, 0.0])
  >>> y, _ = layer.apply(
  ...   variables, x, train=True, mask=mask, mutable="batch_stats"
  ... )
  >>> y[:2, 0].round(2).tolist()
  [-1.0, 1.0]
  """

  axis_name: str | None = None
  momentum: float = 0.9
  epsilon: float = 1e-5

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    train: bool = False,
    mask: jax.Array | None = None,
  ) -> jax.Array:
    """Normalises.

    Args:
      x: Floating-point, shape ``[b, ..., channels]``.
      train: Whether to use the batch's own statistics, and to update the
        running ones (collection ``batch_stats``, which must be mutable).
      mask: Shape ``[b]``, 0 or False for examples that the statistics leave
        out; None for none.

    Returns:
      The normalised inputs, in their shape and dtype.
    """
    shape = (x.shape[-1],)
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
    running_var = self.variable("batch_stats", "var", jnp.ones, shape)
    scale = self.param("scale", nn.initializers.ones, shape)
    bias = self.param("bias", nn.initializers.zeros, shape)
    # The statistics of half types are float32, as Flax's are.
    wide = x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
    if not train:
      mean, var = running_mean.value, running_var.value
    else:
      mean, var = self._batch_statistics(wide, mask)
      if not self.is_initializing():
        for old, new in ((running_mean, mean), (running_var, var)):
          old.value = self.momentum * old.value + (1 - self.momentum) * new
    lift = (1,) * (x.ndim - 1)
    factor = scale * jax.lax.rsqrt(var + self.epsilon)
    wide = (wide - mean.reshape(*lift, -1)) * factor.reshape(*lift, -1)
    return (wide + bias.reshape(*lift, -1)).astype(x.dtype)

  def _batch_statistics(
    self, x: jax.Array, mask: jax.Array | None
  ) -> tuple[jax.Array, jax.Array]:
    axes = tuple(range(x.ndim - 1))
    if mask is None:
      moments = jnp.stack([x.mean(axes), jnp.square(x).mean(axes)])
      if self.axis_name is not None and not self.is_initializing():
        moments = jax.lax.pmean(moments, self.axis_name)
    else:
      weights = mask.astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
      sums = jnp.stack([(weights * x).sum(axes), (weights * x * x).sum(axes)])
      count = weights.sum() * (x[0, ..., 0].size)
      if self.axis_name is not None and not self.is_initializing():
        sums, count = jax.lax.psum((sums, count), self.axis_name)
      moments = sums / count
    mean, square = moments
    # Rounding can take the difference below 0.
    return mean, jnp.maximum(square - jnp.square(mean), 0.0)
