"""Merges by both tools, and how far their results are apart."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import yaml

from benchmarks import (
  _mergekit_compare,
  _mergekit_files,
  _mergekit_recipes,
  _mergekit_tables,
)

Json = dict[str, Any]

KINDS = (
  "llama-tiny",
  "gpt2",
  "llama-100m",
  "minilm",
  "bert",
  "clip",
)

RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
# mergekit-yaml fails on these; mergekit-pytorch takes tensors by their names.
RAW = ("minilm", "bert", "clip")
# Results of mergekit up to this size stay, so that ours alone are made again.
KEPT_BYTES = 64e6


def load(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors of a folder of safetensors."""
  from safetensors import numpy as safetensors

  found: dict[str, np.ndarray] = {}
  for file in sorted(folder.glob("*.safetensors")):
    found |= safetensors.load_file(file)
  return found


def last_line(text: str, hide: Mapping[str, str]) -> str:
  """The last line of an error, without the paths of this machine."""
  lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
  line = lines[-1] if lines else "no message"
  for path, name in hide.items():
    line = line.replace(path, name)
  return line[:300]


@dataclasses.dataclass(frozen=True)
class Parity:
  """Merges one kind of models with both tools.

  Attributes:
    workdir: Where measurements are kept.
    mergekit: mergekit's command.
    root: The folders of the models.
    kind: Their kind.
    mode: The dtype that they are stored and merged in.
  """

  workdir: pathlib.Path
  mergekit: str
  root: pathlib.Path
  kind: str
  mode: str

  def row(self, name: str, recipe: Json) -> Json:
    """Compares the results of one recipe, or says who failed.

    Args:
      name: The name of the row.
      recipe: mergekit's configuration.

    Returns:
      What is kept.
    """
    slug = re.sub(r"\W+", "-", name)
    kept = self.workdir / "parity" / self.kind / self.mode / f"{slug}.json"
    if kept.exists():
      return json.loads(kept.read_text())
    recipe = {"dtype": self.mode} | recipe
    random = recipe["merge_method"] in RANDOM
    row: Json = {
      "kind": self.kind,
      "mode": self.mode,
      "name": name,
      "method": recipe["merge_method"],
    }
    folder = kept.parent / slug
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.yml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    self._ours(file, folder / "ours", row)
    self._theirs(recipe, folder / "theirs", row, "mergekit_error")
    wide = folder / "wide"
    if recipe["dtype"] != "float32" and not random:
      wide_recipe = recipe | {"dtype": "float32", "out_dtype": recipe["dtype"]}
      self._theirs(wide_recipe, wide, row, "wide_error")
    ours, theirs, widely = (
      load(one) if one.is_dir() else None
      for one in (folder / "ours", folder / "theirs", wide)
    )
    if ours is not None and theirs is not None:
      if random:
        row["moments"] = _mergekit_compare.moments(
          load(self.root / "base"), ours, theirs
        )
      else:
        row["difference"] = _mergekit_compare.compare(ours, theirs)
    if ours is not None and widely is not None:
      row["against_wide"] = _mergekit_compare.compare(ours, widely)
      if theirs is not None:
        row["mergekit_itself"] = _mergekit_compare.compare(theirs, widely)
    shutil.rmtree(folder / "ours", ignore_errors=True)
    if sum(one.stat().st_size for one in folder.rglob("*")) > KEPT_BYTES:
      shutil.rmtree(folder)
    _mergekit_files.write_json(kept, row)
    return row

  def _ours(self, file: pathlib.Path, out: pathlib.Path, row: Json) -> None:
    from jaxmerge import recipes as ours

    start = time.monotonic()
    try:
      ours.merge_checkpoints(file, out, overwrite=True)
    except Exception as error:  # Whatever it is, the row says so.
      name = type(error).__name__
      row["jaxmerge_error"] = self._shown(f"{name}: {error}")
    row["jaxmerge_seconds"] = round(time.monotonic() - start, 2)

  def _theirs(
    self,
    recipe: Json,
    out: pathlib.Path,
    row: Json,
    failed: str,
  ) -> None:
    # mergekit-pytorch writes no configuration: what it began may be there.
    if (out / "config.json").exists():
      return
    raw = self.kind in RAW
    file = out.with_suffix(".yml")
    file.write_text(
      yaml.safe_dump(
        _mergekit_recipes.of_files(recipe) if raw else recipe, sort_keys=False
      )
    )
    command = raw_command(self.mergekit) if raw else self.mergekit
    start = time.monotonic()
    done = subprocess.run(
      [command, str(file), str(out), "--quiet"],
      capture_output=True,
      text=True,
      check=False,
    )
    row["mergekit_seconds"] = round(time.monotonic() - start, 2)
    if done.returncode:
      row[failed] = self._shown(done.stderr)
      shutil.rmtree(out, ignore_errors=True)

  def _shown(self, text: str) -> str:
    return last_line(text, {str(self.workdir): "WORKDIR"})


def raw_command(mergekit: str) -> str:
  """The command for networks by names alone, beside mergekit-yaml."""
  return str(
    pathlib.Path(shutil.which(mergekit) or mergekit).with_name(
      "mergekit-pytorch"
    )
  )


def measure(
  given: Any, workdir: pathlib.Path, in_time: Callable[[], bool]
) -> None:
  """Compares all rows that are asked for, and prints each."""
  for kind in given.models:
    for mode in given.dtypes:
      if mode == "float16" and kind != KINDS[0]:
        continue  # The examples, once.
      root = _mergekit_files.build(given.python, workdir, kind, mode)
      if kind in RAW:
        made = _mergekit_recipes.raw_recipes(root)
      else:
        make = (
          _mergekit_recipes.examples
          if mode == "float16"
          else _mergekit_recipes.recipes
        )
        made = make(root, _mergekit_files.num_layers(root))
      one = Parity(workdir, given.mergekit, root, kind, mode)
      for name, recipe in made.items():
        if not _mergekit_recipes.chosen(
          given.methods, name, recipe["merge_method"]
        ):
          continue
        if not in_time():
          return
        row = one.row(name, recipe)
        print(
          " | ".join([kind, mode, *_mergekit_tables.parity_cells(row)]),
          flush=True,
        )
        if given.tensors and "moments" in row:
          print(
            _mergekit_tables.tensor_table(row["moments"]) + "\n", flush=True
          )
        # The architecture, not the rule.
        if "mergekit_error" in row and "jaxmerge_error" not in row:
          if not any(
            "difference" in kept for kept in _mergekit_files.rows(workdir, kind)
          ):
            print(f"{kind}: mergekit fails, the other rows are left out")
            break
