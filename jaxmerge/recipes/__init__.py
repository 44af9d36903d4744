"""Recipes: merging checkpoints on disk, by mergekit's configuration.

* `merge_checkpoints`: merges by a recipe, out of core.
* `plan_merge`: what it would do.
* `verify`: whether a result and its inputs are as they were.
* `load`: reads and checks a recipe alone.
* `methods`: the merge methods by the names that recipes have for them.

And what else is done with checkpoints on disk:

* `describe`: tensors, architecture, adapter.
* `compare`: what two of them differ in.
* `extract`, `extract_lora`: what a network was tuned by, as a task vector or as
  an adapter of low rank.
* `apply_vector`: adds it to a network.
* `convert`: from safetensors to Orbax and back.
"""

from jaxmerge.recipes._compare import (
  Comparison,
  TaskDifference,
  TensorDifference,
  compare,
)
from jaxmerge.recipes._convert import ConvertReport, convert
from jaxmerge.recipes._describe import (
  Description,
  DtypeInfo,
  TensorInfo,
  describe,
)
from jaxmerge.recipes._extract_lora import (
  Kept,
  LeftOut,
  LoraReport,
  extract_lora,
)
from jaxmerge.recipes._merge import (
  MergePlan,
  MergeReport,
  merge_checkpoints,
  plan_merge,
  verify,
)
from jaxmerge.recipes._methods import Method
from jaxmerge.recipes._methods import table as methods
from jaxmerge.recipes._recipe import load
from jaxmerge.recipes._vectors import (
  ApplyReport,
  ExtractReport,
  apply_vector,
  extract,
)
from jaxmerge.recipes._yaml import RecipeError

__all__ = [
  "ApplyReport",
  "Comparison",
  "ConvertReport",
  "Description",
  "DtypeInfo",
  "ExtractReport",
  "Kept",
  "LeftOut",
  "LoraReport",
  "MergePlan",
  "MergeReport",
  "Method",
  "RecipeError",
  "TaskDifference",
  "TensorDifference",
  "TensorInfo",
  "apply_vector",
  "compare",
  "convert",
  "describe",
  "extract",
  "extract_lora",
  "load",
  "merge_checkpoints",
  "methods",
  "plan_merge",
  "verify",
]
