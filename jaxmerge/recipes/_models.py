"""The models of a recipe, opened."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from jaxmerge import checkpoints
from jaxmerge.recipes import _lora, _schema

Tensor = Any

# One tensor under two names: a network that has only one of them ties both.
_TIES = (
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


class OpenModel(Mapping[str, Tensor]):
  """A model's tensors, with its adapter applied.

  Attributes:
    reference: as the recipe has it.
    checkpoint: the opened checkpoint.
  """

  def __init__(
    self, reference: _schema.Model, *, weights_only: bool = False
  ) -> None:
    """Opens a model.

    Args:
      reference: which one.
      weights_only: whether pickled weights may be read.

    Raises:
      CheckpointError: it is not there, or is damaged.
    """
    self.reference = reference
    self.checkpoint = _open(reference.model, weights_only)
    self._tensors: dict[str, Tensor] = dict(self.checkpoint)
    if reference.lora is not None:
      adapter = _open(reference.lora, weights_only)
      self._tensors = _lora.applied(self._tensors, adapter)

  def __getitem__(self, name: str) -> Tensor:
    """The tensor of a name."""
    return self._tensors[name]

  def __iter__(self) -> Iterator[str]:
    """The names."""
    return iter(self._tensors)

  def __len__(self) -> int:
    """Number of tensors."""
    return len(self._tensors)

  @property
  def folder(self) -> pathlib.Path:
    """Where its other files are."""
    return self.checkpoint.folder

  def twin(self, name: str) -> str | None:
    """The tensor that stands for one that is tied to it, if it has that."""
    for names in _TIES:
      if name in names:
        for other in sorted(names - {name}):
          if other in self._tensors:
            return other
    return None


def _open(place: _schema.Place, weights_only: bool) -> checkpoints.Checkpoint:
  path = pathlib.Path(place.path)
  if not path.exists():
    path = checkpoints.hugging_face.locate(
      place.path, revision=place.revision, weights_only=weights_only
    )
  return checkpoints.open(path, weights_only=weights_only)
