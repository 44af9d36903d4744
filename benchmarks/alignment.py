r"""Alignment and landscapes against peers, all sections in one run.

  pip install -e ".[alignment,bench]"
  python -m benchmarks.alignment [--sections=matching,transport,landscape] \\
    [--smoke]

Each section is a command of its own, in a process of its own, one after the
other: benchmarks.alignment_matching, benchmarks.alignment_transport and
benchmarks.landscape say what they measure.
"""

from __future__ import annotations

import subprocess
import sys

from absl import app, flags

SECTIONS = {
  "matching": "benchmarks.alignment_matching",
  "transport": "benchmarks.alignment_transport",
  "landscape": "benchmarks.landscape",
}


def define_flags() -> None:
  """Defines the flags, for a run of this module alone."""
  flags.DEFINE_list("sections", list(SECTIONS), "Which ones.")
  flags.DEFINE_bool("smoke", False, "Small problems, for seconds.")


def commands(sections: list[str], smoke: bool) -> list[list[str]]:
  """The commands of the sections."""
  unknown = [name for name in sections if name not in SECTIONS]
  if unknown:
    raise app.UsageError(
      f"unknown sections {', '.join(unknown)}; choose from"
      f" {', '.join(SECTIONS)}"
    )
  more = ["--smoke"] if smoke else []
  return [[sys.executable, "-m", SECTIONS[name], *more] for name in sections]


def main(argv: list[str]) -> None:
  """Runs the sections."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {argv[1:]}")
  failed = []
  for command in commands(flags.FLAGS.sections, flags.FLAGS.smoke):
    print(f"== {command[2]}", flush=True)
    # What a section lacks, PyTorch say, is no reason to leave out the others.
    if subprocess.run(command, check=False).returncode:
      failed.append(command[2])
  if failed:
    sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
  define_flags()
  app.run(main)
