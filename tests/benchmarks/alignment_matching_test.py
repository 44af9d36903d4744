"""Tests of the benchmark of weight matching."""

from __future__ import annotations

import jax
import numpy as np
from absl.testing import absltest, parameterized

from benchmarks import alignment_matching
from jaxmerge import alignment, tree


class AlignmentMatchingTest(parameterized.TestCase):
  @parameterized.parameters("mlphuge", "vit")
  def test_both_sides_agree(self, name):
    shapes, spec = alignment_matching.networks(smoke=True)[name]
    cell = alignment_matching.measure(shapes, spec, repeats=1, max_sweeps=50)
    same = cell["same_permutations"]
    self.assertEqual(same["equal"], same["of"])
    self.assertEqual(cell["sweeps"]["plain"], cell["sweeps"]["jaxmerge"])
    self.assertGreater(cell["objectives"][-1], cell["objectives"][0])
    self.assertLen(
      alignment_matching.report(name, cell), len(alignment_matching.HEADER)
    )

  def test_shapes_and_specification_of_vit(self):
    shapes, spec = alignment_matching.networks(smoke=False)["vit"]
    params = jax.tree.map(
      lambda shape: jax.ShapeDtypeStruct(shape, np.float32),
      shapes,
      is_leaf=lambda x: isinstance(x, tuple),
    )
    # ViT-B/16 with its head on ImageNet.
    size = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
    self.assertEqual(size, 86_567_656)
    sizes = alignment.group_sizes(spec, params)
    self.assertLen(sizes, 25)
    self.assertEqual(
      (sizes["stream"], sizes["heads_3"], sizes["mlp_3"]), (768, 12, 3072)
    )
    # All but the last bias have neurons of the stream, a head or an MLP.
    named = {axis.leaf for axes in spec.values() for axis in axes}
    self.assertEqual(set(tree.leaf_names(params)) - named, {"head/bias"})


if __name__ == "__main__":
  absltest.main()
