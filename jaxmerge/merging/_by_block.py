"""Merging one leaf block by block, so that memory does not depend on its size.

A leaf is read as flat blocks of all models. Rules that treat each entry alone
merge them at once. Others read the leaf once or twice before: to find which
magnitudes are kept (`_block_select.py`), how much was dropped, or the inner
products of the models (`_block_gram.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.merging import (
  _average,
  _combine,
  _draws,
  _gathered,
  _leafwise,
  _nearswap,
  _reductions,
  _registry,
  _sparsify,
  _task_vectors,
)

Array = jax.Array
Values = dict[str, Any]
Rule = _leafwise.LeafRule | _gathered.GatherRule


# Sums of so many rows at most are in float32.
_ROW = 4096


class Block(NamedTuple):
  """A piece of one leaf, of all models.

  Attributes:
    start: Place of its first entry in the flattened leaf.
    size: Its number of entries; what follows in the arrays is zero.
    arrays: One flat array a model, that of the base first; all of one length,
      which should take few values, since each is compiled for.
    release: To be called when the arrays are needed no more.
  """

  start: int
  size: int
  arrays: Sequence[np.ndarray]
  release: Callable[[], None] = lambda: None


class Blocks(Protocol):
  """One leaf of a base and of models, read as often as is asked for."""

  @property
  def size(self) -> int:
    """Its number of entries."""

  def __iter__(self) -> Iterator[Block]:
    """Reads all of it once."""

  def sample(self, count: int) -> Sequence[np.ndarray]:
    """Reads about so many entries of it, spread evenly, of each model."""


class NonfiniteError(ValueError):
  """A merged block holds NaN or infinity."""


def on_device(arrays: Sequence[np.ndarray]) -> list[Array]:
  """The arrays for a kernel; on a CPU without a copy, if they are aligned."""
  return [jax.device_put(array, may_alias=True) for array in arrays]


@functools.partial(jax.jit, static_argnames=("rule", "dtype"))
def _merge_block(
  rule: Rule,
  arrays: list[Array],
  weights: Array,
  values: Values,
  start: Array,
  key: Array | None,
  dtype: Any,
) -> tuple[Array, Array]:
  """The merged block, and how many of its entries are not finite."""
  base, *leaves = [array.astype(jnp.float32) for array in arrays]
  if isinstance(rule, _gathered.GatherRule):
    merged = rule.merge(base, leaves, weights, values)
  else:
    if not rule.spreads:
      # A comparison could hide what is not finite.
      rule = _leafwise._marking(rule)
    accumulator = _accumulate(rule, base, leaves, weights, values, start, key)
    merged = rule.finalize(accumulator, base, values, values.get("majority"))
  merged = merged.astype(dtype)
  odd = ~jnp.isfinite(merged)
  return merged, _reductions.counts([odd, ~odd])[0]


def _accumulate(
  rule: _leafwise.LeafRule,
  base: Array,
  leaves: Sequence[Array],
  weights: Array,
  values: Values,
  start: Array,
  key: Array | None,
) -> Any:
  accumulator = rule.init(base, jnp.zeros((), base.dtype))
  for i, leaf in enumerate(leaves):
    step = _leafwise.Step(
      weights[i],
      None if key is None else jax.random.fold_in(key, i),
      {**_of_model(values, i), "start": start},
      None,
      None,
    )
    accumulator = rule.update(accumulator, base, leaf, step)
  return accumulator


@functools.partial(jax.jit, static_argnames="rule")
def _summarize(
  rule: _leafwise.LeafRule,
  arrays: list[Array],
  weights: Array,
  values: Values,
  start: Array,
) -> Array:
  base, *leaves = [array.astype(jnp.float32) for array in arrays]
  assert rule.summarize is not None
  return rule.summarize(
    _accumulate(rule, base, leaves, weights, values, start, None)
  )


def _of_model(values: Values, place: Any) -> Values:
  """One model's values: those with an axis are of one value a model."""
  return {
    name: value[place] if isinstance(value, list) or value.ndim else value
    for name, value in values.items()
  }


@functools.partial(jax.jit, static_argnames="sparsifier")
def _sums(
  sparsifier: _sparsify.Sparsifier,
  arrays: list[Array],
  values: Values,
  start: Array,
) -> list[Array]:
  """Sums of magnitudes of each model before and after the sparsifier.

  Each is a vector of sums, for float32 holds no sum of millions.
  """
  base, *leaves = [array.astype(jnp.float32) for array in arrays]
  rows = (-1, min(_ROW, base.size))
  found = []
  for i, leaf in enumerate(leaves):
    tau = leaf - base
    told = {**_of_model(values, i), "start": start}
    step = _leafwise.Step(jnp.ones(()), None, told, None, None)
    kept = sparsifier.apply(tau, step)
    found += [jnp.abs(tau).reshape(rows), jnp.abs(kept).reshape(rows)]
  return _reductions.sums(found)


@functools.partial(jax.jit, static_argnames="size")
def _masks(key: Array, density: Array, size: int) -> list[Array]:
  """Which entries of a block are kept, of each model.

  On their own: within a larger kernel they would be drawn several times.
  """
  return [
    _draws.bernoulli(jax.random.fold_in(key, i), (size,), density[i])
    for i in range(len(density))
  ]


@functools.cache
def _within() -> _sparsify.Sparsifier:
  """Keeps what lies between two magnitudes, and is told which."""

  def apply(tau: Array, step: _leafwise.Step) -> Array:
    values = step.values
    bits = jax.lax.bitcast_convert_type(jnp.abs(tau), jnp.uint32)
    place = values["start"] + jnp.arange(tau.size, dtype=jnp.uint32)
    least, largest = values["least"], values["largest"]
    # Equals at a border are told apart by their places.
    low = (bits > least) | (
      (bits == least)
      & (place >= values["least_from"])
      & (place < values["least_to"])
    )
    high = (bits < largest) | (
      (bits == largest) & (place < values["largest_to"])
    )
    return jnp.where(low & high, tau * values["factor"], 0)

  return _sparsify.Sparsifier(apply)


@functools.cache
def _drawn() -> _sparsify.Sparsifier:
  """Keeps entries that were drawn, and multiplies by a factor."""

  def apply(tau: Array, step: _leafwise.Step) -> Array:
    kept = jnp.where(step.values["mask"], tau, 0)
    return kept * step.values["factor"]

  return _sparsify.Sparsifier(apply)


def _combiner(options: Values, ties: bool) -> _combine.Combiner:
  if not ties:
    return _combine.total(bool(options["normalize"]))
  merge = options.get("merge", "mean" if options.get("normalize") else "sum")
  zero_sign = options["zero_sign"]
  return _combine.elected(options["elect"], merge, zero_sign, "vector")


class BlockRule(NamedTuple):
  """How a method merges a block.

  Attributes:
    rule: The rule.
    sparsifier: What drops entries, and is told beforehand what it needs.
    selects: "magnitude", "middle" or "random", how the sparsifier drops.
    gram: Whether the merge is a linear combination of the models whose
      coefficients follow from their inner products.
  """

  rule: Rule | None
  sparsifier: _sparsify.Sparsifier | None = None
  selects: str = ""
  gram: bool = False


def block_rule(method: _registry.RegisteredMethod) -> BlockRule | None:
  """How a method merges blocks; None where it needs whole leaves."""
  options = {**method.info.options, **method.options}
  name = method.info.name
  if name in ("average", "weighted_average"):
    return BlockRule(_average._average_rule())
  if name == "task_arithmetic":
    rule = _task_vectors.task_vector_rule(_combiner(options, False))
    return BlockRule(rule)
  if name in ("magmax", "max_abs"):
    return BlockRule(_task_vectors.task_vector_rule(_combine.largest()))
  if name == "random_mix":
    return BlockRule(_task_vectors.task_vector_rule(_combine.chosen()))
  if name == "nearswap":
    return BlockRule(_nearswap._rule())
  if name in _GRAM and _is_flat(options):
    return BlockRule(None, gram=True)
  if name not in _SELECTS:
    return None
  if options.get("rescale") not in (None, "density", "l1"):
    return None
  ties = name == "ties" or options["variant"] == "ties"
  selects = _SELECTS[name]
  sparsifier = _drawn() if selects == "random" else _within()
  return BlockRule(
    _task_vectors.task_vector_rule(_combiner(options, ties), sparsifier),
    sparsifier,
    selects,
  )


_SELECTS = {"ties": "magnitude", "breadcrumbs": "middle", "dare": "random"}
_GRAM = ("karcher_mean", "model_stock", "multislerp", "nuslerp", "slerp")


def _is_flat(options: Values) -> bool:
  return options.get("flatten", True) and not options.get("filter_wise", False)


# Options that are numbers, which a kernel is told; it is compiled for others.
_NUMBERS = ("scale", "density", "t")


def numbers(method: _registry.RegisteredMethod) -> Values:
  """The options of a method that are arrays for its rule."""
  options = {**method.info.options, **method.options}
  return {
    name: np.asarray(options[name], np.float32)
    for name in _NUMBERS
    if name in options
  }


class Masks:
  """What is drawn for the blocks of a leaf, kept while there is room.

  Args:
    key: PRNG key of the leaf; None for a rule that draws nothing.
    density: Share that is kept of each model, float32 [n].
    room: Bytes that may be kept.
  """

  def __init__(
    self, key: Array | None, density: np.ndarray, room: int = 1 << 27
  ) -> None:
    """See the class."""
    self._key = key
    self._density = density
    self._room = room
    self._kept: dict[int, list[Array]] = {}

  def of(self, block: Block) -> Values:
    """What a rule is told of a block.

    Args:
      block: The block.

    Returns:
      The masks of the models under "mask", if there are any.
    """
    if self._key is None:
      return {}
    found = self._kept.get(block.start)
    if found is None:
      size = len(block.arrays[0])
      key = of_block(self._key, block.start)
      found = _masks(key, self._density, size)
      if size * len(found) <= self._room:
        self._room -= size * len(found)
        self._kept[block.start] = found
    return {"mask": found}


def rescaling(
  rule: BlockRule,
  rescale: str | None,
  blocks: Blocks,
  values: Values,
  masks: Masks,
) -> np.ndarray:
  """What kept entries are multiplied by, for each model.

  Args:
    rule: The rule, with a sparsifier.
    rescale: None, "density" or "l1".
    blocks: The leaf.
    values: What the sparsifier is told, but for the factor.
    masks: What is drawn.

  Returns:
    The factors [n].
  """
  count = values["density"].size
  if rescale is None:
    return np.ones(count, np.float32)
  if rescale == "density":
    return (1 / values["density"]).astype(np.float32)
  assert rule.sparsifier is not None
  told = {**values, "factor": np.ones((), np.float32)}
  total = np.zeros(2 * count)
  for block in blocks:
    found = _sums(
      rule.sparsifier,
      on_device(block.arrays),
      {**told, **masks.of(block)},
      np.uint32(block.start),
    )
    total += [np.asarray(one, np.float64).sum() for one in found]
    block.release()
  before, after = total[::2], total[1::2]
  is_zero = after == 0
  factor = before / np.where(is_zero, 1, after)
  return np.where(is_zero, 1, factor).astype(np.float32)


def majority(
  rule: Rule,
  blocks: Blocks,
  weights: np.ndarray,
  values: Values,
  masks: Masks,
) -> int:
  """Positive elected signs of a leaf less negative ones.

  Args:
    rule: What merges a block.
    blocks: The leaf.
    weights: One for each model, float32 [n].
    values: What the rule is told.
    masks: What is drawn.

  Returns:
    The difference; 0 for a rule that does not ask for it.
  """
  total = 0
  if isinstance(rule, _leafwise.LeafRule) and rule.summarize is not None:
    for block in blocks:
      found = _summarize(
        rule,
        on_device(block.arrays),
        weights,
        {**values, **masks.of(block)},
        np.uint32(block.start),
      )
      total += int(found)
      block.release()
  return total


def of_block(key: Array | None, start: int) -> Array | None:
  """The key of a block, the same whenever it is read."""
  return None if key is None else jax.random.fold_in(key, start >> 12)


def merge_blocks(
  rule: Rule,
  blocks: Blocks,
  weights: np.ndarray,
  values: Values,
  key: Array | None,
  masks: Masks,
  dtype: Any,
) -> Iterator[tuple[Block, Array, Array]]:
  """Merges a leaf block by block.

  Args:
    rule: What merges a block.
    blocks: The leaf.
    weights: One for each model, float32 [n].
    values: What the rule is told.
    key: PRNG key of the leaf, for a rule that draws by itself.
    masks: What is drawn for a rule that is told.
    dtype: Dtype of the result.

  Yields:
    The block that was read, the merged one, and its number of entries that are
    not finite. The block is to be released when the others are there.
  """
  for block in blocks:
    merged, odd = _merge_block(
      rule,
      on_device(block.arrays),
      weights,
      {**values, **masks.of(block)},
      np.uint32(block.start),
      of_block(key, block.start),
      dtype,
    )
    yield block, merged, odd
