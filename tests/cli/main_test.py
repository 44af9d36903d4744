"""Tests of the command line as a whole: its start, its statuses."""

from __future__ import annotations

import builtins
import subprocess
import sys
import time
from unittest import mock

from absl.testing import absltest, parameterized

import jaxmerge
from jaxmerge import cli
from jaxmerge.cli import _main
from tests.cli import _command

_HELP = """
import sys
from jaxmerge import cli
sys.argv = ["jaxmerge", *sys.argv[1:]]
try:
  cli.main()
finally:
  heavy = {"jax", "numpy", "absl", "yaml", "pydantic", "orbax"}
  print("imported:", *sorted(heavy & set(sys.modules)), file=sys.stderr)
"""


class MainTest(parameterized.TestCase):
  def _start(self, *args):
    return subprocess.run(
      [sys.executable, "-c", _HELP, *args],
      check=False,
      capture_output=True,
      text=True,
    )

  def test_help_is_quick_and_imports_nothing(self):
    seconds = []
    for _ in range(3):
      start = time.perf_counter()
      run = self._start("--help")
      seconds.append(time.perf_counter() - start)
      self.assertEqual(run.returncode, 0)
      self.assertEqual(run.stderr, "imported:\n")
      for name in cli.COMMANDS:
        self.assertIn(f"  {name} ", run.stdout)
    # 0.3 on a machine that does nothing else.
    self.assertLess(min(seconds), 1)

  @parameterized.parameters((["--version"], 0), (["xyz"], 2), (["merge"], 2))
  def test_the_status_of_the_process(self, args, status):
    run = self._start(*args)
    self.assertEqual(run.returncode, status)
    self.assertIn("imported:\n", run.stderr)
    self.assertNotIn("Traceback", run.stderr)

  @parameterized.parameters(*cli.COMMANDS)
  def test_help_of_commands(self, name):
    for flag in ("-h", "--help"):
      run = _command.run(name, flag)
      self.assertEqual((run.status, run.err), (0, ""))
      self.assertIn("Usage: ", run.out)

  def test_version(self):
    run = _command.run("--version")
    self.assertIn(jaxmerge.__version__, run.out)
    self.assertEqual(run.status, 0)

  @parameterized.parameters(("xyz",), ("--xyz",), ("merg",))
  def test_unknown(self, *args):
    run = _command.run(*args)
    self.assertEqual((run.status, run.out), (2, ""))
    self.assertIn(args[0], run.err)

  def test_errors_that_are_not_ours_are_raised(self):
    with mock.patch.object(
      _main.group, "main", side_effect=ValueError("a bug")
    ):
      with self.assertRaisesRegex(ValueError, "a bug"):
        _main.run([])

  def test_packages_that_are_missing(self):
    with mock.patch.object(
      _main.group, "main", side_effect=ImportError("needs x: pip install x")
    ):
      run = _command.run("merge")
    self.assertEqual((run.status, run.out), (2, ""))
    self.assertEqual(run.err, "error: needs x: pip install x\n")

  def test_without_click(self):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
      if name.partition(".")[0] == "click":
        raise ImportError(name)
      return real(name, *args, **kwargs)

    with (
      mock.patch.object(
        cli.importlib, "import_module", side_effect=ImportError("click")
      ),
      mock.patch.object(builtins, "__import__", missing),
      self.assertRaises(SystemExit) as caught,
      mock.patch.object(sys, "stderr") as stderr,
    ):
      cli.main()
    self.assertEqual(caught.exception.code, 2)
    written = "".join(call.args[0] for call in stderr.write.call_args_list)
    self.assertIn("pip install 'jaxmerge[merge]'", written)


if __name__ == "__main__":
  absltest.main()
