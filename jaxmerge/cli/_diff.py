"""`jaxmerge diff`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from jaxmerge.cli import _info, _options, _show

if TYPE_CHECKING:
  from jaxmerge.recipes import Comparison, TensorDifference


@click.command("diff")
@click.argument("a")
@click.argument("b")
@click.option(
  "--base", help="Compare task vectors, too: what A and B were tuned from."
)
@click.option(
  "--all", "show_all", is_flag=True, help="Print tensors that are equal, too."
)
@_options.shared("weights_only", "quiet", "json")
def diff_command(
  a: str,
  b: str,
  base: str | None,
  show_all: bool,
  weights_only: bool,
  quiet: bool,
  as_json: bool,
) -> int:
  """Says what the checkpoints A and B differ in.

  Exit status: 0 where both have the same tensors of the same shapes and dtypes,
  whatever is in them; 1 where not.
  """
  from jaxmerge import recipes

  bar = _show.Bar(False if quiet or as_json else None)
  try:
    found = recipes.compare(
      a, b, base=base, weights_only=weights_only, seen=bar
    )
  finally:
    bar.close()
  if as_json:
    _show.as_json(_for_machines(found, show_all))
  else:
    _print(found, a, b, show_all)
  return 0 if found.same_structure else 1


def _number(value: float) -> float | None:
  """JSON has neither NaN nor infinity."""
  return value if math.isfinite(value) else None


def _row(one: TensorDifference) -> dict[str, Any]:
  found: dict[str, Any] = {
    "name": one.name,
    "shape": list(one.shape),
    "dtypes": list(one.dtypes),
    "entries": one.entries,
    "changed": one.changed,
    "not_finite": one.odd,
    "norm": _number(one.norm),
    "relative": _number(one.relative),
    "cosine": _number(one.cosine),
    "largest": _number(one.largest),
  }
  if one.task is not None:
    task = one.task
    found["task"] = {
      "norm_a": _number(task.norm_a),
      "norm_b": _number(task.norm_b),
      "cosine": _number(task.cosine),
      "kept": task.kept,
      "shared": task.shared,
      "conflicts": task.conflicts,
      "conflict_rate": task.rate,
    }
  return found


def _shown(found: Comparison, show_all: bool) -> list[TensorDifference]:
  return [
    one
    for one in found.tensors
    if show_all or one.changed or (one.task is not None and one.task.kept)
  ]


def _for_machines(found: Comparison, show_all: bool) -> dict[str, Any]:
  total = _row(found.total)
  for key in ("name", "shape", "dtypes"):
    del total[key]
  return {
    "same_structure": found.same_structure,
    "only_a": found.only_a,
    "only_b": found.only_b,
    "shapes": found.shapes,
    "dtypes": found.dtypes,
    "no_base": found.no_base,
    "compared": len(found.tensors),
    "tensors": [_row(one) for one in _shown(found, show_all)],
    "total": total,
  }


def _print(found: Comparison, a: str, b: str, show_all: bool) -> None:
  for names, owner in ((found.only_a, a), (found.only_b, b)):
    for name in names:
      click.echo(f"only in {owner}: {name}")
  for name, (one, other) in found.shapes.items():
    click.echo(f"shapes of {name}: {_info.shape(one)} and {_info.shape(other)}")
  for name, kinds in found.dtypes.items():
    click.echo(f"dtypes of {name}: {kinds[0]} and {kinds[1]}")
  for name in found.no_base:
    click.echo(f"not in the base, or in another shape: {name}")
  shown = _shown(found, show_all)
  has_base = found.total.task is not None
  heading = ["tensor", "changed", "norm", "relative", "cosine", "largest"]
  if has_base:
    heading += ["task A", "task B", "cosine", "conflicts"]
  if shown:
    rows = [heading, *(_cells(one, has_base) for one in shown)]
    rows.append(_cells(found.total, has_base))
    click.echo(_show.table(rows, right=range(1, len(heading))))
  rest = len(found.tensors) - len(shown)
  if rest:
    click.echo(f"Equal: {rest} of {len(found.tensors)} tensors.")


def _cells(one: TensorDifference, has_base: bool) -> list[str]:
  share = one.changed / one.entries if one.entries else 0.0
  found = [
    one.name,
    f"{share:.2%}",
    _text(one.norm),
    _text(one.relative),
    _text(one.cosine, 6),
    _text(one.largest),
  ]
  if has_base:
    task = one.task
    found += (
      ["-"] * 4
      if task is None
      else [
        _text(task.norm_a),
        _text(task.norm_b),
        _text(task.cosine, 6),
        f"{task.rate:.2%}",
      ]
    )
  return found


def _text(value: float, digits: int = 4) -> str:
  return "-" if math.isnan(value) else f"{value:.{digits}g}"
