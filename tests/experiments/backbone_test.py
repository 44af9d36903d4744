"""Tests of pre-trained networks with a frozen head."""

from __future__ import annotations

import pathlib
import sys
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from experiments import _backbone
from jaxmerge import data
from jaxmerge.checkpoints import hugging_face
from tests.experiments import _magmax


class TextsTest(_magmax.Folders):
  def test_the_frozen_head(self):
    study = self.build()
    back = study.backbone
    self.assertEqual(
      back.class_names,
      tuple(sorted(n.replace("_", " ") for n in _magmax.CLASSES)),
    )
    np.testing.assert_allclose(
      np.linalg.norm(back.head, axis=1), 20.0, rtol=1e-5
    )
    # A class name is nearest to itself.
    tokenizer = data.load_tokenizer(self.model, vocab_size=20)
    ids = data.tokenize(tokenizer, back.class_names, length=7)
    logits = np.asarray(jax.jit(back.logits_fn)(back.params, jnp.asarray(ids)))
    np.testing.assert_array_equal(logits.argmax(axis=1), np.arange(4))
    np.testing.assert_allclose(np.diag(logits), 20.0, rtol=1e-4)

  @parameterized.parameters(
    ({"kind": "sounds"}, "Unknown kind 'sounds'"),
    ({"buckets": (4, 64)}, "must not be above the 32 positions"),
    ({"templates": ("a text",)}, "must have one {}"),
  )
  def test_bad_networks(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      _magmax.LOAD(_magmax.config(self.model, **fields), str(self.root))

  def test_a_tokenizer_of_another_model(self):
    _magmax.write_model(self.empty / "model", vocab_size=12)
    with self.assertRaisesRegex(ValueError, "tokens, but the embedding"):
      _magmax.LOAD(_magmax.config(self.empty / "model"), str(self.root))


class FindModelTest(absltest.TestCase):
  def test_a_package_stands_for_its_own_model_alone(self):
    with tempfile.TemporaryDirectory() as folder:
      root = pathlib.Path(folder)
      (root / "held" / "inner").mkdir(parents=True)
      (root / "held" / "__init__.py").write_text("")
      with (
        mock.patch.object(sys, "path", [folder, *sys.path]),
        mock.patch.dict(_backbone._PACKAGES, {"owner/held": ("held", "inner")}),
      ):
        self.assertEqual(
          _backbone.find_model("owner/held"), root / "held" / "inner"
        )
        with mock.patch.object(
          hugging_face, "locate", lambda source, weights_only: "hub"
        ):
          self.assertEqual(_backbone.find_model("owner/other"), "hub")
      self.assertEqual(_backbone.find_model(folder), root)


if __name__ == "__main__":
  absltest.main()
