"""Selection by magnitude equals sorting."""

from __future__ import annotations

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxmerge.merging import _reductions, _threshold

SETTINGS = hypothesis.settings(max_examples=60, deadline=None)
# One shape, so that selection is compiled once for each dtype.
SHAPE = (3, 4)
_select = jax.jit(_threshold.kth_largest_bits)


def _kth(arrays, k):
  """The k-th largest magnitude by sorting, as bits of the widest dtype."""
  widest = np.result_type(np.float32, *(np.abs(one).dtype for one in arrays))
  values = np.concatenate(
    [np.abs(np.asarray(one)).astype(widest).ravel() for one in arrays]
  )
  return np.sort(values)[-k].view(f"uint{8 * widest.itemsize}")


def _floats(width):
  """Ties, zeros of both signs, denormals, infinity, and anything else."""
  kind = np.dtype(f"float{width}")
  info = np.finfo(kind)
  special = [0.0, -0.0, 1.0, -1.0, float(info.smallest_subnormal)]
  special += [-float(info.tiny), float(info.max), float("inf")]
  return hnp.arrays(
    kind,
    SHAPE,
    elements=st.one_of(
      st.sampled_from(special), st.floats(allow_nan=False, width=width)
    ),
  )


class ThresholdTest(parameterized.TestCase):
  @parameterized.parameters(16, 32)
  def test_every_rank_is_that_of_sorting(self, width):
    @SETTINGS
    @hypothesis.given(x=_floats(width), k=st.integers(1, 12))
    def check(x, k):
      got = _select([jnp.asarray(x)], np.uint32(k))
      self.assertEqual(got.dtype, jnp.uint32)
      self.assertEqual(int(got), int(_kth([x], k)))

    check()

  @SETTINGS
  @hypothesis.given(
    half=_floats(16), single=_floats(32), k=st.sampled_from([1, 7, 12, 24])
  )
  def test_arrays_of_several_dtypes(self, half, single, k):
    got = _select([jnp.asarray(half), jnp.asarray(single)], np.uint32(k))
    self.assertEqual(int(got), int(_kth([half, single], k)))

  def test_bfloat16_and_complex_numbers(self):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=50), jnp.bfloat16)
    z = jnp.asarray([3 + 4j, 0, -1j, 6], jnp.complex64)
    wide = np.asarray(x).astype(np.float32)
    for k in (1, 20, 50):
      self.assertEqual(int(_select([x], np.uint32(k))), int(_kth([wide], k)))
    self.assertEqual(
      [int(_select([z], np.uint32(k))) for k in (1, 2, 3, 4)],
      np.array([6, 5, 1, 0], np.float32).view(np.uint32).tolist(),
    )

  def test_64_bits(self):
    with jax.enable_x64(True):
      x = np.random.default_rng(0).normal(size=200)
      x[:5] = [0.0, -0.0, 5e-324, np.inf, 1 + 2**-52]
      for k in (1, 2, 77, 199, 200):
        got = _threshold.kth_largest_bits([jnp.asarray(x)], np.uint32(k))
        self.assertEqual(got.dtype, jnp.uint64)
        self.assertEqual(int(got), int(_kth([x], k)))

  def test_scalars_empty_arrays_and_one_entry(self):
    arrays = [jnp.asarray(-2.0), jnp.zeros((0, 3)), jnp.asarray([3.0])]
    got = [int(_select(arrays, np.uint32(k))) for k in (1, 2)]
    want = np.array([3, 2], np.float32).view(np.uint32).tolist()
    self.assertEqual(got, want)

  def test_maps_over_ranks_and_arrays(self):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6)), jnp.float32)
    ranks = jnp.arange(1, 7, dtype=jnp.uint32)
    one = lambda row, k: _threshold.kth_largest_bits([row], k)  # noqa: E731
    got = jax.vmap(jax.vmap(one, (None, 0)), (0, None))(x, ranks)
    want = -np.sort(-np.abs(np.asarray(x)), axis=1)
    np.testing.assert_array_equal(got, want.view(np.uint32))

  def test_sharded(self):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    x = np.random.default_rng(2).normal(size=(8, 5)).astype(np.float32)
    sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.P("x")))
    self.assertEqual(int(_select([sharded], np.uint32(9))), int(_kth([x], 9)))

  def test_counts(self):
    marks = [np.array([True, False, True]), np.zeros(3, bool)]
    got = _reductions.counts([jnp.asarray(mark) for mark in marks])
    self.assertEqual([int(one) for one in got], [2, 0])


if __name__ == "__main__":
  absltest.main()
