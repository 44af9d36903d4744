"""The strategies by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from jaxmerge import merging
from jaxmerge.continual import _strategy
from jaxmerge.continual._strategies_merge import (
  avg,
  became,
  magmax,
  merge,
  mpf,
  ot,
  pam,
  regmean_replay,
  simplex,
  trm,
  tunable_magmax,
)
from jaxmerge.continual._strategies_plain import (
  cumulative,
  ewc,
  gpm,
  independent,
  joint,
  lwf,
  naive,
  si,
)
from jaxmerge.continual._strategies_replay import (
  agem,
  buffer_only,
  der,
  er,
)

__all__ = (
  "agem",
  "avg",
  "became",
  "buffer_only",
  "cumulative",
  "der",
  "er",
  "ewc",
  "get",
  "gpm",
  "independent",
  "joint",
  "lwf",
  "magmax",
  "merge",
  "mpf",
  "naive",
  "names",
  "ot",
  "pam",
  "regmean_replay",
  "si",
  "simplex",
  "trm",
  "tunable_magmax",
)

Strategy = _strategy.Strategy

_NAMED: dict[str, Callable[..., Strategy]] = {
  "agem": agem,
  "avg": avg,
  "became": became,
  "buffer_only": buffer_only,
  "cumulative": cumulative,
  "der": der,
  "er": er,
  "ewc": ewc,
  "gpm": gpm,
  "independent": independent,
  "joint": joint,
  "lwf": lwf,
  "magmax": magmax,
  "mpf": mpf,
  "naive": naive,
  "ot": ot,
  "pam": pam,
  "regmean_replay": regmean_replay,
  "si": si,
  "simplex": simplex,
  "trm": trm,
  "tunable_magmax": tunable_magmax,
}


def names() -> tuple[str, ...]:
  """Names of strategies, and "merge:<rule>" of the rules that need no option.

  >>> "mpf" in names(), "merge:ties" in names()
  (True, True)
  """
  rules = [
    f"merge:{rule}"
    for rule in merging.names()
    if merging.info(rule).max_models is None
    and not merging.info(rule).needs_weights
    and inspect.Parameter.empty not in merging.info(rule).options.values()
  ]
  return tuple(sorted([*_NAMED, *rules]))


def get(name: str, **options: Any) -> Strategy:
  """A strategy by its name.

  Args:
    name: one of `names`, or "merge:" and any rule that `merges.by_rule` takes.
    **options: its options.

  Returns:
    The strategy.

  Raises:
    ValueError: the name or an option is unknown, or out of its range.

  >>> get("mpf", t="1/t").needs_replay
  True
  """
  if name.startswith("merge:"):
    return merge(name.removeprefix("merge:"), **options)
  if name not in _NAMED:
    close = difflib.get_close_matches(name, names(), 1)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    raise ValueError(
      f"Unknown strategy {name!r}{hint} choose from {', '.join(names())}."
    )
  make = _NAMED[name]
  known = inspect.signature(make).parameters
  takes_all = any(one.kind is one.VAR_KEYWORD for one in known.values())
  unknown = sorted(set(options) - set(known))
  if unknown and not takes_all:
    raise ValueError(
      f"Unknown option {unknown[0]!r} of {name}; choose from "
      f"{', '.join(known)}."
    )
  try:
    return make(**options)
  except TypeError as error:
    raise ValueError(f"Strategy {name}: {error}") from error
