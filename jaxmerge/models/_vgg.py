"""Convolutional networks of the VGG kind."""

from __future__ import annotations

import flax.linen as nn
import jax

from jaxmerge.models import _blocks, _norms

#: Pools, where a plan has no number of channels.
POOL = "M"


class VGG(nn.Module):
  """A VGG network: 3 x 3 convolutions and pools by a plan, dense layers.

  Every convolution is followed by a normalisation and ReLU, every hidden
  dense layer by ReLU. The positions that the pools leave are averaged before
  the dense layers. The layers are named ``Conv_0``, ``Norm_0``, ``Conv_1``,
  ... and ``Dense_0``, .... A convolution has a bias only where no
  normalisation follows.

  Its convolutions have gradients of their own: forward-mode differentiation
  (``jax.jvp``, ``jax.jacfwd``, ``jax.hessian``) is not available.

  Attributes:
    plan: Numbers of channels, and ``"M"`` for a 2 x 2 maximum; by default
      that of VGG-11.
    hidden: The widths of the hidden dense layers.
    num_classes: The number of logits.
    norm: As for `CNN`.
    num_groups: As for `CNN`.
    axis_name: As for `CNN`.

  Raises:
    ValueError: If an attribute is unknown or out of its range.

  References:
    Simonyan and Zisserman, `Very deep convolutional networks for large-scale
    image recognition <https://arxiv.org/abs/1409.1556>`_, 2015

  >>> import jax, jax.numpy as jnp
  >>> model = VGG(plan=(4, "M", 8, 8, "M"), hidden=(6,), num_classes=3)
  >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
  >>> model.apply(variables, jnp.zeros((5, 8, 8, 3))).shape
  (5, 3)
  """

  plan: tuple[int | str, ...] = (
    *(64, "M", 128, "M", 256, 256, "M"),
    *(512, 512, "M", 512, 512, "M"),
  )
  hidden: tuple[int, ...] = ()
  num_classes: int = 10
  norm: str = "batch"
  num_groups: int = 8
  axis_name: str | None = None

  def __post_init__(self) -> None:
    """Validates the attributes."""
    widths = {entry for entry in self.plan if isinstance(entry, int)}
    others = set(self.plan) - widths - {POOL}
    if not widths or others or min(widths) < 1:
      raise ValueError(
        f"the plan of VGG holds positive numbers of channels and {POOL!r} for"
        f" a pool, got {tuple(self.plan)}"
      )
    if min(*self.hidden, self.num_classes, 1) < 1:
      raise ValueError(
        "VGG needs hidden widths and num_classes that are positive, got"
        f" {tuple(self.hidden)} and {self.num_classes}"
      )
    _norms.check_norm("VGG", self.norm, widths, self.num_groups)
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
      x: Floating-point images, shape ``[b, h, w, c]``; every pool halves
        height and width, which must allow it.
      train: As for `CNN`.
      mask: As for `CNN`.

    Returns:
      The logits, shape ``[b, num_classes]``.
    """
    _norms.check_images("VGG", x)
    index = 0
    for entry in self.plan:
      if not isinstance(entry, int):
        if min(x.shape[1:3]) < 2:
          raise ValueError(
            f"the plan of VGG pools images of {x.shape[1]} x {x.shape[2]};"
            " take larger images, or a plan with fewer pools"
          )
        x = nn.max_pool(x, (2, 2), (2, 2))
        continue
      x = _blocks.conv_norm_relu(
        x,
        entry,
        index,
        self.norm,
        train,
        mask,
        num_groups=self.num_groups,
        axis_name=self.axis_name,
      )
      index += 1
    x = x.mean((1, 2))
    for i, width in enumerate(self.hidden):
      x = nn.Dense(
        width, kernel_init=nn.initializers.he_normal(), name=f"Dense_{i}"
      )(x)
      x = nn.relu(x)
    return nn.Dense(self.num_classes, name=f"Dense_{len(self.hidden)}")(x)
