"""Data sets as arrays: images (embedded digits, TFDS sets), texts, tokens."""

from jaxmerge.data._dataset import DataError, Dataset
from jaxmerge.data._lazy_images import (
  ImageSource,
  LazyImages,
  clip_augment,
  clip_preprocess,
  open_images,
)
from jaxmerge.data._load import load
from jaxmerge.data._normalization import channel_moments, normalization
from jaxmerge.data._splits import heterogeneous_split, plain_split
from jaxmerge.data._templates import clip_templates
from jaxmerge.data._texts import TextDataset, load_texts
from jaxmerge.data._tokens import (
  length_buckets,
  load_tokenizer,
  text_lengths,
  tokenize,
)

__all__ = (
  "DataError",
  "Dataset",
  "ImageSource",
  "LazyImages",
  "TextDataset",
  "channel_moments",
  "clip_augment",
  "clip_preprocess",
  "clip_templates",
  "heterogeneous_split",
  "length_buckets",
  "load",
  "load_texts",
  "load_tokenizer",
  "normalization",
  "open_images",
  "plain_split",
  "text_lengths",
  "tokenize",
)
