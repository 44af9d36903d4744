"""Tests of CLIP, against transformers where it is there."""

from __future__ import annotations

import functools
import tempfile
import unittest

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import models
from jaxmerge.checkpoints import hugging_face
from tests.models import _noise

VISION = models.ClipSizes(12, 2, 3, 20, image_size=8, patch=4)
TEXT = models.ClipSizes(8, 2, 2, 16, vocab_size=30, positions=10, end=29)


def _inputs(vocab_size=30, end=29, side=8, length=10):
  draws = np.random.default_rng(0)
  images = draws.normal(size=(3, side, side, 3)).astype(np.float32)
  ids = draws.integers(3, vocab_size - 2, (4, length)).astype(np.int32)
  sizes = draws.integers(3, length, 4)
  ids[np.arange(length) > sizes[:, None]] = 1
  ids[np.arange(4), sizes] = end
  return images, ids, np.arange(length) <= sizes[:, None]


def _params():
  images, ids, _ = _inputs()
  return _noise.params(models.Clip(VISION, TEXT, 6), images, ids, size=0.2)


class ClipTest(parameterized.TestCase):
  def _model(self):
    return models.Clip(VISION, TEXT, 6), _params(), *_inputs()

  def test_logits_are_scaled_cosines(self):
    model, params, images, ids, mask = self._model()
    variables = {"params": params}
    apply = jax.jit(model.apply, static_argnames="method")
    a = np.asarray(apply(variables, images, method="encode_image"))
    b = np.asarray(apply(variables, ids, mask, method="encode_text"))
    cosines = (a @ b.T) / np.outer(
      np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    )
    np.testing.assert_allclose(
      apply(variables, images, ids, mask),
      np.exp(params["logit_scale"]) * cosines,
      rtol=1e-4,
      atol=1e-4,
    )

  def test_what_is_behind_the_end_changes_nothing(self):
    model, params, _, ids, mask = self._model()

    @jax.jit
    def encode(ids, mask=None):
      return model.apply({"params": params}, ids, mask, method="encode_text")

    plain = encode(ids)
    chex.assert_trees_all_close(encode(ids, mask), plain, rtol=1e-5, atol=1e-6)
    other = np.where(mask, ids, 7)
    chex.assert_trees_all_close(encode(other), plain, rtol=1e-5, atol=1e-6)
    changed = np.where(np.arange(10) == 0, 7, ids)
    self.assertGreater(float(jnp.abs(encode(changed) - plain).min(0).max()), 0)

  def test_legacy_end_is_the_largest_token(self):
    model, params, _, ids, _ = self._model()
    legacy = models.Clip(VISION, TEXT._replace(end=2), 6)
    found = [
      jax.jit(one.apply, static_argnames="method")(
        {"params": params}, ids, method="encode_text"
      )
      for one in (model, legacy)
    ]
    chex.assert_trees_all_equal(*found)

  def test_remat_and_half_types(self):
    _, _, images, ids, mask = self._model()
    sizes = [one._replace(depth=1) for one in (VISION, TEXT)]
    model = models.Clip(*sizes, 6)
    params = _noise.params(model, images, ids)

    @functools.partial(jax.jit, static_argnums=1)
    def step(params, model):
      def loss(params):
        return model.apply({"params": params}, images, ids, mask)[0, 0]

      return jax.value_and_grad(loss)(params)

    value, plain = step(params, model)
    _, again = step(params, models.Clip(*sizes, 6, remat=True))
    chex.assert_trees_all_close(again, plain, rtol=1e-4, atol=1e-6)
    half = models.Clip(*sizes, 6, dtype=jnp.bfloat16)
    other, grads = step(params, half)
    chex.assert_trees_all_equal_dtypes(grads, plain)
    self.assertEqual(other.dtype, jnp.float32)
    self.assertLess(float(abs(value - other)), 0.05 * 1 / 0.07)

  def test_round_trip(self):
    _, params, *_ = self._model()
    with tempfile.TemporaryDirectory() as folder:
      hugging_face.save(folder, params, max_shard_bytes=2000)
      chex.assert_trees_all_equal(hugging_face.load(folder, params), params)

  @parameterized.parameters(
    ({"vision": VISION._replace(heads=5)}, "heads=5 of Clip's vision encoder"),
    ({"text": TEXT._replace(depth=0)}, "depth of Clip's text encoder"),
    ({"vision": VISION._replace(patch=3)}, "side 3 do not divide.*side 8"),
    ({"text": TEXT._replace(activation="x")}, "unknown activation 'x'"),
  )
  def test_bad_sizes(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      models.Clip(**options)

  def test_inputs_that_do_not_fit(self):
    model, params, images, ids, _ = self._model()
    with self.assertRaisesRegex(ValueError, r"takes \[b, 8, 8, 3\]; resize"):
      jax.eval_shape(
        lambda x: model.apply({"params": params}, x, method="encode_image"),
        images[:, :4],
      )
    with self.assertRaisesRegex(ValueError, "20 tokens.*positions for 10"):
      jax.eval_shape(
        lambda x: model.apply({"params": params}, x, method="encode_text"),
        np.tile(ids, (1, 2)),
      )

  def test_another_kind(self):
    with self.assertRaisesRegex(ValueError, "of the type 'siglip'"):
      models.clip_from_config({"model_type": "siglip"})


class ParityTest(absltest.TestCase):
  def test_random_networks_of_several_sizes(self):
    try:
      import torch
      import transformers
    except ImportError:
      raise unittest.SkipTest(
        "transformers is not installed: pip install -e '.[bench]'"
      ) from None
    for side, patch, depth, end in ((8, 4, 1, 29), (12, 3, 2, 2)):
      vision = {
        "hidden_size": 24,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "image_size": side,
        "patch_size": patch,
      }
      text = {
        "hidden_size": 16,
        "num_hidden_layers": depth + 1,
        "num_attention_heads": 2,
        "intermediate_size": 30,
        "vocab_size": 30,
        "max_position_embeddings": 10,
        "eos_token_id": end,
      }
      torch.manual_seed(depth)
      theirs = transformers.CLIPModel(
        transformers.CLIPConfig(
          text_config=text, vision_config=vision, projection_dim=12
        )
      ).eval()
      with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model = models.clip_from_config(hugging_face.read_config(folder))
        images, ids, mask = _inputs(side=side)
        like = jax.eval_shape(model.init, jax.random.key(0), images, ids)
        params = hugging_face.load(folder, like["params"])
      self._compare(torch, theirs, model, params, images, ids, mask)

  def _compare(self, torch, theirs, model, params, images, ids, mask):
    def loss(params):
      logits = model.apply({"params": params}, images, ids, mask)
      return (jax.nn.log_softmax(logits)[:, 0]).mean(), logits

    (_, logits), grads = jax.value_and_grad(loss, has_aux=True)(params)
    found = theirs(
      input_ids=torch.tensor(ids.astype(np.int64)),
      pixel_values=torch.tensor(images.transpose(0, 3, 1, 2).copy()),
      attention_mask=torch.tensor(mask.astype(np.int64)),
    )
    np.testing.assert_allclose(
      logits, found.logits_per_image.detach().numpy(), rtol=1e-4, atol=1e-4
    )
    torch.log_softmax(found.logits_per_image, 1)[:, 0].mean().backward()
    named = dict(theirs.named_parameters())
    for path, grad in hugging_face._named(grads).items():
      other = named.pop(hugging_face.tensor_name(path)).grad.numpy()
      error = np.linalg.norm(hugging_face._to_tensor(path, grad) - other)
      # The gradient of a key's bias is zero but for rounding.
      self.assertLessEqual(error, 1e-4 * np.linalg.norm(other) + 2e-6, path)
    self.assertEmpty(named)


if __name__ == "__main__":
  absltest.main()
