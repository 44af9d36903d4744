"""What the benchmarks share: turns, and tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def take_turns(
  sides: dict[str, Callable[[], float]], repeats: int, budget: float = 1e9
) -> dict[str, list[float]]:
  """Measures every side once a turn, in an order that rotates.

  Args:
    sides: Functions that measure once and return seconds.
    repeats: Number of turns.
    budget: A side that has taken so many seconds sits out the other turns.

  Returns:
    The seconds of each side; at least one measurement.
  """
  times: dict[str, list[float]] = {name: [] for name in sides}
  names = list(sides)
  for turn in range(repeats):
    shift = turn % len(names)
    for name in names[shift:] + names[:shift]:
      if not times[name] or sum(times[name]) < budget:
        times[name].append(sides[name]())
  return times


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A Markdown table."""
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)
