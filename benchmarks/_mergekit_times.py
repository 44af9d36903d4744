"""The tables of time and memory, and the goals."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks import _mergekit_recipes, _mergekit_speed, _turns

Json = dict[str, Any]

# How many times faster than mergekit each rule is to be.
GOALS = {
  "linear": 4.0,
  "ties": 10.0,
  "dare_ties": 6.0,
  "slerp": 6.0,
  "breadcrumbs": 6.0,
  "magmax": 6.0,
}
COPY_GOAL = 2.5
ANON_GOAL = 1.5e9
# Peaks of so many inputs are flat if the larger is at most that much more.
FLAT = 1.1


@dataclasses.dataclass(frozen=True)
class Times:
  """What was measured of one rule.

  Attributes:
    records: Those of the rule, by side.
    theirs: mergekit's, of the rule that it is held against.
  """

  records: dict[str, list[Json]]
  theirs: list[Json]

  def median(self, side: str, key: str = "seconds") -> float | None:
    """The median of a side, if it was measured."""
    found = self.theirs if side == "mergekit" else self.records.get(side)
    return statistics.median(one[key] for one in found) if found else None

  def ratio(self, side: str) -> float | None:
    """How many times our seconds a side takes."""
    ours, other = self.median("jaxmerge"), self.median(side)
    return other / ours if ours and other else None


def times(records: Sequence[Json], rule: str, inputs: int, cache: str) -> Times:
  """Gathers what was measured of a rule."""

  def of(name: str) -> dict[str, list[Json]]:
    found: dict[str, list[Json]] = {}
    for one in records:
      if (one["rule"], one["inputs"], one["cache"]) == (name, inputs, cache):
        found.setdefault(one["side"], []).append(one)
    return found

  theirs = of(_mergekit_recipes.OURS.get(rule, rule)).get("mergekit", [])
  return Times(of(rule), theirs)


def _number(value: float | None, form: str = "{:.1f}") -> str:
  return "" if value is None else form.format(value)


def _gigabytes(value: float | None) -> str:
  return _number(None if value is None else value / 1e9, "{:.2f}")


def _range(found: Sequence[Json]) -> str:
  seconds = [one["seconds"] for one in found]
  if not seconds:
    return ""
  text = f"{statistics.median(seconds):.1f}"
  if len(seconds) > 1:
    text += f" ({min(seconds):.1f} - {max(seconds):.1f})"
  return text


def speed_table(records: Sequence[Json], cache: str) -> str:
  """Time and memory of three inputs, in one state of the page cache."""
  rows = []
  for rule in dict.fromkeys(one["rule"] for one in records):
    found = times(records, rule, 3, cache)
    if "jaxmerge" not in found.records and not found.theirs:
      continue
    ours, theirs = found.ratio("mergekit"), found.ratio("copy")
    rows.append(
      [
        rule
        + (
          f", mergekit's {_mergekit_recipes.OURS[rule]}"
          if rule in _mergekit_recipes.OURS
          else ""
        ),
        _range(found.records.get("jaxmerge", [])),
        _range(found.theirs),
        _number(ours, "{:.1f}x"),
        _range(found.records.get("copy", [])),
        _number(1 / theirs if theirs else None, "{:.1f}x"),
        *(
          _gigabytes(found.median(side, key))
          for side in ("jaxmerge", "mergekit")
          for key in ("anon", "file", "max_rss")
        ),
        _number(found.median("first")),
      ]
    )
  header = ["rule", "jaxmerge s", "mergekit s", "mergekit / jaxmerge"]
  header += ["copy s", "jaxmerge / copy", "anonymous GB", "file GB", "peak GB"]
  header += ["mergekit's anonymous GB", "file GB", "peak GB", "first run s"]
  return _turns.table(header, rows)


def inputs_table(records: Sequence[Json]) -> str:
  """Memory by the number of inputs."""
  rows = []
  for rule in ("linear", "ties"):
    for inputs in (2, 3, 8):
      found = times(records, rule, inputs, "warm")
      for side in ("jaxmerge", "mergekit"):
        if found.median(side) is not None:
          rows.append(
            [
              f"{rule}, {side}",
              str(inputs),
              *(
                _gigabytes(found.median(side, key))
                for key in ("anon", "file", "max_rss")
              ),
              _number(found.median(side)),
            ]
          )
  header = ["rule", "inputs", "anonymous GB", "file GB", "peak GB", "seconds"]
  return _turns.table(header, rows)


def _goal(text: str, value: float | None, form: str, met: bool) -> list[str]:
  if value is None:
    return [text, "not measured", ""]
  return [text, form.format(value), "yes" if met else "no"]


def goals(records: Sequence[Json]) -> list[list[str]]:
  """The rows of the goals: what, how much, and whether it is met.

  Args:
    records: What was measured of speed.

  Returns:
    Cells of a table.
  """
  rows = []
  for cache in _mergekit_speed.CACHES:
    for rule, goal in GOALS.items():
      ratio = times(records, rule, 3, cache).ratio("mergekit")
      text = f"{rule}: at least {goal:g}x faster, {cache}"
      rows.append(_goal(text, ratio, "{:.1f}x", (ratio or 0) >= goal))
    ratio = times(records, "linear", 3, cache).ratio("copy")
    slower = 1 / ratio if ratio else None
    text = f"linear: at most {COPY_GOAL:g}x the copy's time, {cache}"
    rows.append(_goal(text, slower, "{:.1f}x", (slower or 9e9) <= COPY_GOAL))
  for rule in ("linear", "ties"):
    peaks = {
      inputs: times(records, rule, inputs, "warm").median("jaxmerge", "anon")
      for inputs in (2, 3, 8)
    }
    there = [peak for peak in peaks.values() if peak is not None]
    most = max(there, default=None)
    rows.append(
      _goal(
        f"{rule}: peak anonymous memory under {ANON_GOAL / 1e9:g} GB",
        None if most is None else most / 1e9,
        "{:.2f} GB",
        (most or 0) < ANON_GOAL,
      )
    )
    few, many = peaks[2], peaks[8]
    growth = many / few if few and many else None
    rows.append(
      _goal(
        f"{rule}: flat from 2 to 8 inputs (at most {FLAT:g}x)",
        growth,
        "{:.2f}x",
        (growth or 9e9) <= FLAT,
      )
    )
  return rows
