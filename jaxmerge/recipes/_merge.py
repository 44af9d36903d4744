"""Merging checkpoints that are larger than memory, by a recipe."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jaxmerge
from jaxmerge import checkpoints
from jaxmerge.recipes import (
  _adapters,
  _blocks,
  _building,
  _card,
  _digests,
  _engine,
  _folder,
  _models,
  _peft,
  _plan,
  _planner,
  _recipe,
  _schema,
  _shards,
  _tokens,
  _yaml,
)

Source = str | os.PathLike[str] | Mapping[str, Any]
#: Bytes of a file of the result.
SHARD_BYTES = 5_000_000_000


@dataclasses.dataclass(frozen=True)
class MergeReport:
  """What a merge did.

  Attributes:
    out: the folder of the result.
    tensors: number of its tensors.
    bytes_written: bytes of its tensors.
    bytes_read: bytes that were read for them, again where they were read again.
    resumed: number of files that an earlier, interrupted merge had finished.
    missing_tokens: where vocabularies were merged, for each model the number of
      tokens that it has no row of its own for.
  """

  out: pathlib.Path
  tensors: int
  bytes_written: int
  bytes_read: int
  resumed: int
  missing_tokens: dict[str, int]


@dataclasses.dataclass(frozen=True)
class MergePlan:
  """What a merge would do.

  Attributes:
    tensors: for each tensor of the result its name, shape, dtype, the models
      that it is merged of, and the method.
    files: names of the files of the result.
    bytes_to_read: bytes of all inputs, each counted once.
    bytes_to_write: bytes of the result.
    peak_bytes: an estimate of the memory beside that of the program itself.
  """

  tensors: list[dict[str, Any]]
  files: list[str]
  bytes_to_read: int
  bytes_to_write: int
  peak_bytes: int


def _references(recipe: _schema.Recipe) -> dict[str, _schema.Model]:
  """All models of a recipe by name, in their order."""
  found: list[_schema.Model] = [one.model for one in recipe.models or []]
  slices = list(recipe.slices or [])
  for module in (recipe.modules or {}).values():
    found += [one.model for one in module.models or []]
    slices += module.slices or []
  for one in slices:
    found += [source.model for source in one.sources]
    found += [one.base_model] if one.base_model else []
  if recipe.base_model:
    found.append(recipe.base_model)
  return {str(model): model for model in found}


def _prepare(
  source: Source, weights_only: bool
) -> tuple[_yaml.Document, _plan.Plan]:
  document, recipe = _recipe.load(source)
  models = {}
  for name, reference in _references(recipe).items():
    models[name] = _models.OpenModel(reference, weights_only=weights_only)
  adapters = _adapters.are_adapters(recipe, models)
  plan = _planner.make_plan(document, recipe, models)
  return document, _adapters.factor(plan) if adapters else plan


def plan_merge(
  source: Source,
  *,
  max_shard_bytes: int = SHARD_BYTES,
  weights_only: bool = False,
) -> MergePlan:
  """Says what a merge would do; only headers of files are read.

  Args:
    source: the recipe, see `merge_checkpoints`.
    max_shard_bytes: bytes of a file of the result.
    weights_only: whether pickled weights may be read.

  Returns:
    The plan.

  Raises:
    RecipeError: as `merge_checkpoints`.
    CheckpointError: likewise.
  """
  _, plan = _prepare(source, weights_only)
  shards = _divide(plan, max_shard_bytes)
  return MergePlan(
    [
      {
        "name": output.name,
        "shape": list(output.shape),
        "dtype": str(output.dtype),
        "models": list(output.models),
        "method": "copy" if output.call is None else plan.method.name,
      }
      for output in plan.outputs
    ],
    [shard.name for shard in shards],
    sum(_inputs(plan).values()),
    sum(output.nbytes for output in plan.outputs),
    _engine.peak_bytes(plan),
  )


def _inputs(plan: _plan.Plan) -> dict[int, int]:
  """The bytes of all tensors that are read, each once."""
  return {
    id(tensor): tensor.nbytes
    for output in plan.outputs
    for tensor in output.inputs
  }


def _divide(plan: _plan.Plan, max_shard_bytes: int) -> list[_shards.Shard]:
  single = _peft.FILE if plan.adapter else None
  sizes = [output.nbytes for output in plan.outputs]
  return _shards.divide(sizes, max_shard_bytes, single)


def _fingerprint(plan: _plan.Plan, max_shard_bytes: int) -> str:
  """What the bytes of a result depend on."""
  files = {}
  for model in plan.models.values():
    for tensor in model.checkpoint.values():
      file = getattr(tensor, "file", None)
      if file is not None and str(file) not in files:
        found = file.stat()
        files[str(file)] = [found.st_size, found.st_mtime_ns]
  content = {
    "version": jaxmerge.__version__,
    "recipe": plan.recipe.model_dump(mode="json"),
    "files": files,
    "outputs": [
      [output.name, list(output.shape), str(output.dtype)]
      for output in plan.outputs
    ],
    "block": _blocks.BLOCK,
    "shard": max_shard_bytes,
  }
  return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def merge_checkpoints(
  source: Source,
  out: str | os.PathLike[str],
  *,
  overwrite: bool = False,
  max_shard_bytes: int = SHARD_BYTES,
  weights_only: bool = False,
  seen: Callable[[int, int], None] | None = None,
) -> MergeReport:
  """Merges checkpoints by a recipe, in memory that does not depend on them.

  The recipe is mergekit's configuration; see docs/checkpoints.md for what is
  different. The result is built in a folder beside its place and renamed in
  the end. A merge that is interrupted goes on with the next file when it is
  started again, and ends with the same bytes.

  Args:
    source: a file of YAML, or what it would hold as a mapping.
    out: the folder of the result: safetensors with config and tokenizer of the
      base (or the first model), README.md with the recipe, and jaxmerge.json
      with checksums.
    overwrite: whether a folder that is there is replaced.
    max_shard_bytes: bytes of a file of the result, but for larger tensors.
    weights_only: whether models that are pickled may be read, by
      ``torch.load(weights_only=True)``.
    seen: told the bytes read and written so far, and all of them, while
      merging; tensors that are read several times count again.

  Returns:
    What was done.

  Raises:
    RecipeError: the recipe is wrong (with its line), models do not fit it or
      each other, a result is not finite, or it cannot be written.
    CheckpointError: a checkpoint is missing or damaged.

  >>> import tempfile
  >>> import numpy as np
  >>> from jaxmerge import checkpoints, recipes
  >>> folder = tempfile.TemporaryDirectory()
  >>> for name, value in (("a", 1.0), ("b", 3.0)):
  ...   checkpoints.hugging_face.save(
  ...     f"{folder.name}/{name}", {"w": np.full(2, value)}
  ...   )
  >>> recipe = {
  ...   "merge_method": "linear",
  ...   "parameters": {"weight": 1.0},
  ...   "models": [{"model": f"{folder.name}/{name}"} for name in "ab"],
  ... }
  >>> report = recipes.merge_checkpoints(recipe, f"{folder.name}/merged")
  >>> np.asarray(checkpoints.open(report.out)["w"])
  array([2., 2.])
  >>> folder.cleanup()
  """
  target = pathlib.Path(os.path.abspath(out))
  if max_shard_bytes < 1:
    raise ValueError(f"max_shard_bytes must be positive; got {max_shard_bytes}")
  _folder.check_target(target, overwrite)
  document, plan = _prepare(source, weights_only)
  for model in plan.models.values():
    _building.check_apart(target, model.opened)
  total = sum(output.nbytes for output in plan.outputs)
  to_read = sum(_inputs(plan).values())
  counter = _Counter(seen, to_read + total)
  staging = _Staged(target, plan, max_shard_bytes)
  engine = _engine.Engine(plan, staging.digests, counter.add)
  try:
    _folder.check_room(target, total - staging.bytes_done)
    for shard in staging.shards:
      if shard.name not in staging.found.done:
        staging.write(shard, engine)
    staging.finish(document)
  except OSError as error:
    staging.found.discard()
    raise _folder.explain(error, staging.found.folder) from error
  except (ValueError, TypeError):
    staging.found.discard()
    raise
  finally:
    engine.close()
  return MergeReport(
    target,
    len(plan.outputs),
    total,
    counter.read,
    staging.resumed,
    {} if plan.tokens is None else plan.tokens.missing,
  )


class _Counter:
  """Adds up bytes and tells somebody."""

  def __init__(
    self, seen: Callable[[int, int], None] | None, total: int
  ) -> None:
    self._seen = seen
    self._total = total
    self.read = 0
    self.written = 0

  def add(self, read: int, written: int) -> None:
    self.read += read
    self.written += written
    if self._seen is not None:
      self._seen(self.read + self.written, self._total)


class _Staged:
  """A result that is being built."""

  def __init__(
    self, target: pathlib.Path, plan: _plan.Plan, max_shard_bytes: int
  ) -> None:
    self.plan = plan
    self.shards = _divide(plan, max_shard_bytes)
    self.found = _folder.Staging(target, _fingerprint(plan, max_shard_bytes))
    self.resumed = len(self.found.done)
    self.digests = _digests.Digests()
    for kept in self.found.done.values():
      for file, tensors in kept["inputs"].items():
        self.digests.found.setdefault(file, {}).update(tensors)

  @property
  def bytes_done(self) -> int:
    return sum(kept["size"] for kept in self.found.done.values())

  def write(self, shard: _shards.Shard, engine: _engine.Engine) -> None:
    """Writes one file."""
    outputs = [self.plan.outputs[place] for place in shard.tensors]
    writer = _shards.ShardWriter(
      self.found.folder / shard.name,
      {output.name: (output.dtype, output.shape) for output in outputs},
    )
    try:
      digests = engine.write(outputs, writer)
    except BaseException:
      writer.discard()
      raise
    writer.finish()
    self.found.finished(
      shard.name, {"tensors": digests, "inputs": self.digests.found}
    )

  def finish(self, document: _yaml.Document) -> None:
    """Writes all other files, and puts the result in its place."""
    plan, folder = self.plan, self.found.folder
    _shards.write_index(
      folder,
      self.shards,
      [output.name for output in plan.outputs],
      sum(output.nbytes for output in plan.outputs),
    )
    donor = plan.models[plan.donor].checkpoint
    if plan.adapter:
      _folder.write_json(folder / "adapter_config.json", plan.config)
    else:
      _building.carry_others(donor, folder, plan.config)
    if plan.tokens is not None:
      _tokens.write(plan.tokens, folder)
    if plan.recipe.chat_template is not None:
      _tokens.write_template(
        document, plan.recipe.chat_template, plan.models, folder
      )
    text = document.text
    card = _card.make_card(plan, text, self.found.out.name)
    (folder / "README.md").write_text(card)
    (folder / "recipe.yml").write_text(text)
    _folder.write_json(
      folder / _folder.RECORD,
      {
        "jaxmerge": jaxmerge.__version__,
        "checksum": "xxh3_128",
        "method": plan.method.name,
        "inputs": self.digests.found,
        "missing_tokens": {} if plan.tokens is None else plan.tokens.missing,
        "outputs": {
          shard.name: self.found.done[shard.name]["tensors"]
          for shard in self.shards
        },
      },
    )
    self.found.publish()


def verify(out: str | os.PathLike[str], *, inputs: bool = True) -> list[str]:
  """Compares a result, and what it was merged of, with their checksums.

  Args:
    out: the folder of a result.
    inputs: whether the models are looked at, too.

  Returns:
    What differs or has gone, in words; nothing where all is as it was.

  Raises:
    RecipeError: it is no result of a merge.
    CheckpointError: it is damaged beyond that.
  """
  folder = pathlib.Path(out)
  try:
    record = json.loads((folder / _folder.RECORD).read_text())
    outputs = {name: dict(found) for name, found in record["outputs"].items()}
    sources = {name: dict(found) for name, found in record["inputs"].items()}
  except (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
  ) as error:
    raise _yaml.RecipeError(
      f"{folder} holds no {_folder.RECORD} of a merge ({error}). Give the"
      " folder of a result."
    ) from error
  files = {str(folder / name): tensors for name, tensors in outputs.items()}
  if inputs:
    files |= sources
  return [
    problem
    for file, tensors in files.items()
    for problem in _differences(file, tensors)
  ]


def _differences(file: str, tensors: dict[str, str]) -> list[str]:
  try:
    opened = checkpoints.open(file)
  except checkpoints.CheckpointError as error:
    return [str(error)]
  found = []
  for name, digest in tensors.items():
    if name not in opened:
      found.append(f"{file}: {name!r} is missing.")
    elif _digests.of_tensor(opened[name]) != digest:
      found.append(f"{file}: {name!r} has changed.")
  return found
