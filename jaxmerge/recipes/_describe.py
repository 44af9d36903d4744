"""What is in a checkpoint: tensors, architecture, adapter."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np

from jaxmerge import checkpoints
from jaxmerge.recipes import _building, _layers, _ties, _writing

Tensor = Any
# What is said of a network -> the keys that config.json may have for it.
_SIZES = {
  "architectures": ("architectures",),
  "model_type": ("model_type",),
  "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
  "layers": _layers.COUNTS,
  "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
  "key_value_heads": ("num_key_value_heads",),
  "intermediate_size": ("intermediate_size", "n_inner", "d_ff", "ffn_dim"),
  "vocabulary": ("vocab_size",),
  "positions": ("max_position_embeddings", "n_positions", "n_ctx"),
  "dtype": ("dtype", "torch_dtype"),
}
_ADAPTER = {
  "type": "peft_type",
  "rank": "r",
  "alpha": "lora_alpha",
  "targets": "target_modules",
  "saved_modules": "modules_to_save",
  "ranks": "rank_pattern",
  "alphas": "alpha_pattern",
  "base": "base_model_name_or_path",
  "task": "task_type",
}
# Architectures whose scores are read off by a matrix, often the embedding.
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining")
_HEADS = (
  "lm_head.weight",
  "embed_out.weight",
  "cls.predictions.decoder.weight",
)
_SAMPLES = 64


class TensorInfo(NamedTuple):
  """A tensor.

  Attributes:
    name: its name.
    dtype: its dtype.
    shape: its shape.
    nbytes: its bytes.
  """

  name: str
  dtype: str
  shape: tuple[int, ...]
  nbytes: int


class DtypeInfo(NamedTuple):
  """All tensors of a dtype.

  Attributes:
    tensors: their number.
    parameters: number of their entries.
    nbytes: their bytes.
  """

  tensors: int
  parameters: int
  nbytes: int


class Description(NamedTuple):
  """What is in a checkpoint.

  Attributes:
    path: where it is.
    layout: "safetensors", "orbax" or "pickled".
    tensors: its tensors, in their order.
    parameters: number of their entries.
    nbytes: their bytes.
    dtypes: dtype -> the tensors of it.
    architecture: what config.json says of the network: architectures,
      model_type, hidden_size, layers, heads, vocabulary, ...; of networks of
      several parts also of each part, as text_config.
    stacks: what names of layers begin with -> the number of layers.
    tied: names of one tensor each; the first is in the file.
    adapter: of an adapter its type, rank, alpha, targets, ...; None of others.
  """

  path: str
  layout: str
  tensors: list[TensorInfo]
  parameters: int
  nbytes: int
  dtypes: dict[str, DtypeInfo]
  architecture: dict[str, Any]
  stacks: dict[str, int]
  tied: list[list[str]]
  adapter: dict[str, Any] | None


def _architecture(config: dict[str, Any]) -> dict[str, Any]:
  found: dict[str, Any] = {}
  for word, keys in _SIZES.items():
    for key in keys:
      if config.get(key) is not None:
        found[word] = config[key]
        break
  for key, value in config.items():
    if key.endswith("_config") and isinstance(value, dict):
      part = _architecture(value)
      if part and key != "quantization_config":
        found[key] = part
  return found


def _adapter(opened: checkpoints.Checkpoint) -> dict[str, Any] | None:
  if not opened.is_adapter:
    return None
  config = opened.config("adapter_config.json")
  found = {
    word: config[key]
    for word, key in _ADAPTER.items()
    if config.get(key) not in (None, [], {})
  }
  for key in ("use_dora", "use_rslora", "fan_in_fan_out"):
    if config.get(key):
      found[key] = True
  if isinstance(found.get("targets"), list):
    found["targets"] = sorted(map(str, found["targets"]))
  found["factors"] = sum(".lora_A" in name for name in opened)
  return found


def _sample(tensor: Tensor) -> bytes:
  """Entries from the beginning, the middle and the end."""
  last = max(0, tensor.size - _SAMPLES)
  return b"".join(
    tensor.read(start, min(start + _SAMPLES, tensor.size)).tobytes()
    for start in sorted({0, last // 2, last})
  )


def _are_equal(one: Tensor, other: Tensor) -> bool:
  for start, stop in _writing.spans(one.size):
    first = one.read(start, stop).view(np.uint8)
    if not np.array_equal(first, other.read(start, stop).view(np.uint8)):
      return False
  return True


def _twice(opened: checkpoints.Checkpoint) -> list[list[str]]:
  """Names of matrices that are in the file more than once."""
  alike: dict[Any, list[str]] = {}
  for name, tensor in opened.items():
    # Others are made whole to be looked at; vectors are often all ones.
    if isinstance(tensor, checkpoints.LazyTensor) and tensor.ndim >= 2:
      key = (str(tensor.dtype), tensor.shape)
      alike.setdefault(key, []).append(name)
  groups: list[list[str]] = []
  for names in alike.values():
    if len(names) < 2:
      continue
    samples: dict[bytes, list[str]] = {}
    for name in names:
      sample = _sample(opened[name])
      size = opened[name].dtype.itemsize
      # Matrices that are all zero were not tied, but never trained.
      if sample[:size] * (len(sample) // size) != sample:
        samples.setdefault(sample, []).append(name)
    for same in samples.values():
      rest = same
      while len(rest) > 1:
        first = opened[rest[0]]
        equal = [name for name in rest[1:] if _are_equal(first, opened[name])]
        if equal:
          groups.append([rest[0], *equal])
        rest = [name for name in rest[1:] if name not in equal]
  return groups


def architectures(config: dict[str, Any]) -> list[str]:
  """The names of a network's classes.

  Args:
    config: what config.json holds.

  Returns:
    The names; none where it says none.
  """
  found = config.get("architectures")
  return [str(one) for one in found] if isinstance(found, list) else []


def tied_head(opened: checkpoints.Checkpoint) -> list[str]:
  """The embedding that is read again for the scores.

  Args:
    opened: the checkpoint.

  Returns:
    Its name, and the one that the file has not; nothing where they are not
    tied.
  """
  config = opened.config()
  heads = any(kind.endswith(_WITH_HEAD) for kind in architectures(config))
  if not heads or config.get("tie_word_embeddings") is False:
    return []
  for names in _ties.TIES:
    inside = sorted(names & set(opened))
    absent = [name for name in _HEADS if name in names and name not in opened]
    if len(inside) == 1 and inside[0] not in _HEADS and absent:
      return [inside[0], absent[0]]
  return []


def describe(
  path: _building.Source, *, weights_only: bool = False
) -> Description:
  """Says what is in a checkpoint, reading next to nothing of it.

  Tied are an embedding and the scores' matrix that the file lacks, where
  config.json has an architecture that needs one, and matrices that the file has
  more than once (they are compared where a sample of them is equal).

  Args:
    path: the checkpoint.
    weights_only: whether a pickled one may be read, by
      ``torch.load(weights_only=True)``.

  Returns:
    The description.

  Raises:
    CheckpointError: it is missing or damaged.
    RecipeError: a file of it is a link out of its folder.

  >>> import tempfile
  >>> from jaxmerge import checkpoints, recipes
  >>> folder = tempfile.TemporaryDirectory()
  >>> checkpoints.hugging_face.save(
  ...   folder.name, {"h": {"0": {"w": np.ones(2)}, "1": {"w": np.ones(3)}}}
  ... )
  >>> found = recipes.describe(folder.name)
  >>> found.parameters, found.nbytes, found.stacks
  (5, 40, {'h': 2})
  >>> folder.cleanup()
  """
  opened = _building.open_source(path, weights_only=weights_only)
  tensors = [
    TensorInfo(name, str(one.dtype), tuple(one.shape), one.nbytes)
    for name, one in opened.items()
  ]
  sizes = {name: one.size for name, one in opened.items()}
  dtypes = {}
  in_order = sorted(tensors, key=lambda one: one.dtype)
  for dtype, group in itertools.groupby(in_order, lambda one: one.dtype):
    same = list(group)
    dtypes[dtype] = DtypeInfo(
      len(same),
      sum(sizes[one.name] for one in same),
      sum(one.nbytes for one in same),
    )
  missing = tied_head(opened)
  return Description(
    str(path),
    opened.layout,
    tensors,
    sum(sizes.values()),
    sum(one.nbytes for one in tensors),
    dtypes,
    _architecture(opened.config()),
    _layers.stacks(opened),
    ([missing] if missing else []) + _twice(opened),
    _adapter(opened),
  )
