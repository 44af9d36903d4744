"""Adapters in PEFT's layout: their products, and networks with them applied."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxmerge import checkpoints
from jaxmerge.recipes import _ties

Tensor = Any

#: What the names of an adapter's tensors begin with.
PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.*)\.lora_(A|B|embedding_A|embedding_B)(?:\.weight)?$")


class Pair(NamedTuple):
  """The two factors of one tensor's change.

  Attributes:
    down: [rank, in]; of an embedding [rank, entries].
    up: [out, rank].
    scale: what their product is multiplied by.
    transposed: whether the tensor is [in, out], or an embedding.
    embedding: whether it is an embedding.
  """

  down: Tensor
  up: Tensor
  scale: float
  transposed: bool
  embedding: bool = False

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the tensor that it changes."""
    shape = (self.up.shape[0], self.down.shape[1])
    return shape[::-1] if self.transposed else shape

  def delta(self) -> np.ndarray:
    """The change of the tensor, float32."""
    down = jnp.asarray(np.asarray(self.down), jnp.float32)
    up = jnp.asarray(np.asarray(self.up), jnp.float32)
    product = self.scale * jnp.matmul(up, down, precision="highest")
    return np.asarray(product.T if self.transposed else product)


class Adapter(NamedTuple):
  """What an adapter does to a network.

  Attributes:
    pairs: name of a tensor -> how it is changed.
    replaced: name of a tensor -> what it is replaced by.
    config: what adapter_config.json holds.
  """

  pairs: dict[str, Pair]
  replaced: dict[str, Tensor]
  config: dict[str, Any]


def _error(
  adapter: checkpoints.Checkpoint, what: str
) -> checkpoints.CheckpointError:
  return checkpoints.CheckpointError(f"{adapter.path}: {what}")


def _pattern(found: Mapping[str, Any], name: str, default: float) -> float:
  """PEFT's own value for a module, by the end of its name."""
  for pattern, value in found.items():
    if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name):
      return float(value)
  return default


def read(adapter: checkpoints.Checkpoint) -> Adapter:
  """Reads what an adapter is; its tensors stay unread.

  Args:
    adapter: the opened checkpoint.

  Returns:
    The adapter.

  Raises:
    CheckpointError: it is no LoRA in PEFT's layout, of a kind that cannot be
      applied, or a factor is missing.
  """
  config = adapter.config("adapter_config.json")
  if not config:
    raise _error(
      adapter,
      "has no adapter_config.json beside it. Give the folder of an adapter in"
      " PEFT's layout.",
    )
  kind = config.get("peft_type", "LORA")
  for wrong, what in (
    (kind != "LORA", f"is an adapter of the type {kind}"),
    (config.get("use_dora"), "is a DoRA adapter"),
  ):
    if wrong:
      raise _error(
        adapter,
        f"{what}; plain LoRA alone can be applied. Merge it into its base with"
        " PEFT first.",
      )
  factors: dict[str, dict[str, Tensor]] = {}
  replaced: dict[str, Tensor] = {}
  for name, tensor in adapter.items():
    short = name.removeprefix(PREFIX)
    match = _FACTOR.match(short)
    if match:
      module = match[1].replace(".base_layer", "")
      factors.setdefault(module, {})[match[2]] = tensor
    else:
      # PEFT's own words for where the network keeps it.
      for own in (".modules_to_save.default", ".base_layer"):
        short = short.replace(own, "")
      replaced[short] = tensor
  pairs = {}
  for module, found in factors.items():
    embedding = "embedding_A" in found or "embedding_B" in found
    names = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    if set(found) != set(names):
      raise _error(
        adapter,
        f"{module!r} has the factors {sorted(found)} alone. Download it again.",
      )
    down, up = found[names[0]], found[names[1]]
    if down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0]:
      raise _error(
        adapter,
        f"{module!r} has factors of shapes {down.shape} and {up.shape}, which"
        " are no LoRA of a linear layer or an embedding.",
      )
    rank = down.shape[0]
    try:
      alpha = _pattern(
        dict(config.get("alpha_pattern") or {}),
        module,
        float(config.get("lora_alpha", rank)),
      )
    except (TypeError, ValueError, re.error) as error:
      raise _error(
        adapter,
        f"its lora_alpha or alpha_pattern in adapter_config.json is none"
        f" ({error}). Download it again.",
      ) from error
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    pairs[f"{module}.weight"] = Pair(
      down,
      up,
      alpha / divisor,
      embedding or bool(config.get("fan_in_fan_out")),
      embedding,
    )
  return Adapter(pairs, replaced, config)


def changes(adapter: checkpoints.Checkpoint) -> dict[str, Tensor]:
  """The changes that an adapter makes, and what it replaces, by tensor.

  Args:
    adapter: the opened adapter.

  Returns:
    The tensors, unread.

  Raises:
    CheckpointError: it is no LoRA in PEFT's layout.
  """
  parts = read(adapter)
  found: dict[str, Tensor] = dict(parts.replaced)
  for name, pair in parts.pairs.items():
    found[name] = checkpoints.LoadedTensor(
      name, pair.shape, np.float32, pair.delta, (pair.down, pair.up)
    )
  return found


def _match(name: str, tensors: Mapping[str, Tensor]) -> str | None:
  """A tensor's name in a network that may have a prefix more or less."""
  if name in tensors:
    return name
  for other in (f"model.{name}", f"transformer.{name}", name.partition(".")[2]):
    if other in tensors:
      return other
  return None


def applied(
  tensors: Mapping[str, Tensor], adapter: checkpoints.Checkpoint
) -> dict[str, Tensor]:
  r"""A network's tensors with an adapter applied: :math:`W + s B A`.

  Args:
    tensors: the network's.
    adapter: the opened adapter.

  Returns:
    All tensors; those that are changed are made when they are read.

  Raises:
    CheckpointError: it is no LoRA, or does not fit the network.
  """
  found = dict(tensors)
  parts = read(adapter)
  for name, pair in parts.pairs.items():
    place = _match(name, tensors)
    if place is None:
      raise _error(
        adapter,
        f"changes {name!r}, which the network has not. Give the network that"
        " it was trained on.",
      )
    tensor = tensors[place]
    if tuple(tensor.shape) != pair.shape:
      raise _error(
        adapter,
        f"changes {name!r} of shape {pair.shape}, which is {tensor.shape} in"
        " the network. Give the network that it was trained on.",
      )
    found[place] = checkpoints.LoadedTensor(
      place,
      tensor.shape,
      tensor.dtype,
      functools.partial(_apply, tensor, pair),
      (tensor, pair.down, pair.up),
    )
  for name, tensor in parts.replaced.items():
    place = _match(name, tensors)
    if place is None and _ties.twin(name, parts.replaced) is not None:
      continue
    if place is None or tuple(tensors[place].shape) != tuple(tensor.shape):
      raise _error(
        adapter,
        f"replaces {name!r} of shape {tuple(tensor.shape)}, which the network"
        " has not. Give the network that it was trained on.",
      )
    found[place] = tensor
  return found


def _apply(tensor: Tensor, pair: Pair) -> np.ndarray:
  array = np.asarray(tensor)
  return (array.astype(np.float32) + pair.delta()).astype(array.dtype)
