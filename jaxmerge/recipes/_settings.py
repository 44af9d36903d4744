"""Values of parameters for a tensor: filters, layer gradients, precedence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxmerge.recipes import _schema


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def evaluate(setting: Any, name: str, t: float) -> Any:
  """The value of a parameter for one tensor.

  Args:
    setting: a value; a list, from the first layer to the last, numbers being
      interpolated; or values with filters, of which the first counts whose
      filter is part of the name.
    name: of the tensor.
    t: where its layer is, from 0 to 1.

  Returns:
    The value; None if no filter matches.

  >>> evaluate([0.0, 1.0, 0.5], "w", 0.75)
  0.75
  """
  if isinstance(setting, _schema.Conditional):
    setting = [setting]
  if not isinstance(setting, list):
    return setting
  if all(isinstance(one, _schema.Conditional) for one in setting):
    for one in setting:
      if one.filter is None or one.filter == "*" or one.filter in name:
        return evaluate(one.value, name, t)
    return None
  reach = t * (len(setting) - 1)
  first = int(reach)
  if not all(_is_number(one) for one in setting):
    return setting[first]
  second = min(first + 1, len(setting) - 1)
  part = reach - first
  return (1 - part) * setting[first] + part * setting[second]


def look_up(
  parameter: str,
  levels: Sequence[_schema.Parameters | None],
  name: str,
  t: float,
) -> Any:
  """The value of a parameter on the first level that has one.

  Args:
    parameter: its name.
    levels: from the most particular (of one source) to the recipe's own.
    name: of the tensor.
    t: where its layer is, from 0 to 1.

  Returns:
    The value; None if no level has one.
  """
  for level in levels:
    if level and parameter in level:
      value = evaluate(level[parameter], name, t)
      if value is not None:
        return value
  return None
