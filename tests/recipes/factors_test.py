"""Tests of the nearest product of two factors."""

from __future__ import annotations

from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge.recipes import _factors


class FactorsTest(parameterized.TestCase):
  @parameterized.product(
    shape=((90, 60), (60, 90)), own=(60, 3), dtype=(np.float32, np.float64)
  )
  def test_large_matrices_are_decomposed_in_part(self, shape, own, dtype):
    draws = np.random.default_rng(0)
    left, right = (
      draws.normal(size=(shape[0], own)),
      draws.normal(size=(own, shape[1])),
    )
    matrix = (left * 0.7 ** np.arange(own) @ right).astype(dtype)
    wanted = _factors.factors(matrix, 5)
    with mock.patch.object(_factors, "_MOST_WHOLE", 30):
      found = _factors.factors(matrix, 5)
      again = _factors.factors(matrix, 5)
      whole = _factors.factors(matrix, 20)
    np.testing.assert_allclose(
      found[0] @ found[1],
      wanted[0] @ wanted[1],
      rtol=0,
      atol=1e-4 if dtype == np.float32 else 1e-10,
    )
    self.assertEqual(found[0].dtype, dtype)
    np.testing.assert_array_equal(found[0], again[0])
    np.testing.assert_array_equal(whole[0], _factors.factors(matrix, 20)[0])

  def test_where_the_decomposition_in_part_fails(self):
    from scipy.sparse import linalg

    matrix = np.diag(np.arange(1.0, 61.0))
    wanted = _factors.factors(matrix, 2)
    failure = linalg.ArpackError(-9999)
    with (
      mock.patch.object(_factors, "_MOST_WHOLE", 30),
      mock.patch.object(linalg, "svds", side_effect=failure),
    ):
      found = _factors.factors(matrix, 2)
    np.testing.assert_array_equal(found[0], wanted[0])


if __name__ == "__main__":
  absltest.main()
