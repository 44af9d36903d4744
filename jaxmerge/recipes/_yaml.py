"""YAML with the line of everything in it, safe against hostile files."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

#: Largest file that is read, and how many values it may stand for.
MOST_BYTES = 1_000_000
MOST_VALUES = 100_000
_MOST_DEPTH = 40


class RecipeError(ValueError):
  """A recipe, or a checkpoint that it names, cannot be used."""


class Document:
  """A document and the lines of its parts.

  Attributes:
    value: mappings, lists and scalars.
    text: the YAML itself.
  """

  def __init__(self, text: str, name: str) -> None:
    """Parses a document.

    Args:
      text: YAML.
      name: what messages call it.

    Raises:
      RecipeError: it is no YAML, or larger than it may be.
    """
    try:
      import yaml
    except ImportError as error:
      raise ImportError(
        "Reading recipes needs PyYAML: pip install 'jaxmerge[merge]'."
      ) from error
    self.text = text
    self._name = name
    self._lines: dict[tuple[Any, ...], int] = {}
    self._left = MOST_VALUES
    if len(text.encode(errors="replace")) > MOST_BYTES:
      raise RecipeError(
        f"{name} is larger than {MOST_BYTES} bytes: that is no recipe."
      )
    self._yaml = yaml
    loader = None
    try:
      loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
      self._loader = loader
      node = loader.get_single_node()
      self.value = None if node is None else self._build(node, (), 0)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
      if isinstance(error, RecipeError):
        raise
      mark = getattr(error, "problem_mark", None)
      where = f"line {mark.line + 1}" if mark else "it"
      what = getattr(error, "problem", None) or str(error) or "nested too deep"
      raise RecipeError(
        f"{name}, {where}: is no YAML ({what}). Mend the file."
      ) from error
    finally:
      if loader is not None:
        loader.dispose()

  def _build(self, node: Any, place: tuple[Any, ...], depth: int) -> Any:
    self._left -= 1
    line = node.start_mark.line + 1
    # References to references grow exponentially.
    if self._left < 0 or depth > _MOST_DEPTH:
      raise RecipeError(
        f"{self._name}, line {line}: stands for more than {MOST_VALUES} values,"
        f" or is nested deeper than {_MOST_DEPTH}. Write it out without"
        " references."
      )
    self._lines[place] = line
    yaml = self._yaml
    if isinstance(node, yaml.MappingNode):
      found: dict[str, Any] = {}
      for key_node, value_node in node.value:
        key = self._scalar(key_node)
        if not isinstance(key, str):
          key = str(key)
        if key in found:
          raise RecipeError(
            f"{self._name}, line {key_node.start_mark.line + 1}: {key!r} stands"
            " twice. Remove one of them."
          )
        found[key] = self._build(value_node, (*place, key), depth + 1)
        self._lines[(*place, key)] = key_node.start_mark.line + 1
      return found
    if isinstance(node, yaml.SequenceNode):
      return [
        self._build(child, (*place, number), depth + 1)
        for number, child in enumerate(node.value)
      ]
    return self._scalar(node)

  def _scalar(self, node: Any) -> Any:
    try:
      return self._loader.construct_object(node)
    except (self._yaml.YAMLError, RecursionError):
      raise
    except Exception as error:  # Of many kinds, where a tag does not fit.
      raise RecipeError(
        f"{self._name}, line {node.start_mark.line + 1}: is no YAML"
        f" ({node.value!r:.60} is no {node.tag.rpartition(':')[2]}). Mend it."
      ) from error

  def line(self, place: Sequence[Any]) -> int:
    """The line of a part, or of the nearest one around it.

    Args:
      place: keys and indices from the root.

    Returns:
      The line, from 1.
    """
    rest = tuple(place)
    while rest and rest not in self._lines:
      rest = rest[:-1]
    return self._lines.get(rest, 1)

  def error(self, place: Sequence[Any], what: str) -> RecipeError:
    """An error that names the line of a part.

    Args:
      place: keys and indices from the root.
      what: what is wrong, and how to mend it.

    Returns:
      The error, to be raised.
    """
    path = ".".join(str(part) for part in place)
    at = f" ({path})" if path else ""
    return RecipeError(f"{self._name}, line {self.line(place)}{at}: {what}")


def load(path: str | pathlib.Path) -> Document:
  """Reads a file.

  Args:
    path: of the file.

  Returns:
    The document.

  Raises:
    RecipeError: it cannot be read, is too large, or is no YAML.
  """
  file = pathlib.Path(path)
  try:
    with file.open("rb") as opened:
      data = opened.read(MOST_BYTES + 1)
    text = data.decode("utf-8")
  except OSError as error:
    raise RecipeError(
      f"{file} cannot be read ({error.strerror}). Give a recipe in YAML."
    ) from error
  except UnicodeDecodeError as error:
    raise RecipeError(
      f"{file} is no text in UTF-8 ({error.reason})."
    ) from error
  return Document(text, str(file))
