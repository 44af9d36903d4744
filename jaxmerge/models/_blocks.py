"""What the convolutional networks are made of."""

from __future__ import annotations

import flax.linen as nn
import jax

from jaxmerge.models import _conv, _norms


def conv_norm_relu(
  x: jax.Array,
  width: int,
  index: int,
  norm: str,
  train: bool,
  mask: jax.Array | None,
  *,
  num_groups: int,
  axis_name: str | None,
) -> jax.Array:
  """A 3 x 3 convolution, its normalisation, and ReLU.

  The layers become submodules ``Conv_<index>`` and ``Norm_<index>`` of the
  calling module. The convolution has a bias only without normalisation.
  """
  x = nn.Conv(
    width,
    (3, 3),
    use_bias=norm == "none",
    kernel_init=nn.initializers.he_normal(),
    conv_general_dilated=_conv.conv_general_dilated,
    name=f"Conv_{index}",
  )(x)
  x = _norms.apply_norm(
    norm,
    x,
    train,
    mask,
    num_groups=num_groups,
    axis_name=axis_name,
    name=f"Norm_{index}",
  )
  return nn.relu(x)
