"""Tests of checkpoints in open_clip's layout."""

from __future__ import annotations

import json
import pathlib
import tempfile
import unittest

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest
from safetensors import numpy as safetensors_numpy

from jaxmerge import models
from jaxmerge.checkpoints import CheckpointError, open_clip
from tests.models import _noise

CONFIG = {
  "embed_dim": 6,
  "vision_cfg": {
    "image_size": 8,
    "layers": 2,
    "width": 12,
    "head_width": 4,
    "patch_size": 4,
  },
  "text_cfg": {
    "context_length": 10,
    "vocab_size": 30,
    "width": 8,
    "heads": 2,
    "layers": 2,
  },
}


def _inputs():
  draws = np.random.default_rng(0)
  images = draws.normal(size=(3, 8, 8, 3)).astype(np.float32)
  ids = draws.integers(1, 28, (4, 10)).astype(np.int32)
  ids[np.arange(4), [3, 9, 5, 7]] = 29
  for row, end in zip(ids, [3, 9, 5, 7], strict=True):
    row[end + 1 :] = 0
  return images, ids


def _like(model):
  images, ids = _inputs()
  return jax.eval_shape(model.init, jax.random.key(0), images, ids)["params"]


def _params():
  return _noise.params(models.clip_from_open_clip(CONFIG), *_inputs())


def _theirs(params):
  """The tensors of open_clip, leaf by leaf from the paper's equations."""
  found = {"logit_scale": params["logit_scale"]}
  for tower, at, text in (
    ("vision_model", "visual.", False),
    ("text_model", "", True),
  ):
    mine = params[tower]
    names = ("ln_final",) if text else ("ln_pre", "ln_post")
    norms = (
      ("final_layer_norm",) if text else ("pre_layrnorm", "post_layernorm")
    )
    for name, norm in zip(names, norms, strict=True):
      found[f"{at}{name}.weight"] = mine[norm]["scale"]
      found[f"{at}{name}.bias"] = mine[norm]["bias"]
    for number, layer in mine["encoder"]["layers"].items():
      block = f"{at}transformer.resblocks.{number}"
      attention, mlp = layer["self_attn"], layer["mlp"]
      fused = [attention[f"{letter}_proj"] for letter in "qkv"]
      found[f"{block}.attn.in_proj_weight"] = np.concatenate(
        [one["kernel"].T for one in fused]
      )
      found[f"{block}.attn.in_proj_bias"] = np.concatenate(
        [one["bias"] for one in fused]
      )
      for name, dense in (
        ("attn.out_proj", attention["out_proj"]),
        ("mlp.c_fc", mlp["fc1"]),
        ("mlp.c_proj", mlp["fc2"]),
      ):
        found[f"{block}.{name}.weight"] = dense["kernel"].T
        found[f"{block}.{name}.bias"] = dense["bias"]
      for place in "12":
        norm = layer[f"layer_norm{place}"]
        found[f"{block}.ln_{place}.weight"] = norm["scale"]
        found[f"{block}.ln_{place}.bias"] = norm["bias"]
  vision, text = (params[f"{name}_model"] for name in ("vision", "text"))
  patches = vision["embeddings"]["patch_embedding"]["kernel"]
  found["visual.conv1.weight"] = patches.transpose(3, 2, 0, 1)
  found["visual.class_embedding"] = vision["embeddings"]["class_embedding"]
  for at, part in (("visual.", vision), ("", text)):
    places = part["embeddings"]["position_embedding"]["embedding"]
    found[f"{at}positional_embedding"] = places
  tokens = text["embeddings"]["token_embedding"]["embedding"]
  found["token_embedding.weight"] = tokens
  found["visual.proj"] = params["visual_projection"]["kernel"]
  found["text_projection"] = params["text_projection"]["kernel"]
  return {name: np.array(value, order="C") for name, value in found.items()}


class OpenClipTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.root = pathlib.Path(folder.name)
    self.folder = self.root / "model"
    self.folder.mkdir()
    self.model = models.clip_from_open_clip(CONFIG)
    self.params = _params()

  def _write(self, tensors):
    safetensors_numpy.save_file(tensors, self.folder / open_clip.WEIGHTS)
    config = {"model_cfg": CONFIG, "preprocess_cfg": {}}
    (self.folder / open_clip.CONFIG).write_text(json.dumps(config))

  def test_there_and_back(self):
    tensors = _theirs(self.params)
    self._write(tensors)
    self.assertEqual(open_clip.read_config(self.folder), CONFIG)
    found = open_clip.load(self.folder, _like(self.model))
    chex.assert_trees_all_equal(found, self.params)
    back = self.root / "back"
    open_clip.save(back, found, source=self.folder)
    again = safetensors_numpy.load_file(back / open_clip.WEIGHTS)
    self.assertEqual(set(again), set(tensors))
    for name, value in tensors.items():
      np.testing.assert_array_equal(again[name], value, err_msg=name)
    self.assertEqual(open_clip.read_config(back), CONFIG)

  def test_the_text_tower_of_newer_checkpoints(self):
    self._write(
      {
        name
        if name.startswith("visual.") or name == "logit_scale"
        else f"text.{name}": value
        for name, value in _theirs(self.params).items()
      }
    )
    found = open_clip.load(self.folder, _like(self.model))
    chex.assert_trees_all_equal(found, self.params)

  def test_every_tensor_is_accounted_for(self):
    tensors = _theirs(self.params)
    del tensors["visual.transformer.resblocks.1.attn.in_proj_weight"]
    tensors["visual.transformer.resblocks.2.ln_1.weight"] = np.zeros(12)
    self._write(tensors)
    with self.assertRaisesRegex(
      CheckpointError,
      r"3 missing tensors.*layers\.1\.self_attn\.q_proj\.weight.*1 tensors that"
      r" the network has not: vision_model\.encoder\.layers\.2\.layer_norm1",
    ):
      open_clip.load(self.folder, _like(self.model))

  def test_another_size(self):
    self._write(_theirs(self.params))
    model = models.clip_from_open_clip({**CONFIG, "embed_dim": 5})
    with self.assertRaisesRegex(
      CheckpointError, r"visual_projection\.weight has \(6, 12\).*\(5, 12\)"
    ):
      open_clip.load(self.folder, _like(model))

  def test_saving_another_network_or_over_the_source(self):
    self._write(_theirs(self.params))
    with self.assertRaisesRegex(CheckpointError, "choose another one"):
      open_clip.save(self.folder, self.params, source=self.folder)
    less = {k: v for k, v in self.params.items() if k != "logit_scale"}
    with self.assertRaisesRegex(CheckpointError, "differ in 1.*logit_scale"):
      open_clip.save(self.root / "back", less, source=self.folder)

  def test_configurations(self):
    with self.assertRaisesRegex(ValueError, "has no embed_dim"):
      models.clip_from_open_clip({"vision_cfg": {}})
    with self.assertRaisesRegex(ValueError, "a ResNet; Clip has a transformer"):
      models.clip_from_open_clip(
        {"embed_dim": 8, "vision_cfg": {"layers": [3, 4, 6, 3]}}
      )
    with self.assertRaisesRegex(ValueError, "vision_cfg.*'timm_model_name'"):
      models.clip_from_open_clip(
        {"embed_dim": 8, "vision_cfg": {"timm_model_name": "x"}}
      )
    large = models.clip_from_open_clip(
      {
        "embed_dim": 768,
        "quick_gelu": True,
        "vision_cfg": {"layers": 24, "width": 1024, "patch_size": 14},
        "text_cfg": {"width": 768, "heads": 12},
      }
    )
    self.assertEqual(large.vision.heads, 16)
    self.assertEqual(large.vision.activation, "quick_gelu")
    self.assertEqual(large.text.mlp_dim, 3072)

  def test_no_configuration(self):
    with self.assertRaisesRegex(CheckpointError, "cannot be read"):
      open_clip.read_config(self.folder)
    (self.folder / open_clip.CONFIG).write_text("[1]")
    with self.assertRaisesRegex(CheckpointError, "is damaged"):
      open_clip.read_config(self.folder)

  def test_parity_with_the_library(self):
    try:
      import open_clip as library
      import torch
    except (ImportError, RuntimeError):
      # torchvision of another build raises a RuntimeError.
      raise unittest.SkipTest(
        "open_clip is not there: pip install open_clip_torch"
      ) from None
    for quick in (False, True):
      torch.manual_seed(0)
      theirs = library.model.CLIP(**CONFIG, quick_gelu=quick).eval()
      with torch.no_grad():
        for value in theirs.parameters():
          value += 0.1 * torch.randn(value.shape)
      tensors = {
        name: value.detach().numpy().copy()
        for name, value in theirs.state_dict().items()
        if name != "attn_mask"
      }
      self._write(tensors)
      model = models.clip_from_open_clip({**CONFIG, "quick_gelu": quick})
      params = open_clip.load(self.folder, _like(model))
      images, ids = _inputs()
      pictures = torch.tensor(images.transpose(0, 3, 1, 2).copy())
      words = torch.tensor(ids.astype(np.int64))
      wanted = [
        part.detach().numpy()
        for part in (theirs.encode_image(pictures), theirs.encode_text(words))
      ]
      found = [
        model.apply({"params": params}, images, method="encode_image"),
        model.apply({"params": params}, jnp.asarray(ids), method="encode_text"),
      ]
      for mine, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
  absltest.main()
