"""Plain convolutional networks."""

from __future__ import annotations

import flax.linen as nn
import jax

from jaxmerge.models import _blocks, _norms

HEADS = ("pool", "flatten")


class CNN(nn.Module):
  """A plain convolutional ReLU network for images ``[b, h, w, c]``.

  Each stage is a 3 x 3 convolution, a normalisation, ReLU, and a 2 x 2
  maximum over positions. Then comes one dense layer, on the mean over the
  positions or on all of them. The layers are named ``Conv_0``, ``Norm_0``,
  ``Conv_1``, ... and ``Dense_0``. A convolution has a bias only where no
  normalisation follows.

  Its convolutions have gradients of their own: forward-mode differentiation
  (``jax.jvp``, ``jax.jacfwd``, ``jax.hessian``) is not available.

  Attributes:
    widths: The channels of the stages.
    num_classes: The number of logits.
    norm: ``"batch"``, ``"group"``, ``"layer"`` (over the channels of each
      position) or ``"none"``.
    head: ``"pool"`` for the mean over positions, ``"flatten"`` for all.
    num_groups: The number of groups of ``norm="group"``.
    axis_name: The mapped axis of the devices that share a batch, such as
      `jaxmerge.training.DEVICE_AXIS`: ``norm="batch"`` then takes the
      statistics of the whole batch.

  Raises:
    ValueError: If an attribute is unknown or out of its range.

  >>> import jax, jax.numpy as jnp
  >>> model = CNN(widths=(4, 8), num_classes=3)
  >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
  >>> sorted(variables["params"])
  ['Conv_0', 'Conv_1', 'Dense_0', 'Norm_0', 'Norm_1']
  >>> model.apply(variables, jnp.zeros((5, 8, 8, 1))).shape
  (5, 3)
  """

  widths: tuple[int, ...] = (32, 64, 128)
  num_classes: int = 10
  norm: str = "batch"
  head: str = "pool"
  num_groups: int = 8
  axis_name: str | None = None

  def __post_init__(self) -> None:
    """Validates the attributes."""
    if not self.widths or min(*self.widths, self.num_classes) < 1:
      raise ValueError(
        "CNN needs widths and num_classes that are positive, got"
        f" {tuple(self.widths)} and {self.num_classes}"
      )
    if self.head not in HEADS:
      raise ValueError(
        f"unknown head {self.head!r} of CNN; choose one of {', '.join(HEADS)}"
      )
    _norms.check_norm("CNN", self.norm, set(self.widths), self.num_groups)
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    train: bool = False,
    mask: jax.Array | None = None,
  ) -> jax.Array:
    """Computes the logits.

    Args:
      x: Floating-point images, shape ``[b, h, w, c]``.
      train: Whether batch normalisation uses the batch's statistics and
        updates the running ones (the collection ``batch_stats``).
      mask: Shape ``[b]``, 0 for examples that these statistics leave out.

    Returns:
      The logits, shape ``[b, num_classes]``.
    """
    _norms.check_images("CNN", x)
    for i, width in enumerate(self.widths):
      x = _blocks.conv_norm_relu(
        x,
        width,
        i,
        self.norm,
        train,
        mask,
        num_groups=self.num_groups,
        axis_name=self.axis_name,
      )
      if min(x.shape[1:3]) > 1:
        x = nn.max_pool(x, (2, 2), (2, 2))
    if self.head == "pool":
      x = x.mean((1, 2))
    x = x.reshape((x.shape[0], -1))
    return nn.Dense(self.num_classes, name="Dense_0")(x)
