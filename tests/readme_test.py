"""The Python examples of the README and of docs/ run."""

from __future__ import annotations

import contextlib
import io
import pathlib
import re
import tempfile

import chex
import jax
import jax.numpy as jnp
from absl.testing import absltest

from jaxmerge import models
from jaxmerge.checkpoints import hugging_face
from tests.experiments import _magmax

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

  def test_checkpoints_page(self):
    (code,) = _blocks("docs/checkpoints.md")
    self.assertIn("float32, (2, 4)) 2.0", _run(code, "docs/checkpoints.md"))

  def test_page_on_pretrained_networks(self):
    """With a small network of random weights in MiniLM's place."""
    (code,) = _blocks("docs/pretrained.md")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
      places = [pathlib.Path(name) for name in ("base", "banking", "travel")]
      _magmax.write_model(places[0])
      config = hugging_face.read_config("base")
      model = models.bert_from_config(config, pooler=True)
      like = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32)
      )["params"]
      base = hugging_face.load("base", like)
      for number, place in enumerate(places[1:], 1):
        tuned = jax.tree.map(lambda leaf, n=number: leaf + n, base)
        hugging_face.save(f"runs/{place}", tuned, source="base")
      name = '"sentence-transformers/all-MiniLM-L6-v2"'
      self.assertIn(name, code)
      _run(code.replace(name, '"base"'), "docs/pretrained.md")
      merged = hugging_face.load("runs/merged", like)
    # Half of the larger move.
    chex.assert_trees_all_close(
      merged, jax.tree.map(lambda leaf: leaf + 1, base), rtol=1e-6
    )


if __name__ == "__main__":
  absltest.main()
