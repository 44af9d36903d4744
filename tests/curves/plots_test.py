"""Tests of the pictures of planes."""

from __future__ import annotations

import pathlib
import sys
import tempfile
from unittest import mock

import numpy as np
from absl.testing import absltest
from matplotlib import figure, image

from jaxmerge import curves


def _found(values):
  values = np.asarray(values, np.float64)
  bad = int((~np.isfinite(values)).sum())
  return curves.PlaneValues(
    np.arange(values.shape[1], dtype=np.float64),
    np.arange(values.shape[0], dtype=np.float64),
    {"test": {"loss": values}},
    {"test": {"loss": bad}},
    0.0,
  )


class PlotPlaneTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name)

  def _plot(self, values, name="plane", **options):
    """Draws, and returns the paths and the figure."""
    drawn = []
    save = figure.Figure.savefig

    def spy(self, *args, **kwargs):
      drawn.append(self)
      return save(self, *args, **kwargs)

    with mock.patch.object(figure.Figure, "savefig", spy):
      paths = curves.plot_plane(_found(values), self.folder / name, **options)
    return paths, drawn[0]

  def test_files_and_what_is_drawn(self):
    values = np.array([[1.0, 10.0, 100.0], [2.0, 3.0, 1000.0]])
    curve, ends = [[0, 0], [1, 1], [2, 0]], [[0, 0], [2, 0]]
    paths, drawn = self._plot(
      values, "plane.png", curve=curve, ends=ends, merged=[1, 1], title="T"
    )
    self.assertEqual(
      [path.name for path in paths], ["plane.png", "plane.svg", "plane.npz"]
    )
    self.assertCountEqual(self.folder.iterdir(), paths)
    self.assertGreater(image.imread(paths[0]).std(), 0.05)
    with np.load(paths[2]) as kept:
      np.testing.assert_array_equal(kept["test/loss"], values)
      np.testing.assert_array_equal(kept["curve"], curve)
      np.testing.assert_array_equal(kept["ends"], ends)
      np.testing.assert_array_equal(kept["merged"], [1, 1])
    axes = drawn.axes[0]
    lines = {
      (line.get_linestyle(), line.get_marker()): line.get_xydata().tolist()
      for line in axes.lines
    }
    self.assertEqual(
      lines,
      {
        ("--", "None"): ends,
        ("-", "None"): curve,
        ("None", "o"): ends,
        ("None", "D"): [[1, 1]],
      },
    )
    # Twenty-five levels, a constant ratio apart.
    levels = axes.collections[0].levels
    np.testing.assert_allclose(levels, 10 ** np.linspace(0, 3, 25), rtol=1e-6)
    self.assertEqual(axes.get_title(), "test loss")

  def test_equal_figures_are_equal_files(self):
    values = [[1.0, 2.0], [3.0, 4.0]]
    first, second = (self._plot(values, name)[0] for name in ("a", "b"))
    for one, other in zip(first[:2], second[:2], strict=True):
      self.assertEqual(one.read_bytes(), other.read_bytes())

  def test_non_finite_cells(self):
    values = [[1.0, 2.0, np.nan], [3.0, np.inf, 5.0]]
    _, drawn = self._plot(values)
    axes = drawn.axes[0]
    self.assertIn("2 of 6 cells not finite", axes.get_title())
    hatched = [c for c in axes.collections if c.get_hatch()]
    self.assertLen(hatched, 1)
    np.testing.assert_array_equal(
      np.ma.getmaskarray(hatched[0].get_array()), np.isfinite(values)
    )

  def test_nothing_finite_and_all_equal(self):
    _, drawn = self._plot(np.full((2, 2), np.nan))
    self.assertIn("4 of 4 cells", drawn.axes[0].get_title())
    for value in (0.0, 3.0):
      paths, _ = self._plot(np.full((2, 2), value))
      self.assertLen(paths, 3)

  def test_without_matplotlib(self):
    with mock.patch.dict(sys.modules, {"matplotlib": None}):
      with self.assertRaisesRegex(ImportError, "pip install 'jaxmerge"):
        self._plot([[1.0, 2.0], [3.0, 4.0]])

  def test_errors(self):
    with self.assertRaisesRegex(ValueError, "train/loss was not measured"):
      self._plot([[1.0]], maps=[("train", "loss", "")])
    with self.assertRaisesRegex(ValueError, "2 levels"):
      self._plot([[1.0]], levels=1)


if __name__ == "__main__":
  absltest.main()
