"""Data sets as arrays: the embedded digits, TFDS sets, and splits of them."""

from jaxmerge.data._dataset import DataError, Dataset
from jaxmerge.data._load import load
from jaxmerge.data._normalization import channel_moments, normalization
from jaxmerge.data._splits import heterogeneous_split, plain_split

__all__ = (
  "DataError",
  "Dataset",
  "channel_moments",
  "heterogeneous_split",
  "load",
  "normalization",
  "plain_split",
)
