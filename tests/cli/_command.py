"""Runs a command in this process, and catches what it prints."""

from __future__ import annotations

import contextlib
import io
from typing import NamedTuple

from jaxmerge.cli import _main


class Run(NamedTuple):
  """What a command returned and printed."""

  status: int
  out: str
  err: str


def run(*args):
  """Runs `jaxmerge` with arguments."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    status = _main.run([str(one) for one in args])
  return Run(status, out.getvalue(), err.getvalue())
