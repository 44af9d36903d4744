"""Task vectors as checkpoints: taken from a network, and added to one."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

import jaxmerge
from jaxmerge import checkpoints
from jaxmerge.checkpoints import _open
from jaxmerge.recipes import (
  _blocks,
  _building,
  _changes,
  _folder,
  _lora,
  _plan,
  _ties,
  _writing,
  _yaml,
)

Tensor = Any
#: The file that says of what a task vector is.
RECORD = "jaxmerge_vector.json"


class ExtractReport(NamedTuple):
  """What `extract` did.

  Attributes:
    out: the folder of the result.
    tensors: names of its tensors.
    left_out: name of any other tensor -> why.
    bytes_written: bytes of its tensors.
  """

  out: str
  tensors: list[str]
  left_out: dict[str, str]
  bytes_written: int


class ApplyReport(NamedTuple):
  """What `apply_vector` did.

  Attributes:
    out: the folder of the result.
    changed: names of the tensors that the vector changed.
    copied: names of the others.
    bytes_written: bytes of all of them.
  """

  out: str
  changed: list[str]
  copied: list[str]
  bytes_written: int


def _difference(
  change: _changes.Change, dtype: np.dtype[Any], owner: Any
) -> _writing.Made:
  """The tensor of a task vector."""
  wide = _writing.wide(change.base, change.tuned)
  what = f"{owner}: the change of {change.name!r}"

  def blocks() -> _writing.Blocks:
    for start, stop in _writing.spans(change.base.size):
      first = change.base.read(start, stop).astype(wide)
      # What is no number is named below.
      with np.errstate(all="ignore"):
        difference = change.tuned.read(start, stop).astype(wide) - first
      yield start, _writing.narrowed(difference, dtype, what)

  return _writing.Made(change.name, tuple(change.base.shape), dtype, blocks)


def check_dtype(name: str) -> np.dtype[Any]:
  """The dtype of a name.

  Args:
    name: as it was given.

  Returns:
    The dtype.

  Raises:
    RecipeError: it is none of those for results.
  """
  if name not in _plan.DTYPES:
    raise _yaml.RecipeError(
      f"There is no dtype {name!r} for a result. Choose one of"
      f" {', '.join(sorted(_plan.DTYPES))}."
    )
  return _plan.DTYPES[name]


def extract(
  base: _building.Source,
  tuned: _building.Source,
  out: _building.Source,
  *,
  dtype: str = "float32",
  select: str | None = None,
  overwrite: bool = False,
  max_shard_bytes: int = _writing.SHARD_BYTES,
  weights_only: bool = False,
  seen: _writing.Seen | None = None,
) -> ExtractReport:
  r"""Writes the task vector :math:`\tau = \theta_{tuned} - \theta_{base}`.

  It is a checkpoint of safetensors with the names of the base, with the tuned
  network's config.json, and a jaxmerge_vector.json that says of what it is.
  Differences are taken in float32 (float64 of such tensors), block by block;
  tensors that hold no floating-point numbers are left out.

  Args:
    base: the checkpoint that was tuned.
    tuned: what became of it.
    out: the folder of the result.
    dtype: of the result.
    select: regular expression; tensors in whose names it finds no match are
      left out.
    overwrite: whether a folder that is there is replaced.
    max_shard_bytes: bytes of a file of the result, but for larger tensors.
    weights_only: whether pickled checkpoints may be read, by
      ``torch.load(weights_only=True)``.
    seen: told the bytes written so far, and those there are to write.

  Returns:
    What was done.

  Raises:
    RecipeError: the networks do not fit each other, a difference is not finite,
      or the result cannot be written.
    CheckpointError: a checkpoint is missing or damaged.

  >>> import tempfile
  >>> from jaxmerge import checkpoints, recipes
  >>> folder = tempfile.TemporaryDirectory()
  >>> for name, value in (("base", 1.0), ("tuned", 3.0)):
  ...   checkpoints.hugging_face.save(
  ...     f"{folder.name}/{name}", {"w": np.full(2, value, np.float32)}
  ...   )
  >>> places = [f"{folder.name}/{name}" for name in ("base", "tuned", "vector")]
  >>> recipes.extract(*places).tensors
  ['w']
  >>> np.asarray(checkpoints.open(places[2])["w"])
  array([2., 2.], dtype=float32)
  >>> folder.cleanup()
  """
  kind = check_dtype(dtype)
  _building.target_of(out, overwrite)
  first = _building.open_source(base, weights_only=weights_only)
  second = _building.open_source(tuned, weights_only=weights_only)
  found = _changes.changes(first, second, select)
  made = [_difference(change, kind, second.path) for change in found.found]
  with _building.building(
    out,
    [first, second],
    overwrite=overwrite,
    size=sum(one.nbytes for one in made),
  ) as folder:
    written = _writing.write_tensors(
      folder, made, max_shard_bytes=max_shard_bytes, seen=seen
    )
    config = second.config()
    if config:
      _folder.write_json(folder / "config.json", config)
    _folder.write_json(
      folder / RECORD,
      {
        "jaxmerge": jaxmerge.__version__,
        "kind": "task vector",
        "base": str(base),
        "tuned": str(tuned),
        "dtype": dtype,
        "select": select,
        "left_out": found.left_out,
      },
    )
  return ExtractReport(
    str(out), [one.name for one in made], found.left_out, written
  )


def apply_vector(
  base: _building.Source,
  vector: _building.Source,
  out: _building.Source,
  *,
  scale: float = 1.0,
  overwrite: bool = False,
  max_shard_bytes: int = _writing.SHARD_BYTES,
  weights_only: bool = False,
  seen: _writing.Seen | None = None,
) -> ApplyReport:
  r"""Writes :math:`\theta_{base} + s \tau`, block by block.

  An adapter's :math:`\tau` is :math:`(\alpha / r) B A`, and for a tensor that
  it replaces the difference from the base's. Sums are taken in float32 (float64
  of such tensors) and rounded once, to the dtype of the base.

  Args:
    base: the checkpoint.
    vector: what `extract` or `extract_lora` wrote, or any LoRA in PEFT's
      layout.
    out: the folder of the result: safetensors with the base's configuration and
      tokenizer.
    scale: what the vector is multiplied by.
    overwrite: whether a folder that is there is replaced.
    max_shard_bytes: bytes of a file of the result, but for larger tensors.
    weights_only: whether pickled checkpoints may be read, by
      ``torch.load(weights_only=True)``.
    seen: told the bytes written so far, and those there are to write.

  Returns:
    What was done.

  Raises:
    RecipeError: the scale is not finite, the vector is none or does not fit the
      base, a sum is not finite, or the result cannot be written.
    CheckpointError: a checkpoint is missing or damaged, or the adapter is no
      LoRA that fits the base.

  >>> import tempfile
  >>> from jaxmerge import checkpoints, recipes
  >>> folder = tempfile.TemporaryDirectory()
  >>> for name, value in (("base", 1.0), ("tuned", 3.0)):
  ...   checkpoints.hugging_face.save(
  ...     f"{folder.name}/{name}", {"w": np.full(2, value, np.float32)}
  ...   )
  >>> base, tuned, vector, out = (
  ...   f"{folder.name}/{name}" for name in ("base", "tuned", "vector", "out")
  ... )
  >>> _ = recipes.extract(base, tuned, vector)
  >>> recipes.apply_vector(base, vector, out, scale=0.5).changed
  ['w']
  >>> np.asarray(checkpoints.open(out)["w"])
  array([2., 2.], dtype=float32)
  >>> folder.cleanup()
  """
  if not math.isfinite(scale):
    raise _yaml.RecipeError(f"The scale is {scale}. Give a finite one.")
  _building.target_of(out, overwrite)
  first = _building.open_source(base, weights_only=weights_only)
  second = _building.open_source(vector, weights_only=weights_only)
  if second.is_adapter:
    changed = _of_adapter(first, second, scale)
  else:
    changed = _of_vector(first, second, scale)
  made = [
    changed.get(name) or _writing.copied(name, tensor)
    for name, tensor in first.items()
  ]
  with _building.building(
    out,
    [first, second],
    overwrite=overwrite,
    size=sum(one.nbytes for one in made),
  ) as folder:
    written = _writing.write_tensors(
      folder, made, max_shard_bytes=max_shard_bytes, seen=seen
    )
    _building.carry_others(first, folder)
  return ApplyReport(
    str(out),
    [name for name in first if name in changed],
    [name for name in first if name not in changed],
    written,
  )


def _check_fit(
  owner: checkpoints.Checkpoint,
  name: str,
  shape: tuple[int, ...],
  place: str | None,
  base: checkpoints.Checkpoint,
) -> str:
  """The base's name of a tensor that is changed."""
  if place is None or place not in base:
    raise _yaml.RecipeError(
      f"{owner.path} changes {name!r}, which {base.path} has not. Give the"
      " network that it was made of."
    )
  if shape != tuple(base[place].shape):
    raise _yaml.RecipeError(
      f"{owner.path} changes {name!r} of shape {shape}, which is"
      f" {tuple(base[place].shape)} in {base.path}. Give the network that it"
      " was made of."
    )
  if not _changes.is_float(base[place]):
    raise _yaml.RecipeError(
      f"{owner.path} changes {name!r}, which is {base[place].dtype} in"
      f" {base.path}. Give a network of floating-point numbers."
    )
  return place


def _of_vector(
  base: checkpoints.Checkpoint, vector: checkpoints.Checkpoint, scale: float
) -> dict[str, _writing.Made]:
  if not (vector.folder / RECORD).exists():
    raise _yaml.RecipeError(
      f"{vector.path} holds neither {RECORD} nor {_open.ADAPTER}: it"
      " is no task vector. Make one by jaxmerge extract."
    )
  return {
    _check_fit(vector, name, tuple(tensor.shape), name, base): _added(
      name, base[name], tensor, scale, vector
    )
    for name, tensor in vector.items()
  }


def _added(
  name: str,
  base: Tensor,
  change: Tensor,
  scale: float,
  owner: checkpoints.Checkpoint,
) -> _writing.Made:
  """base + scale * change."""
  wide = _writing.wide(base, change)
  dtype = np.dtype(base.dtype)
  what = f"{name!r} with {owner.path}"

  def blocks() -> _writing.Blocks:
    for start, stop in _writing.spans(base.size):
      first = base.read(start, stop).astype(wide)
      with np.errstate(all="ignore"):
        first += wide.type(scale) * change.read(start, stop).astype(wide)
      yield start, _writing.narrowed(first, dtype, what)

  return _writing.Made(name, tuple(base.shape), dtype, blocks)


def _replaced(
  name: str,
  base: Tensor,
  other: Tensor,
  scale: float,
  owner: checkpoints.Checkpoint,
) -> _writing.Made:
  """base + scale * (other - base); the other itself for a scale of 1."""
  wide = _writing.wide(base, other)
  dtype = np.dtype(base.dtype)
  what = f"{name!r} with {owner.path}"

  def blocks() -> _writing.Blocks:
    for start, stop in _writing.spans(base.size):
      values = other.read(start, stop).astype(wide)
      if scale != 1:
        first = base.read(start, stop).astype(wide)
        with np.errstate(all="ignore"):
          values = first + wide.type(scale) * (values - first)
      yield start, _writing.narrowed(values, dtype, what)

  return _writing.Made(name, tuple(base.shape), dtype, blocks)


def _of_adapter(
  base: checkpoints.Checkpoint, adapter: checkpoints.Checkpoint, scale: float
) -> dict[str, _writing.Made]:
  parts = _lora.read(adapter)
  found = {}
  for name, pair in parts.pairs.items():
    place = _lora._match(name, base)
    place = _check_fit(adapter, name, pair.shape, place, base)
    found[place] = _with_product(place, base[place], pair, scale, adapter)
  for name, tensor in parts.replaced.items():
    # The bias of a layer that PEFT has put another one around.
    name = name.replace(".base_layer.", ".")
    place = _lora._match(name, base)
    if place is None and _has_twin(name, base, parts.replaced):
      continue
    place = _check_fit(adapter, name, tuple(tensor.shape), place, base)
    found[place] = _replaced(place, base[place], tensor, scale, adapter)
  return found


def _has_twin(
  name: str, base: checkpoints.Checkpoint, replaced: dict[str, Tensor]
) -> bool:
  """Whether a tensor is tied to one of the base, which is replaced, too."""
  other = _ties.twin(name, replaced)
  return other is not None and _lora._match(other, base) is not None


def _with_product(
  name: str,
  base: Tensor,
  pair: _lora.Pair,
  scale: float,
  owner: checkpoints.Checkpoint,
) -> _writing.Made:
  """base + scale * product, some rows of it at a time."""
  wide = _writing.wide(base)
  dtype = np.dtype(base.dtype)
  what = f"{name!r} with {owner.path}"
  rows, width = pair.shape
  step = max(1, _blocks.BLOCK // max(1, width))

  def blocks() -> _writing.Blocks:
    down = np.asarray(pair.down).astype(wide)
    up = np.asarray(pair.up).astype(wide)
    left, right = (down.T, up.T) if pair.transposed else (up, down)
    for first in range(0, rows, step):
      last = min(first + step, rows)
      start, stop = first * width, last * width
      values = base.read(start, stop).astype(wide)
      with np.errstate(all="ignore"):
        product = (left[first:last] @ right).reshape(-1)
        values += wide.type(scale * pair.scale) * product
      yield start, _writing.narrowed(values, dtype, what)

  return _writing.Made(name, pair.shape, dtype, blocks)
