"""Tests of the convolution with gradients of its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax import lax

from jaxmerge.models import _conv


def _draw(shape, seed):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _plain(x, kernel, strides, padding):
  return lax.conv_general_dilated(
    x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


class ConvTest(parameterized.TestCase):
  @parameterized.parameters(
    ((6, 5), (3, 3), (1, 1), "SAME"),
    ((6, 6), (3, 3), (2, 2), "SAME"),
    ((7, 6), (3, 3), (2, 2), "SAME"),
    ((6, 7), (1, 1), (2, 2), "SAME"),  # Rows that no window reaches.
    ((8, 6), (4, 2), (4, 2), "VALID"),  # Patches.
    ((9, 7), (4, 3), (4, 3), "VALID"),
    ((6, 5), (3, 2), (1, 2), ((2, 0), (0, 3))),
  )
  def test_equals_xla(self, image, window, strides, padding):
    x, kernel = _draw((2, *image, 3), 0), _draw((*window, 3, 4), 1)
    want, pull = jax.vjp(
      lambda *args: _plain(*args, strides, padding), x, kernel
    )
    found, own_pull = jax.vjp(
      lambda *args: _conv.conv_general_dilated(*args, strides, padding),
      x,
      kernel,
    )
    np.testing.assert_array_equal(found, want)
    gradient = _draw(want.shape, 2)
    for one, other in zip(own_pull(gradient), pull(gradient), strict=True):
      np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)

  def test_gradients_keep_the_fast_layout(self):
    """Within a loop, XLA leaves the layout of a convolution as it is."""

    def step(kernel, x):
      loss = lambda k: (  # noqa: E731
        _conv.conv_general_dilated(x, k, (2, 2), "SAME") ** 2
      ).sum()
      return kernel - jax.grad(loss)(kernel), None

    text = (
      jax.jit(lambda k, xs: lax.scan(step, k, xs)[0])
      .lower(jnp.ones((3, 3, 3, 4)), jnp.ones((5, 2, 8, 8, 3)))
      .compile()
      .as_text()
    )
    labels = [
      line.split("dim_labels=")[1].split(",")[0]
      for line in text.splitlines()
      if " convolution(" in line
    ]
    self.assertNotEmpty(labels)
    self.assertEqual(set(labels), {"b01f_01io->b01f"})


if __name__ == "__main__":
  absltest.main()
