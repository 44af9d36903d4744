"""Parameters none of which is at its simple initial value."""

from __future__ import annotations

import jax


def noisy(params, size=0.2):
  """Adds noise, so that a leaf in a wrong place cannot be overlooked."""
  leaves, structure = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  return jax.tree.unflatten(
    structure,
    [
      leaf + size * jax.random.normal(key, leaf.shape)
      for key, leaf in zip(keys, leaves, strict=True)
    ],
  )
