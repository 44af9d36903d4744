"""Measures both tools, and a copy, in turns."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

import yaml

from benchmarks import _mergekit_files, _mergekit_process, _mergekit_recipes

Json = dict[str, Any]

SPEED_KIND = "llama-1b"
CACHES = ("warm", "cold")
SIDES = ("jaxmerge", "copy", "mergekit", "first")
# Measurements while others keep more processors busy are not kept.
OTHERS = 0.25


def jaxmerge_command() -> str:
  """The command that belongs to this Python, or that of the path."""
  beside = pathlib.Path(sys.executable).with_name("jaxmerge")
  found = str(beside) if beside.exists() else shutil.which("jaxmerge")
  if found is None:
    raise SystemExit(
      'error: jaxmerge is not installed: pip install -e ".[merge]"'
    )
  return found


@dataclasses.dataclass(frozen=True)
class Speed:
  """Measures the sides of one rule.

  Attributes:
    workdir: Where measurements are kept.
    mergekit: mergekit's command.
    rule: The name of the rule.
    recipe: Its configuration.
    inputs: Number of models besides the base.
    cache: "warm" or "cold".
  """

  workdir: pathlib.Path
  mergekit: str
  rule: str
  recipe: Json
  inputs: int
  cache: str

  def _kept(self, side: str, turn: int) -> pathlib.Path:
    slug = re.sub(r"\W+", "-", self.rule)
    name = f"{slug}-{self.inputs}-{self.cache}-{side}-{turn}.json"
    return self.workdir / "speed" / name

  def is_kept(self, side: str, turn: int) -> bool:
    """Whether this was measured."""
    return self._kept(side, turn).exists()

  def measure(self, side: str, turn: int) -> None:
    """Measures one side once, unless that was done."""
    if self.is_kept(side, turn):
      return
    folders = [
      pathlib.Path(one) for one in _mergekit_recipes.input_folders(self.recipe)
    ]
    files = [one for folder in folders for one in folder.glob("*.safetensors")]
    out = self.workdir / "out"
    shutil.rmtree(out, ignore_errors=True)
    slug = re.sub(r"\W+", "-", self.rule)
    recipe = self.workdir / "recipes" / f"{slug}-{self.inputs}.yml"
    recipe.parent.mkdir(exist_ok=True)
    recipe.write_text(yaml.safe_dump(self.recipe, sort_keys=False))
    programs = self.workdir / "programs"
    if side == "mergekit":
      command = [self.mergekit, str(recipe), str(out), "--quiet"]
    elif side == "copy":
      out.mkdir()
      read = 'to=$1; shift; cat "$@" > /dev/null && cp "$1" "$to"'
      command = ["sh", "-c", read, "sh", str(out / "copy"), *map(str, files)]
    else:
      command = [jaxmerge_command(), "merge", str(recipe), str(out), "--quiet"]
    if side == "first":
      programs = self.workdir / "no-programs"
      shutil.rmtree(programs, ignore_errors=True)
    os.sync()
    (
      _mergekit_process.read_through
      if self.cache == "warm"
      else _mergekit_process.drop
    )(files)
    before: Json = {
      "available": _mergekit_process.available_bytes(),
      "cached": _mergekit_process.cached_share(files),
    }
    try:
      found = _mergekit_process.run_measured(
        command, {"JAX_COMPILATION_CACHE_DIR": str(programs)}
      )
    finally:
      shutil.rmtree(out, ignore_errors=True)
    record = {
      "rule": self.rule,
      "inputs": self.inputs,
      "cache": self.cache,
      "side": side,
      "turn": turn,
      "input_bytes": sum(one.stat().st_size for one in files),
      "load": os.getloadavg()[0],
      **before,
      **found,
    }
    disturbed = found["others"] > OTHERS
    if not disturbed:
      _mergekit_files.write_json(self._kept(side, turn), record)
    print(
      f"{self.rule} | {self.inputs} | {self.cache} | {side} |"
      f" {record['seconds']:.1f} s | anonymous"
      f" {record.get('anon', 0) / 1e9:.2f} GB, file"
      f" {record.get('file', 0) / 1e9:.2f} GB | before:"
      f" {before['available'] / 1e9:.1f} GB available, cached"
      f" {before['cached']} | others {found['others']:.2f} cores"
      + (": disturbed, not kept" if disturbed else ""),
      flush=True,
    )


def measure(
  given: Any, workdir: pathlib.Path, in_time: Callable[[], bool]
) -> None:
  """Measures all rules that are asked for; what is kept is not measured."""
  root = _mergekit_files.build(given.python, workdir, SPEED_KIND, "bfloat16")
  jobs: list[tuple[Speed, str, int]] = []

  def add(rule: str, inputs: int, cache: str, sides: Sequence[str]) -> None:
    recipe = _mergekit_recipes.speed_recipes(root, inputs)[rule]
    one = Speed(workdir, given.mergekit, rule, recipe, inputs, cache)
    turns = {
      "jaxmerge": given.repeats,
      "copy": given.repeats,
      "mergekit": given.mergekit_repeats,
      "first": 1,
    }
    for turn in range(given.repeats):
      for side in sides:
        if side in given.sides and turn < turns[side]:
          jobs.append((one, side, turn))

  for cache in given.caches:
    for rule, recipe in _mergekit_recipes.speed_recipes(root).items():
      if _mergekit_recipes.chosen(given.methods, rule, recipe["merge_method"]):
        theirs = () if rule in _mergekit_recipes.OURS else ("mergekit",)
        first = ("first",) if cache == "warm" else ()
        add(rule, 3, cache, (*first, "jaxmerge", *theirs, "copy"))
    if given.inputs and cache == "warm":
      for rule in ("linear", "ties"):
        if _mergekit_recipes.chosen(given.methods, rule, rule):
          for inputs in (2, 8):
            _mergekit_recipes.link(root, inputs)
            add(rule, inputs, cache, ("jaxmerge", "mergekit"))
  for one, side, turn in jobs:
    if not one.is_kept(side, turn):
      if not in_time():
        return
      one.measure(side, turn)
