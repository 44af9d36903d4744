"""What PEFT calls the parts of a network, and how it keeps an adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from jaxmerge import checkpoints
from jaxmerge.recipes import _describe, _lora

Tensor = Any

#: The file of an adapter's tensors.
FILE = "adapter_model.safetensors"
# Networks whose linear layers hold [in, out], and which of their layers do.
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
CONV1D_LAYERS = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)$")
EMBEDDING = re.compile(
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


def module_of(name: str) -> str:
  """The module that a tensor is of."""
  return name.rpartition(".")[0]


def targets(kept: list[str], names: list[str]) -> list[str]:
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


def task_of(config: dict[str, Any]) -> str | None:
  """PEFT's word for what a network is for, by its configuration."""
  for kind in _describe.architectures(config):
    for end, task in _TASKS.items():
      if kind.endswith(end):
        return task
    if kind.endswith("ForConditionalGeneration") and config.get(
      "is_encoder_decoder"
    ):
      return "SEQ_2_SEQ_LM"
  return None


def prefix_of(base: checkpoints.Checkpoint) -> str:
  """What names of modules begin with in the network, but not in the file."""
  config = base.config()
  part = _PARTS.get(str(config.get("model_type")))
  kinds = _describe.architectures(config)
  if part is None or not any(
    "For" in kind or kind.endswith("LMHeadModel") for kind in kinds
  ):
    return ""
  return "" if any(name.startswith(f"{part}.") for name in base) else f"{part}."


def heads_of(base: checkpoints.Checkpoint, task: str | None) -> dict[str, str]:
  """Tensors of modules that PEFT saves whole of itself -> the module."""
  pattern = _HEADS.get(task or "")
  if pattern is None:
    return {}
  found = {name: pattern.match(name) for name in base}
  return {name: match[1] for name, match in found.items() if match}


class Rest:
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
    """See the class."""
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
      self.tensors[f"{_lora.PREFIX}{self._prefix}{name}"] = self._every[name]
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
        place = f"{_lora.PREFIX}{self._prefix}{module}.base_layer.bias"
        self.tensors[place] = self._every[name]
        self.names.add(name)
        self.bias = "all"
      return
    own = [one for one in self._every if one.startswith(f"{module}.")]
    # PEFT saves modules whole, and these hold other ones.
    if not module or any(module_of(other) != module for other in own):
      return
    if name in tied:
      # PEFT unties them, and would leave the scores as they were.
      if tied[1] not in _PLAIN_HEADS:
        return
      self.modules.append(module_of(tied[1]))
      self.tensors[_lora.PREFIX + tied[1]] = self._every[name]
    self.add_module(module, own)
