"""Tensors that are one under two names."""

from __future__ import annotations

from collections.abc import Container

# One tensor under two names: a network that has only one of them ties both.
TIES = (
  frozenset(
    {
      "lm_head.weight",
      "model.embed_tokens.weight",
      "transformer.wte.weight",
      "wte.weight",
      "shared.weight",
      "embed_out.weight",
    }
  ),
  frozenset(
    {
      "cls.predictions.decoder.weight",
      "bert.embeddings.word_embeddings.weight",
    }
  ),
)


def twin(name: str, names: Container[str]) -> str | None:
  """The tensor that stands for one that is tied to it, if it is there.

  Args:
    name: of the tensor.
    names: of those that are there.

  Returns:
    The name of the other one.

  >>> twin("lm_head.weight", {"model.embed_tokens.weight"})
  'model.embed_tokens.weight'
  """
  for tied in TIES:
    if name in tied:
      for other in sorted(tied - {name}):
        if other in names:
          return other
  return None
