"""The change of a tuned network as an adapter of low rank, in PEFT's layout."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from jaxmerge.recipes import (
  _building,
  _changes,
  _describe,
  _factors,
  _folder,
  _lora,
  _measure,
  _peft,
  _vectors,
  _writing,
  _yaml,
)


class Kept(NamedTuple):
  """A matrix whose change has become two factors.

  Attributes:
    name: of the tensor.
    shape: its shape.
    norm: Euclidean norm of the change.
    share: part of the squared norm that the rank keeps.
  """

  name: str
  shape: tuple[int, ...]
  norm: float
  share: float


class LeftOut(NamedTuple):
  """A tensor that has changed, and that no factors were made of.

  Attributes:
    name: of the tensor.
    norm: Euclidean norm of the change.
    why: why not.
    saved: whether it is in the adapter as a whole.
  """

  name: str
  norm: float
  why: str
  saved: bool


class LoraReport(NamedTuple):
  """What `extract_lora` did.

  Attributes:
    out: the folder of the result.
    rank: that of the factors.
    kept: the matrices.
    left_out: the other tensors that have changed.
    share: part of the squared norm of all changes that the adapter holds.
    bytes_written: bytes of its tensors.
  """

  out: str
  rank: int
  kept: list[Kept]
  left_out: list[LeftOut]
  share: float
  bytes_written: int


def _why_not(change: _changes.Change, conv1d: bool, heads: set[str]) -> str:
  """Why no factors can be made of a tensor; nothing where they can."""
  module = _peft.module_of(change.name)
  if change.name in heads:
    return "of the head, which PEFT saves whole"
  if change.name.endswith(".bias"):
    return "a bias"
  if len(change.base.shape) != 2:
    return f"has {len(change.base.shape)} axes"
  if not module or not change.name.endswith(".weight"):
    return "is no weight of a layer"
  if _peft.EMBEDDING.search(module):
    return "an embedding"
  if conv1d and not _peft.CONV1D_LAYERS.search(module):
    return "is stored as [out, in], unlike the other layers"
  return ""


class _Factored:
  """A matrix whose factors are made when the first of them is written."""

  def __init__(
    self,
    change: _changes.Change,
    norm: float,
    rank: int,
    transposed: bool,
    dtype: np.dtype[Any],
  ) -> None:
    self.change = change
    self.norm = norm
    self.share = math.nan
    self._rank = rank
    self._transposed = transposed
    self._dtype = dtype
    self._up: np.ndarray | None = None

  def _decompose(self) -> np.ndarray:
    """Keeps the one factor, and returns the other."""
    base, tuned = self.change.base, self.change.tuned
    wide = _writing.wide(base, tuned)
    with np.errstate(all="ignore"):
      matrix = np.asarray(tuned).astype(wide) - np.asarray(base).astype(wide)
    matrix = _writing.narrowed(matrix, wide, f"The change of {base.name!r}")
    if self._transposed:
      matrix = matrix.T
    up, down = _factors.factors(matrix, self._rank)
    # The factors' columns and rows are at right angles.
    kept = np.square(np.linalg.norm(up, axis=0).astype(np.float64)) * np.square(
      np.linalg.norm(down, axis=1).astype(np.float64)
    )
    self.share = min(1.0, float(kept.sum()) / self.norm**2)
    self._up = up
    return down

  def made(self, module: str) -> list[_writing.Made]:
    """What is to be written."""
    out, width = self.change.base.shape
    if self._transposed:
      out, width = width, out

    def down() -> _writing.Blocks:
      found = self._decompose()
      yield 0, _writing.narrowed(found, self._dtype, self.change.name)

    def up() -> _writing.Blocks:
      found, self._up = self._up, None
      assert found is not None
      yield 0, _writing.narrowed(found, self._dtype, self.change.name)

    start = f"{_lora.PREFIX}{module}.lora_"
    return [
      _writing.Made(f"{start}A.weight", (self._rank, width), self._dtype, down),
      _writing.Made(f"{start}B.weight", (out, self._rank), self._dtype, up),
    ]


def extract_lora(
  base: _building.Source,
  tuned: _building.Source,
  out: _building.Source,
  rank: int,
  *,
  dtype: str = "float32",
  select: str | None = None,
  save_rest: bool = False,
  overwrite: bool = False,
  weights_only: bool = False,
  seen: _writing.Seen | None = None,
) -> LoraReport:
  r"""Writes the nearest adapter of a rank to what a network was tuned by.

  Of each linear layer's weight :math:`W` that has changed the factors
  :math:`B A` are the truncated singular value decomposition of
  :math:`W_{tuned} - W_{base}`, the nearest product of that rank. Where the
  shorter side is above 1024, and the rank below an eighth of it, the largest
  singular values alone are sought, by Lanczos' method. One matrix is held in
  memory at a time.

  The folder holds adapter_config.json and adapter_model.safetensors as PEFT
  reads them. Embeddings, norms, biases and whatever else is no linear layer are
  reported, and left out unless `save_rest`. The head of a classifier is always
  put in whole, as PEFT does.

  Args:
    base: the checkpoint that was tuned.
    tuned: what became of it.
    out: the folder of the result.
    rank: of the adapter.
    dtype: of the factors.
    select: regular expression; tensors in whose names it finds no match are
      taken for unchanged.
    save_rest: whether other tensors that have changed are put in whole: modules
      as modules_to_save, and biases of the adapted layers.
    overwrite: whether a folder that is there is replaced.
    weights_only: whether pickled checkpoints may be read, by
      ``torch.load(weights_only=True)``.
    seen: told the bytes written so far, and those there are to write.

  Returns:
    What was done, with the share of each squared norm that the rank keeps.

  Raises:
    RecipeError: the rank is below 1, the networks do not fit each other, no
      linear layer has changed, a change is not finite, or the result cannot be
      written.
    CheckpointError: a checkpoint is missing or damaged.

  >>> import tempfile
  >>> from jaxmerge import checkpoints, recipes
  >>> folder = tempfile.TemporaryDirectory()
  >>> for name, value in (("base", 1.0), ("tuned", 3.0)):
  ...   checkpoints.hugging_face.save(
  ...     f"{folder.name}/{name}",
  ...     {"q": {"kernel": np.full((3, 2), value, np.float32)}},
  ...   )
  >>> places = [f"{folder.name}/{name}" for name in ("base", "tuned", "lora")]
  >>> report = recipes.extract_lora(*places, rank=1)
  >>> report.kept[0].name, round(report.share, 6)
  ('q.weight', 1.0)
  >>> sorted(checkpoints.open(places[2]))
  ['base_model.model.q.lora_A.weight', 'base_model.model.q.lora_B.weight']
  >>> folder.cleanup()
  """
  if rank < 1:
    raise _yaml.RecipeError(f"The rank is {rank}. Give 1 or more.")
  kind = _vectors.check_dtype(dtype)
  _building.target_of(out, overwrite)
  first = _building.open_source(base, weights_only=weights_only)
  second = _building.open_source(tuned, weights_only=weights_only)
  found = {
    one.name: one for one in _changes.changes(first, second, select).found
  }
  config = first.config()
  conv1d = config.get("model_type") in _peft.CONV1D
  task = _peft.task_of(config)
  heads = _peft.heads_of(first, task)
  matrices: dict[str, _Factored] = {}
  rest: dict[str, tuple[float, str]] = {}
  for name, change in found.items():
    sums = _measure.measure(change.base, change.tuned)
    norm = math.sqrt(sums.dd)
    if not math.isfinite(norm):
      raise _yaml.RecipeError(
        f"The change of {name!r} from {first.path} to {second.path} is not"
        " finite. Repair the checkpoint that holds NaN or infinity."
      )
    if norm == 0:
      continue
    why = _why_not(change, conv1d, set(heads))
    if why:
      rest[name] = norm, why
    else:
      matrices[name] = _Factored(change, norm, rank, conv1d, kind)
  if not matrices:
    raise _yaml.RecipeError(
      f"No weight of a linear layer differs in {first.path} and {second.path}"
      + (f", among those that {select!r} selects" if select else "")
      + ". Give a network that was tuned, or extract without a rank."
    )
  prefix = _peft.prefix_of(first)
  adapted = {_peft.module_of(name) for name in matrices}
  saved = _peft.Rest(
    prefix, {**first, **{name: change.tuned for name, change in found.items()}}
  )
  for name, module in heads.items():
    saved.add_module(module, [name])
  if save_rest:
    for name in rest:
      if name not in heads:
        saved.add(name, adapted, _describe.tied_head(first))
  made = [
    one
    for name, matrix in matrices.items()
    for one in matrix.made(prefix + _peft.module_of(name))
  ]
  made += [
    _writing.copied(name, tensor) for name, tensor in saved.tensors.items()
  ]
  modules = {
    _peft.module_of(name): None for name in first if _peft.module_of(name)
  }
  with _building.building(
    out,
    [first, second],
    overwrite=overwrite,
    size=sum(one.nbytes for one in made),
  ) as folder:
    written = _writing.write_tensors(folder, made, single=_peft.FILE, seen=seen)
    _folder.write_json(
      folder / "adapter_config.json",
      {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": saved.bias,
        "fan_in_fan_out": conv1d,
        "target_modules": _peft.targets(
          [prefix + name for name in sorted(adapted)],
          [prefix + name for name in modules],
        ),
        "modules_to_save": saved.modules or None,
        "inference_mode": True,
      },
    )
  return _report(out, rank, matrices, rest, saved.names, written)


def _report(
  out: _building.Source,
  rank: int,
  matrices: dict[str, _Factored],
  rest: dict[str, tuple[float, str]],
  whole: set[str],
  written: int,
) -> LoraReport:
  kept = [
    Kept(name, tuple(one.change.base.shape), one.norm, one.share)
    for name, one in matrices.items()
  ]
  left_out = [
    LeftOut(name, norm, why, name in whole)
    for name, (norm, why) in rest.items()
  ]
  total = sum(one.norm**2 for one in kept)
  total += sum(other.norm**2 for other in left_out)
  held = sum(one.share * one.norm**2 for one in kept)
  held += sum(other.norm**2 for other in left_out if other.saved)
  return LoraReport(str(out), rank, kept, left_out, held / total, written)
