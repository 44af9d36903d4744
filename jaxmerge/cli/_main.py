"""The group of commands, and what becomes of their errors."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import click

import jaxmerge
from jaxmerge import cli


class _Commands(click.Group):
  """Commands that are imported when they are asked for."""

  def list_commands(self, ctx: click.Context) -> list[str]:
    """Names of the commands."""
    return sorted(cli.COMMANDS)

  def get_command(
    self, ctx: click.Context, cmd_name: str
  ) -> click.Command | None:
    """The command of a name."""
    module = cli.COMMANDS.get(cmd_name)
    if module is None:
      return None
    found: Any = importlib.import_module(f"jaxmerge.cli._{module}")
    return getattr(found, f"{cmd_name}_command")


@click.group(
  cls=_Commands,
  context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(jaxmerge.__version__, prog_name="jaxmerge")
def group() -> None:
  """Merges checkpoints, and looks at them.

  Folders of Hugging Face (safetensors), of Orbax, and adapters in PEFT's
  layout. Exit status: 0 success, 1 failure, 2 bad input.
  """


def run(args: Sequence[str] | None = None) -> int:
  """Runs the command line.

  Args:
    args: the arguments; those of the process by default.

  Returns:
    The exit status.
  """
  try:
    found = group.main(
      args=None if args is None else list(args), standalone_mode=False
    )
  except click.exceptions.Abort:
    click.echo("Interrupted. Start it again to go on.", err=True)
    return 1
  except click.ClickException as error:
    error.show()
    return 2
  except ImportError as error:
    click.echo(f"error: {error}", err=True)
    return 2
  except ValueError as error:
    if not _is_ours(error):
      raise
    click.echo(f"error: {error}", err=True)
    return 2
  return found if isinstance(found, int) else 0


def _is_ours(error: ValueError) -> bool:
  """Whether an error is one of bad input, that says how to mend it."""
  from jaxmerge import checkpoints, recipes, tree

  return isinstance(
    error,
    (checkpoints.CheckpointError, recipes.RecipeError, tree.TreeMismatchError),
  )
