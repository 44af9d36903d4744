"""Passthrough: a deeper or other network from the layers of several."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmerge import tree
from jaxmerge.merging import (
  _gathered,
  _lazy,
  _leaves,
  _method,
  _values,
  _weights,
)

PyTree = Any
KeyPath = tuple[Any, ...]

# layers_3, layers/3, layer/3, blocks_3, block_3, h/3, h_3; or in a flat name,
# model.layers.3.mlp.weight.
PATTERN = r"(?:^|[/._])(?:layers?|blocks?|h)[/._](\d+)(?=$|[/._])"


class LayerSlice(NamedTuple):
  """A range of layers of one model.

  Attributes:
    model: Place of the model in the list of models.
    start: Number of the first layer.
    stop: Number after that of the last layer.
    scale: What the range's parameters are multiplied by: a scalar, a prefix of
      a layer, or a mapping from regular expressions of the names within a
      layer to scalars; None leaves them as they are.
  """

  model: int
  start: int
  stop: int
  scale: Any = None


class _Node(NamedTuple):
  """A part of a tree that belongs to one layer.

  Attributes:
    parent: Name of the container that holds it.
    key: Its name in there.
    span: Where the number is in the key.
    number: The number of the layer.
    value: The part.
  """

  parent: str
  key: str
  span: tuple[int, int]
  number: int
  value: PyTree

  def renamed(self, number: int) -> str:
    """The key with another number, padded with zeros as the old one."""
    first, last = self.span
    old = self.key[first:last]
    width = len(old) if old.startswith("0") else 0
    return f"{self.key[:first]}{number:0{width}d}{self.key[last:]}"


def _name(path: KeyPath) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _children(node: PyTree) -> list[tuple[Any, PyTree]]:
  """The keys and values one level down; none of a leaf."""
  flat = jax.tree_util.tree_leaves_with_path(
    node, is_leaf=lambda other: other is not node
  )
  return [(path[0], child) for path, child in flat if path]


def _nodes(
  params: PyTree, pattern: re.Pattern[str], label: str
) -> dict[str, _Node]:
  """The parts that belong to layers, by name."""
  found: dict[str, tuple[int, tuple[int, int]]] = {}
  matched = []
  names = tree.leaf_names(params)
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  for leaf, path in zip(names, paths, strict=True):
    match = pattern.search(leaf)
    if match is None or match.group(1) is None:
      continue
    matched.append(leaf)
    number, span = match.group(1), match.span(1)
    if not (number.isascii() and number.isdigit()):
      raise ValueError(
        f"pattern {pattern.pattern!r} finds {number!r} in leaf '{leaf}' of"
        f" {label}, which is not a number; let its group match digits only"
      )
    depth, start = 1, 0
    # A key may have a slash of its own.
    while len(_name(path[:depth])) < span[1]:
      start = len(_name(path[:depth])) + 1
      depth += 1
    name = _name(path[:depth])
    place = (int(number), (span[0] - start, span[1] - start))
    if found.setdefault(name, place) != place:
      raise ValueError(
        f"pattern {pattern.pattern!r} finds more than one number in '{name}' of"
        f" {label}; anchor it with the names before the number"
      )
  whole = set(matched)
  for leaf, path in zip(names, paths, strict=True):
    for depth in range(1, len(path) + 1):
      if _name(path[:depth]) in found and leaf not in whole:
        raise ValueError(
          f"leaf '{leaf}' of {label} does not match the pattern"
          f" {pattern.pattern!r}, but others of layer '{_name(path[:depth])}'"
          " do; match whole layers, and leave out what is within them"
        )
  if not found:
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    raise ValueError(
      f"no leaf of {label} matches the pattern {pattern.pattern!r}; the names"
      f" are: {shown or '(none)'}"
    )
  return dict(_walk(params, "", found))


def _walk(
  node: PyTree, name: str, found: dict[str, tuple[int, tuple[int, int]]]
) -> Iterator[tuple[str, _Node]]:
  for key, child in _children(node):
    label = _name((key,))
    below = f"{name}/{label}" if name else label
    if below in found:
      number, span = found[below]
      yield below, _Node(name, label, span, number, child)
    else:
      yield from _walk(child, below, found)


def _check_slice(
  index: int, given: Any, layers: Sequence[dict[str, _Node]]
) -> LayerSlice:
  """The slice, or an error that says what is wrong with it."""
  try:
    one = LayerSlice(*given)
  except TypeError as error:
    raise ValueError(
      f"slice {index} is {given!r}; give (model, start, stop) or (model,"
      " start, stop, scale)"
    ) from error
  if any(type(value) is not int for value in one[:3]):
    raise ValueError(
      f"slice {index} is {given!r}; its model, start and stop must be ints"
    )
  if not 0 <= one.model < len(layers):
    raise ValueError(
      f"slice {index} is of model {one.model}, but there are {len(layers)}"
      " models, numbered from 0"
    )
  numbers = {node.number for node in layers[one.model].values()}
  if not 0 <= one.start < one.stop:
    raise ValueError(
      f"slice {index} has layers {one.start} to {one.stop}, which is no range;"
      " give 0 <= start < stop"
    )
  missing = sorted(set(range(one.start, one.stop)) - numbers)
  if missing:
    raise ValueError(
      f"slice {index} has layers {one.start} to {one.stop}, but model"
      f" {one.model} has no layer {missing[0]}; its layers are numbered"
      f" {min(numbers)} to {max(numbers)}"
    )
  return one


def _scale(leaf: Any, factor: Any) -> Any:
  wide = _leaves.widen(leaf)
  scaled = wide * jnp.asarray(factor).astype(wide.dtype)
  return scaled.astype(jnp.asarray(leaf).dtype)


def _read_scaled(leaf: _lazy.LazyLeaf, factor: Any) -> Any:
  return _scale(leaf.read(), factor)


def _scaled(layer: PyTree, scale: Any, name: str) -> PyTree:
  if scale is None:
    return layer
  treedef: Any = jax.tree.structure(layer)
  leaves = []
  for leaf, factor in zip(
    jax.tree.leaves(layer), _values.per_leaf(scale, layer, name), strict=True
  ):
    if tree.is_float(leaf):
      if isinstance(leaf, _lazy.LazyLeaf):
        read = functools.partial(_read_scaled, leaf, factor)
        leaf = _lazy.LazyLeaf(leaf.shape, leaf.dtype, read)
      else:
        leaf = _scale(leaf, factor)
    leaves.append(leaf)
  return treedef.unflatten(leaves)


def _fill(
  node: PyTree, name: str, old: dict[str, _Node], new: dict[str, dict[str, Any]]
) -> PyTree:
  """The tree with other layers in the containers of the old ones."""
  inside = f"{name}/" if name else ""
  if name not in new and not any(other.startswith(inside) for other in new):
    return node
  children = {_name((key,)): (key, child) for key, child in _children(node)}
  others = {
    label: _fill(child, inside + label, old, new)
    for label, (_, child) in children.items()
    if inside + label not in old
  }
  if name not in new:
    treedef: Any = jax.tree.structure(
      node, is_leaf=lambda other: other is not node
    )
    return treedef.unflatten(others.values())
  where = f"'{name}'" if name else "the tree"
  for label in new[name]:
    if label in others:
      raise ValueError(
        f"layer '{label}' of the result would overwrite what the pattern does"
        f" not match in {where}; widen the pattern, or rename that part"
      )
  if isinstance(node, Mapping):
    entries = {children[label][0].key: child for label, child in others.items()}
    numbers = any(isinstance(key, int) for key in node)
    for label, child in new[name].items():
      entries[int(label) if numbers else label] = child
    return type(node)(entries)  # type: ignore[call-arg]
  if type(node) not in (list, tuple):
    raise ValueError(
      f"layers in a {type(node).__name__}, at {where}, cannot be added or taken"
      " away; convert it to a dictionary or a list first"
    )
  if others:
    raise ValueError(
      f"the pattern matches some entries of the {type(node).__name__} at"
      f" {where}, but not entry {next(iter(others))}; match all of them"
    )
  return type(node)(new[name][label] for label in sorted(new[name], key=int))


def passthrough(
  models: Sequence[PyTree],
  slices: Sequence[LayerSlice | tuple[Any, ...]],
  *,
  pattern: str = PATTERN,
  rest: int = 0,
  dtype: Any = None,
  allow_nonfinite: bool = False,
) -> PyTree:
  r"""Stacks ranges of layers of models, renumbered from 0.

  With slices :math:`(m_j, a_j, b_j)` the layers of the result are those
  numbered :math:`a_1, \dots, b_1 - 1` of model :math:`m_1`, then
  :math:`a_2, \dots, b_2 - 1` of model :math:`m_2`, and so on.

  Args:
    models: One or more trees. Their depths and leaves may differ; whether the
      layers fit on one another is not checked.
    slices: One or more ranges of layers, in their order, as `LayerSlice` or
      plain tuples ``(model, start, stop)`` or ``(model, start, stop, scale)``.
      A range may be given more than once.
    pattern: Regular expression that is looked for in the names of leaves, such
      as ``r"layers_(\d+)"`` or ``r"(?:^|/)h/(\d+)"``. Its one group is the
      number of the layer, all of it within one key of the path; whatever is
      below that key moves with it. All places with the same number are one
      layer, such as ``params/layers_3`` and ``batch_stats/layers_3``. The
      containers of the layers must be mappings, lists or plain tuples.
    rest: Place of the model that everything else is taken from.
    dtype: Dtype of the floating-point leaves of the result; by default each
      has its own.
    allow_nonfinite: Whether NaN and infinity are let through.

  Returns:
    A tree with the containers of ``models[rest]``. Leaves that are neither
    scaled nor cast are those of the models, not copies.

  Raises:
    ValueError: If there are no models or slices; a slice is out of bounds; the
      pattern is not valid, matches nothing or parts of layers; names of layers
      clash with other names; or a leaf of the result holds NaN or infinity.

  References:
    Kim et al., `SOLAR 10.7B: scaling large language models with simple yet
    effective depth up-scaling <https://arxiv.org/abs/2312.15166>`_, 2023

  >>> model = {"embed": 0.5, "h_0": 1.0, "h_1": 2.0, "h_2": 3.0}
  >>> passthrough([model], [(0, 0, 2), (0, 1, 3)])
  {'embed': 0.5, 'h_0': 1.0, 'h_1': 2.0, 'h_2': 2.0, 'h_3': 3.0}
  """
  models = _method.check_models(models)
  if not slices:
    raise ValueError("slices is empty; give at least one (model, start, stop)")
  if type(rest) is not int or not 0 <= rest < len(models):
    raise ValueError(
      f"rest must be the place of one of the {len(models)} models; got {rest!r}"
    )
  try:
    compiled = re.compile(pattern)
  except re.error as error:
    raise ValueError(
      f"pattern {pattern!r} is not a valid regular expression ({error})"
    ) from error
  if compiled.groups != 1:
    raise ValueError(
      f"pattern {pattern!r} has {compiled.groups} groups; give it one, around"
      " the number of the layer, and write others as (?:...)"
    )
  layers = [
    _nodes(params, compiled, f"model {i}") for i, params in enumerate(models)
  ]
  plan = [_check_slice(i, one, layers) for i, one in enumerate(slices)]
  new: dict[str, dict[str, Any]] = {
    node.parent: {} for node in layers[rest].values()
  }
  number = 0
  for index, one in enumerate(plan):
    for old in range(one.start, one.stop):
      for name, node in layers[one.model].items():
        if node.number != old:
          continue
        if node.parent not in new:
          raise ValueError(
            f"layer '{name}' of model {one.model} has no place in model {rest},"
            f" which has no layers in '{node.parent}'; choose another model"
            " with rest"
          )
        new[node.parent][node.renamed(number)] = _scaled(
          node.value, one.scale, f"scale of slice {index}"
        )
      number += 1
  result = _fill(models[rest], "", layers[rest], new)
  merged = _leaves.merged_leaves(result, None)
  if not allow_nonfinite:
    _leaves.check_finite([result], ["the result"], merged)
  return _leaves.rebuild(result, [], [], dtype) if dtype else result


def passthrough_method(
  slices: Sequence[LayerSlice | tuple[Any, ...]],
  *,
  pattern: str = PATTERN,
  rest: int = 0,
  dtype: Any = None,
  allow_nonfinite: bool = False,
) -> _method.MergeMethod:
  """Passthrough as a method, which keeps all models; see `passthrough`.

  Args:
    slices: See `passthrough`, as the rest.
    pattern: What finds the numbers of layers.
    rest: Place of the model that everything else is taken from.
    dtype: Dtype of the result.
    allow_nonfinite: Whether NaN and infinity are let through.

  Returns:
    The method. Unlike others, it takes models of other structures than its
    base, which it does not use, and its ``update`` takes no weights.

  >>> method = passthrough_method([(0, 0, 2), (0, 1, 2)])
  >>> model = {"h_0": 1.0, "h_1": 2.0}
  >>> method.finalize(method.update(method.init(model), model))
  {'h_0': 1.0, 'h_1': 2.0, 'h_2': 2.0}
  """

  def init(base: PyTree) -> _gathered.GatheredState:
    return _gathered.GatheredState(base, (), ())

  def update(
    state: _gathered.GatheredState,
    params: PyTree,
    weight: Any = 1.0,
    statistics: Any = None,
    *,
    donate: bool = False,
  ) -> _gathered.GatheredState:
    # The state holds the models as they are given: nothing to take over.
    del donate
    _method.check_no_statistics(statistics)
    return state._replace(
      models=(*state.models, params), weights=(*state.weights, weight)
    )

  def finalize(state: _gathered.GatheredState) -> PyTree:
    return passthrough(
      state.models,
      slices,
      pattern=pattern,
      rest=rest,
      dtype=dtype,
      allow_nonfinite=allow_nonfinite,
    )

  return _weights.unweighted(
    _method.MergeMethod(init, update, finalize),
    "passthrough",
    "scale a slice instead",
  )
