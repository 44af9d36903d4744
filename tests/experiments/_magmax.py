"""A small encoder, a small set of texts, and MagMax's study of them."""

from __future__ import annotations

import json
import pathlib
import tempfile
from unittest import mock

import jax.numpy as jnp
import ml_collections
import numpy as np
import tokenizers
from absl.testing import parameterized
from tokenizers import models as token_models
from tokenizers import pre_tokenizers, processors

from experiments import _backbone, _magmax_study, magmax
from experiments.configs import magmax as configs
from jaxmerge import models
from jaxmerge.checkpoints import hugging_face
from tests.models import _noise

CLASSES = ("pay_bill", "book_flight", "play_song", "set_alarm")
WORDS = {
  "pay_bill": ("pay", "bill", "money", "card"),
  "book_flight": ("book", "flight", "plane", "city"),
  "play_song": ("play", "song", "music", "band"),
  "set_alarm": ("set", "alarm", "wake", "clock"),
}
SIZES = {
  "model_type": "bert",
  "hidden_size": 16,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "intermediate_size": 24,
  "max_position_embeddings": 32,
  "pad_token_id": 0,
}


def _texts(count, seed):
  draws = np.random.default_rng(seed)
  rows = []
  for number in range(count * len(CLASSES)):
    label = CLASSES[number % len(CLASSES)]
    own = draws.choice(WORDS[label], draws.integers(1, 4)).tolist()
    others = draws.choice(sum(WORDS.values(), ()), 2).tolist()
    rows.append([" ".join(own + others), label])
  return rows


def write_set(folder):
  content = {"train": _texts(20, 0), "val": _texts(8, 1), "test": _texts(10, 2)}
  (folder / "data_full.json").write_text(json.dumps(content))


def write_model(folder, vocab_size=None):
  """A random encoder in Hugging Face's layout."""
  words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sum(WORDS.values(), ())]
  made = tokenizers.Tokenizer(
    token_models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]")
  )
  made.pre_tokenizer = pre_tokenizers.Whitespace()
  made.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
  )
  folder.mkdir(parents=True, exist_ok=True)
  made.save(str(folder / "tokenizer.json"))
  config = {**SIZES, "vocab_size": vocab_size or len(words)}
  (folder / "config.json").write_text(json.dumps(config))
  model = models.bert_from_config(config, pooler=True)
  params = _noise.params(model, jnp.zeros((1, 4), jnp.int32))
  hugging_face.save(folder, params)


def config(model, **fields):
  """The smoke variant of CLINC150, cut down to seconds."""
  made = configs.get_config("clinc150-2-smoke")
  made.model.source = str(model)
  made.length, made.buckets = 6, (4, 5, 7)
  made.orders, made.per_class, made.curve_orders = (0, 1), 0, 2
  made.training.batch_size, made.devices = 8, 1
  made.training.epochs = 4
  with made.unlocked():
    made.recipes = {
      "slow": {"learning_rate": 1e-3},
      "fast": {"learning_rate": 1e-2},
    }
    rows = {
      name: made.rows[name].to_dict()
      for name in (
        "sequential",
        "independent",
        "avg",
        "random_mix",
        "magmax",
      )
    }
    made.rows = ml_collections.ConfigDict(rows, sort_keys=False)
    made.curves = ("sequential", "magmax")
    made.learners = {"sequential": {}, "independent": {}}
    for name, value in fields.items():
      if name == "rows":
        value = ml_collections.ConfigDict(value, sort_keys=False)
      made[name] = value
  return made


# What `Folders` puts one network in the place of.
LOAD = _magmax_study._load


class Folders(parameterized.TestCase):
  """Tests with a data set, an encoder, and a folder that is empty."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = tempfile.TemporaryDirectory()
    cls.addClassCleanup(folder.cleanup)
    cls.root = pathlib.Path(folder.name)
    write_set(cls.root)
    cls.model = cls.root / "model"
    write_model(cls.model)
    # One network for all studies: equal functions share what is compiled.
    backbone = _backbone.texts(config(cls.model), str(cls.root))
    cls.enterClassContext(
      mock.patch.object(_magmax_study, "_load", lambda *args: backbone)
    )

  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.empty = pathlib.Path(folder.name)

  def run_study(self, folder, **fields):
    return magmax.run(
      config(self.model, **fields), str(folder), str(self.root), False
    )

  def build(self, **fields):
    return _magmax_study.build(config(self.model, **fields), str(self.root))
