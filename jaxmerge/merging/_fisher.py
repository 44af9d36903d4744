"""The diagonal of the Fisher information of a model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree
from jaxmerge.merging import _examples, _leaves, _sparsify, _values

PyTree = Any
Array = jax.Array

_LABELS = ("exact", "sampled", "empirical")


def _log_probs(fn: Callable[..., Array], params: PyTree, x: PyTree) -> Array:
  """Log-probabilities [outputs, classes] of one example."""
  logits = fn(params, jax.tree.map(lambda leaf: leaf[None], x))
  rows = logits.reshape(-1, logits.shape[-1])
  return jax.nn.log_softmax(_leaves.widen(rows))


def _at(log_probs: Array, labels: Array) -> Array:
  """Log-likelihood of labels [outputs]."""
  return jnp.take_along_axis(log_probs, labels.reshape(-1, 1), axis=1).sum()


def _squares(
  log_likelihood: Callable[[PyTree, PyTree], Array],
  floats: PyTree,
  examples: PyTree,
  weights: Array,
) -> PyTree:
  """Weighted sum of the squared gradients of some examples."""
  grads = jax.vmap(jax.grad(log_likelihood), in_axes=(None, 0))(
    floats, examples
  )

  def total(leaf: Array) -> Array:
    squares = jnp.abs(_leaves.widen(leaf)) ** 2
    shape = (-1,) + (1,) * (squares.ndim - 1)
    weight = weights.astype(squares.dtype).reshape(shape)
    # Padding may have any gradient, even NaN.
    return jnp.where(weight == 0, 0, weight * squares).sum(axis=0)

  return jax.tree.map(total, grads)


def _chunk_squares(
  fn: Callable[..., Array],
  labels: str | None,
  key: Array | None,
  params: PyTree,
  chunk: tuple[PyTree, Array, Array],
) -> PyTree:
  """Fisher of the examples of one chunk, summed."""
  batch, index, weights = chunk
  floats, rest = tree.partition(params)
  join = lambda floats: tree.combine(floats, rest)  # noqa: E731
  if labels is None:

    def given(floats: PyTree, example: PyTree) -> Array:
      one = jax.tree.map(lambda leaf: leaf[None], example)
      return _leaves.widen(fn(join(floats), one)[0])

    return _squares(given, floats, batch, weights)

  def chosen(floats: PyTree, example: tuple[PyTree, Array]) -> Array:
    x, label = example
    return _at(_log_probs(fn, join(floats), x), label)

  if labels == "empirical":
    return _squares(chosen, floats, batch, weights)
  log_probs = jax.vmap(lambda x: _log_probs(fn, params, x))(batch)
  if labels == "sampled":
    assert key is not None
    # A key of the example's own: batches and chunks change nothing.
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)
    drawn = jax.vmap(jax.random.categorical)(keys, log_probs)
    return _squares(chosen, floats, (batch, drawn), weights)

  def entry(place: Array, floats: PyTree, x: PyTree) -> Array:
    return _log_probs(fn, join(floats), x).reshape(-1)[place]

  probs = jnp.exp(log_probs).reshape(len(index), -1)

  # Class after class: gradients of all at once would be as many times larger.
  def body(sums: PyTree, place: Array) -> tuple[PyTree, None]:
    squares = _squares(
      functools.partial(entry, place), floats, batch, weights * probs[:, place]
    )
    return jax.tree.map(jnp.add, sums, squares), None

  sums, _ = jax.lax.scan(body, _zeros(floats), jnp.arange(probs.shape[1]))
  return sums


def _zeros(floats: PyTree) -> PyTree:
  return jax.tree.map(
    lambda leaf: jnp.zeros_like(jnp.real(_leaves.widen(leaf))), floats
  )


@functools.partial(
  jax.jit,
  static_argnames=("fn", "labels", "chunk_size", "static"),
  donate_argnames="sums",
)
def _add_batch(
  fn: Callable[..., Array],
  labels: str | None,
  chunk_size: int,
  static: _examples.Static,
  sums: PyTree,
  arrays: list[Any],
  batch: PyTree,
  first: Array,
  count: Array,
  key: Array | None,
) -> PyTree:
  """Adds the Fisher of a batch whose rows from `count` on are padding."""
  params = _examples.join_arrays(arrays, static)
  size = jax.tree.leaves(batch)[0].shape[0]
  rows = jnp.arange(size, dtype=jnp.int32)
  weights = (rows < count).astype(jnp.float32)
  chunks = jax.tree.map(
    lambda leaf: leaf.reshape(-1, chunk_size, *leaf.shape[1:]),
    (batch, first + rows, weights),
  )

  def body(sums: PyTree, chunk: Any) -> tuple[PyTree, None]:
    squares = _chunk_squares(fn, labels, key, params, chunk)
    return jax.tree.map(jnp.add, sums, squares), None

  if size == chunk_size:
    return body(sums, jax.tree.map(lambda leaf: leaf[0], chunks))[0]
  return jax.lax.scan(body, sums, chunks)[0]


def _check_output(
  fn: Callable[..., Array],
  labels: str | None,
  params: PyTree,
  batch: PyTree,
  size: int,
) -> int:
  """Checks a batch of a new shape; returns the number of classes, or 0."""
  if labels == "empirical" and not (
    isinstance(batch, (tuple, list)) and len(batch) == 2
  ):
    raise ValueError(
      "labels='empirical' needs batches (inputs, labels); got"
      f" {type(batch).__name__}"
    )
  inputs = batch[0] if labels == "empirical" else batch
  arrays, static = _examples.split_arrays(params)
  output = jax.eval_shape(
    lambda arrays, inputs: fn(_examples.join_arrays(arrays, static), inputs),
    arrays,
    inputs,
  )
  shape = getattr(output, "shape", None)
  if labels is None:
    if shape != (size,) or not tree.is_float(output):
      raise ValueError(
        "the log-likelihood must be one number for each example, shape"
        f" ({size},); got {output}"
      )
    return 0
  if shape is None or len(shape) < 2 or shape[0] != size:
    raise ValueError(
      f"the logits must have shape ({size}, ..., classes); got {output}"
    )
  if labels == "empirical":
    given = batch[1]
    dtype = jnp.result_type(given)
    if np.shape(given) != shape[:-1] or not jnp.issubdtype(dtype, jnp.integer):
      raise ValueError(
        f"labels must be integers of shape {shape[:-1]}; got shape"
        f" {np.shape(given)} and dtype {dtype}"
      )
  return int(shape[-1])


def _check_labels(labels: Any, classes: int, number: int) -> None:
  """Raises for labels that are no class, unless they are traced."""
  if isinstance(labels, jax.core.Tracer) or not np.size(labels):
    return
  least, most = int(np.min(labels)), int(np.max(labels))
  if least < 0 or most >= classes:
    raise ValueError(
      f"labels must lie in [0, {classes - 1}], the classes of the logits; batch"
      f" {number} has {least if least < 0 else most}; leave out examples"
      " without a label"
    )


def _fisher(
  fn: Callable[..., Array],
  params: PyTree,
  batches: Iterable[PyTree],
  labels: str | None,
  key: Array | None,
  reduction: str,
  chunk_size: int | None,
) -> PyTree:
  _examples.check_reduction(reduction)
  if chunk_size is not None and (type(chunk_size) is not int or chunk_size < 1):
    raise ValueError(
      f"chunk_size must be an int of at least 1; got {chunk_size!r}"
    )
  floats, rest = tree.partition(params)
  sums = _zeros(floats)
  arrays, static = _examples.split_arrays(params)
  count, padded = 0, 0
  checked: dict[Any, int] = {}
  for number, batch in enumerate(batches):
    size = _examples.batch_size(batch, number)
    if not size:
      continue
    # A smaller batch is padded to the size that is compiled.
    padded = max(padded, size)
    chunk = padded if chunk_size is None else min(chunk_size, padded)
    padded += -padded % chunk
    kind = tuple(
      (np.shape(leaf), leaf.dtype) for leaf in jax.tree.leaves(batch)
    )
    if kind not in checked:
      checked[kind] = _check_output(fn, labels, params, batch, size)
    if labels == "empirical":
      _check_labels(batch[1], checked[kind], number)
    if size < padded:
      rows = np.minimum(np.arange(padded), size - 1)
      batch = jax.tree.map(lambda leaf, rows=rows: leaf[rows], batch)
    sums = _add_batch(
      fn,
      labels,
      chunk,
      static,
      sums,
      arrays,
      batch,
      np.int32(count),
      np.int32(size),
      key,
    )
    count += size
  _examples.check_any(count)
  if reduction == "mean":
    sums = _examples.divide(sums, np.float32(count))
  return tree.combine(sums, rest)


def diagonal_fisher(
  logits_fn: Callable[[PyTree, PyTree], Array],
  params: PyTree,
  batches: Iterable[PyTree],
  *,
  labels: str = "exact",
  key: Array | None = None,
  reduction: str = "mean",
  chunk_size: int | None = None,
) -> PyTree:
  r"""Diagonal of the Fisher information of a classifier.

  .. math::
    F = \frac{1}{N} \sum_{i=1}^N \mathbb{E}_{y \sim p_\theta(y | x_i)}
      \left(\nabla_\theta \log p_\theta(y | x_i)\right)^2

  with the squares of the gradients of single examples, not of a batch's mean.
  One batch is held at a time, and all batches share one compiled program. A
  model with several outputs for an example has independent ones given the
  input, each with classes of its own: its log-likelihood is their sum.

  Args:
    logits_fn: ``logits_fn(params, inputs)`` gives logits ``[n, ..., classes]``
      for inputs ``[n, ...]``, example by example: no batch statistics. Keep
      one function object: each one compiles anew.
    params: Any pytree.
    batches: Inputs, any pytree of arrays with a leading axis of examples; pairs
      ``(inputs, labels)`` for ``labels="empirical"``, with integers of the
      shape of the logits without classes. Batches may differ in size; smaller
      ones are padded to the largest so far.
    labels: Where :math:`y` comes from. "exact": the expectation is a sum over
      the classes, one gradient each. "sampled": one label is drawn for each
      example, which is right on average. "empirical": those of the data, which
      gives the empirical Fisher, another quantity.
    key: PRNG key for "sampled". An example's label depends on the key and the
      example's place, not on the batches.
    reduction: "mean" over the examples, or their "sum". Keep to one convention:
      the weights of a merge depend on it.
    chunk_size: So many examples have their gradients in memory at once, each as
      large as the model; by default the whole batch.

  Returns:
    A tree of the structure and shapes of ``params``, with floating-point leaves
    of at least float32, real and not negative. Other leaves are those of
    ``params``.

  Raises:
    ValueError: If there is no example, a shape does not fit, an option is
      unknown, or the key is missing or given in vain.

  References:
    Matena and Raffel, `Merging models with Fisher-weighted averaging
    <https://arxiv.org/abs/2111.09832>`_, 2021;
    Kunstner et al., `Limitations of the empirical Fisher approximation for
    natural gradient descent <https://arxiv.org/abs/1905.12558>`_, 2019

  >>> import jax.numpy as jnp
  >>> logits = lambda params, x: jnp.stack([x * params["w"], 0 * x], axis=-1)
  >>> fisher = diagonal_fisher(logits, {"w": 0.0}, [jnp.array([1.0, 2.0])])
  >>> print(fisher["w"])  # The mean of x^2 p (1 - p).
  0.625
  """
  _sparsify.check_choice(labels, "labels", _LABELS)
  _values.check_key(key)
  if (labels == "sampled") != (key is not None):
    raise ValueError(
      f"labels={labels!r} "
      + (
        "needs a PRNG key; give key=jax.random.key(...)"
        if key is None
        else "draws nothing; leave key out"
      )
    )
  return _fisher(logits_fn, params, batches, labels, key, reduction, chunk_size)


def squared_gradients(
  log_likelihood_fn: Callable[[PyTree, PyTree], Array],
  params: PyTree,
  batches: Iterable[PyTree],
  *,
  reduction: str = "mean",
  chunk_size: int | None = None,
) -> PyTree:
  r"""Squared gradients of a log-likelihood, example by example.

  .. math::
    F = \frac{1}{N} \sum_{i=1}^N
      \left(\nabla_\theta \log p_\theta(z_i)\right)^2

  The empirical diagonal Fisher of any model; where the :math:`z_i` are drawn
  from the model, an estimate of the Fisher itself. `diagonal_fisher` is that of
  classifiers.

  Args:
    log_likelihood_fn: ``log_likelihood_fn(params, batch)`` gives one number for
      each example, shape ``[n]``, example by example. Keep one function object.
    params: Any pytree.
    batches: Any pytrees of arrays with a leading axis of examples.
    reduction: See `diagonal_fisher`.
    chunk_size: See `diagonal_fisher`.

  Returns:
    See `diagonal_fisher`.

  Raises:
    ValueError: If there is no example or a shape does not fit.

  >>> import jax.numpy as jnp
  >>> gaussian = lambda params, z: -0.5 * (z - params["mean"]) ** 2
  >>> batches = [jnp.array([1.0, -1.0]), jnp.array([2.0])]
  >>> print(squared_gradients(gaussian, {"mean": 0.0}, batches)["mean"])
  2.0
  """
  return _fisher(
    log_likelihood_fn, params, batches, None, None, reduction, chunk_size
  )
