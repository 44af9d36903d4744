"""The models of a recipe, opened."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from jaxmerge import checkpoints
from jaxmerge.recipes import _building, _lora, _schema, _ties

Tensor = Any


class OpenModel(Mapping[str, Tensor]):
  """A model's tensors, with its adapter applied.

  Attributes:
    reference: as the recipe has it.
    checkpoint: the opened checkpoint.
    opened: it, and that of the adapter.
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
      RecipeError: a file of it is a link out of its folder.
    """
    self.reference = reference
    self.checkpoint = _open(reference.model, weights_only)
    self.opened = [self.checkpoint]
    self._tensors: dict[str, Tensor] = _with_dots(self.checkpoint)
    if reference.lora is not None:
      adapter = _open(reference.lora, weights_only)
      self.opened.append(adapter)
      self._tensors = _lora.applied(self._tensors, adapter)
    elif self.checkpoint.is_adapter:
      self._tensors = _lora.changes(self.checkpoint)

  def __getitem__(self, name: str) -> Tensor:
    """The tensor of a name."""
    return self._tensors[name]

  def __iter__(self) -> Iterator[str]:
    """The names."""
    return iter(self._tensors)

  def __len__(self) -> int:
    """Number of tensors."""
    return len(self._tensors)

  def replace(self, tensors: Mapping[str, Tensor]) -> None:
    """Puts other tensors in the place of some.

    Args:
      tensors: the others by name.
    """
    self._tensors |= tensors

  @property
  def folder(self) -> pathlib.Path:
    """Where its other files are."""
    return self.checkpoint.folder

  def twin(self, name: str) -> str | None:
    """The tensor that stands for one that is tied to it, if it has that."""
    return _ties.twin(name, self._tensors)


def _with_dots(opened: checkpoints.Checkpoint) -> dict[str, Tensor]:
  """The tensors; of Orbax by names such as files of safetensors have.

  So the result of a merge is one that `convert` makes an Orbax checkpoint of.
  """
  if opened.layout != "orbax":
    return dict(opened)
  found = {name.replace("/", "."): tensor for name, tensor in opened.items()}
  if len(found) < len(opened):
    raise checkpoints.CheckpointError(
      f"{opened.path} has keys with dots, which make names equal. Rename the"
      " keys."
    )
  return found


def _open(place: _schema.Place, weights_only: bool) -> checkpoints.Checkpoint:
  # A folder may have an @ in its name, too.
  if place.revision is None or not pathlib.Path(place.path).exists():
    return _building.open_source(str(place), weights_only=weights_only)
  return _building.open_source(place.path, weights_only=weights_only)
