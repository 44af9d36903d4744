"""The benchmark of transport runs and measures the same problem twice."""

from __future__ import annotations

import numpy as np
from absl.testing import absltest
from scipy.spatial import distance

from benchmarks import alignment_transport


class TransportBenchmarkTest(absltest.TestCase):
  def test_cost(self):
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(k, 9)) / 3 for k in (4, 5))
    np.testing.assert_allclose(
      alignment_transport.make_cost(4, 5, 9),
      distance.cdist(x, y, "sqeuclidean"),
      rtol=1e-4,
    )

  def test_run(self):
    results = alignment_transport.run(((9, 9), (9, 6)), (9,), 1, 1.0)
    square, other = results["exact"]
    self.assertEqual(set(square["ratios"]), {"pot", "scipy"})
    self.assertEqual(set(other["ratios"]), {"pot"})
    for found in results["exact"]:
      cost = found["cost"]
      np.testing.assert_allclose(cost["jaxmerge"], cost["pot"], rtol=1e-5)
    (found,) = results["sinkhorn"]
    self.assertGreater(found["ratio"], 0)


if __name__ == "__main__":
  absltest.main()
