"""What commands print: sizes, tables, progress."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import click

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def size(count: float) -> str:
  """Bytes in words.

  >>> size(2_500_000_000)
  '2.50 GB'
  """
  for unit in ("B", "kB", "MB", "GB"):
    if count < 1000:
      return f"{count:.3g} {unit}" if unit == "B" else f"{count:.2f} {unit}"
    count /= 1000
  return f"{count:.2f} TB"


def parse_size(value: str) -> int:
  """Bytes of a text such as 5GB, 200M or 1000; a type of click's options.

  >>> parse_size("1.5GB")
  1500000000
  """
  found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", value.upper())
  if not found or float(found[1]) * _UNITS[found[2]] < 1:
    raise click.BadParameter(f"{value!r} is no size: write 5GB, 200MB or 1000")
  return int(float(found[1]) * _UNITS[found[2]])


def table(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
  """Rows in columns.

  Args:
    rows: the first one is the heading.
    right: columns that are aligned to the right.

  Returns:
    The text.
  """
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for row in rows:
    cells = [
      cell.rjust(width) if place in right else cell.ljust(width)
      for place, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    lines.append("  ".join(cells).rstrip())
  return "\n".join(lines)


def as_json(value: Any) -> None:
  """Prints a value for a machine."""
  click.echo(json.dumps(value, indent=2))


class Bar:
  """A progress bar with the rate in bytes a second; none for machines.

  Args:
    shown: whether it is shown; on a terminal alone by default.
  """

  def __init__(self, shown: bool | None = None) -> None:
    """See the class."""
    self._shown = sys.stderr.isatty() if shown is None else shown
    self._bar: Any = None
    self.start = time.monotonic()

  def __call__(self, done: int, total: int) -> None:
    """Shows how far it is."""
    if not self._shown:
      return
    if self._bar is None:
      import tqdm

      self._bar = tqdm.tqdm(
        total=total, unit="B", unit_scale=True, dynamic_ncols=True
      )
    self._bar.total = max(total, done)
    self._bar.update(done - self._bar.n)

  def close(self) -> None:
    """Ends it."""
    if self._bar is not None:
      self._bar.close()
