"""Fully connected networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

Initializer = Callable[..., jax.Array]

_KERNEL_INITS: dict[str, Initializer] = {
  "he_normal": nn.initializers.he_normal(),
  "lecun_normal": nn.initializers.lecun_normal(),
  # The variance of U(-b, b) is b^2 / 3, so that b = 1 / sqrt(fan_in).
  "torch": nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
}


def _symmetric_uniform(bound: float) -> Initializer:
  def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)

  return init


class MLP(nn.Module):
  r"""A fully connected ReLU network.

  .. math::
    h_0 = \mathrm{flatten}(x), \quad
    h_l = \mathrm{relu}(h_{l-1} W_l + b_l), \quad
    \mathrm{logits} = h_L W_{L+1} + b_{L+1}

  Its layers are named ``Dense_0``, ``Dense_1``, ... from the input on; the last
  one is the output layer.

  Attributes:
    features: The widths of the hidden layers; empty for a linear classifier.
    num_classes: The number of logits.
    use_bias: Whether the layers have biases :math:`b_l`.
    kernel_init: The distribution of the initial weights: ``"lecun_normal"``,
      ``"he_normal"``, or ``"torch"`` for :math:`U(-1/\sqrt n, 1/\sqrt n)` with
      :math:`n` the layer's number of inputs. Biases start at zero, with
      ``"torch"`` they are drawn as the weights are.

  Raises:
    ValueError: If a width or the number of classes is not positive, or if
      ``kernel_init`` is unknown.

  >>> import jax, jax.numpy as jnp
  >>> model = MLP(features=(16, 8), num_classes=3)
  >>> params = model.init(jax.random.key(0), jnp.zeros((1, 4, 4)))["params"]
  >>> jax.tree.map(jnp.shape, params)["Dense_2"]
  {'kernel': (8, 3)}
  >>> model.apply({"params": params}, jnp.zeros((5, 4, 4))).shape
  (5, 3)
  """

  features: tuple[int, ...]
  num_classes: int = 10
  use_bias: bool = False
  kernel_init: str = "lecun_normal"

  def __post_init__(self) -> None:
    """Validates the attributes."""
    if any(width < 1 for width in self.features):
      raise ValueError(
        f"MLP features must be positive widths, got {tuple(self.features)}"
      )
    if self.num_classes < 1:
      raise ValueError(
        f"MLP num_classes must be positive, got {self.num_classes}"
      )
    if self.kernel_init not in _KERNEL_INITS:
      raise ValueError(
        f"unknown kernel_init {self.kernel_init!r}; choose one of "
        + ", ".join(sorted(_KERNEL_INITS))
      )
    super().__post_init__()

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Computes the logits.

    Args:
      x: Floating-point inputs, shape ``[b, ...]``, flattened to ``[b, d]``.

    Returns:
      The logits, shape ``[b, num_classes]``.
    """
    x = x.reshape((x.shape[0], -1))
    widths = (*self.features, self.num_classes)
    for i, width in enumerate(widths):
      bias_init = nn.initializers.zeros
      if self.kernel_init == "torch":
        bias_init = _symmetric_uniform(1 / math.sqrt(x.shape[-1]))
      x = nn.Dense(
        width,
        use_bias=self.use_bias,
        kernel_init=_KERNEL_INITS[self.kernel_init],
        bias_init=bias_init,
        name=f"Dense_{i}",
      )(x)
      if i < len(self.features):
        x = nn.relu(x)
    return x
