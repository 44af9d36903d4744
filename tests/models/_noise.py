"""Parameters none of which is at its simple initial value."""

from __future__ import annotations

import jax
import numpy as np


def params(model, *inputs, size=0.3):
  """Random parameters of a Flax module, without compiling its `init`.

  So no leaf in a wrong place can be overlooked.
  """
  shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
  draws = np.random.default_rng(1)

  def leaf(path, shape):
    noise = size * draws.standard_normal(shape.shape)
    centre = 1.0 if "scale" in path[-1].key else 0.0
    return (centre + noise).astype(np.float32)

  return jax.tree_util.tree_map_with_path(leaf, shapes)
