"""The Python examples of the README and of docs/ run."""

from __future__ import annotations

import contextlib
import io
import pathlib
import re

from absl.testing import absltest

_ROOT = pathlib.Path(__file__).parents[1]


def _blocks(page):
  text = (_ROOT / page).read_text()
  return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def _run(code, page):
  """What the code prints."""
  output = io.StringIO()
  with contextlib.redirect_stdout(output):
    exec(compile(code, page, "exec"), {})
  return output.getvalue()


class ReadmeTest(absltest.TestCase):
  def test_example(self):
    (code,) = _blocks("README.md")
    average, merged = map(float, _run(code, "README.md").split())
    # The average of (2, 0) and (0, 2) is (1, 1): (2 - 4)^2 = 4.
    self.assertAlmostEqual(average, 4.0, places=5)
    self.assertLess(merged, 1.0)

  def test_page_on_continual_learning(self):
    code = "\n".join(_blocks("docs/continual.md"))
    output = _run(code, "docs/continual.md")
    self.assertIn("'examples': 5760", output)  # 5 x 16 x (64 + 4 + 4) bytes

  def test_page_on_merging(self):
    """The blocks of the page follow one another."""
    code = "\n".join(_blocks("docs/merging.md"))
    output = _run(code, "docs/merging.md")
    # Where the kernels agree in sign: 1 and 2; where both are 0, 0.
    self.assertIn("[[1.5 0. ]\n [0.  0. ]]", output)
    self.assertIn("kernel (2, 2)", output)

  def test_page_on_alignment(self):
    output = _run("\n".join(_blocks("docs/alignment.md")), "docs/alignment.md")
    # The wide network's 600 neurons beside the other's 512.
    self.assertIn("(600, 512)", output)
    self.assertEndsWith(output, "True\n")


if __name__ == "__main__":
  absltest.main()
