"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from jaxmerge.cli import _show

_Command = TypeVar("_Command", bound=Callable[..., int])

_OPTIONS: dict[str, tuple[list[str], dict[str, Any]]] = {
  "json": (["--json", "as_json"], {"is_flag": True, "help": "For machines."}),
  "max_shard_size": (
    ["--max-shard-size"],
    {
      "type": _show.parse_size,
      "metavar": "SIZE",
      "default": "5GB",
      "show_default": True,
      "help": "Size from which on a further file is begun.",
    },
  ),
  "overwrite": (
    ["--overwrite"],
    {"is_flag": True, "help": "Replace OUT if it is there."},
  ),
  "quiet": (["--quiet"], {"is_flag": True, "help": "No progress bar."}),
  "weights_only": (
    ["--weights-only"],
    {
      "is_flag": True,
      "help": "Read pickled weights, and nothing else of a pickle.",
    },
  ),
}


def shared(*names: str, **helps: str) -> Callable[[_Command], _Command]:
  """Gives a command options that other commands have, too.

  Args:
    *names: of the options, in the order of ``--help``.
    **helps: what an option does, where it is said in other words.

  Returns:
    The decorator.
  """

  def decorate(command: _Command) -> _Command:
    # Decorators are applied from the last one up.
    for name in reversed(names):
      flags, settings = _OPTIONS[name]
      if name in helps:
        settings = {**settings, "help": helps[name]}
      command = click.option(*flags, **settings)(command)
    return command

  return decorate
