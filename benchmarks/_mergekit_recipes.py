"""The recipes that mergekit_parity merges by."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from benchmarks import _mergekit_files

Json = dict[str, Any]


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
  base, *others = (str(root / name) for name in _mergekit_files.MODELS)
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
  base, *others = (str(root / name) for name in _mergekit_files.MODELS)
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
    one | {"model": f"{one['model']}/{_mergekit_files.WEIGHTS}"}
    for one in recipe["models"]
  ]
  if "base_model" in recipe:
    found["base_model"] = f"{recipe['base_model']}/{_mergekit_files.WEIGHTS}"
  return found


def examples(root: pathlib.Path, layers: int) -> dict[str, Json]:
  """mergekit's example files with local paths.

  Args:
    root: The folder of the models.
    layers: How many layers they have.

  Returns:
    The configurations, in float16 as they are there.
  """
  base, *others = (str(root / name) for name in _mergekit_files.MODELS)
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
  return [
    beside / f"m{i + 1}" for i in range(len(_mergekit_files.MODELS) - 1, inputs)
  ]


def link(root: pathlib.Path, inputs: int) -> None:
  """Makes further models of the same files, by hard links.

  Args:
    root: The folder of the models.
    inputs: Number of models besides the base.
  """
  for i, folder in enumerate(linked(root, inputs)):
    folder.mkdir(parents=True, exist_ok=True)
    for file in (
      root / _mergekit_files.MODELS[1 + i % (len(_mergekit_files.MODELS) - 1)]
    ).iterdir():
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
  base, *others = (str(root / name) for name in _mergekit_files.MODELS)
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


def input_folders(recipe: Json) -> list[str]:
  """The folders that a recipe reads, each once."""
  found = [one["model"] for one in recipe["models"]]
  if "base_model" in recipe:
    found.append(recipe["base_model"])
  return sorted(set(found))


def chosen(names: Sequence[str] | None, name: str, method: str) -> bool:
  """Whether a row is asked for, by its name or method."""
  return names is None or name in names or method in names
