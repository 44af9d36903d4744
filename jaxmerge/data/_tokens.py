"""Texts as tokens, and batches of texts of about one length."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmerge.data._dataset import DataError


def load_tokenizer(
  folder: str | os.PathLike[str], *, vocab_size: int, pad_id: int | None = None
) -> Any:
  """Reads the tokenizer of a pre-trained network.

  Args:
    folder: of the checkpoint, with tokenizer.json.
    vocab_size: number of rows of the network's token embedding.
    pad_id: the network's padding token; None where it has none.

  Returns:
    A `tokenizers.Tokenizer` that neither pads nor cuts.

  Raises:
    DataError: there is none, it is damaged, or it does not fit the network.
    ImportError: the library tokenizers is missing.
  """
  try:
    import tokenizers
  except ImportError as error:
    raise ImportError(
      "Texts need the library tokenizers: pip install 'jaxmerge[hub]'."
    ) from error
  path = pathlib.Path(folder) / "tokenizer.json"
  if not path.is_file():
    raise DataError(
      f"there is no {path}: place the tokenizer of the network there."
    )
  try:
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # The library raises nothing finer.
    raise DataError(
      f"{path} is no tokenizer ({error}): place it anew."
    ) from error
  size = tokenizer.get_vocab_size()
  if size > vocab_size:
    raise DataError(
      f"the tokenizer of {folder} has {size} tokens, but the embedding of the"
      f" network has {vocab_size} rows: they are not of one model. Take both"
      " from one checkpoint."
    )
  padding = tokenizer.padding
  if padding and pad_id is not None and padding["pad_id"] != pad_id:
    raise DataError(
      f"the tokenizer of {folder} pads with the token {padding['pad_id']}, but"
      f" config.json says {pad_id}: they are not of one model. Take both from"
      " one checkpoint."
    )
  tokenizer.no_padding()
  tokenizer.no_truncation()
  return tokenizer


def tokenize(
  tokenizer: Any, texts: Sequence[str], *, length: int, pad_id: int = 0
) -> np.ndarray:
  """Texts as rows of tokens of one length.

  Args:
    tokenizer: a `tokenizers.Tokenizer`.
    texts: the texts.
    length: the number of tokens of a row, those that begin and end a text among
      them; longer texts are cut so that they still end as they should.
    pad_id: the token behind the end of a text.

  Returns:
    int32 `[n, length]`.

  Raises:
    DataError: the length has no room for a text, or a text has no token.
  """
  room = length - tokenizer.num_special_tokens_to_add(False)
  if room < 1:
    raise DataError(
      f"length {length} has no room for a token beside those that begin and end"
      " a text: make it larger."
    )
  tokenizer.enable_truncation(length)
  try:
    encoded = tokenizer.encode_batch(list(texts))
  finally:
    tokenizer.no_truncation()
  rows = np.full((len(encoded), length), pad_id, np.int32)
  for row, one in zip(rows, encoded, strict=True):
    if not one.ids:
      raise DataError("a text has no token at all: leave it out.")
    row[: len(one.ids)] = one.ids
  return rows


def text_lengths(tokens: np.ndarray, pad_id: int = 0) -> np.ndarray:
  """The number of tokens of each text.

  Args:
    tokens: `[n, length]`.
    pad_id: the padding behind the end.

  Returns:
    int32 `[n]`.

  >>> text_lengths(np.array([[5, 0, 7, 0], [5, 6, 0, 0]])).tolist()
  [3, 2]
  """
  real = tokens != pad_id
  length = tokens.shape[1]
  last = length - np.argmax(real[:, ::-1], axis=1)
  return np.where(real.any(axis=1), last, 0).astype(np.int32)


def length_buckets(
  lengths: np.ndarray, sizes: Sequence[int]
) -> list[tuple[int, np.ndarray]]:
  """Sorts texts into buckets, so that few lengths are compiled.

  Args:
    lengths: the number of tokens of each text, `[n]`.
    sizes: lengths of the buckets, increasing; the longest text must fit the
      last.

  Returns:
    For each bucket that has a text its length and the rows of its texts, each
    text in the smallest bucket that it fits; int32, sorted.

  Raises:
    DataError: the sizes do not increase, or a text fits no bucket.

  >>> [
  ...   (size, rows.tolist())
  ...   for size, rows in length_buckets(np.array([3, 9, 8]), (4, 8, 16))
  ... ]
  [(4, [0]), (8, [2]), (16, [1])]
  """
  if not len(sizes) or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
    raise DataError(f"sizes of buckets must increase, got {list(sizes)}.")
  if len(lengths) and lengths.max() > sizes[-1]:
    raise DataError(
      f"a text has {lengths.max()} tokens, but the largest bucket holds"
      f" {sizes[-1]}: add a larger one, or cut the texts."
    )
  places = np.searchsorted(sizes, lengths)
  found = []
  for place, size in enumerate(sizes):
    rows = np.flatnonzero(places == place).astype(np.int32)
    if len(rows):
      found.append((int(size), rows))
  return found
