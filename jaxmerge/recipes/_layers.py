"""Which layer of which stack a tensor belongs to, by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

_LAYER = re.compile(
  r"^(?P<stack>(?:.*[./_])?(?:layers?|blocks?|resblocks|h))[./_]"
  r"(?P<number>\d+)(?=[./_]|$)"
)
# What stands before the first layer; anything else without a layer is behind.
_BEFORE = re.compile(
  r"embed|(^|[./])(wte|wpe|shared|patch|pre_layrnorm|ln_pre|cls_token)",
  re.IGNORECASE,
)
_HEAD = re.compile(r"(^|[./])(lm_head|embed_out|score|classifier|pooler)")
#: Keys of config.json that count the layers.
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


class Layer(NamedTuple):
  """Where a tensor is.

  Attributes:
    stack: what its name begins with, up to the number.
    number: of its layer.
    rest: what follows the number.
  """

  stack: str
  number: int
  rest: str


def find(name: str) -> Layer | None:
  """The layer of a tensor, None for one outside of all layers.

  Args:
    name: of the tensor.

  Returns:
    The layer.

  >>> find("model.layers.12.mlp.up_proj.weight")
  Layer(stack='model.layers', number=12, rest='.mlp.up_proj.weight')
  >>> find("model.norm.weight")
  """
  found = _LAYER.match(name)
  if found is None:
    return None
  return Layer(
    found["stack"], int(found["number"]), name[found.end("number") :]
  )


def rename(name: str, number: int) -> str:
  """The name of the same tensor of another layer.

  Args:
    name: of a tensor in a layer.
    number: of the other layer.

  Returns:
    Its name.

  >>> rename("h.0.attn.weight", 7)
  'h.7.attn.weight'
  """
  found = _LAYER.match(name)
  assert found is not None
  begin, end = found.span("number")
  return f"{name[:begin]}{number}{name[end:]}"


def is_before(name: str) -> bool:
  """Whether a tensor without a layer stands before the first one."""
  return bool(_BEFORE.search(name)) and not _HEAD.search(name)


def stacks(names: Iterable[str]) -> dict[str, int]:
  """The stacks of a network and their numbers of layers.

  Args:
    names: of all tensors.

  Returns:
    Beginning of the names -> number of layers.
  """
  found: dict[str, set[int]] = {}
  for name in names:
    layer = find(name)
    if layer is not None:
      found.setdefault(layer.stack, set()).add(layer.number)
  return {
    stack: max(numbers) + 1
    for stack, numbers in found.items()
    # Two layers of a classifier are no stack of a transformer.
    if sorted(numbers) == list(range(len(numbers)))
  }


def with_layers(
  config: dict[str, Any], taken: list[int], before: int
) -> dict[str, Any]:
  """A network's configuration with other layers.

  Args:
    config: what config.json holds.
    taken: for each layer of the result that of the network it came from.
    before: the number of layers there.

  Returns:
    The configuration: counts are changed, and lists of one entry a layer.
  """
  found = dict(config)
  for key, value in config.items():
    if key in COUNTS and value == before:
      found[key] = len(taken)
    elif (
      isinstance(value, list)
      and len(value) == before
      and key in ("layer_types", "no_rope_layers", "attention_layers")
    ):
      found[key] = [value[number] for number in taken]
    elif isinstance(value, dict) and key.endswith("text_config"):
      found[key] = with_layers(value, taken, before)
  return found
