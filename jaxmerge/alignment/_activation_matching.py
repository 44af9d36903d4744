"""Activation matching: the permutations under which neurons act alike."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree
from jaxmerge.alignment import (
  _assignment,
  _derive_spec,
  _similarity,
  _spec,
)

PyTree = Any

_SIMILARITIES = ("correlation", "covariance", "inner_product")


class ActivationMoments(NamedTuple):
  """Sums over examples of two networks' activations, centred at their means.

  Each is an array for each group, with n neurons of k entries each.

  Attributes:
    counts: Shape ``[]``, the number of examples.
    means: Shape ``[2, n, k]``, of the reference and of the model.
    squares: Shape ``[2, n, k]``, the sums of squared deviations.
    products: Shape ``[k, n, n]``, the sums of products of deviations; rows are
      the reference's neurons.
  """

  counts: dict[str, jax.Array]
  means: dict[str, jax.Array]
  squares: dict[str, jax.Array]
  products: dict[str, jax.Array]


def activation_moments(
  reference_activations: Mapping[str, Any],
  model_activations: Mapping[str, Any],
  sizes: Mapping[str, int],
  moments: ActivationMoments | None = None,
) -> ActivationMoments:
  """Sums up the activations of two networks on a batch, after other batches.

  Args:
    reference_activations: For each group an array of shape ``[..., n]``, or
      ``[..., n * k]`` where a neuron has k entries in a row, as a head has. All
      leading axes count examples.
    model_activations: The same of the other network, on the same examples.
    sizes: The number of neurons of each group, see `group_sizes`.
    moments: What earlier batches gave; by default there were none.

  Returns:
    The sums over all batches, of at least float32.

  Raises:
    ValueError: If the groups or shapes do not fit.

  >>> x = {"hidden": jnp.array([[1.0, 0.0], [3.0, 0.0]])}
  >>> moments = activation_moments(x, x, {"hidden": 2})
  >>> print(moments.means["hidden"][0, :, 0], moments.products["hidden"][0, 0])
  [2. 0.] [2. 0.]
  """
  pairs = _check_activations(reference_activations, model_activations, sizes)
  if moments is not None and set(moments.counts) != set(pairs):
    raise ValueError(
      f"moments are of the groups {', '.join(moments.counts)}, but the"
      f" activations of {', '.join(pairs)}"
    )
  found = {}
  for group, (x, y) in pairs.items():
    new = _moments(x, y, sizes[group])
    if moments is not None:
      old = tuple(value[group] for value in moments)
      if old[1].shape != new[1].shape:
        raise ValueError(
          f"moments of group '{group}' have shape {old[1].shape}, but its"
          f" activations give {new[1].shape}"
        )
      new = _add_moments(old, new)
    found[group] = new
  return ActivationMoments(
    *({group: value[i] for group, value in found.items()} for i in range(4))
  )


def _check_activations(
  reference: Mapping[str, Any],
  model: Mapping[str, Any],
  sizes: Mapping[str, int],
) -> dict[str, tuple[jax.Array, jax.Array]]:
  pairs = {}
  if set(reference) != set(model):
    other = set(reference) ^ set(model)
    raise ValueError(
      "give the activations of the same groups for both networks; only one has"
      f" {', '.join(sorted(other))}"
    )
  if not reference:
    raise ValueError("there are no activations; give those of a group")
  for group in reference:
    if group not in sizes:
      raise ValueError(
        f"got activations of group '{group}', which the specification does not"
        f" have; its groups are {', '.join(sizes)}"
      )
    x, y = jnp.asarray(reference[group]), jnp.asarray(model[group])
    n = sizes[group]
    if x.shape != y.shape or x.ndim < 1 or not x.size or x.shape[-1] % n:
      raise ValueError(
        f"activations of group '{group}' must have shape [..., {n}], or a"
        f" multiple of {n} where a neuron has several entries, and be of the"
        f" same examples; got {x.shape} and {y.shape}"
      )
    if not (tree.is_float(x) and tree.is_float(y)):
      raise ValueError(
        f"activations of group '{group}' must be floating-point; got {x.dtype}"
        f" and {y.dtype}"
      )
    pairs[group] = x, y
  return pairs


@functools.partial(jax.jit, static_argnums=2)
def _moments(
  x: jax.Array, y: jax.Array, n: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  dtype = np.result_type(tree.accumulation_dtype(x), tree.accumulation_dtype(y))
  both = jnp.stack([x.astype(dtype), y.astype(dtype)])
  both = both.reshape(2, -1, n, x.shape[-1] // n)
  means = both.mean(axis=1)
  both = both - means[:, None]
  return (
    jnp.asarray(both.shape[1], dtype),
    means,
    jnp.sum(jnp.square(both), axis=1),
    jnp.einsum(
      "bgk,bjk->kgj", both[0], both[1], precision=jax.lax.Precision.HIGHEST
    ),
  )


@jax.jit
def _add_moments(
  old: tuple[jax.Array, ...], new: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  # Chan's update: sums of squares are never differences of large numbers.
  count = old[0] + new[0]
  step = new[1] - old[1]
  weight = old[0] * new[0] / count
  between = weight * step[0].T[:, :, None] * step[1].T[:, None, :]
  return (
    count,
    old[1] + step * (new[0] / count),
    old[2] + new[2] + weight * jnp.square(step),
    old[3] + new[3] + between,
  )


def activation_matching(
  reference_activations: Mapping[str, Any],
  model_activations: Mapping[str, Any],
  model: PyTree,
  spec: _spec.PermutationSpec | None = None,
  *,
  similarity: str = "correlation",
  moments: ActivationMoments | None = None,
) -> tuple[PyTree, _similarity.MatchingInfo]:
  r"""Permutes a network's neurons so that they act like a reference's.

  .. math::
    \sigma = \arg\max_\sigma \sum_g S_{g\,\sigma(g)}, \quad
    S_{gj} = \frac{\sum_x (a_g(x) - \bar a_g)(b_j(x) - \bar b_j)}
      {\sqrt{\sum_x (a_g(x) - \bar a_g)^2 \sum_x (b_j(x) - \bar b_j)^2}}

  with the activations a of the reference and b of the model on the same
  examples x, for each group by itself. A neuron that is constant is correlated
  with none; of several entries of a neuron the similarities are averaged.

  Args:
    reference_activations: For each group an array of shape ``[..., n]``, or
      ``[..., n * k]`` where a neuron has k entries in a row, as a head has. All
      leading axes count examples. A group that is left out keeps its order.
    model_activations: The same of the other network, on the same examples.
    model: The parameters of the other network.
    spec: The specification; by default that of `derive_spec`.
    similarity: ``"correlation"``; ``"covariance"``, which is not divided by
      the deviations; or ``"inner_product"``, the mean of :math:`a_g b_j`.
    moments: Sums over earlier batches, from `activation_moments`, which are
      continued with these.

  Returns:
    The permuted parameters of ``model``, and the permutations. The objective is
    the sum of the similarities, before and after.

  Raises:
    SpecError: If the specification does not fit the parameters.
    ValueError: If the groups or shapes do not fit, the activations are not
      finite, or the similarity is unknown.

  References:
    Li et al., `Convergent learning: Do different neural networks learn the same
    representations? <https://arxiv.org/abs/1511.07543>`_, 2015

    Ainsworth et al., `Git Re-Basin: Merging models modulo permutation
    symmetries <https://arxiv.org/abs/2209.04836>`_, 2022

  >>> model = {"a": jnp.array([[2.0, 1.0]]), "b": jnp.array([[4.0], [3.0]])}
  >>> spec = {"hidden": (_spec.Axis("a", 1), _spec.Axis("b", 0, False))}
  >>> acts = jnp.array([[1.0, 2.0], [1.0, 5.0], [2.0, 6.0]])
  >>> aligned, info = activation_matching(
  ...   {"hidden": acts}, {"hidden": acts[:, ::-1]}, model, spec
  ... )
  >>> print(aligned["a"], info.permutations["hidden"])
  [[1. 2.]] [1 0]
  """
  if similarity not in _SIMILARITIES:
    raise ValueError(
      f"unknown similarity {similarity!r}; choose one of "
      + ", ".join(_SIMILARITIES)
    )
  if spec is None:
    spec = _derive_spec.derive_spec(model)
  sizes = _spec.group_sizes(spec, model)
  moments = activation_moments(
    reference_activations, model_activations, sizes, moments
  )
  permutations = _spec.identity_permutations(spec, model)
  before = after = 0.0
  for group in moments.counts:
    values = np.asarray(
      _similarities(*(value[group] for value in moments), similarity)
    )
    if not np.isfinite(values).all():
      raise ValueError(
        f"activations of group '{group}' are not finite, or too large to be"
        " multiplied"
      )
    order = _assignment.solve_assignment(values)
    permutations[group] = order
    before += float(np.trace(values, dtype=np.float64))
    rows = np.arange(len(values))
    after += float(np.sum(values[rows, np.asarray(order)], dtype=np.float64))
  return _spec.apply_permutations(spec, model, permutations), (
    _similarity.MatchingInfo(
      permutations=permutations,
      objectives=np.array([before, after]),
      converged=True,
      n_iters=1,
    )
  )


@functools.partial(jax.jit, static_argnums=4)
def _similarities(
  count: jax.Array,
  means: jax.Array,
  squares: jax.Array,
  products: jax.Array,
  similarity: str,
) -> jax.Array:
  if similarity == "inner_product":
    x, y = jnp.moveaxis(means, -1, 1)
    values = products / count + x[:, :, None] * y[:, None, :]
  elif similarity == "covariance":
    values = products / count
  else:
    # Rounding leaves deviations to a constant neuron.
    eps = jnp.finfo(squares.dtype).eps
    floor = count * jnp.square(4 * eps * means)
    scales = jnp.where(
      squares > floor, jax.lax.rsqrt(jnp.maximum(squares, floor)), 0.0
    )
    x, y = jnp.moveaxis(scales, -1, 1)
    values = products * x[:, :, None] * y[:, None, :]
  return values.mean(axis=0)
