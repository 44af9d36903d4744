"""The tables of how far the results of both tools are apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import _mergekit_compare, _turns

Json = dict[str, Any]


def _difference_cells(found: Json | None, narrow: bool) -> list[str]:
  if found is None:
    return ["", ""] if not narrow else ["", "", ""]
  share = found["beyond"] / max(1, found["total"])
  beyond = f"{found['beyond']:,}"
  if found["beyond"]:
    beyond += f" ({100 * share:.2g}%)"
  cells = [f"{found['relative']:.1e}", beyond]
  return [*cells, f"{found['ulps']:,}"] if narrow else cells


def _failure(row: Json) -> str | None:
  for key, tool in (
    ("mergekit_error", "mergekit"),
    ("jaxmerge_error", "jaxmerge"),
  ):
    if key in row:
      return f"{tool} fails: {row[key]}".replace("|", "\\|")
  return None


def moment_text(found: Json) -> str:
  """A line about the moments."""
  worst = _mergekit_compare.worst_moment(found)
  if worst is None:
    return "no tensors"
  mean, std = worst["mean"], worst["std"]
  count = found.get("count", len(found["tensors"]))
  return (
    f"{found['largest']:.1f} standard errors at most, of"
    f" {2 * count} (limit {found['limit']:.1f}):"
    f" {worst['tensor']}, mean {mean[0]:.2e} and {mean[1]:.2e}, standard"
    f" deviation {std[0]:.4e} and {std[1]:.4e}"
  )


def tensor_table(found: Json) -> str:
  """The moments of every tensor."""
  return _turns.table(
    ["tensor", "mean, ours", "mergekit's", "std, ours", "mergekit's", "errors"],
    [
      [
        row["tensor"],
        *(f"{value:.3e}" for key in ("mean", "std") for value in row[key]),
        f"{row['mean_errors']:.1f}, {row['square_errors']:.1f}",
      ]
      for row in found["tensors"]
    ],
  )


def parity_cells(row: Json) -> list[str]:
  """The cells of a row that is printed."""
  failure = _failure(row)
  if failure is not None:
    return [row["name"], failure]
  if "moments" in row:
    return [row["name"], moment_text(row["moments"])]
  narrow = row["mode"] != "float32"
  cells = [row["name"], *_difference_cells(row["difference"], narrow)]
  if narrow:
    cells += _difference_cells(row.get("against_wide"), True)
    cells += _difference_cells(row.get("mergekit_itself"), True)
  problems = row["difference"]["problems"]
  if problems:
    cells[0] += f" ({len(problems)} tensors differ in kind: {problems[0]})"
  return cells


def parity_tables(rows: Sequence[Json]) -> list[str]:
  """The lines of all tables, by models and format."""
  text = []
  groups: dict[tuple[str, str], list[Json]] = {}
  for row in rows:
    groups.setdefault((row["kind"], row["mode"]), []).append(row)
  for (kind, mode), group in groups.items():
    text += [f"### {kind}, {mode}", ""]
    failed = [row for row in group if _failure(row)]
    random = [row for row in group if row not in failed and "moments" in row]
    others = [row for row in group if row not in failed + random]
    if others and mode == "float32":
      header = ["method", "largest difference", "beyond 1e-5"]
      text += [_turns.table(header, [parity_cells(row) for row in others]), ""]
    elif others:
      header = ["method", "largest difference", "beyond 1 ulp", "most ulps"]
      header += ["against mergekit in float32", "beyond 1 ulp", "most ulps"]
      header += ["mergekit against itself", "beyond 1 ulp", "most ulps"]
      text += [_turns.table(header, [parity_cells(row) for row in others]), ""]
    if random:
      header = ["method", "moments of (merged - base), ours and mergekit's"]
      text += [_turns.table(header, [parity_cells(row) for row in random]), ""]
    text += [f"{row['name']}: {_failure(row)}" for row in failed]
    text += [""] if failed else []
  return text
