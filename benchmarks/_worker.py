"""Processes that measure on request, so that sides do not disturb another."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any


class Worker:
  """A process that measures on request.

  It runs `target(pipe, *args)`, which sends a description of itself when it is
  ready; then it answers each request, until it gets None.

  Attributes:
    info: What it sent first.
  """

  def __init__(self, target: Callable[..., None], *args: Any):
    context = multiprocessing.get_context("spawn")
    self._pipe, theirs = context.Pipe()
    self._process = context.Process(
      target=target, args=(theirs, *args), daemon=True
    )
    self._process.start()
    theirs.close()
    self.info: dict[str, Any] = self._receive()

  def _receive(self) -> Any:
    try:
      return self._pipe.recv()
    except EOFError:
      self._process.join()
      raise SystemExit("error: a measuring process failed, see above") from None

  def ask(self, request: Any) -> Any:
    """Sends a request and returns the answer."""
    self._pipe.send(request)
    return self._receive()

  def seconds(self, request: Any = "epoch") -> float:
    """Measures once."""
    return self.ask(request)

  def close(self) -> None:
    """Ends the process."""
    with contextlib.suppress(OSError):
      self._pipe.send(None)
    self._process.join()


@contextlib.contextmanager
def worker(target: Callable[..., None], *args: Any) -> Iterator[Worker]:
  """A `Worker` that ends with the context."""
  one = Worker(target, *args)
  try:
    yield one
  finally:
    one.close()
