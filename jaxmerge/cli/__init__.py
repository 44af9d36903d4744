"""The command line: `jaxmerge merge`, `diff`, `info`, ...

Nothing but the parser of the command line is imported until a command runs, so
that ``jaxmerge --help`` answers at once.
"""

from __future__ import annotations

import importlib
import sys

# Command -> the module that has it, under that name with an underscore.
COMMANDS = {
  "apply": "vectors",
  "convert": "convert",
  "diff": "diff",
  "extract": "vectors",
  "info": "info",
  "merge": "merge",
  "methods": "methods",
  "validate": "merge",
}


def main() -> None:
  """Runs the command line and ends the process with its status.

  0 is success, 1 a failure, 2 bad input.
  """
  try:
    importlib.import_module("click")
  except ImportError:
    print(
      "error: the command line needs click: pip install 'jaxmerge[merge]'",
      file=sys.stderr,
    )
    sys.exit(2)
  from jaxmerge.cli import _main

  sys.exit(_main.run())
