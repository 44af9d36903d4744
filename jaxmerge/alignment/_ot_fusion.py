"""Fusion of two networks by optimal transport."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxmerge import tree
from jaxmerge.alignment import _ot_align, _spec

PyTree = Any


def ot_fusion(
  reference: PyTree,
  model: PyTree,
  spec: _spec.PermutationSpec | None = None,
  *,
  weight: jax.typing.ArrayLike = 0.5,
  **options: Any,
) -> tuple[PyTree, _ot_align.TransportInfo]:
  r"""Aligns a network to a reference, then averages: OT fusion.

  .. math::
    \theta = (1 - w)\,\theta^{\mathrm{ref}} + w\,\tilde\theta

  with :math:`\tilde\theta` the model aligned by `ot_align`. The result is in
  the order and of the widths of the reference.

  Args:
    reference: Parameters that give the order and the widths.
    model: Parameters of the same structure and dtypes.
    spec: The specification of both; by default `derive_spec` of the reference.
    weight: The weight :math:`w` of the model, a scalar, traced or not; the
      reference has the rest. 1/t for the t-th model of a running average.
    **options: Options of `ot_align`: ``by``, ``solver``, ``activations``,
      ``importance``, ``outgoing``, and those of Sinkhorn.

  Returns:
    The fused parameters, and the plans with their diagnostics.

  Raises:
    ValueError: If the weight is not a scalar, and as `ot_align` does.

  References:
    Singh and Jaggi, `Model fusion via optimal transport
    <https://arxiv.org/abs/1910.05653>`_, 2020

  >>> reference = {
  ...   "Dense_0": {"kernel": jnp.array([[1.0, 2.0]])},
  ...   "Dense_1": {"kernel": jnp.array([[3.0], [4.0]])},
  ... }
  >>> narrow = {
  ...   "Dense_0": {"kernel": jnp.array([[1.0]])},
  ...   "Dense_1": {"kernel": jnp.array([[3.0]])},
  ... }
  >>> params, _ = ot_fusion(reference, narrow)
  >>> print(params["Dense_0"]["kernel"])
  [[1.  1.5]]
  """
  if jnp.ndim(weight):
    raise ValueError(f"weight must be a scalar; got shape {jnp.shape(weight)}")
  aligned, info = _ot_align.ot_align(reference, model, spec, **options)
  return tree.lerp(reference, aligned, weight), info
