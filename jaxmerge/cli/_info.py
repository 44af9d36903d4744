"""`jaxmerge info`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from jaxmerge.cli import _options, _show

if TYPE_CHECKING:
  from jaxmerge.recipes import Description


@click.command("info")
@click.argument("path")
@_options.shared("weights_only", "json")
def info_command(path: str, weights_only: bool, as_json: bool) -> int:
  """Says what is in the checkpoint PATH.

  Tensors with their dtypes, shapes and bytes, the architecture, stacks of
  layers, tied tensors; of an adapter its rank and targets.
  """
  from jaxmerge import recipes

  found = recipes.describe(path, weights_only=weights_only)
  if as_json:
    _show.as_json(
      {
        **found._asdict(),
        "tensors": [one._asdict() for one in found.tensors],
        "dtypes": {key: one._asdict() for key, one in found.dtypes.items()},
      }
    )
    return 0
  rows = [("tensor", "dtype", "shape", "bytes")]
  rows += [
    (one.name, one.dtype, shape(one.shape), _show.size(one.nbytes))
    for one in found.tensors
  ]
  click.echo(_show.table(rows, right=[3]))
  click.echo("\n" + "\n".join(_summary(found)))
  return 0


def shape(sizes: tuple[int, ...]) -> str:
  """A shape in words.

  Args:
    sizes: its axes.

  Returns:
    The text.

  >>> shape((3, 4)), shape(())
  ('3x4', 'scalar')
  """
  return "x".join(map(str, sizes)) or "scalar"


def _summary(found: Description) -> list[str]:
  lines = [
    f"{found.path}: {found.layout}, {len(found.tensors)} tensors,"
    f" {found.parameters:,} parameters, {_show.size(found.nbytes)}"
  ]
  if len(found.dtypes) > 1:
    lines += [
      f"  {dtype}: {one.tensors} tensors, {one.parameters:,} parameters,"
      f" {_show.size(one.nbytes)}"
      for dtype, one in found.dtypes.items()
    ]
  for title, values in (
    ("architecture", found.architecture),
    ("layers", found.stacks),
    ("adapter", found.adapter or {}),
  ):
    if values:
      lines += [f"{title}:", *_listed(values, "  ")]
  lines += [f"tied: {' = '.join(names)}" for names in found.tied]
  return lines


def _listed(values: dict[str, Any], indent: str) -> list[str]:
  lines = []
  for key, value in values.items():
    if isinstance(value, dict):
      lines += [f"{indent}{key}:", *_listed(value, indent + "  ")]
    elif isinstance(value, list):
      lines.append(f"{indent}{key}: {', '.join(map(str, value))}")
    else:
      lines.append(f"{indent}{key}: {value}")
  return lines
