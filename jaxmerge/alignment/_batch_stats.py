"""Running statistics of batch normalisation, estimated anew."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree
from jaxmerge.alignment import _finite

PyTree = Any

#: `apply_fn(variables, batch) -> new batch_stats`, in training mode.
ApplyFn = Callable[[PyTree, PyTree], PyTree]

_COLLECTION = "batch_stats"


def reset_batch_stats(
  apply_fn: ApplyFn,
  variables: Mapping[str, PyTree],
  batches: PyTree | Iterable[PyTree],
) -> dict[str, PyTree]:
  r"""Estimates the running statistics of batch normalisation from data.

  A merged network's running statistics are those of neither of its ends, and
  their mean is not the statistics of the mean. With :math:`n_b` the sizes of
  the batches and :math:`\mu_b, \sigma_b^2` their own statistics,

  .. math::
    \mu = \frac{\sum_b n_b \mu_b}{\sum_b n_b}, \quad
    \sigma^2 = \frac{\sum_b n_b (\sigma_b^2 + (\mu_b - \mu)^2)}{\sum_b n_b}

  so that every example counts once, unlike in a running average. Batch
  statistics come from the network itself: a step of the running average is
  :math:`s' = m s + (1 - m) s_b`, which from two values of :math:`s` gives
  :math:`m` and :math:`s_b`, whatever the momentum. A momentum m multiplies the
  rounding error by 1 / (1 - m).

  The result is exactly the data's for every layer whose inputs do not depend
  on the other examples of the batch. Behind another batch normalisation, the
  inputs are those of training mode, where that layer uses each batch's own
  statistics; take batches as large as in training, or larger.

  Args:
    apply_fn: ``apply_fn(variables, batch)`` runs the network in training mode
      and returns the new ``batch_stats``; for Flax linen
      ``model.apply(variables, batch, train=True,
      mutable="batch_stats")[1]["batch_stats"]``. Keep one function object:
      each one compiles anew.
    variables: A mapping with ``"batch_stats"`` and whatever else the network
      needs. The old statistics are not used.
    batches: Either arrays ``[batches, examples, ...]``, as one array or a
      dictionary of them, which are scanned in one program: this form works
      under ``jax.jit`` and ``jax.vmap``. Or any other iterable of batches,
      whose sizes may differ, leaves ``[examples, ...]``.

  Returns:
    The variables with the new statistics.

  Raises:
    ValueError: If there are no statistics, no batches, a statistic is named
      neither ``mean`` nor ``var``, ``apply_fn`` leaves them as they are, or
      batches or parameters are not finite.

  References:
    Garipov et al., `Loss surfaces, mode connectivity, and fast ensembling of
    DNNs <https://arxiv.org/abs/1802.10026>`_, 2018; Jordan et al., `REPAIR
    <https://arxiv.org/abs/2211.08403>`_, 2023

  >>> def apply_fn(variables, batch):  # the identity and a normalisation
  ...   new = {"mean": batch.mean(0), "var": batch.var(0)}
  ...   old = variables["batch_stats"]
  ...   return jax.tree.map(lambda o, n: 0.9 * o + 0.1 * n, old, new)
  >>> zeros = jnp.zeros(1)
  >>> variables = {"batch_stats": {"mean": zeros, "var": zeros}}
  >>> batches = jnp.array([[[0.0], [2.0]], [[4.0], [6.0]]])
  >>> found = reset_batch_stats(apply_fn, variables, batches)
  >>> jax.tree.map(lambda leaf: round(leaf.item(), 3), found["batch_stats"])
  {'mean': 3.0, 'var': 5.0}
  """
  stats = variables.get(_COLLECTION)
  if not jax.tree.leaves(stats):
    raise ValueError(
      "the variables have no batch_stats; only networks with batch"
      " normalisation have statistics to reset"
    )
  pairs = _pairs(stats)
  variables = dict(variables)
  for name, collection in variables.items():
    if name != _COLLECTION:
      _finite.check(f"the variables' {name}", collection)
  if isinstance(batches, Mapping) or hasattr(batches, "shape"):
    found = _over_stack(apply_fn, variables, pairs, batches)
  else:
    found = _over_iterable(apply_fn, variables, pairs, batches)
  mean, square = found.mean, found.square
  leaves = jax.tree.leaves(stats)
  for (mean_index, var_index), one, other in zip(
    pairs, mean, square, strict=True
  ):
    leaves[mean_index] = one.astype(leaves[mean_index].dtype)
    var = other / found.examples
    leaves[var_index] = var.astype(leaves[var_index].dtype)
  treedef: Any = jax.tree.structure(stats)
  return {**variables, _COLLECTION: treedef.unflatten(leaves)}


def _pairs(stats: PyTree) -> list[tuple[int, int]]:
  """Positions of each layer's mean and variance among the leaves."""
  names = tree.leaf_names(stats)
  index = {name: i for i, name in enumerate(names)}
  pairs = []
  for name, i in index.items():
    layer, _, kind = name.rpartition("/")
    prefix = f"{layer}/" if layer else ""
    if kind not in ("mean", "var"):
      raise ValueError(
        f"leaf '{name}' of batch_stats is neither a 'mean' nor a 'var', as"
        " batch normalisation has them; estimate it by other means"
      )
    partner = prefix + ("var" if kind == "mean" else "mean")
    if partner not in index:
      raise ValueError(
        f"leaf '{name}' of batch_stats has no '{partner}' beside it; batch"
        " normalisation has both"
      )
    if kind == "mean":
      pairs.append((i, index[partner]))
  return pairs


def _size(batch: PyTree, axis: int) -> int:
  sizes = {np.shape(leaf)[axis] for leaf in jax.tree.leaves(batch)}
  if len(sizes) != 1:
    raise ValueError(
      "all leaves of a batch must have the same number of examples, got"
      f" {sorted(sizes)}"
    )
  return int(sizes.pop())


def _stats_from(
  apply_fn: ApplyFn, variables: PyTree, start: PyTree, batch: PyTree
) -> list[jax.Array]:
  """The statistics after one step from `start`, float32 or wider."""
  new = apply_fn({**variables, _COLLECTION: start}, batch)
  tree.check_match(
    start, new, names=("batch_stats", "the statistics from apply_fn")
  )
  return [
    leaf.astype(tree.accumulation_dtype(leaf)) for leaf in jax.tree.leaves(new)
  ]


@functools.partial(jax.jit, static_argnums=0)
def _momenta(
  apply_fn: ApplyFn, variables: PyTree, batch: PyTree
) -> list[jax.Array]:
  """1 - m for every statistic, a scalar each."""
  stats = jax.tree.map(jnp.asarray, variables[_COLLECTION])
  zero = _stats_from(
    apply_fn, variables, jax.tree.map(jnp.zeros_like, stats), batch
  )
  # A start far above the batch's statistics, so that the difference does not
  # lose digits. A power of two is exact in every type.
  starts = [
    jnp.exp2(jnp.ceil(jnp.log2(jnp.maximum(jnp.abs(leaf).max(), 1.0))))
    for leaf in zero
  ]
  treedef: Any = jax.tree.structure(stats)
  high = treedef.unflatten(
    jnp.broadcast_to(start, leaf.shape).astype(leaf.dtype)
    for start, leaf in zip(starts, jax.tree.leaves(stats), strict=True)
  )
  moved = _stats_from(apply_fn, variables, high, batch)
  return [
    1 - ((one - other) / start).mean()
    for one, other, start in zip(moved, zero, starts, strict=True)
  ]


@functools.partial(jax.jit, static_argnums=0)
def _own(
  apply_fn: ApplyFn,
  variables: PyTree,
  shares: list[jax.Array],
  batch: PyTree,
) -> list[jax.Array]:
  """The batch's own statistics."""
  zero = jax.tree.map(jnp.zeros_like, variables[_COLLECTION])
  new = _stats_from(apply_fn, variables, zero, batch)
  return [leaf / share for leaf, share in zip(new, shares, strict=True)]


def _check_momenta(shares: list[jax.Array]) -> None:
  for share in shares:
    if not isinstance(share, jax.core.Tracer) and not share > 1e-6:
      raise ValueError(
        "apply_fn leaves the statistics as they are: run the network in"
        " training mode (train=True, use_running_average=False) and return the"
        " new batch_stats; the momentum must be below 1"
      )


class _Moments(NamedTuple):
  """Statistics of the examples so far, a list of layers each.

  Attributes:
    examples: How many there are, float32.
    mean: Their means.
    square: Their summed squared deviations from the means.
  """

  examples: jax.Array
  mean: list[jax.Array]
  square: list[jax.Array]


def _empty(stats: list[jax.Array], pairs: list[tuple[int, int]]) -> _Moments:
  zeros = [jnp.zeros_like(stats[i]) for i, _ in pairs]
  return _Moments(jnp.zeros((), jnp.float32), zeros, zeros)


def _add(
  moments: _Moments,
  stats: list[jax.Array],
  pairs: list[tuple[int, int]],
  size: int,
) -> _Moments:
  """Adds a batch's statistics; as means, so that no sum grows large."""
  examples = moments.examples + size
  share = size / examples
  mean, square = [], []
  for (i, j), old, spread in zip(
    pairs, moments.mean, moments.square, strict=True
  ):
    gap = stats[i] - old
    mean.append(old + share * gap)
    between = moments.examples * share * jnp.square(gap)
    square.append(spread + size * stats[j] + between)
  return _Moments(examples, mean, square)


def _over_stack(
  apply_fn: ApplyFn,
  variables: PyTree,
  pairs: list[tuple[int, int]],
  batches: PyTree,
) -> _Moments:
  if not _size(batches, 0) or not (size := _size(batches, 1)):
    raise ValueError("there is no batch to take statistics of")
  _finite.check("batches", batches)
  batches = jax.tree.map(jnp.asarray, batches)
  first = jax.tree.map(lambda leaf: leaf[0], batches)
  shares = _momenta(apply_fn, variables, first)
  _check_momenta(shares)
  stats = _own(apply_fn, variables, shares, first)

  def body(moments: _Moments, batch: PyTree) -> tuple[_Moments, None]:
    stats = _own(apply_fn, variables, shares, batch)
    return _add(moments, stats, pairs, size), None

  return jax.lax.scan(body, _empty(stats, pairs), batches)[0]


def _over_iterable(
  apply_fn: ApplyFn,
  variables: PyTree,
  pairs: list[tuple[int, int]],
  batches: Iterable[PyTree],
) -> _Moments:
  moments, shares = None, None
  for batch in batches:
    _finite.check("a batch", batch)
    if shares is None:
      shares = _momenta(apply_fn, variables, batch)
      _check_momenta(shares)
    stats = _own(apply_fn, variables, shares, batch)
    moments = _add(
      _empty(stats, pairs) if moments is None else moments,
      stats,
      pairs,
      _size(batch, 0),
    )
  if moments is None:
    raise ValueError("there is no batch to take statistics of")
  return moments
