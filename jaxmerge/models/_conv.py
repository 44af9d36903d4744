"""Convolutions whose gradients are fast within loops on a CPU."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Pads = tuple[tuple[int, int], ...]

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv_general_dilated(
  lhs: jax.Array,
  rhs: jax.Array,
  window_strides: tuple[int, ...],
  padding: Any,
  *,
  precision: Any = None,
  **_: Any,
) -> jax.Array:
  """``lax.conv_general_dilated`` of images, for ``nn.Conv``.

  The result and its gradients are the same. On a CPU, XLA brings convolutions
  into the one layout that its fast kernels know, but only outside of loops;
  within the scan over an epoch's batches, the layouts that differentiation
  makes take some fifty times as long. Here the gradients are written in that
  layout from the start. As they are given as a rule for reverse mode,
  forward-mode differentiation (``jax.jvp``, ``jax.jacfwd``, ``jax.hessian``) is
  not available.

  Args:
    lhs: Images ``[b, h, w, c]``.
    rhs: The kernel ``[height, width, c, outputs]``.
    window_strides: Two strides.
    padding: ``"SAME"``, ``"VALID"`` or two pairs.
    precision: As for ``lax.conv_general_dilated``.
    **_: What else ``nn.Conv`` passes, always its default in this package.

  Returns:
    Images ``[b, h, w, outputs]``.

  >>> x, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5))
  >>> conv_general_dilated(x, kernel, (2, 2), "SAME").shape
  (1, 2, 2, 5)
  """
  strides = tuple(window_strides)
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(
      lhs.shape[1:3], rhs.shape[:2], strides, padding
    )
  pads = tuple((int(low), int(high)) for low, high in padding)
  return _conv(lhs, rhs, strides, pads, precision)


def _plain(
  x: jax.Array,
  kernel: jax.Array,
  strides: tuple[int, ...],
  pads: Pads,
  precision: Any,
) -> jax.Array:
  return lax.conv_general_dilated(
    x, kernel, strides, pads, dimension_numbers=_LAYOUT, precision=precision
  )


_conv = jax.custom_vjp(_plain, nondiff_argnums=(2, 3, 4))


def _forward(
  x: jax.Array,
  kernel: jax.Array,
  strides: tuple[int, ...],
  pads: Pads,
  precision: Any,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return _plain(x, kernel, strides, pads, precision), (x, kernel)


def _backward(
  strides: tuple[int, ...],
  pads: Pads,
  precision: Any,
  saved: tuple[jax.Array, jax.Array],
  gradient: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  def default(
    x: jax.Array, kernel: jax.Array, gradient: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    plain = functools.partial(
      _plain, strides=strides, pads=pads, precision=precision
    )
    return jax.vjp(plain, x, kernel)[1](gradient)

  def canonical(
    x: jax.Array, kernel: jax.Array, gradient: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    return (
      _input_gradient(x, kernel, gradient, strides, pads, precision),
      _kernel_gradient(x, kernel, gradient, strides, pads, precision),
    )

  return lax.platform_dependent(
    *saved, gradient, cpu=canonical, default=default
  )


_conv.defvjp(_forward, _backward)


def _input_gradient(
  x: jax.Array,
  kernel: jax.Array,
  gradient: jax.Array,
  strides: tuple[int, ...],
  pads: Pads,
  precision: Any,
) -> jax.Array:
  """The gradient, spread by the strides, against the kernel turned around."""
  padding = []
  for i, (stride, (low, _)) in enumerate(zip(strides, pads, strict=True)):
    spread = (gradient.shape[1 + i] - 1) * stride + 1
    before = kernel.shape[i] - 1 - low
    after = x.shape[1 + i] - spread - before + kernel.shape[i] - 1
    padding.append((before, after))
  return lax.conv_general_dilated(
    gradient,
    lax.rev(kernel, (0, 1)).transpose(0, 1, 3, 2),
    (1, 1),
    padding,
    lhs_dilation=strides,
    dimension_numbers=_LAYOUT,
    precision=precision,
  )


def _kernel_gradient(
  x: jax.Array,
  kernel: jax.Array,
  gradient: jax.Array,
  strides: tuple[int, ...],
  pads: Pads,
  precision: Any,
) -> jax.Array:
  """Input channels as images, examples as their channels."""
  padding = []
  for i, (stride, (low, _)) in enumerate(zip(strides, pads, strict=True)):
    spread = (gradient.shape[1 + i] - 1) * stride + 1
    after = kernel.shape[i] - 1 + spread - x.shape[1 + i] - low
    if after < 0:
      # Rows that no window reaches; the fast kernels know no negative padding.
      x = lax.slice_in_dim(x, 0, x.shape[1 + i] + after, axis=1 + i)
    padding.append((low, max(after, 0)))
  found = lax.conv_general_dilated(
    x.transpose(3, 1, 2, 0),
    gradient.transpose(1, 2, 0, 3),
    (1, 1),
    padding,
    rhs_dilation=strides,
    dimension_numbers=_LAYOUT,
    precision=precision,
  )
  return jnp.asarray(found.transpose(1, 2, 0, 3))
