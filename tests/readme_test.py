"""The README's Python example runs and shows what it says."""

from __future__ import annotations

import contextlib
import io
import pathlib
import re

from absl.testing import absltest

_README = pathlib.Path(__file__).parents[1] / "README.md"


class ReadmeTest(absltest.TestCase):
  def test_example(self):
    (code,) = re.findall(r"```python\n(.*?)```", _README.read_text(), re.DOTALL)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
      exec(compile(code, "README.md", "exec"), {})
    average, merged = map(float, output.getvalue().split())
    # The average of (2, 0) and (0, 2) is (1, 1): (2 - 4)^2 = 4.
    self.assertAlmostEqual(average, 4.0, places=5)
    self.assertLess(merged, 1.0)


if __name__ == "__main__":
  absltest.main()
