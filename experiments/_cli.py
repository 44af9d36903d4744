"""Running a main function with clear errors and exit statuses."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging


def _fail(error: BaseException) -> None:
  """Prints one line and exits with status 2."""
  text = str(error.args[0]) if isinstance(error, KeyError) else str(error)
  if "Traceback" in text:
    # config_flags puts the whole traceback of a configuration file into the
    # message; its last line is the error.
    text = text.strip().splitlines()[-1].partition(": ")[2] or text
  print(f"error: {' '.join(text.split())}", file=sys.stderr)
  sys.exit(2)


def run(main: Callable[[Sequence[str]], None]) -> None:
  """Runs `main(argv)`; bad input is one line on stderr and exit status 2.

  Args:
    main: a function of the arguments that are not flags.
  """

  def parse(argv: Sequence[str]) -> list[str]:
    try:
      return flags.FLAGS(argv)
    except (
      flags.Error,
      AttributeError,
      ImportError,
      KeyError,
      OSError,
      TypeError,
      ValueError,
    ) as error:
      _fail(error)
      raise

  def guarded(argv: Sequence[str]) -> None:
    if not flags.FLAGS["verbosity"].present:
      # Orbax says a dozen lines a checkpoint at the default, "info".
      logging.set_verbosity(logging.WARNING)
    try:
      main(argv)
    except (FloatingPointError, OSError, ValueError) as error:
      _fail(error)

  app.run(guarded, flags_parser=parse)
