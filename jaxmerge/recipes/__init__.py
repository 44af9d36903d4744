"""Recipes: merging checkpoints on disk, by mergekit's configuration.

* `merge_checkpoints`: merges by a recipe, out of core.
* `plan_merge`: what it would do.
* `verify`: whether a result and its inputs are as they were.
* `load`: reads and checks a recipe alone.
* `methods`: the merge methods by the names that recipes have for them.
"""

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
from jaxmerge.recipes._yaml import RecipeError

__all__ = [
  "MergePlan",
  "MergeReport",
  "Method",
  "RecipeError",
  "load",
  "merge_checkpoints",
  "methods",
  "plan_merge",
  "verify",
]
