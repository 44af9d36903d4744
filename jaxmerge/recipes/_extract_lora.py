"""The change of a tuned network as an adapter of low rank, in PEFT's layout."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from jaxmerge import checkpoints
from jaxmerge.recipes import (
  _building,
  _changes,
  _describe,
  _folder,
  _measure,
  _vectors,
  _writing,
  _yaml,
)

Tensor = Any
# Shorter sides up to this are decomposed whole: a second, and eight times as
# much for twice the side.
_MOST_WHOLE = 1024
_PREFIX = "base_model.model."
#: The file of an adapter's tensors.
FILE = "adapter_model.safetensors"
# Networks whose linear layers hold [in, out], and which of their layers do.
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_LAYERS = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)$")
_EMBEDDING = re.compile(
  r"(^|\.)(wte|wpe|shared|relative_attention_bias|(?!embed_out$)\w*embed\w*)$"
)
# Published without the name of the part that a network with a head has it in.
_PARTS = {"gpt2": "transformer", "bert": "bert", "roberta": "roberta"}
_TASKS = {
  "ForCausalLM": "CAUSAL_LM",
  "LMHeadModel": "CAUSAL_LM",
  "ForSequenceClassification": "SEQ_CLS",
  "ForTokenClassification": "TOKEN_CLS",
  "ForQuestionAnswering": "QUESTION_ANS",
}
# What PEFT saves whole of a network of such a task, asked for or not.
_HEADS = {
  "SEQ_CLS": re.compile(r"(.*(?:classifier|score))\."),
  "TOKEN_CLS": re.compile(r"(.*(?:classifier|score))\."),
  "QUESTION_ANS": re.compile(r"(.*qa_outputs)\."),
}
# Scores of which nothing but the embedding is read.
_PLAIN_HEADS = ("lm_head.weight", "embed_out.weight")


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


def _module(name: str) -> str:
  return name.rpartition(".")[0]


def _why_not(change: _changes.Change, conv1d: bool, heads: set[str]) -> str:
  """Why no factors can be made of a tensor; nothing where they can."""
  module = _module(change.name)
  if change.name in heads:
    return "of the head, which PEFT saves whole"
  if change.name.endswith(".bias"):
    return "a bias"
  if len(change.base.shape) != 2:
    return f"has {len(change.base.shape)} axes"
  if not module or not change.name.endswith(".weight"):
    return "is no weight of a layer"
  if _EMBEDDING.search(module):
    return "an embedding"
  if conv1d and not _CONV1D_LAYERS.search(module):
    return "is stored as [out, in], unlike the other layers"
  return ""


def factors(change: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
  r"""The product of a rank that is nearest to a matrix.

  Args:
    change: float32 or float64 [out, in].
    rank: of the product.

  Returns:
    up [out, rank] and down [rank, in], the roots of the singular values in
    both; columns and rows beyond the matrix's own rank are zero.

  >>> up, down = factors(np.diag([4.0, 1.0]), 1)
  >>> print(np.round(up @ down, 6) + 0.0)
  [[4. 0.]
   [0. 0.]]
  """
  short = min(change.shape)
  found = min(rank, short)
  parts = None
  if short > _MOST_WHOLE and found < short // 8:
    parts = _first_parts(change, found)
  left, values, right = _all_parts(change) if parts is None else parts
  order = np.argsort(-values, kind="stable")[:found]
  roots = np.sqrt(values[order])
  up = np.zeros((change.shape[0], rank), change.dtype)
  down = np.zeros((rank, change.shape[1]), change.dtype)
  up[:, :found] = left[:, order] * roots
  down[:found] = roots[:, None] * right[order]
  return up, down


def _all_parts(change: np.ndarray) -> tuple[np.ndarray, ...]:
  """The singular value decomposition."""
  from scipy import linalg

  try:
    found = linalg.svd(change, full_matrices=False)
  except linalg.LinAlgError:
    # Slower, and converges where the other does not.
    found = linalg.svd(change, full_matrices=False, lapack_driver="gesvd")
  return tuple(found)


def _first_parts(
  change: np.ndarray, rank: int
) -> tuple[np.ndarray, ...] | None:
  """Its largest values alone, by Lanczos' method; None if it fails."""
  from scipy.sparse import linalg

  # The start is drawn, and always the same.
  start = np.random.default_rng(0).normal(size=min(change.shape))
  try:
    # Squares of singular values are sought, which float32 tells apart badly.
    found = linalg.svds(change.astype(np.float64), rank, v0=start)
  except linalg.ArpackError:
    return None
  return tuple(one.astype(change.dtype) for one in found)


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
    up, down = factors(matrix, self._rank)
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

    start = f"{_PREFIX}{module}.lora_"
    return [
      _writing.Made(f"{start}A.weight", (self._rank, width), self._dtype, down),
      _writing.Made(f"{start}B.weight", (out, self._rank), self._dtype, up),
    ]


def _targets(kept: list[str], names: list[str]) -> list[str]:
  """Ends of modules' names that PEFT finds those modules by, and no others.

  Args:
    kept: the modules.
    names: of all modules.

  Returns:
    The last part of a name where it stands for these modules alone, else whole
    names.
  """
  inside = set(kept)
  found = []
  for last in sorted({name.rpartition(".")[2] for name in kept}):
    same = [name for name in names if name == last or name.endswith(f".{last}")]
    whole = inside.issuperset(same)
    found += [last] if whole else [name for name in same if name in inside]
  return found


def _task(config: dict[str, Any]) -> str | None:
  for kind in _describe.architectures(config):
    for end, task in _TASKS.items():
      if kind.endswith(end):
        return task
    if kind.endswith("ForConditionalGeneration") and config.get(
      "is_encoder_decoder"
    ):
      return "SEQ_2_SEQ_LM"
  return None


def _prefix(base: checkpoints.Checkpoint) -> str:
  """What names of modules begin with in the network, but not in the file."""
  config = base.config()
  part = _PARTS.get(str(config.get("model_type")))
  kinds = _describe.architectures(config)
  if part is None or not any(
    "For" in kind or kind.endswith("LMHeadModel") for kind in kinds
  ):
    return ""
  return "" if any(name.startswith(f"{part}.") for name in base) else f"{part}."


def _heads(base: checkpoints.Checkpoint, task: str | None) -> dict[str, str]:
  """Tensors of modules that PEFT saves whole of itself -> the module."""
  pattern = _HEADS.get(task or "")
  if pattern is None:
    return {}
  found = {name: pattern.match(name) for name in base}
  return {name: match[1] for name, match in found.items() if match}


class _Rest:
  """Tensors that are put into the adapter whole.

  Args:
    prefix: what names begin with in the network, but not in the file.
    every: the tuned network's tensors; the base's of those not selected.

  Attributes:
    names: of the tensors, in the file.
    modules: names of modules that are saved, in the network.
    tensors: name in the adapter -> the tuned network's tensor.
    bias: PEFT's word for which biases there are.
  """

  def __init__(self, prefix: str, every: dict[str, Tensor]) -> None:
    self._prefix = prefix
    self._every = every
    self.names: set[str] = set()
    self.modules: list[str] = []
    self.tensors: dict[str, Tensor] = {}
    self.bias = "none"

  def add_module(self, module: str, names: Iterable[str]) -> None:
    """Saves a module, or more of it."""
    if self._prefix + module not in self.modules:
      self.modules.append(self._prefix + module)
    for name in names:
      self.tensors[f"{_PREFIX}{self._prefix}{name}"] = self._every[name]
      self.names.add(name)

  def add(self, name: str, adapted: set[str], tied: list[str]) -> None:
    """Saves a tensor, if PEFT can.

    Args:
      name: of the tensor.
      adapted: modules that have factors.
      tied: names of the embedding and of the scores that are tied to it.
    """
    module, _, last = name.rpartition(".")
    if module in adapted:
      if last == "bias":
        # PEFT has put a layer around the one of this bias.
        place = f"{_PREFIX}{self._prefix}{module}.base_layer.bias"
        self.tensors[place] = self._every[name]
        self.names.add(name)
        self.bias = "all"
      return
    own = [one for one in self._every if one.startswith(f"{module}.")]
    # PEFT saves modules whole, and these hold other ones.
    if not module or any(_module(other) != module for other in own):
      return
    if name in tied:
      # PEFT unties them, and would leave the scores as they were.
      if tied[1] not in _PLAIN_HEADS:
        return
      self.modules.append(_module(tied[1]))
      self.tensors[_PREFIX + tied[1]] = self._every[name]
    self.add_module(module, own)


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
  conv1d = config.get("model_type") in _CONV1D
  task = _task(config)
  heads = _heads(first, task)
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
  prefix = _prefix(first)
  adapted = {_module(name) for name in matrices}
  saved = _Rest(
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
    for one in matrix.made(prefix + _module(name))
  ]
  made += [
    _writing.copied(name, tensor) for name, tensor in saved.tensors.items()
  ]
  modules = {_module(name): None for name in first if _module(name)}
  with _building.building(
    out,
    [first, second],
    overwrite=overwrite,
    size=sum(one.nbytes for one in made),
  ) as folder:
    written = _writing.write_tensors(folder, made, single=FILE, seen=seen)
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
        "target_modules": _targets(
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
