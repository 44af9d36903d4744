"""What two checkpoints differ in: structure, and distance tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxmerge import checkpoints
from jaxmerge.recipes import _building, _changes, _measure

Tensor = Any


class TaskDifference(NamedTuple):
  """What two task vectors differ in: those of A and B from one base.

  Attributes:
    norm_a: Euclidean norm of A's.
    norm_b: of B's.
    cosine: of the angle between them; NaN where one of them is zero.
    kept: number of entries where one of them is not zero.
    shared: of those where neither is.
    conflicts: of those where they differ in sign.
  """

  norm_a: float
  norm_b: float
  cosine: float
  kept: int
  shared: int
  conflicts: int

  @property
  def rate(self) -> float:
    """Conflicts per entry that is kept, as `merging.sign_conflicts` has it."""
    return self.conflicts / self.kept if self.kept else 0.0


class TensorDifference(NamedTuple):
  """What two tensors differ in.

  Attributes:
    name: their name.
    shape: their shape.
    dtypes: that of A's and that of B's.
    entries: number of their entries.
    changed: number of those that differ.
    odd: number of those that are NaN or infinite in A or B.
    norm: Euclidean norm of B's less A's.
    relative: the same per norm of A's; NaN where both are zero.
    cosine: of the angle between A's and B's; NaN where one of them is zero.
    largest: the largest magnitude of B's less A's.
    task: what their differences from a base differ in; None without.
  """

  name: str
  shape: tuple[int, ...]
  dtypes: tuple[str, str]
  entries: int
  changed: int
  odd: int
  norm: float
  relative: float
  cosine: float
  largest: float
  task: TaskDifference | None = None


class Comparison(NamedTuple):
  """What two checkpoints differ in.

  Attributes:
    only_a: names of tensors that B lacks.
    only_b: names of tensors that A lacks.
    shapes: name of a tensor of two shapes -> that of A's and that of B's.
    dtypes: name of a tensor of two dtypes -> that of A's and that of B's.
    no_base: names of tensors that the base lacks, or has in another shape.
    tensors: those that both have in one shape, in the order of A.
    total: the same over all of them that hold floating-point numbers.
  """

  only_a: list[str]
  only_b: list[str]
  shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
  dtypes: dict[str, tuple[str, str]]
  no_base: list[str]
  tensors: list[TensorDifference]
  total: TensorDifference

  @property
  def same_structure(self) -> bool:
    """Whether both have the same tensors, of the same shapes and dtypes."""
    return not (self.only_a or self.only_b or self.shapes or self.dtypes)


def _cosine(product: float, one: float, other: float) -> float:
  scale = math.sqrt(one) * math.sqrt(other)
  if not scale > 0:
    return math.nan
  found = product / scale
  return found if math.isnan(found) else min(1.0, max(-1.0, found))


def _difference(
  name: str,
  shape: tuple[int, ...],
  dtypes: tuple[str, str],
  sums: _measure.Sums,
  has_base: bool,
) -> TensorDifference:
  norm, norm_a = math.sqrt(sums.dd), math.sqrt(sums.aa)
  relative = math.nan
  if norm_a > 0 or norm > 0:
    relative = norm / norm_a if norm_a > 0 else math.inf
  task = None
  if has_base:
    task = TaskDifference(
      math.sqrt(sums.uu),
      math.sqrt(sums.vv),
      _cosine(sums.uv, sums.uu, sums.vv),
      sums.kept,
      sums.shared,
      sums.conflicts,
    )
  return TensorDifference(
    name,
    shape,
    dtypes,
    sums.entries,
    sums.changed,
    sums.odd,
    norm,
    relative,
    _cosine(sums.ab, sums.aa, sums.bb),
    sums.largest,
    task,
  )


class _Counter:
  """Adds up bytes and tells somebody."""

  def __init__(
    self, seen: Callable[[int, int], None] | None, total: int
  ) -> None:
    self._seen = seen
    self._total = total
    self._done = 0

  def __call__(self, size: int) -> None:
    self._done += size
    if self._seen is not None:
      self._seen(self._done, max(self._total, self._done))


def compare(
  a: _building.Source,
  b: _building.Source,
  *,
  base: _building.Source | None = None,
  weights_only: bool = False,
  seen: Callable[[int, int], None] | None = None,
) -> Comparison:
  """Compares two checkpoints, a block of a tensor in memory at a time.

  Args:
    a: a checkpoint.
    b: another one.
    base: what both were tuned from, if their task vectors are to be compared.
    weights_only: whether pickled checkpoints may be read, by
      ``torch.load(weights_only=True)``.
    seen: told the bytes read so far, and those there are to read.

  Returns:
    What they differ in.

  Raises:
    CheckpointError: a checkpoint is missing or damaged.
    RecipeError: a file of one is a link out of its folder.

  >>> import tempfile
  >>> import numpy as np
  >>> from jaxmerge import checkpoints, recipes
  >>> folder = tempfile.TemporaryDirectory()
  >>> for name, value in (("a", [3.0, 4.0]), ("b", [3.0, 1.0])):
  ...   checkpoints.hugging_face.save(
  ...     f"{folder.name}/{name}", {"w": np.asarray(value, np.float32)}
  ...   )
  >>> found = recipes.compare(f"{folder.name}/a", f"{folder.name}/b")
  >>> found.same_structure, found.total.norm, found.total.relative
  (True, 3.0, 0.6)
  >>> folder.cleanup()
  """
  first = _building.open_source(a, weights_only=weights_only)
  second = _building.open_source(b, weights_only=weights_only)
  origin = None
  if base is not None:
    origin = _building.open_source(base, weights_only=weights_only)
  both = [name for name in first if name in second]
  shapes = {
    name: (tuple(first[name].shape), tuple(second[name].shape))
    for name in both
    if tuple(first[name].shape) != tuple(second[name].shape)
  }
  kinds = {
    name: (str(first[name].dtype), str(second[name].dtype)) for name in both
  }
  compared = [name for name in both if name not in shapes]
  no_base = []
  triples: list[tuple[str, Tensor, Tensor, Tensor | None]] = []
  for name in compared:
    third = _of_base(origin, name, tuple(first[name].shape))
    if origin is not None and third is None:
      no_base.append(name)
    triples.append((name, first[name], second[name], third))
  counter = _Counter(
    seen,
    sum(
      one.nbytes
      for _, *tensors in triples
      for one in tensors
      if one is not None
    ),
  )
  found = []
  total = _measure.Sums()
  for name, one, two, third in triples:
    sums = _measure.measure(one, two, third, counter)
    found.append(
      _difference(name, tuple(one.shape), kinds[name], sums, third is not None)
    )
    if _changes.is_float(one) and _changes.is_float(two):
      total = total.plus(sums)
  return Comparison(
    [name for name in first if name not in second],
    [name for name in second if name not in first],
    shapes,
    {name: pair for name, pair in kinds.items() if pair[0] != pair[1]},
    no_base,
    found,
    _difference("total", (), ("", ""), total, origin is not None),
  )


def _of_base(
  base: checkpoints.Checkpoint | None, name: str, shape: tuple[int, ...]
) -> Tensor | None:
  if base is None or name not in base or tuple(base[name].shape) != shape:
    return None
  return base[name]
