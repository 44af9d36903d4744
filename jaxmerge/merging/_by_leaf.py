"""Merging checkpoints that are read leaf by leaf."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree
from jaxmerge.merging import (
  _consensus,
  _gathered,
  _lazy,
  _leafwise,
  _leaves,
  _method,
  _passthrough_by_leaf,
  _registry,
  _ties,
  _ties_by_leaf,
  _values,
)

PyTree = Any
Array = jax.Array
_Bind = Callable[[int], Mapping[str, Any]]


def _of_leaf(
  options: Mapping[str, Any], base: PyTree
) -> Callable[[int], dict[str, Any]]:
  """Options that are prefixes of the tree, resolved to those of each leaf."""

  def resolve(value: Any, name: str) -> Callable[[int], Any]:
    if type(value) in (list, tuple):
      columns = [resolve(one, name) for one in value]
      return lambda place: type(value)(column(place) for column in columns)
    if value is None or callable(value) or jax.tree_util.all_leaves([value]):
      return lambda place: value
    leaves = _values.per_leaf(value, base, name)
    return lambda place: leaves[place]

  found = {name: resolve(value, name) for name, value in options.items()}
  return lambda place: {name: pick(place) for name, pick in found.items()}


def _by_name(statistics: Any, base: PyTree, owner: str) -> dict[str, Any]:
  """Statistics of each leaf: a tree like the base's, or a mapping of names."""
  if statistics is None:
    return {}
  structure: Any = jax.tree.structure(statistics)
  if structure == jax.tree.structure(base):
    leaves = jax.tree.leaves(statistics)
    return dict(zip(tree.leaf_names(base), leaves, strict=True))
  unknown = set(tree.leaf_names(statistics)) - set(tree.leaf_names(base))
  if not isinstance(statistics, Mapping) or unknown:
    raise tree.TreeMismatchError(
      f"{owner} has an entry for '{min(unknown, default='')}', which is no leaf"
      " of the model; give a tree of its structure, or a mapping from names of"
      " leaves"
    )
  return dict(statistics)


def _whole_fisher(*given: Any) -> Callable[[int], _method.MergeMethod]:
  del given
  raise ValueError(
    "fisher_average divides by the norm of the whole Fisher with"
    " normalize='vector', which no leaf knows; give maximum(F, floor) / norm(F)"
    " as Fishers, with floor=0 and without normalize"
  )


def _whole_ties(
  leaves: Mapping[int, Any],
  read: _ties_by_leaf.Read,
  weights: Sequence[Sequence[Any]],
  options: Mapping[str, Any],
  bind: _Bind,
) -> Callable[[int], _method.MergeMethod]:
  """TIES of each leaf, told what was found in the whole vector."""
  density, *kinds = (
    options[name] for name in ("density", "elect", "merge", "zero_sign")
  )
  _ties.check_options(density, options["scope"], *kinds)
  rule = _ties_by_leaf.told_rule(*kinds)
  vector = _ties_by_leaf.scan(leaves, read, weights, density, rule)
  return lambda place: _leafwise.leafwise_method(
    rule,
    options={
      "scale": bind(place).get("scale", options["scale"]),
      **vector.values(),
    },
    dtype=options.get("dtype"),
    allow_nonfinite=True,
  )


def _whole_consensus(
  leaves: Mapping[int, Any],
  read: _ties_by_leaf.Read,
  weights: Sequence[Sequence[Any]],
  options: Mapping[str, Any],
  bind: _Bind,
) -> Callable[[int], _method.MergeMethod]:
  """Consensus on the vector of TIES, likewise."""
  _consensus.check_options(
    options["min_tasks"],
    len(weights),
    options["multi_task"],
    options["density"],
    options["merge"],
  )
  rule = _ties_by_leaf.told_rule("mass", options["merge"], "majority", True)
  vector = _ties_by_leaf.scan(leaves, read, weights, options["density"], rule)

  def make(place: int) -> _method.MergeMethod:
    given = {**options, **bind(place)}
    names = ("scale", "tall_lambda", "min_tasks", "dtype")

    def merge(
      base: PyTree, models: Sequence[PyTree], *, weights: Any
    ) -> PyTree:
      return _consensus.keep_used(
        base,
        models,
        weights,
        rule,
        {"scale": 1.0, **vector.values()},
        **{name: given[name] for name in names if name in given},
        allow_nonfinite=True,
      )

    return _gathered.gathering_method(merge, allow_nonfinite=True)

  return make


# What messages call what a function collects.
_NOUNS = {"diagonal_fisher": "Fisher", "gram_matrices": "Gram matrices"}
_WHOLE = {
  "consensus": _whole_consensus,
  "fisher_average": _whole_fisher,
  "ties": _whole_ties,
}


def _check_number(state: Any, num_models: int) -> None:
  """Raises unless options of one value a model have as many as models."""
  if not isinstance(state, _leafwise.LeafwiseState):
    return
  for values in state.values:
    for name, value in values.items():
      if isinstance(value, _leaves.Static) or not value.ndim:
        continue
      if len(value) != num_models:
        raise ValueError(
          f"got {len(value)} values of {name} for {num_models} models; give one"
          " value, or one for each model"
        )


def merge_leaves(
  method: _registry.RegisteredMethod,
  base: PyTree,
  models: Sequence[PyTree],
  *,
  weights: Any = None,
  key: Array | None = None,
  statistics: Sequence[Any] | None = None,
) -> Iterator[tuple[str, Array]]:
  """Merges checkpoints leaf by leaf: one leaf of one model is held at a time.

  The leaves may be `LazyLeaf`, ``np.memmap``, or whatever has a shape and a
  dtype and becomes an array by ``np.asarray``. Structure, shapes and dtypes
  are compared before anything is read. The result is the same bit for bit as
  that of the method on trees in memory. Only ``fisher_average`` with
  ``normalize="vector"`` cannot be merged so, and says so. Methods whose state
  grows with the number of models hold one leaf of all models.

  Each leaf is read once. TIES with a threshold over the whole vector reads
  each floating-point leaf two times more to find the threshold exactly (four
  if one has 64 bits), and once for the majority of the signs.

  Args:
    method: A method from `get`.
    base: See `RegisteredMethod`; a tree, possibly of lazy leaves.
    models: Likewise.
    weights: One for each model; see `task_arithmetic`.
    key: PRNG key, for a method that needs one.
    statistics: One entry for each model, for a method that needs them, of
      leaves that may be lazy as well.

  Returns:
    Iterator of the name and value of each leaf of the base, in the order of
    ``jax.tree.leaves``. Leaves that are not merged come from the base (from
    the first model, if the method needs no base).

  Raises:
    TreeMismatchError: If the trees differ, or, when it is read, a leaf is not
      what it was announced as.
    ValueError: As the method, or if two leaves have one name.

  >>> from jaxmerge.merging import get
  >>> base, models = {"a": 0.0, "b": 1.0}, [{"a": 2.0, "b": 3.0}]
  >>> for name, leaf in merge_leaves(get("magmax"), base, models):
  ...   print(name, leaf)
  a 1.0
  b 2.0
  """
  models = _method.check_models(models)
  method.check(
    base, len(models), weights=weights, key=key, statistics=statistics
  )
  if method.info.name == "passthrough":
    return _passthrough_by_leaf.leaves(models, **method.options)
  owners = ["base", *(f"model {i}" for i in range(len(models)))]
  if not method.info.needs_base:
    base, owners[0] = models[0], "model 0"
  tree.check_match(base, *models, names=owners)
  method.check_sums(weights, base, len(models))
  options = dict(method.options)
  select = options.pop("select", None)
  merged = {leaf.place for leaf in _leaves.merged_leaves(base, select)}
  columns = [
    _values.per_leaf(entry, base, f"weight {i}")
    for i, entry in enumerate(
      _values.per_model(
        1.0 if weights is None else weights, len(models), "weights"
      )
    )
  ]
  allow_nonfinite = options.pop("allow_nonfinite", False)
  bind = _of_leaf(options, base)
  names = tree.leaf_names(base)
  _lazy.check_names(names)
  trees = [jax.tree.leaves(params) for params in (base, *models)]

  def read(place: int, owner: int) -> dict[str, Any]:
    name = names[place]
    value = _lazy.read_leaf(trees[owner][place], name, owners[owner])
    if place not in merged:
      return {name: value}
    leaf = {name: jnp.asarray(value)}
    check_finite(leaf, owners[owner])
    return leaf

  def check_finite(leaf: dict[str, Any], owner: str) -> None:
    if not allow_nonfinite:
      found = _leaves.merged_leaves(leaf, None)
      _leaves.check_finite([leaf], [owner], found)

  noun = _NOUNS.get(method.info.statistics or "", "statistics")
  given_statistics = _method.per_model_statistics(statistics, len(models))
  known = [
    _by_name(one, base, f"{noun} {i}") for i, one in enumerate(given_statistics)
  ]
  for i, one in enumerate(given_statistics):
    if statistics is not None and one is None:
      raise ValueError(
        f"{noun} {i} is missing; collect it with {method.info.statistics}"
      )

  def read_statistics(name: str, model: int) -> dict[str, Any]:
    if name not in known[model]:
      return {}
    owner = f"{noun} {model}"
    value = _lazy.read_leaf(known[model][name], name, owner)
    leaf = {name: jnp.asarray(value)}
    if tree.is_float(value):
      check_finite(leaf, owner)
    return leaf

  def of_leaf(place: int) -> _method.MergeMethod:
    return _registry.get(
      method.info.name, **bind(place), allow_nonfinite=True
    ).method(key)

  _values.check_key(key)
  _leaves.result_dtype(np.float32(0), options.get("dtype"))
  if merged and method.info.leafwise:
    # Options that are out of their range are found before anything is read.
    of_leaf(min(merged))
  make: Callable[[int], _method.MergeMethod] = of_leaf
  if not method.info.leafwise:
    unread = {place: trees[0][place] for place in sorted(merged)}
    given = {**method.info.options, **options}
    make = _WHOLE[method.info.name](unread, read, columns, given, bind)

  def results() -> Iterator[tuple[str, Array]]:
    for place, name in enumerate(names):
      start = read(place, 0)
      if place not in merged:
        yield name, _leaves.rebuild(start, [], [], options.get("dtype"))[name]
        continue
      triple = make(place)
      state = triple.init(start)
      _check_number(state, len(models))
      for i, column in enumerate(columns):
        # Without a base, the first model has been read in its place.
        is_read = i == 0 and not method.info.needs_base
        params = start if is_read else read(place, i + 1)
        given = {} if weights is None else {"weight": column[place]}
        if statistics is not None:
          given["statistics"] = read_statistics(name, i)
        state = triple.update(state, params, **given, donate=True)
      yield name, triple.finalize(state)[name]

  return results()
