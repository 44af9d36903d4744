"""CLIP's image encoder with a frozen head of class names, and image sets."""

from __future__ import annotations

import json
import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from sklearn import model_selection

from experiments import _backbone, _generated
from jaxmerge import data as data_lib
from jaxmerge import models
from jaxmerge.checkpoints import hugging_face, open_clip

PyTree = Any

# Of OpenAI's training images, channel by channel.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
#: What is fine-tuned; the rest makes the head, once.
TRAINED = ("vision_model", "visual_projection")


def _clip(
  folder: pathlib.Path, config: ml_collections.ConfigDict
) -> tuple[models.Clip, PyTree]:
  """The network of a folder in either layout."""
  options = {
    "dtype": jnp.dtype(config.model.dtype) if config.model.dtype else None,
    "remat": config.model.remat,
  }
  theirs = (folder / open_clip.CONFIG).exists()
  if theirs:
    raw = open_clip.read_config(folder)
    # The file does not say what the name of OpenAI's weights does.
    raw = {**raw, "quick_gelu": raw.get("quick_gelu", config.model.quick_gelu)}
    model = models.clip_from_open_clip(raw, **options)
  else:
    model = models.clip_from_config(hugging_face.read_config(folder), **options)
  side = model.vision.image_size
  like = jax.eval_shape(
    model.init,
    jax.random.key(0),
    jnp.zeros((1, side, side, 3)),
    jnp.zeros((1, 4), jnp.int32),
  )["params"]
  load = open_clip.load if theirs else hugging_face.load
  weights_only = config.model.weights_only
  params = load(folder, like, weights_only=weights_only)
  return model, jax.tree.map(jnp.asarray, params)


def _class_names(
  found: tuple[str, ...], file: str, dataset: str
) -> tuple[str, ...]:
  """Names that a text encoder can read."""
  if file:
    path = pathlib.Path(file).expanduser()
    try:
      named = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
      raise ValueError(f"{path} cannot be read as JSON ({error}).") from error
    if isinstance(named, list) and len(named) == len(found):
      return tuple(named)
    missing = [one for one in found if one not in named]
    if not isinstance(named, dict) or missing:
      raise ValueError(
        f"{path} must hold a list of the names of the {len(found)} classes of"
        f" {dataset}, or an object from the set's own names to them; it lacks"
        f" {missing[:1] or 'all'}."
      )
    return tuple(named[one] for one in found)
  coded = [one for one in found if re.fullmatch(r"n\d{8}", one)]
  if coded:
    raise ValueError(
      f"{dataset} names its classes by codes such as {coded[0]}: set"
      " class_names_file to a JSON object from them to names."
    )
  return tuple(re.sub(r"^\d+\.", "", one).replace("_", " ") for one in found)


def _sources(
  config: ml_collections.ConfigDict,
  side: int,
  data_dir: str | os.PathLike[str] | None,
) -> list[data_lib.ImageSource]:
  if config.dataset == "generated":
    return [_generated.images(split, side) for split in ("train", "test")]
  return [
    data_lib.open_images(config.dataset, split, side=side, data_dir=data_dir)
    for split in config.splits
  ]


def images(
  config: ml_collections.ConfigDict, data_dir: str | os.PathLike[str] | None
) -> _backbone.Backbone:
  """CLIP, whose image encoder is fine-tuned, and a set of images.

  Args:
    config: the configuration: `model`, `dataset`, `splits`, `validation`,
      `templates`, `class_names_file`, `augment`.
    data_dir: folder of prepared TFDS sets.

  Returns:
    The backbone; its head is the text encoder's embeddings of the class names
    in CLIP's templates, times its scale.

  Raises:
    ValueError: something cannot be had or does not fit.
  """
  if config.model.source == "random":
    folder = _generated.random_clip()
  else:
    folder = _backbone.find_model(
      config.model.source, config.model.weights_only
    )
  model, whole = _clip(folder, config)
  frozen = {k: v for k, v in whole.items() if k not in TRAINED}
  params = {k: whole[k] for k in TRAINED}
  side = model.vision.image_size
  train, test = _sources(config, side, data_dir)
  if train.class_names != test.class_names:
    raise ValueError(
      f"The splits {tuple(config.splits)} of {config.dataset} have other class"
      " names."
    )
  names = _class_names(
    train.class_names, config.class_names_file, config.dataset
  )
  tokenizer = data_lib.load_tokenizer(folder, vocab_size=model.text.vocab_size)

  @jax.jit
  def embed(ids: jax.Array) -> jax.Array:
    return jnp.asarray(
      model.apply({"params": whole}, ids, method="encode_text")
    )

  def embed_names(given: list[str]) -> jax.Array:
    return embed(
      data_lib.tokenize(tokenizer, given, length=model.text.positions)
    )

  templates = (
    data_lib.clip_templates(config.templates)
    if isinstance(config.templates, str)
    else tuple(config.templates)
  )
  head = models.class_embeddings(embed_names, names, templates)
  head = jnp.exp(frozen["logit_scale"]) * head
  mean, std = (jnp.array(values).reshape(1, 1, 1, 3) for values in (MEAN, STD))

  def logits_fn(params: PyTree, pixels: jax.Array) -> jax.Array:
    inputs = (pixels.astype(jnp.float32) / 255 - mean) / std
    given = {**params, "logit_scale": frozen["logit_scale"]}
    z = jnp.asarray(
      model.apply({"params": given}, inputs, method="encode_image")
    ).astype(jnp.float32)
    return z / jnp.linalg.norm(z, axis=-1, keepdims=True) @ head.T

  def examples(source: data_lib.ImageSource) -> _backbone.Examples:
    rows = np.arange(len(source.labels), dtype=np.int32)
    return _backbone.Examples(
      source.inputs, source.labels, len(names), ((source.inputs, rows),)
    )

  rows = np.arange(len(train.labels), dtype=np.int32)
  _, held_out = model_selection.train_test_split(
    rows, test_size=config.validation, stratify=train.labels, random_state=0
  )

  def load(where: pathlib.Path) -> PyTree:
    return jax.tree.map(jnp.asarray, hugging_face.load(where, params))

  def export(where: pathlib.Path, trained: PyTree) -> None:
    save = (
      open_clip.save
      if (folder / open_clip.CONFIG).exists()
      else hugging_face.save
    )
    save(
      where,
      {**frozen, **trained},
      source=folder,
      weights_only=config.model.weights_only,
    )

  def augment(rows: np.ndarray, draws: np.random.Generator) -> np.ndarray:
    if config.augment:
      return train.inputs.augmented(rows, draws)
    return train.inputs[rows]

  return _backbone.Backbone(
    params=params,
    logits_fn=logits_fn,
    head=head,
    class_names=names,
    pool=examples(train),
    held_out=np.sort(held_out),
    test=examples(test),
    save=hugging_face.save,
    load=load,
    export=export,
    augment_on_host=augment,
  )
