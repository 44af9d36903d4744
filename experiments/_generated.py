"""A small CLIP of random weights, and pictures for it: no download, minutes."""

from __future__ import annotations

import functools
import json
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from jaxmerge import data as data_lib
from jaxmerge import models
from jaxmerge.checkpoints import hugging_face

_COLOURS = {
  "red": (200, 40, 40),
  "green": (40, 170, 60),
  "blue": (50, 70, 210),
  "yellow": (220, 200, 40),
}
_SHAPES = ("square", "disc", "ring", "bar", "cross")
_SIZES = {"train": 40, "test": 20}
_TEXT = {"start": "<|startoftext|>", "end": "<|endoftext|>"}


def _names() -> tuple[str, ...]:
  return tuple(f"{colour} {shape}" for shape in _SHAPES for colour in _COLOURS)


def _picture(label: int, seed: int) -> Image.Image:
  """A coloured shape of any size and place on a noisy ground."""
  draws = np.random.default_rng([seed, label])
  width, height = (int(side) for side in draws.integers(40, 72, 2))
  ground = draws.integers(60, 160, 3) + draws.normal(0, 20, (height, width, 1))
  picture = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
  colour, shape = (
    list(_COLOURS.values())[label % len(_COLOURS)],
    _SHAPES[label // len(_COLOURS)],
  )
  size = int(min(width, height) * draws.uniform(0.4, 0.7))
  left = int(draws.integers(0, width - size + 1))
  top = int(draws.integers(0, height - size + 1))
  right, bottom = left + size, top + size
  pen = ImageDraw.Draw(picture)
  third = size // 3
  if shape == "square":
    pen.rectangle((left, top, right, bottom), fill=colour)
  elif shape == "disc":
    pen.ellipse((left, top, right, bottom), fill=colour)
  elif shape == "ring":
    pen.ellipse(
      (left, top, right, bottom), outline=colour, width=max(2, size // 6)
    )
  elif shape == "bar":
    pen.rectangle((left, top + third, right, bottom - third), fill=colour)
  else:
    pen.rectangle((left, top + third, right, bottom - third), fill=colour)
    pen.rectangle((left + third, top, right - third, bottom), fill=colour)
  return picture


def images(split: str, side: int) -> data_lib.ImageSource:
  """Pictures of 20 classes, a colour and a shape each.

  Args:
    split: "train", 40 a class, or "test", 20 a class.
    side: side that they are prepared to.

  Returns:
    The split; its pictures are drawn when they are asked for.
  """
  names = _names()
  count = _SIZES[split] * len(names)
  labels = np.arange(count, dtype=np.int32) % len(names)
  first = 0 if split == "train" else 10**6

  def fetch(rows: np.ndarray) -> list[Any]:
    return [_picture(int(labels[row]), first + int(row)) for row in rows]

  return data_lib.ImageSource(
    data_lib.LazyImages(fetch, count, side), labels, names
  )


def _tokenizer() -> Any:
  """A token a word, of the words of CLIP's templates and of the classes."""
  import tokenizers
  from tokenizers import models as kinds
  from tokenizers import normalizers, pre_tokenizers, processors

  split = pre_tokenizers.Whitespace()
  texts = [*_names(), *data_lib.clip_templates("cifar100")]
  words = sorted(
    {
      word
      for text in texts
      for word, _ in split.pre_tokenize_str(text.replace("{}", " "))
    }
  )
  # The end has the largest number, by which CLIP finds it.
  vocabulary = ["<|unknown|>", *words, _TEXT["start"], _TEXT["end"]]
  places = {word: place for place, word in enumerate(vocabulary)}
  made = tokenizers.Tokenizer(kinds.WordLevel(places, "<|unknown|>"))
  made.normalizer = normalizers.Lowercase()
  made.pre_tokenizer = split
  made.post_processor = processors.TemplateProcessing(
    single=f"{_TEXT['start']} $A {_TEXT['end']}",
    special_tokens=[(name, places[name]) for name in _TEXT.values()],
  )
  return made


@functools.lru_cache(maxsize=1)
def random_clip() -> pathlib.Path:
  """A folder with a CLIP of random weights, the same in every process.

  Returns:
    The folder, in Hugging Face's layout; it goes with the process.
  """
  folder = tempfile.TemporaryDirectory(prefix="random-clip-")
  _KEPT.append(folder)
  path = pathlib.Path(folder.name)
  tokenizer = _tokenizer()
  common = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "quick_gelu",
  }
  config = {
    "model_type": "clip",
    "architectures": ["CLIPModel"],
    "projection_dim": 32,
    "vision_config": {
      **common,
      "hidden_size": 64,
      "intermediate_size": 128,
      "image_size": 32,
      "patch_size": 8,
    },
    "text_config": {
      **common,
      "hidden_size": 32,
      "intermediate_size": 64,
      "vocab_size": tokenizer.get_vocab_size(),
      "max_position_embeddings": 16,
      "bos_token_id": tokenizer.token_to_id(_TEXT["start"]),
      "eos_token_id": tokenizer.token_to_id(_TEXT["end"]),
    },
  }
  (path / "config.json").write_text(json.dumps(config, indent=1))
  tokenizer.save(str(path / "tokenizer.json"))
  model = models.clip_from_config(config)
  params = model.init(
    jax.random.key(0),
    jnp.zeros((1, 32, 32, 3)),
    jnp.zeros((1, 4), jnp.int32),
  )["params"]
  hugging_face.save(path, params)
  return path


_KEPT: list[Any] = []
