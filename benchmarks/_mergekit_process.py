"""Time and memory of a process, and the page cache before it."""

from __future__ import annotations

import collections
import os
import pathlib
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

Json = dict[str, Any]


def read_through(files: Sequence[pathlib.Path]) -> None:
  """Reads files, so that their pages are cached."""
  for path in files:
    with open(path, "rb", buffering=0) as file:
      while file.read(1 << 24):
        pass


def drop(files: Sequence[pathlib.Path]) -> None:
  """Asks the system to forget the cached pages of files."""
  for path in files:
    with open(path, "rb", buffering=0) as file:
      os.fsync(file.fileno())
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_share(files: Sequence[pathlib.Path]) -> float | None:
  """The share of the files' bytes that is cached, by util-linux's fincore."""
  if shutil.which("fincore") is None:
    return None
  text = subprocess.run(
    ["fincore", "--bytes", "--noheadings", "--output", "RES,SIZE", *files],
    capture_output=True,
    text=True,
    check=True,
  ).stdout
  numbers = [[int(x) for x in line.split()] for line in text.splitlines()]
  share = sum(x for x, _ in numbers) / max(1, sum(y for _, y in numbers))
  return min(1.0, share)  # Pages are whole.


_FIELDS = {"anon": "RssAnon", "file": "RssFile", "rss": "VmRSS"}


def memory_of(status: str) -> dict[str, int]:
  """Bytes of a process by the text of its /proc/PID/status."""
  found = {}
  for key, field in _FIELDS.items():
    match = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    found[key] = 1024 * int(match[1]) if match else 0
  return found


def _descendants(pid: int) -> list[int]:
  found = [pid]
  for one in found:
    try:
      text = pathlib.Path(f"/proc/{one}/task/{one}/children").read_text()
    except OSError:
      continue
    found += [int(child) for child in text.split()]
  return found


def _sample(pid: int, peaks: dict[str, int], stop: threading.Event) -> None:
  """Keeps the most that a process and its children hold, until it ends."""
  while not stop.wait(0.02):
    total: dict[str, int] = collections.Counter()
    for one in _descendants(pid):
      try:
        text = pathlib.Path(f"/proc/{one}/status").read_text()
      except OSError:
        continue
      for key, value in memory_of(text).items():
        total[key] += value
    for key, value in total.items():
      peaks[key] = max(peaks.get(key, 0), value)


def busy_seconds(stat: str) -> float:
  """Seconds in which processors did anything, by the text of /proc/stat."""
  user, nice, system, _, _, irq, soft, steal = map(int, stat.split()[1:9])
  ticks = user + nice + system + irq + soft + steal
  return ticks / os.sysconf("SC_CLK_TCK")


def _busy() -> float:
  return busy_seconds(pathlib.Path("/proc/stat").read_text())


def run_measured(
  command: Sequence[str], environment: Mapping[str, str] | None = None
) -> Json:
  """Runs a command; its time, and the most memory that it held.

  Args:
    command: What to run.
    environment: Variables to set besides those there are.

  Returns:
    "seconds", "user", "system", "max_rss" of getrusage, "anon", "file", "rss",
    the largest of those read every 20 ms, and "others", how many processors
    were busy with anything else.

  Raises:
    SystemExit: The command failed; the message is its last output.
  """
  busy = _busy()
  start = time.perf_counter()
  process = subprocess.Popen(
    command,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    env=os.environ | dict(environment or {}),
  )
  peaks: dict[str, int] = {}
  stop = threading.Event()
  sampler = threading.Thread(
    target=_sample, args=(process.pid, peaks, stop), daemon=True
  )
  sampler.start()
  try:
    assert process.stderr is not None
    with process.stderr as pipe:
      text = pipe.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
  except BaseException:
    process.kill()
    raise
  finally:
    seconds = time.perf_counter() - start
    busy = _busy() - busy
    stop.set()
    sampler.join()
  if process.returncode:
    raise SystemExit(
      f"error: {command[0]} ended with {process.returncode}:\n"
      f"{text.decode(errors='replace')[-2000:]}"
    )
  return {
    "seconds": seconds,
    "user": usage.ru_utime,
    "system": usage.ru_stime,
    "max_rss": 1024 * usage.ru_maxrss,
    "others": max(0.0, busy - usage.ru_utime - usage.ru_stime) / seconds,
    **peaks,
  }


def available_bytes() -> int:
  """Memory that is free or can be, as the system says."""
  text = pathlib.Path("/proc/meminfo").read_text()
  found = re.search(r"MemAvailable:\s+(\d+) kB", text)
  return 1024 * int(found[1]) if found else 0
