"""REPAIR: activation statistics of a merged network, matched to its ends'."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree
from jaxmerge.alignment import _activations, _finite

PyTree = Any


class RepairInfo(NamedTuple):
  """How far a repair went, for each layer in the order of computing.

  Attributes:
    layers: The names of the layers, ``[layers]``.
    std_ratio_before: Float ``[layers]``, the mean standard deviation of the
      layer's channels in the merged network, as a fraction of that of the
      target; well below 1 where averaging made the variance collapse.
    std_ratio_after: The same in the repaired network.
    error_before: Float ``[layers]``, the largest difference of a channel's
      mean or standard deviation from its target, as a fraction of the mean
      target standard deviation of the layer.
    error_after: The same in the repaired network. It stays large where a
      channel is constant in the merged network but not in the ends.
  """

  layers: tuple[str, ...]
  std_ratio_before: jax.Array
  std_ratio_after: jax.Array
  error_before: jax.Array
  error_after: jax.Array


class _Moments(NamedTuple):
  """Mean and standard deviation of a layer's channels, `[channels]` each."""

  mean: jax.Array
  std: jax.Array


class _Layer(NamedTuple):
  """Where a layer's last leaves are: of a kernel, or of a normalisation."""

  name: str
  factor: int
  bias: int | None


def repair(
  params: PyTree,
  start: PyTree,
  end: PyTree,
  activations_fn: _activations.ActivationsFn,
  data: PyTree,
  *,
  t: jax.typing.ArrayLike = 0.5,
  layers: Sequence[str] | None = None,
  scale_only: bool = False,
  batch_size: int = 1000,
) -> tuple[PyTree, RepairInfo]:
  r"""Gives a merged network the activation statistics of its ends.

  The average of two networks has less variance in its activations than either,
  the more so the deeper the layer. For every channel of a layer, with
  :math:`\mu, \sigma` its mean and standard deviation over data and positions,

  .. math::
    \mu^* = (1 - t) \mu_0 + t \mu_1, \quad
    \sigma^* = (1 - t) \sigma_0 + t \sigma_1, \quad
    x \leftarrow \mu^* + \frac{\sigma^*}{\sigma} (x - \mu)

  which is folded into the layer's kernel and bias, or into the scale and bias
  of a normalisation. Layer follows layer: each is measured in the network that
  is repaired below it.

  What the layers are, ``activations_fn`` says. Without normalisation they are
  the dense layers and convolutions, before the nonlinearity. With LayerNorm or
  GroupNorm they are the normalisations, which have a scale and a bias, while
  the layers before them mostly have no bias and are normalised anyway. With
  batch normalisation there is nothing to repair but the running statistics:
  the scales and biases of the ends are merged as they are, and
  `reset_batch_stats` of the merged network does the rest; where the
  statistics of the ends are doubted, reset theirs as well.

  Args:
    params: The merged network, with floating-point leaves ``kernel`` or
      ``scale`` and ``bias`` in each layer.
    start: The network at t = 0.
    end: The network at t = 1, its neurons in the order of the first's; align
      it beforehand.
    activations_fn: ``activations_fn(params, batch)`` returns the layers'
      outputs by name, ``[..., channels]``, in the order of computing; see
      `flax_activations`. A layer's name is that of its leaves without the last
      part. It may be jitted: the order is that of the function inside, as the
      dictionaries that come out of ``jax.jit`` are sorted. Keep one function
      object: each one compiles anew.
    data: A pytree of arrays ``[examples, ...]``, some thousand examples of the
      training set.
    t: Where between the ends the merged network lies, a scalar in [0, 1].
    layers: Names of the layers to repair, in the order of computing; None for
      all, in the order of ``activations_fn``.
    scale_only: Match the standard deviations alone, by scaling kernel and
      bias; for layers without a bias.
    batch_size: How many examples are run at a time.

  Returns:
    The repaired network, and what was changed. A layer that is worse than
    before, and off by more than a tenth, gives a `RuntimeWarning`: its order is
    wrong then, or the network below it cannot be repaired.

  Raises:
    TreeMismatchError: If the three networks differ in structure, shape or
      dtype.
    ValueError: If a layer has no kernel or scale, or no bias to hold a shift,
      or the leaves do not fit its channels; if ``layers`` names one twice; if
      t is out of range; or if there is no data, or data or parameters are not
      finite.

  References:
    Jordan et al., `REPAIR: REnormalizing Permuted Activations for
    Interpolation Repair <https://arxiv.org/abs/2211.08403>`_, 2023

  >>> def activations_fn(params, batch):
  ...   return {"a": batch @ params["a"]["kernel"] + params["a"]["bias"][None]}
  >>> def layer(kernel, bias):
  ...   return {
  ...     "a": {"kernel": jnp.array([[kernel]]), "bias": jnp.array([bias])}
  ...   }
  >>> start, end, merged = layer(2.0, 1.0), layer(-2.0, 1.0), layer(0.1, 0.0)
  >>> x = jnp.array([[-1.0], [1.0]])
  >>> repaired, info = repair(merged, start, end, activations_fn, x)
  >>> repaired["a"]["kernel"].round(2).item(), repaired["a"]["bias"].item()
  (2.0, 1.0)
  """
  tree.check_match(
    start, end, params, names=("start", "end", "the merged network")
  )
  if jnp.ndim(t):
    raise ValueError(f"t must be a scalar; got shape {jnp.shape(t)}")
  if not isinstance(t, jax.core.Tracer) and not 0 <= np.asarray(t) <= 1:
    raise ValueError(f"t must lie in [0, 1]; got {t}")
  sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(data)}
  if len(sizes) != 1 or () in sizes or (0,) in sizes:
    raise ValueError(
      "data must be arrays [examples, ...] with equally many examples, at"
      f" least one; got sizes {sorted(sizes)}"
    )
  if batch_size < 1:
    raise ValueError(f"batch_size must be at least 1; got {batch_size}")
  found = _find(params, activations_fn, data, layers, scale_only)
  for what, values in (
    ("data", data),
    ("start", start),
    ("end", end),
    ("the merged network", params),
  ):
    _finite.check(what, values)
  data = jax.tree.map(jnp.asarray, data)
  measure = functools.partial(
    _measure,
    activations_fn,
    tuple(layer.name for layer in found),
    batch_size,
    data=data,
  )
  targets = _between(measure(start), measure(end), t)
  moments = measure(params)
  before = _compare(moments, targets)
  for i, layer in enumerate(found):
    if i:
      moments = measure(params)
    params = _fold(params, layer, moments[i], targets[i], scale_only)
  after = _compare(measure(params), targets)
  info = RepairInfo(
    tuple(layer.name for layer in found),
    std_ratio_before=before[0],
    std_ratio_after=after[0],
    error_before=before[1],
    error_after=after[1],
  )
  _warn(info)
  return params, info


def _warn(info: RepairInfo) -> None:
  """Says which layers a repair made worse, unless it is traced."""
  if isinstance(info.error_after, jax.core.Tracer):
    return
  before, after = (np.asarray(x) for x in (info.error_before, info.error_after))
  # Not "greater": NaN is worse, too.
  worse = np.flatnonzero(~(after <= np.maximum(before, 0.1)))
  if worse.size:
    i = worse[0]
    warnings.warn(
      f"the statistics of layer '{info.layers[i]}' are further off after the"
      f" repair ({after[i]:.2g}) than before ({before[i]:.2g}, as a fraction of"
      " the standard deviation); if the order of the layers is not that of"
      f" computing, give it in layers=[...]: it was {', '.join(info.layers)}",
      RuntimeWarning,
      stacklevel=3,
    )


def _find(
  params: PyTree,
  activations_fn: _activations.ActivationsFn,
  data: PyTree,
  layers: Sequence[str] | None,
  scale_only: bool,
) -> list[_Layer]:
  """The layers to repair, in the order of computing."""
  order: list[str] = []

  def record(params: PyTree, batch: PyTree) -> dict[str, jax.Array]:
    # Trees of dictionaries come back in the order of their keys, from here and
    # from each jitted function.
    with jax.disable_jit():
      activations = dict(activations_fn(params, batch))
    order.extend(activations)
    return activations

  one = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct((1, *np.shape(leaf)[1:]), leaf.dtype),
    data,
  )
  shapes = jax.eval_shape(record, params, one)
  if layers is not None:
    missing = [name for name in layers if name not in shapes]
    if missing:
      raise ValueError(
        f"layer '{missing[0]}' is not among the activations; they are of "
        + ", ".join(order)
      )
    order = list(layers)
    if len(set(order)) != len(order):
      raise ValueError(f"layers names a layer twice: {order}")
  if not order:
    raise ValueError("there is no layer to repair; activations_fn returns none")
  leaves = jax.tree.leaves(params)
  index = {name: i for i, name in enumerate(tree.leaf_names(params))}
  return [
    _layer(name, shapes[name].shape, leaves, index, scale_only)
    for name in order
  ]


def _layer(
  name: str,
  shape: tuple[int, ...],
  leaves: Sequence[Any],
  index: Mapping[str, int],
  scale_only: bool,
) -> _Layer:
  factors = [f"{name}/{last}" for last in ("kernel", "scale")]
  factor = next((leaf for leaf in factors if leaf in index), None)
  if factor is None:
    raise ValueError(
      f"layer '{name}' of the activations has neither a leaf '{factors[0]}' nor"
      f" '{factors[1]}'; name layers as their leaves are named, without the"
      " last part"
    )
  bias = f"{name}/bias"
  if bias not in index and not scale_only:
    raise ValueError(
      f"layer '{name}' has no leaf '{bias}' that could hold the shift of its"
      " means; give it one, repair the normalisation behind it instead, or"
      " match the standard deviations alone with scale_only=True"
    )
  for leaf in (factor, bias):
    if leaf not in index:
      continue
    found = np.shape(leaves[index[leaf]])
    fits = found[-1:] == shape[-1:] and (leaf != bias or len(found) == 1)
    if not fits or not tree.is_float(leaves[index[leaf]]):
      raise ValueError(
        f"leaf '{leaf}' of shape {found} does not fit the activations of shape"
        f" {shape}; both must be floating-point and end with the channels"
      )
  return _Layer(name, index[factor], index.get(bias))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _measure(
  activations_fn: _activations.ActivationsFn,
  names: tuple[str, ...],
  batch_size: int,
  params: PyTree,
  data: PyTree,
) -> list[_Moments]:
  """Moments of all the layers over the data, chunk after chunk.

  One program for all networks and layers: a pass costs less than compiling
  one for each layer.
  """
  examples = jax.tree.leaves(data)[0].shape[0]
  chunks, rest = divmod(examples, batch_size)

  def moments(batch: PyTree) -> list[tuple[jax.Array, jax.Array]]:
    activations = activations_fn(params, batch)
    found = []
    for name in names:
      values = activations[name].astype(
        tree.accumulation_dtype(activations[name])
      )
      axes = tuple(range(values.ndim - 1))
      found.append((values.mean(axes), values.var(axes)))
    return found

  def add(total: Any, batch: PyTree, size: int) -> Any:
    """Moments of the union, with variances within and between chunks."""
    count, old = total
    share = size / (count + size)
    new = []
    for (mean, var), (other, spread) in zip(old, moments(batch), strict=True):
      gap = other - mean
      var = var + share * (spread - var) + share * (1 - share) * gap**2
      new.append((mean + share * gap, var))
    return count + size, new

  shapes = jax.eval_shape(moments, data)
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
  total = jnp.zeros((), jnp.float32), zeros
  if chunks:
    stacked = jax.tree.map(
      lambda leaf: leaf[: chunks * batch_size].reshape(
        chunks, batch_size, *leaf.shape[1:]
      ),
      data,
    )
    total, _ = jax.lax.scan(
      lambda total, batch: (add(total, batch, batch_size), None),
      total,
      stacked,
    )
  if rest:
    total = add(total, jax.tree.map(lambda leaf: leaf[-rest:], data), rest)
  return [_Moments(mean, jnp.sqrt(var)) for mean, var in total[1]]


@jax.jit
def _between(
  start: list[_Moments], end: list[_Moments], t: jax.typing.ArrayLike
) -> list[_Moments]:
  return tree.lerp(start, end, t)


def _fold(
  params: PyTree,
  layer: _Layer,
  moments: _Moments,
  target: _Moments,
  scale_only: bool,
) -> PyTree:
  """Writes a channel-wise affine map into the layer's leaves."""
  # A constant channel has no deviations to scale, but for those of rounding.
  rounding = 4 * jnp.finfo(moments.mean.dtype).eps * jnp.abs(moments.mean)
  is_constant = moments.std <= jnp.maximum(1e-6 * target.std, rounding)
  safe = jnp.where(is_constant, 1, moments.std)
  ratio = jnp.where(is_constant, 1, target.std / safe)
  treedef: Any = jax.tree.structure(params)
  leaves = jax.tree.leaves(params)

  def put(i: int, change: Any) -> None:
    leaf = jnp.asarray(leaves[i])
    leaves[i] = change(leaf.astype(ratio.dtype)).astype(leaf.dtype)

  put(
    layer.factor,
    lambda leaf: leaf * ratio.reshape((1,) * (leaf.ndim - 1) + (-1,)),
  )
  if layer.bias is not None:
    shift = 0 if scale_only else target.mean - ratio * moments.mean
    put(layer.bias, lambda leaf: leaf * ratio + shift)
  return treedef.unflatten(leaves)


@jax.jit
def _compare(
  moments: list[_Moments], targets: list[_Moments]
) -> tuple[jax.Array, jax.Array]:
  """For each layer the ratio of deviations and the largest error."""
  ratios, errors = [], []
  for one, target in zip(moments, targets, strict=True):
    scale = target.std.mean()
    scale = jnp.where(scale > 0, scale, 1)
    ratios.append(one.std.mean() / scale)
    gaps = jnp.abs(jnp.stack([one.mean - target.mean, one.std - target.std]))
    errors.append(gaps.max() / scale)
  return jnp.stack(ratios), jnp.stack(errors)
