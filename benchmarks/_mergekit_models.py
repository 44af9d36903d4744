"""Builds the model folders of mergekit_parity: a base and three others.

  python benchmarks/_mergekit_models.py KIND DTYPE OUT [SOURCE]

Runs by itself in any Python with PyTorch and transformers. The base has
random weights (or, of the kind "minilm", those of the folder SOURCE); the
others add normal noise of half a tensor's standard deviation to each of its
tensors, of 0.01 where a tensor is constant.
"""

from __future__ import annotations

import pathlib
import shutil
import sys
from typing import Any

import torch
import transformers
from safetensors import torch as safetensors

MODELS = ("base", "m1", "m2", "m3")


def _llama(hidden: int, inner: int, layers: int, heads: int, vocab: int) -> Any:
  return transformers.LlamaForCausalLM, transformers.LlamaConfig(
    hidden_size=hidden,
    intermediate_size=inner,
    num_hidden_layers=layers,
    num_attention_heads=heads,
    # Four heads of keys, and of the tiny one two.
    num_key_value_heads=min(4, heads // 2),
    vocab_size=vocab,
  )


def _configuration(kind: str) -> tuple[Any, Any]:
  """The class of a model, and its configuration."""
  if kind == "llama-tiny":
    return _llama(64, 176, 4, 4, 512)
  if kind == "llama-100m":
    return _llama(768, 2048, 12, 12, 16000)
  if kind == "llama-1b":
    return _llama(2048, 5632, 22, 32, 32000)
  if kind == "gpt2":
    return transformers.GPT2LMHeadModel, transformers.GPT2Config(
      n_embd=128, n_layer=4, n_head=4, vocab_size=1000
    )
  if kind == "bert":
    return transformers.BertModel, transformers.BertConfig(
      hidden_size=128,
      intermediate_size=256,
      num_hidden_layers=4,
      num_attention_heads=4,
      vocab_size=1000,
    )
  if kind == "clip":
    tower = {
      "hidden_size": 64,
      "intermediate_size": 128,
      "num_hidden_layers": 4,
      "num_attention_heads": 4,
    }
    return transformers.CLIPModel, transformers.CLIPConfig(
      text_config=tower | {"vocab_size": 500},
      vision_config=tower | {"image_size": 32, "patch_size": 8},
      projection_dim=32,
    )
  raise SystemExit(f"error: no kind of model is called {kind!r}")


@torch.no_grad()
def _perturbed(
  tensors: dict[str, torch.Tensor], seed: int
) -> dict[str, torch.Tensor]:
  draws = torch.Generator().manual_seed(seed)
  result = {}
  for name in sorted(tensors):
    tensor = tensors[name]
    if tensor.is_floating_point():
      spread = 0.0
      if tensor.numel() > 1:
        spread = 0.5 * tensor.float().std().item()
      noise = torch.randn(tensor.shape, generator=draws)
      tensor = (tensor.float() + (spread or 0.01) * noise).to(tensor.dtype)
    result[name] = tensor.contiguous()
  return result


def build(kind: str, dtype: str, out: pathlib.Path, source: str | None) -> None:
  """Builds the folders of one kind of model.

  Args:
    kind: "llama-tiny", "llama-100m", "llama-1b", "gpt2", "bert", "clip",
      "minilm".
    dtype: "float32", "float16" or "bfloat16", which they are stored in.
    out: The folder of the folders; must not be there.
    source: The folder of a pre-trained model, for "minilm".
  """
  torch.manual_seed(0)
  part = out.with_name(out.name + ".part")
  shutil.rmtree(part, ignore_errors=True)
  base = part / MODELS[0]
  if kind == "minilm":
    if source is None:
      raise SystemExit("error: minilm needs the folder of the model")
    shutil.copytree(source, base, ignore=shutil.ignore_patterns(".*"))
  else:
    cls, config = _configuration(kind)
    cls(config).to(getattr(torch, dtype)).save_pretrained(base)
  file = base / "model.safetensors"
  tensors = safetensors.load_file(file)
  if kind == "minilm" and dtype != "float32":
    for name, tensor in tensors.items():
      if tensor.is_floating_point():
        tensors[name] = tensor.to(getattr(torch, dtype))
    safetensors.save_file(tensors, file, metadata={"format": "pt"})
  for seed, name in enumerate(MODELS[1:], 1):
    shutil.copytree(
      base, part / name, ignore=shutil.ignore_patterns("*.safetensors")
    )
    safetensors.save_file(
      _perturbed(tensors, seed),
      part / name / "model.safetensors",
      metadata={"format": "pt"},
    )
  part.rename(out)


if __name__ == "__main__":
  build(
    sys.argv[1],
    sys.argv[2],
    pathlib.Path(sys.argv[3]),
    sys.argv[4] if len(sys.argv) > 4 else None,
  )
