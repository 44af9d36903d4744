"""Tests of the measurements on the networks of MagMax's study."""

from __future__ import annotations

from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized

from experiments import _magmax_study, magmax_analysis
from experiments.configs import magmax_analysis as analysis_configs
from jaxmerge import tree
from tests.experiments import _magmax


class AnalysisTest(_magmax.Folders):
  def test_measurements(self):
    config = analysis_configs.get_config("clinc150-2-smoke")
    brief = _magmax.config(self.model)
    with config.unlocked():
      for name in ("model", "length", "buckets", "recipes", "rows", "learners"):
        config[name] = brief[name]
    config.curves, config.recipe = ("magmax",), "fast"
    config.devices = 1
    config.densities = (0.1, 0.5)
    folder = self.empty / "run"
    with mock.patch.object(
      magmax_analysis.shutil, "rmtree"
    ):  # Keeps the networks, for the oracle.
      found = magmax_analysis.run(config, str(folder), str(self.root))
    study = _magmax_study.build(config, str(self.root))
    base = study.backbone.params
    networks = {
      name: [
        study.backbone.load(
          _magmax_study.expert(folder / "networks" / name, task)
        )
        for task in range(2)
      ]
      for name in ("independent", "sequential")
    }
    flat = {
      name: [
        np.concatenate(
          [
            (np.asarray(a, np.float64) - np.asarray(b, np.float64)).ravel()
            for a, b in zip(
              jax.tree.leaves(one), jax.tree.leaves(base), strict=True
            )
          ]
        )
        for one in given
      ]
      for name, given in networks.items()
    }
    for name, (a, b) in flat.items():
      cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
      np.testing.assert_allclose(
        found["cosines"][name][0][1], cosine, rtol=1e-3, atol=1e-4
      )
      kept = []
      for vector in (a, b):
        least = np.sort(np.abs(vector))[-int(0.2 * len(vector))]
        kept.append(np.sign(vector) * (np.abs(vector) >= least))
      rate = (kept[0] * kept[1] < 0).sum() / (np.abs(kept).sum(0) > 0).sum()
      np.testing.assert_allclose(found["conflicts"][name], [rate], atol=2e-3)
      np.testing.assert_allclose(
        found["shares"][name],
        [(np.abs(a) > np.abs(b)).mean(), (np.abs(b) >= np.abs(a)).mean()],
        atol=0.05,
      )
    first, last = flat["sequential"]
    signs = np.sign(first), np.sign(last - first)
    both = (signs[0] == signs[1]) & (signs[0] != 0)
    inside = np.concatenate(
      [
        np.full(leaf.size, "_embeddings" not in name)
        for name, leaf in zip(
          tree.leaf_names(base), jax.tree.leaves(base), strict=True
        )
      ]
    )
    self.assertFalse(inside.all())
    for which, there in (("all", both), ("without", both & inside)):
      one = found["consistency"][which]
      np.testing.assert_allclose(one["numbers"][2], there.sum(), rtol=2e-2)
      np.testing.assert_allclose(
        one["magnitudes"][2], np.abs(last[there]).mean(), rtol=2e-2
      )
    self.assertBetween(found["kept"]["whole"], 0, 1)
    for name in ("kept", "conflicts", "consistency", "cosines"):
      for ending in ("png", "svg"):
        self.assertGreater(
          (folder / f"{name}.{ending}").stat().st_size, 1000, name
        )
    magmax_analysis.publish(found, folder, self.empty)
    page = (self.empty / "docs/results/magmax_analysis.md").read_text()
    self.assertIn("Figure 2, sign conflicts", page)

  def test_hypotheses(self):
    def judge(top, random, bottom, apart, after, sizes, numbers=(0, 1, 1)):
      return magmax_analysis.hypotheses(
        {
          "kept": {
            "accuracy": {"top": top, "random": random, "bottom": bottom}
          },
          "conflicts": {"independent": apart, "sequential": after},
          "consistency": {
            which: {"magnitudes": sizes, "numbers": numbers}
            for which in ("all", "without")
          },
        }
      )

    yes = judge([3, 3], [2, 2], [1, 1], [0.5], [0.4], [9, 1, 2])
    self.assertEqual(set(yes.values()), {True})
    no = judge([3, 2], [2, 2], [1, 1], [0.5], [0.5], [9, 2, 2])
    self.assertEqual(set(no.values()), {False})

  @parameterized.parameters(
    ("generated-1", {}, "2 or more"),
    ("generated-2", {"recipe": "lr-1"}, "Unknown recipe 'lr-1'"),
    ("generated-2", {"top": 2.0}, r"must lie in \(0, 1\]"),
    ("generated-2", {"densities": (0.0,)}, r"must lie in \(0, 1\]"),
  )
  def test_bad_configurations(self, variant, fields, message):
    config = analysis_configs.get_config(variant)
    for name, value in fields.items():
      config[name] = value
    with self.assertRaisesRegex(ValueError, message):
      magmax_analysis.run(config, str(self.empty / "run"))
    self.assertFalse((self.empty / "run").exists())


if __name__ == "__main__":
  absltest.main()
