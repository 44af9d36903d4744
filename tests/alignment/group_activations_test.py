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
    parts = [
      np.asarray(activations[name]).astype(np.float64).reshape(-1, 3)
      for name in ("a", "b")
    ]
    parts = [part - part.mean(axis=0) for part in parts]
    np.testing.assert_allclose(
      got["stream"],
      np.concatenate([part / part.std() for part in parts]),
      rtol=1e-4,
      atol=1e-6,
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

  def test_offsets_of_layers_do_not_hide_the_neurons(self):
    # The same signals in both layers, shuffled; one layer is shifted.
    n, order = 16, np.random.default_rng(1).permutation(16)
    params = {name: {"kernel": jnp.ones((2, n))} for name in ("a", "b")}
    spec = {"stream": (Axis("a/kernel", 1), Axis("b/kernel", 1))}
    signals = {"a": np.asarray(_draw(50, n)), "b": np.asarray(_draw(51, n))}
    # A channel's shift is not that of the channel that it is matched to.
    shifts = {"a": np.zeros(n), "b": 5 * np.asarray(_draw(n))}
    first, second = (
      {
        name: jnp.asarray(values[:, places] + shifts[name], jnp.float32)
        for name, values in signals.items()
      }
      for places in (np.arange(n), order)
    )
    got = [
      alignment.group_activations(spec, params, one) for one in (first, second)
    ]
    _, info = alignment.activation_matching(*got, params, spec)
    np.testing.assert_array_equal(
      info.permutations["stream"], np.argsort(order)
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
