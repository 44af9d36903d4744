"""Images that are decoded when they are needed, as CLIP prepares them."""

from __future__ import annotations

import dataclasses
import io
import math
import os
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np

from jaxmerge.data._dataset import DataError
from jaxmerge.data._prepare import prepare
from jaxmerge.data._tfds import (
  PREPARABLE,
  build_command,
  find_prepared,
  parse,
  require,
  tfds_root,
)

_BICUBIC = 3  # As PIL numbers it; whoever needs no image imports no PIL.


def clip_preprocess(image: Any, side: int) -> np.ndarray:
  """CLIP's preparation: the shorter side resized, the centre cut out.

  Args:
    image: uint8 `[height, width, 3]`, or a PIL image.
    side: of the result.

  Returns:
    uint8 `[side, side, 3]`.

  >>> clip_preprocess(np.zeros((40, 60, 3), np.uint8), 8).shape
  (8, 8, 3)
  """
  picture = _rgb(image)
  width, height = picture.size
  scale = side / min(width, height)
  # As torchvision rounds: the longer side down.
  size = (
    (side, int(side * height / width))
    if width <= height
    else (int(side * width / height), side)
  )
  if scale != 1:
    picture = picture.resize(size, _BICUBIC)
  width, height = picture.size
  left, top = round((width - side) / 2), round((height - side) / 2)
  return np.asarray(picture.crop((left, top, left + side, top + side)))


def clip_augment(
  image: Any,
  side: int,
  draws: np.random.Generator,
  *,
  area: tuple[float, float] = (0.9, 1.0),
) -> np.ndarray:
  """CLIP's augmentation: a random part of the image, resized.

  The part has a share of the image's area drawn from `area`, and a ratio of its
  sides drawn log-uniformly from 3/4 to 4/3. Where no such part fits the image,
  at the tenth try, it is the largest one in the centre whose ratio lies there,
  as in torchvision.

  Args:
    image: uint8 `[height, width, 3]`, or a PIL image.
    side: of the result.
    draws: random numbers.
    area: smallest and largest share.

  Returns:
    uint8 `[side, side, 3]`.

  >>> draws = np.random.default_rng(0)
  >>> clip_augment(np.zeros((40, 60, 3), np.uint8), 8, draws).shape
  (8, 8, 3)
  """
  picture = _rgb(image)
  width, height = picture.size
  wide = min(width, round(height * 4 / 3))
  tall = min(height, round(width * 4 / 3))
  left, top = (width - wide) // 2, (height - tall) // 2
  box = (left, top, left + wide, top + tall)
  for _ in range(10):
    pixels = width * height * draws.uniform(*area)
    ratio = math.exp(draws.uniform(math.log(3 / 4), math.log(4 / 3)))
    wide = round(math.sqrt(pixels * ratio))
    tall = round(math.sqrt(pixels / ratio))
    if 0 < wide <= width and 0 < tall <= height:
      left = int(draws.integers(0, width - wide + 1))
      top = int(draws.integers(0, height - tall + 1))
      box = (left, top, left + wide, top + tall)
      break
  return np.asarray(picture.resize((side, side), _BICUBIC, box))


def _rgb(image: Any) -> Any:
  """A PIL image of three channels."""
  from PIL import Image

  if isinstance(image, bytes):
    image = Image.open(io.BytesIO(image))
  elif not isinstance(image, Image.Image):
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[-1] == 1:
      array = array[..., 0]
    image = Image.fromarray(array)
  return image.convert("RGB")


@dataclasses.dataclass(frozen=True, eq=False)
class LazyImages:
  """Images of any size, decoded and prepared when they are asked for.

  `images[rows]` is an array, for whatever indexes a vector; threads decode,
  since the library that does lets others run meanwhile.

  Attributes:
    fetch: `fetch(rows) -> sequence of images`: encoded, arrays or of PIL.
    size: number of images.
    side: side of what is made of them.
    threads: number of threads.
  """

  fetch: Callable[[np.ndarray], Sequence[Any]]
  size: int
  side: int
  threads: int = dataclasses.field(
    default_factory=lambda: min(16, os.cpu_count() or 1)
  )

  @property
  def shape(self) -> tuple[int, int, int, int]:
    """Shape of all of them."""
    return self.size, self.side, self.side, 3

  @property
  def dtype(self) -> np.dtype[Any]:
    """uint8."""
    return np.dtype(np.uint8)

  def __len__(self) -> int:
    """Number of images."""
    return self.size

  def __getitem__(self, rows: Any) -> np.ndarray:
    """Prepares some images as CLIP does: uint8 `[n, side, side, 3]`."""
    return self._map(rows, lambda image, _: clip_preprocess(image, self.side))

  def augmented(self, rows: Any, draws: np.random.Generator) -> np.ndarray:
    """Random parts of some images, as CLIP is trained on.

    Args:
      rows: which images.
      draws: random numbers; each image has its own stream, so that the number
        of threads changes nothing.

    Returns:
      uint8 `[n, side, side, 3]`.
    """
    words = draws.integers(0, 2**63, 2).tolist()

    def one(image: Any, place: int) -> np.ndarray:
      own = np.random.Generator(np.random.PCG64([*words, place]))
      return clip_augment(image, self.side, own)

    return self._map(rows, one)

  def _map(
    self, rows: Any, make: Callable[[Any, int], np.ndarray]
  ) -> np.ndarray:
    # Numbers, slices and masks; IndexError for a row that is not there.
    rows = np.arange(self.size)[rows]
    flat = rows.reshape(-1)
    made = np.empty((len(flat), self.side, self.side, 3), np.uint8)
    chunk = 64

    def work(start: int) -> None:
      part = flat[start : start + chunk]
      for place, image in enumerate(self.fetch(part), start):
        made[place] = make(image, place)

    with futures.ThreadPoolExecutor(self.threads) as pool:
      # A list, so that an error in a thread is raised here.
      list(pool.map(work, range(0, len(flat), chunk)))
    return made.reshape(*rows.shape, *made.shape[1:])


class ImageSource(NamedTuple):
  """A split of images; a `jaxmerge.continual.streams.Source`.

  Attributes:
    inputs: the images.
    labels: int32 `[n]`.
    class_names: as the set has them.
  """

  inputs: LazyImages
  labels: np.ndarray
  class_names: tuple[str, ...]

  @property
  def num_classes(self) -> int:
    """The number of classes of the set."""
    return len(self.class_names)


def open_images(
  name: str,
  split: str,
  *,
  side: int,
  data_dir: str | os.PathLike[str] | None = None,
) -> ImageSource:
  """Opens a split of a TFDS set of images of any size, without TensorFlow.

  Args:
    name: of the set, as in "cifar100", "imagenet_r" or "cars196".
    split: a split of it, or a part of one, "test[:80%]" say.
    side: side in pixels of what the images are made into.
    data_dir: the TFDS folder; None for TFDS_DATA_DIR or ~/tensorflow_datasets.

  Returns:
    The split.

  Raises:
    DataError: the set is not prepared and cannot be, or has not one image and
      one label an example.
  """
  request = parse(name)
  root = tfds_root(data_dir)
  folder = find_prepared(request, root)
  if folder is None:
    if request.name not in PREPARABLE:
      raise DataError(
        f"{name} is not prepared in {root}: once, where there is a network,"
        " run pip install 'jaxmerge[tfds-prepare]' and then"
        f" {build_command(request, root)}; or set data_dir to a folder with it."
      )
    folder = prepare(request, root, download=True)
  with require(name):
    import tensorflow_datasets as tfds
  builder = tfds.builder_from_directory(folder)
  features = builder.info.features
  kinds = tfds.features
  found = [
    [key for key in features if isinstance(features[key], kind)]
    for kind in (kinds.Image, kinds.ClassLabel)
  ]
  keys = builder.info.supervised_keys or ()
  if len(keys) == 2:
    found = [[key] for key in keys]
  if any(len(names) != 1 for names in found):
    raise DataError(
      f"{name} has not one image and one class label among its features"
      f" {list(features)}: choose another set."
    )
  (image_key,), (label_key,) = found
  source = builder.as_data_source(
    split, decoders={image_key: tfds.decode.SkipDecoding()}
  )
  count = len(source)
  labels = np.empty(count, np.int32)
  for start in range(0, count, 1024):
    rows = range(start, min(start + 1024, count))
    for row, record in zip(rows, source.__getitems__(rows), strict=True):
      labels[row] = record[label_key]

  def fetch(rows: np.ndarray) -> list[Any]:
    records = source.__getitems__([int(row) for row in rows])
    return [record[image_key] for record in records]

  return ImageSource(
    LazyImages(fetch, count, side),
    labels,
    tuple(features[label_key].names),
  )
