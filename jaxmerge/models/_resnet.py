"""Residual networks for small images."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax

from jaxmerge.models import _blocks, _conv, _norms

#: Stages of a network; each but the first halves the image.
_STAGES = 3


class _Block(nn.Module):
  """Two 3 x 3 convolutions beside a shortcut.

  Where the number of channels or the resolution changes, the shortcut is a
  1 x 1 convolution with a normalisation: a padded shortcut would tie the
  channels of one stage to those of the next.
  """

  width: int
  stride: int
  norm: str
  num_groups: int
  axis_name: str | None
  # Of the variance of the branch's last convolution, without normalisation.
  gain: float

  @nn.compact
  def __call__(
    self, x: jax.Array, train: bool, mask: jax.Array | None
  ) -> jax.Array:
    normalize = functools.partial(
      _norms.apply_norm,
      self.norm,
      train=train,
      mask=mask,
      num_groups=self.num_groups,
      axis_name=self.axis_name,
    )
    conv = functools.partial(
      nn.Conv,
      use_bias=self.norm == "none",
      conv_general_dilated=_conv.conv_general_dilated,
    )
    he_normal = nn.initializers.he_normal()
    strides = (self.stride, self.stride)
    y = conv(self.width, (3, 3), strides, kernel_init=he_normal, name="Conv_0")(
      x
    )
    y = nn.relu(normalize(x=y, name="Norm_0"))
    last_init = nn.initializers.variance_scaling(
      self.gain, "fan_in", "truncated_normal"
    )
    y = conv(self.width, (3, 3), kernel_init=last_init, name="Conv_1")(y)
    y = normalize(x=y, name="Norm_1")
    if self.stride > 1 or x.shape[-1] != self.width:
      x = conv(self.width, (1, 1), strides, name="Shortcut")(x)
      x = normalize(x=x, name="Norm_2")
    return nn.relu(x + y)


class ResNet(nn.Module):
  """A residual network in the shape for CIFAR, images ``[b, h, w, c]``.

  A 3 x 3 convolution, three stages of :math:`n` blocks with ``width``,
  ``2 width`` and ``4 width`` channels, the mean over positions, and a dense
  layer: ``depth`` = 6n + 2 layers. The first block of the second and of the
  third stage halves the image, and its shortcut is a 1 x 1 convolution with a
  normalisation (option B), so that each stage's residual stream may be
  permuted by itself. The stem is ``Conv_0`` and ``Norm_0``; ``Block_i`` holds
  ``Conv_0``, ``Norm_0``, ``Conv_1``, ``Norm_1`` and, with a convolution in
  the shortcut, ``Shortcut`` and ``Norm_2``; the last layer is ``Dense_0``.

  Its convolutions have gradients of their own: forward-mode differentiation
  (``jax.jvp``, ``jax.jacfwd``, ``jax.hessian``) is not available.

  Attributes:
    depth: The number of layers, 6n + 2: 8, 14, 20, 32, 44, 56, ....
    width: The channels of the first stage; 16 is the published network.
    num_classes: The number of logits.
    norm: As for `CNN`. Without normalisation the convolutions have biases,
      and the branches start smaller, so that the sum over blocks does not
      grow with the depth.
    num_groups: As for `CNN`.
    axis_name: As for `CNN`.

  Raises:
    ValueError: If an attribute is unknown or out of its range.

  References:
    He et al., `Deep residual learning for image recognition
    <https://arxiv.org/abs/1512.03385>`_, 2016

  >>> import jax, jax.numpy as jnp
  >>> model = ResNet(depth=8, width=4, num_classes=3)
  >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
  >>> sorted(variables["params"])
  ['Block_0', 'Block_1', 'Block_2', 'Conv_0', 'Dense_0', 'Norm_0']
  >>> model.apply(variables, jnp.zeros((5, 8, 8, 3))).shape
  (5, 3)
  """

  depth: int = 20
  width: int = 16
  num_classes: int = 10
  norm: str = "batch"
  num_groups: int = 8
  axis_name: str | None = None

  def __post_init__(self) -> None:
    """Validates the attributes."""
    if self.depth < 8 or (self.depth - 2) % (2 * _STAGES):
      raise ValueError(
        f"ResNet depth must be 6n + 2 (8, 14, 20, ...), got {self.depth}"
      )
    if min(self.width, self.num_classes) < 1:
      raise ValueError(
        "ResNet needs a width and num_classes that are positive, got"
        f" {self.width} and {self.num_classes}"
      )
    # The other widths are multiples of it.
    _norms.check_norm("ResNet", self.norm, {self.width}, self.num_groups)
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    train: bool = False,
    mask: jax.Array | None = None,
  ) -> jax.Array:
    """Computes the logits; the arguments are those of `CNN`.

    Args:
      x: Floating-point images, shape ``[b, h, w, c]``.
      train: As for `CNN`.
      mask: As for `CNN`.

    Returns:
      The logits, shape ``[b, num_classes]``.
    """
    _norms.check_images("ResNet", x)
    x = _blocks.conv_norm_relu(
      x,
      self.width,
      0,
      self.norm,
      train,
      mask,
      num_groups=self.num_groups,
      axis_name=self.axis_name,
    )
    blocks = (self.depth - 2) // (2 * _STAGES)
    for i in range(_STAGES * blocks):
      stage, position = divmod(i, blocks)
      x = _Block(
        width=self.width * 2**stage,
        stride=2 if stage and not position else 1,
        norm=self.norm,
        num_groups=self.num_groups,
        axis_name=self.axis_name,
        gain=2 / (_STAGES * blocks if self.norm == "none" else 1),
        name=f"Block_{i}",
      )(x, train, mask)
    return nn.Dense(self.num_classes, name="Dense_0")(x.mean((1, 2)))
