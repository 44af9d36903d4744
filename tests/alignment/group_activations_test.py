"""Tests of the activations of groups."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from jaxmerge import alignment
from jaxmerge.alignment import Axis

PARAMS = {
  "a": {"kernel": jnp.ones((2, 3))},
  "b": {"kernel": jnp.ones((3, 3, 2, 3))},
  "heads": {"kernel": jnp.ones((3, 4, 5))},
  "flat": {"kernel": jnp.ones((3, 6))},
}
SPEC = {
  "stream": (Axis("a/kernel", 1), Axis("b/kernel", 3)),
  "heads": (Axis("heads/kernel", 1),),
  "flat": (Axis("flat/kernel", 1, inner=3),),
}


def _draw(*shape):
  rng = np.random.default_rng(sum(shape))
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


class GroupActivationsTest(absltest.TestCase):
  def test_of_several_layers_and_of_blocks(self):
    activations = {
      "a": _draw(7, 3),
      "b": _draw(7, 2, 2, 3),
      "heads": _draw(7, 4, 5),
      "flat": _draw(7, 6),
    }
    got = alignment.group_activations(SPEC, PARAMS, activations)
    np.testing.assert_array_equal(
      got["stream"],
      np.concatenate([activations["a"], np.reshape(activations["b"], (-1, 3))]),
    )
    np.testing.assert_array_equal(
      got["heads"],
      np.moveaxis(np.asarray(activations["heads"]), 1, -1).reshape(-1, 4),
    )
    np.testing.assert_array_equal(
      got["flat"],
      np.asarray(activations["flat"])
      .reshape(7, 2, 3)
      .swapaxes(1, 2)
      .reshape(-1, 2),
    )

  def test_errors(self):
    activations = {"a": _draw(7, 3), "heads": _draw(7, 4, 5)}
    with self.assertRaisesRegex(ValueError, "'flat' has no layer with"):
      alignment.group_activations(SPEC, PARAMS, activations)
    activations["a"] = _draw(7, 4)
    with self.assertRaisesRegex(
      ValueError, r"'a' have shape \(7, 4\), but its kernel 'a/kernel' has"
    ):
      alignment.group_activations(SPEC, PARAMS, activations)


if __name__ == "__main__":
  absltest.main()
