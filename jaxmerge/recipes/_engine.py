"""Computes the tensors of a plan, block by block or whole, and writes them."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import merging
from jaxmerge.merging import (
  _block_gram,
  _block_select,
  _by_block,
  _threshold,
)
from jaxmerge.recipes import (
  _blocks,
  _digests,
  _methods,
  _plan,
  _shards,
  _yaml,
)

Tensor = Any
Values = dict[str, Any]


# Bytes of a tensor of all models that are kept for when they are read again.
_KEPT = 1 << 28


class _Piece(NamedTuple):
  """Some entries of a result.

  Attributes:
    start: Place of the first in the flattened tensor.
    values: The entries; what exceeds the tensor is no part of it.
    odd: How many of them are not finite; a device may still be counting.
    release: To be called when they are written.
  """

  start: int
  values: Any
  odd: Any = 0
  release: Callable[[], None] = lambda: None


class Engine:
  """Merges the tensors of a plan.

  Args:
    plan: the plan.
    digests: where checksums of what is read are kept.
    seen: told the bytes that were read, and those that were written.
    block: entries of a block.
  """

  def __init__(
    self,
    plan: _plan.Plan,
    digests: _digests.Digests,
    seen: Callable[[int, int], None],
    block: int = _blocks.BLOCK,
  ) -> None:
    """See the class."""
    self._plan = plan
    self._digests = digests
    self._seen = seen
    self._block = block
    self._pool = _blocks.Pool()
    self._reader = futures.ThreadPoolExecutor(1, "reader")
    self._writer = futures.ThreadPoolExecutor(1, "writer")
    self._key = jax.random.key(plan.recipe.seed)
    self._of_vector: Values | None = None

  def close(self) -> None:
    """Ends the threads."""
    self._reader.shutdown(cancel_futures=True)
    self._writer.shutdown(cancel_futures=True)

  def write(
    self, outputs: Sequence[_plan.Output], writer: _shards.ShardWriter
  ) -> dict[str, str]:
    """Merges tensors into a file.

    Args:
      outputs: the tensors.
      writer: the file.

    Returns:
      Name of each tensor -> checksum of what was written.

    Raises:
      RecipeError: a result is not finite.
    """
    hashers = {output.name: _digests.hasher() for output in outputs}
    waiting: list[futures.Future[None]] = []
    for output in outputs:
      for piece in self._pieces(output):
        # A few blocks are merged while others are written.
        waiting.append(
          self._writer.submit(
            self._write, writer, output, hashers[output.name], piece
          )
        )
        while len(waiting) > 2:
          waiting.pop(0).result()
    for one in waiting:
      one.result()
    return {name: one.hexdigest() for name, one in hashers.items()}

  def _write(
    self,
    writer: _shards.ShardWriter,
    output: _plan.Output,
    hasher: Any,
    piece: _Piece,
  ) -> None:
    """Waits for a piece, writes it, and gives the memory back."""
    values = np.asarray(piece.values).reshape(-1)
    values = values.astype(output.dtype, copy=False)
    size = int(np.prod(output.shape, dtype=np.int64)) - piece.start
    values = values[:size]
    if int(piece.odd):
      self._explain(output)
    writer.write(output.name, piece.start, values)
    hasher.update(_digests.raw(values))
    self._seen(0, values.nbytes)
    piece.release()

  def _explain(self, output: _plan.Output) -> None:
    """Raises for a result that is not finite, and says why."""
    owners = list(output.models)
    if output.base is not None:
      # A slice may have a base of its own.
      owners.insert(0, output.base_model)
    for owner, tensor in zip(owners, output.inputs, strict=True):
      for start in range(0, tensor.size, self._block):
        part = tensor.read(start, min(start + self._block, tensor.size))
        if not np.isfinite(part).all():
          raise _yaml.RecipeError(
            f"{output.name!r} of {owner} holds NaN or infinity: the model is"
            " damaged. Leave the tensor out by exclude, or take another model."
          )
    raise _yaml.RecipeError(
      f"{output.name!r} is too large for {output.dtype} once it is merged. Ask"
      " for a wider type with out_dtype, or smaller weights."
    )

  def _blocks_of(
    self,
    output: _plan.Output,
    tensors: Sequence[Tensor | None] | None = None,
    *,
    keep: bool = True,
    room: int = 0,
  ) -> _blocks.TensorBlocks:
    given = output.inputs if tensors is None else tensors
    return _blocks.TensorBlocks(
      given,
      self._pool,
      self._reader,
      output.read_dtype,
      _blocks.block_for(len(given), self._block),
      self._digests if keep else None,
      lambda size: self._seen(size, 0),
      room,
    )

  def _pieces(self, output: _plan.Output) -> Iterator[_Piece]:
    """The result in pieces, in order."""
    call = output.call
    if not output.inputs[0].size:
      yield _Piece(0, np.zeros(0, output.dtype))
      return
    if call is None or call.method is None:
      yield from self._copied(output, None if call is None else call.factor)
      return
    rule = _by_block.block_rule(call.method)
    if rule is None:
      yield self._whole(output, call, call.method)
    elif rule.gram:
      yield from self._by_gram(output, call.method, call.weights)
    else:
      yield from self._by_rule(output, call, call.method, rule)

  def _copied(
    self, output: _plan.Output, factor: float | None
  ) -> Iterator[_Piece]:
    (tensor,) = output.inputs
    for block in self._blocks_of(output):
      values = block.arrays[0][: block.size]
      if factor is not None:
        values = values.astype(np.float32) * np.float32(factor)
      if np.dtype(tensor.dtype) == np.float64 and factor is None:
        # Kernels reckon in single precision; a copy need not.
        values = tensor.read(block.start, block.start + block.size)
      odd = 0
      if factor is not None or tensor.dtype != output.dtype:
        with np.errstate(over="ignore"):
          values = values.astype(output.dtype)
        odd = int((~np.isfinite(values)).sum())
      yield _Piece(block.start, values, odd, block.release)

  def _key_of(self, output: _plan.Output, method: Any) -> Any:
    if not method.info.needs_key:
      return None
    seed = np.uint32(zlib.crc32(output.name.encode()))
    return jax.random.fold_in(self._key, seed)

  def _by_rule(
    self,
    output: _plan.Output,
    call: _methods.Call,
    method: merging.RegisteredMethod,
    rule: _by_block.BlockRule,
  ) -> Iterator[_Piece]:
    assert rule.rule is not None
    tensors = _owners(output, call)
    weights = np.asarray(
      [1.0] * len(output.tensors) if call.weights is None else call.weights,
      np.float32,
    )
    key = self._key_of(output, method)
    blocks = self._blocks_of(
      output, tensors, room=_KEPT if rule.sparsifier is not None else 0
    )
    drawn = rule.selects == "random"
    density = np.broadcast_to(
      np.asarray(method.options.get("density", 1.0), np.float32), len(weights)
    )
    masks = _by_block.Masks(key if drawn else None, density)
    told = self._told(call, method, rule, blocks, weights, masks)
    yield from _merged(
      output,
      rule.rule,
      blocks,
      weights,
      told,
      masks,
      None if drawn else key,
    )

  def _told(
    self,
    call: _methods.Call,
    method: merging.RegisteredMethod,
    rule: _by_block.BlockRule,
    blocks: _blocks.TensorBlocks,
    weights: np.ndarray,
    masks: _by_block.Masks,
  ) -> Values:
    """What the rule is told of a tensor, found by reading it."""
    values = _by_block.numbers(method)
    if rule.sparsifier is None:
      return values
    options = {**method.info.options, **method.options}
    count = len(weights)
    density = np.broadcast_to(np.asarray(options["density"], float), count)
    values["density"] = density.astype(np.float32)
    if call.scope == "vector":
      values |= self._vector()
    elif rule.selects == "magnitude":
      values |= _block_select.largest(blocks, density)
    elif rule.selects == "middle":
      gamma = np.broadcast_to(np.asarray(options["gamma"], float), count)
      values |= _block_select.middle(blocks, density, gamma)
    rescale = call.rescale or options.get("rescale")
    values["factor"] = _by_block.rescaling(rule, rescale, blocks, values, masks)
    if call.scope != "vector":
      assert rule.rule is not None
      votes = _by_block.majority(rule.rule, blocks, weights, values, masks)
      values["majority"] = np.int32(np.sign(votes))
    return values

  def _vector(self) -> Values:
    """What is selected of all tensors together: TIES' trimming."""
    if self._of_vector is not None:
      return self._of_vector
    merged = [
      (one, one.call)
      for one in self._plan.outputs
      if one.call is not None and one.call.scope == "vector"
    ]
    densities = {
      tuple(np.asarray(call.method.options["density"], float).tolist())
      for _, call in merged
      if call.method is not None
    }
    if len(densities) > 1:
      raise _yaml.RecipeError(
        "With scope: vector a model has one density, and none that differs from"
        " tensor to tensor. Give one, or scope: tensor."
      )
    (density,) = densities
    leaves = [
      self._blocks_of(one, _owners(one, call), keep=False)
      for one, call in merged
    ]
    size = sum(leaf.size for leaf in leaves)
    keep = [
      0 if one >= 1 else _threshold.entries_to_keep(one, size)
      for one in density
    ]
    values = _block_select.everything(len(density))
    found = _block_select.kth_largest(leaves, keep, places=False)
    for i, bound in enumerate(found):
      if bound is not None:
        values["least"][i] = bound.bits
    self._of_vector = {**values, "majority": np.int32(0)}
    votes, none = 0, _by_block.Masks(None, np.zeros(0))
    for (_, call), leaf in zip(merged, leaves, strict=True):
      assert call.method is not None
      rule = _by_block.block_rule(call.method)
      assert rule is not None and rule.rule is not None
      told = {
        **_by_block.numbers(call.method),
        **values,
        "factor": np.ones(len(density), np.float32),
        "majority": np.int32(0),
      }
      weights = np.asarray(call.weights, np.float32)
      votes += _by_block.majority(rule.rule, leaf, weights, told, none)
    self._of_vector["majority"] = np.int32(np.sign(votes))
    return self._of_vector

  def _by_gram(
    self,
    output: _plan.Output,
    method: merging.RegisteredMethod,
    weights: Any,
  ) -> Iterator[_Piece]:
    blocks = self._blocks_of(output, room=_KEPT)
    products = _block_gram.gram(blocks, len(output.inputs))
    if not np.isfinite(products).all():
      self._explain(output)
    surplus, found = _block_gram.coefficients(
      method, products, output.base is not None, weights
    )
    yield from _merged(
      output,
      _block_gram.combination_rule(),
      blocks,
      found.astype(np.float32),
      {"surplus": np.asarray(surplus, np.float32)},
      _by_block.Masks(None, np.zeros(0)),
    )

  def _whole(
    self,
    output: _plan.Output,
    call: _methods.Call,
    method: merging.RegisteredMethod,
  ) -> _Piece:
    """A tensor that is merged in one piece."""
    name = output.name
    given: Values = {}
    if call.weights is not None:
      given["weights"] = list(call.weights)
    if method.info.needs_key:
      given["key"] = self._key
    # What is not finite is looked for, and named, here.
    options = {**method.options, "allow_nonfinite": True}
    found = method._replace(options=options)(
      None if output.base is None else {name: self._read(output, output.base)},
      [{name: self._read(output, tensor)} for tensor in output.tensors],
      **given,
    )[name]
    merged = found.astype(_kernel_dtype(output))
    return _Piece(0, merged, (~jnp.isfinite(merged)).sum())

  def _read(self, output: _plan.Output, tensor: Tensor) -> jax.Array:
    """All of a tensor."""
    parts = []
    for block in self._blocks_of(output, [tensor]):
      parts.append(block.arrays[0][: block.size].copy())
      block.release()
    return jnp.asarray(np.concatenate(parts).reshape(output.shape))


def peak_bytes(plan: _plan.Plan, block: int = _blocks.BLOCK) -> int:
  """An estimate of the memory that merging takes.

  Args:
    plan: the plan.
    block: entries of a block.

  Returns:
    Bytes of what is held at a time, beside the program itself.
  """
  most = 0
  for output in plan.outputs:
    call, size = output.call, int(np.prod(output.shape, dtype=np.int64))
    whole = (
      call is not None
      and call.method is not None
      and _by_block.block_rule(call.method) is None
    )
    # Three blocks read ahead, three merged; a whole tensor in single precision
    # with what a rule makes of it.
    held = (
      4 * size * 3 if whole else 3 * output.dtype.itemsize * min(size, block)
    )
    inputs = sum(
      np.dtype(tensor.dtype).itemsize for tensor in output.inputs
    ) * (size if whole else 3 * _blocks.padded(min(size, block)))
    most = max(most, held + inputs)
  return most


def _merged(
  output: _plan.Output,
  rule: _by_block.Rule,
  blocks: _blocks.TensorBlocks,
  weights: np.ndarray,
  values: Values,
  masks: _by_block.Masks,
  key: Any = None,
) -> Iterator[_Piece]:
  """The pieces of a tensor; what was kept of it goes with the last one."""

  def release(block: _by_block.Block) -> None:
    block.release()
    if block.start + block.size == blocks.size:
      blocks.forget()

  for block, merged, odd in _by_block.merge_blocks(
    rule, blocks, weights, values, key, masks, _kernel_dtype(output)
  ):
    yield _Piece(block.start, merged, odd, functools.partial(release, block))


def _kernel_dtype(output: _plan.Output) -> np.dtype[Any]:
  """The dtype that kernels return: they reckon in single precision."""
  if output.dtype == np.float64:
    return np.dtype(np.float32)
  return output.dtype


def _owners(output: _plan.Output, call: _methods.Call) -> list[Tensor | None]:
  """The tensors for a rule of blocks, which begin with that of a base."""
  if output.base is not None:
    return [output.base, *output.tensors]
  if call.from_zero:
    return [None, *output.tensors]
  # A rule that needs no base gets a model in its place.
  return [output.tensors[0], *output.tensors]
