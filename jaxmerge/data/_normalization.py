"""Mean and standard deviation of a set's channels."""

from __future__ import annotations

import os

import numpy as np

from jaxmerge.data._load import load

# Of the training splits. digits is measured on the split of this package;
# the others are the figures in common use.
_KNOWN = {
  "digits": ((0.3053,), (0.3757,)),
  "mnist": ((0.1307,), (0.3081,)),
  "fashion_mnist": ((0.2860,), (0.3530,)),
  "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
  "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
_CHUNK = 4096


def normalization(
  name: str,
  *,
  data_dir: str | os.PathLike[str] | None = None,
  cache_dir: str | os.PathLike[str] | None = None,
  download: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns what makes a set's pixels have mean 0 and deviation about 1.

  On the scale 0..1, that is for uint8 images:
  (images / 255 - mean) / std.

  For mnist, fashion_mnist, cifar10, cifar100 and digits these are constants;
  for another set they are computed over all pixels of its training split.
  cifar10's deviations are those in common use, which are the mean over images
  of the deviation within an image.

  Args:
    name: the set, as for `load`.
    data_dir: as for `load`.
    cache_dir: as for `load`.
    download: as for `load`.

  Returns:
    The mean and the standard deviation: float32, one for each channel.

  Raises:
    DataError: an unknown set cannot be loaded.

  >>> normalization("mnist")
  (array([0.1307], dtype=float32), array([0.3081], dtype=float32))
  """
  known = _KNOWN.get(name.partition(":")[0])
  if known is not None:
    mean, std = known
    return np.array(mean, np.float32), np.array(std, np.float32)
  dataset = load(
    name, "train", data_dir=data_dir, cache_dir=cache_dir, download=download
  )
  return channel_moments(dataset.images)


def channel_moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the mean and deviation of each channel, on the scale 0..1.

  Args:
    images: [n, height, width, channels]; integers count 0..255.

  Returns:
    float32 [channels] each; a channel that is constant gets deviation 1.

  >>> mean, std = channel_moments(np.full((2, 4, 4, 1), 51, np.uint8))
  >>> mean.tolist(), std.tolist()
  ([0.20000000298023224], [1.0])
  """
  scale = 1.0 if images.dtype.kind == "f" else 1 / 255
  pixels = images.size // images.shape[-1]
  chunks = [
    images[start : start + _CHUNK] for start in range(0, len(images), _CHUNK)
  ]
  # Two passes over chunks: exact, and never the whole set in float64.
  axes = (0, 1, 2)
  mean = sum(c.sum(axes, dtype=np.float64) for c in chunks) * scale / pixels
  squares = sum(((c * scale - mean) ** 2).sum(axes) for c in chunks)
  std = np.sqrt(squares / pixels)
  std = np.where(std > 0, std, 1.0)
  return mean.astype(np.float32), std.astype(np.float32)
