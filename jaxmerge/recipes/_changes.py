"""What a tuned network changed of its base, tensor by tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxmerge import checkpoints
from jaxmerge.recipes import _plan, _ties, _yaml

Tensor = Any


class Change(NamedTuple):
  """One tensor of both networks.

  Attributes:
    name: its name in the base.
    base: the base's tensor.
    tuned: the tuned network's.
  """

  name: str
  base: Tensor
  tuned: Tensor


class Changes(NamedTuple):
  """All tensors of both networks.

  Attributes:
    found: those of floating-point numbers that are selected.
    left_out: name of any other -> why.
  """

  found: list[Change]
  left_out: dict[str, str]


def is_float(tensor: Tensor) -> bool:
  """Whether a tensor holds floating-point numbers of 16 bits or more."""
  return np.dtype(tensor.dtype) in _plan.DTYPES.values()


def pattern(text: str | None) -> re.Pattern[str]:
  """The regular expression of an option.

  Args:
    text: as it was given; None for one that fits all names.

  Returns:
    The expression.

  Raises:
    RecipeError: it is none.
  """
  try:
    return re.compile(text or "")
  except re.error as error:
    raise _yaml.RecipeError(
      f"{text!r} is no regular expression ({error}). Mend it, or leave"
      " --select out."
    ) from error


def _twin(tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
  """A tensor, or the one that is tied to it."""
  if name in tensors:
    return tensors[name]
  other = _ties.twin(name, tensors)
  return None if other is None else tensors[other]


def changes(
  base: checkpoints.Checkpoint,
  tuned: checkpoints.Checkpoint,
  select: str | None = None,
) -> Changes:
  """Pairs the tensors of a base with those of a network tuned from it.

  Args:
    base: the opened base.
    tuned: the opened network.
    select: regular expression of which names have to hold a match.

  Returns:
    The tensors.

  Raises:
    RecipeError: a selected one is missing in one of them, or has another shape;
      or none is selected.
  """
  wanted = pattern(select)
  found: list[Change] = []
  left_out: dict[str, str] = {}
  for name in dict.fromkeys([*base, *tuned]):
    if not is_float(base[name] if name in base else tuned[name]):
      left_out[name] = "holds no floating-point numbers"
      continue
    if not wanted.search(name):
      left_out[name] = "not selected"
      continue
    first, second = base.get(name), _twin(tuned, name)
    if first is None or second is None:
      owner, other = (tuned, base) if first is None else (base, tuned)
      raise _yaml.RecipeError(
        f"{other.path} has no tensor {name!r}, which {owner.path} has. Give a"
        " network that was tuned from the base, or leave the tensor out by"
        " --select."
      )
    if tuple(first.shape) != tuple(second.shape):
      raise _yaml.RecipeError(
        f"{name!r} has the shape {tuple(second.shape)} in {tuned.path} and"
        f" {tuple(first.shape)} in {base.path}. Give a network that was tuned"
        " from the base, or leave the tensor out by --select."
      )
    found.append(Change(name, first, second))
  if not found:
    raise _yaml.RecipeError(
      f"{base.path} has no tensor of floating-point numbers"
      + (f" that {select!r} selects" if select else "")
      + ". Select at least one."
    )
  return Changes(found, left_out)
