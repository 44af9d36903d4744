"""Tests of the frozen head."""

from __future__ import annotations

import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import models


def _embed(texts):
  """Any vectors that depend on the texts alone."""
  return np.stack(
    [
      np.random.default_rng(list(text.encode()))
      .normal(size=5)
      .astype("float32")
      for text in texts
    ]
  )


class ClassEmbeddingsTest(parameterized.TestCase):
  def test_formula(self):
    names, templates = ["cat", "dog", "{x}"], ["a {}.", "the {}", "{}"]
    found = models.class_embeddings(_embed, names, templates)
    for name, row in zip(names, np.asarray(found), strict=True):
      vectors = _embed([t.replace("{}", name) for t in templates])
      vectors = vectors.astype(np.float64)
      vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
      mean = vectors.mean(axis=0)
      np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-6)

  @parameterized.parameters(
    (([], ["{}"]), "there is no class name"),
    ((["a", " "], ["{}"]), "class 1 has no name"),
    ((["a", None], ["{}"]), "class 1 has no name"),
    ((["a", "b", "a"], ["{}"]), "classes 0 and 2 are both named 'a'"),
    ((["a"], []), "there is no template"),
    ((["a"], ["a photo"]), "'a photo' must have one {}"),
    ((["a"], ["{} {}"]), "must have one {}"),
  )
  def test_bad_input(self, given, message):
    with self.assertRaisesRegex(ValueError, message):
      models.class_embeddings(_embed, *given)


if __name__ == "__main__":
  absltest.main()
