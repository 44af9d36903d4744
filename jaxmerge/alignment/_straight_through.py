"""Learned permutations: weight matching to a copy that is trained."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree
from jaxmerge.alignment import (
  _derive_spec,
  _similarity,
  _spec,
  _weight_matching,
)

if TYPE_CHECKING:
  import optax

PyTree = Any
LossFn = Callable[[PyTree, PyTree], jax.Array]


class StraightThroughInfo(NamedTuple):
  """How the training of permutations went.

  Attributes:
    permutations: The best ones, for each group int32 of shape ``[n]``, as
      `apply_permutations` takes them.
    losses: float64 of shape ``[n_iters + 1]``: the mean loss of the midpoint
      over all batches, of the start and after each step. Steps with the
      permutations of the step before have its loss.
    best_step: Which of them is the lowest; 0 is the start.
    objectives: float64 of shape ``[n_iters + 1]``: the inner product of the
      trained copy and the permuted model.
    n_iters: Number of steps.
  """

  permutations: dict[str, jax.Array]
  losses: np.ndarray
  best_step: int
  objectives: np.ndarray
  n_iters: int


def straight_through(
  reference: PyTree,
  model: PyTree,
  loss_fn: LossFn,
  batches: PyTree,
  optimizer: optax.GradientTransformation,
  spec: _spec.PermutationSpec | None = None,
  *,
  key: jax.Array,
  steps: int = 100,
  project_every: int = 1,
  restarts: int = 0,
  max_sweeps: int = 100,
  tolerance: float = 1e-6,
  select: _similarity.Select = None,
) -> tuple[PyTree, StraightThroughInfo]:
  r"""Learns permutations by the loss halfway between two networks.

  .. math::
    \min_{\tilde\theta} \mathcal L\!\left(\tfrac12 \left(
      \theta^{\mathrm{ref}} + \sigma_{\tilde\theta}\,\theta\right)\right),
    \quad
    \sigma_{\tilde\theta} = \arg\max_\sigma
      \langle \tilde\theta, \sigma\theta \rangle

  :math:`\tilde\theta` starts as the reference and is trained. The permutations
  come from `weight_matching` to it, begun from those before; gradients go
  through them as if the permuted model were :math:`\tilde\theta` (straight
  through). The permutations of the lowest loss count. The start is weight
  matching, so that the result is no worse than that by this loss.

  Args:
    reference: Any pytree of arrays.
    model: A tree of the same structure, shapes and dtypes.
    loss_fn: ``loss_fn(params, batch)`` returns the mean loss of a batch, a
      scalar. Its inputs are of at least float32.
    batches: A pytree of arrays with a leading axis of batches of equal size.
      Step t takes batch t modulo their number. All of them are evaluated
      whenever a permutation has changed.
    optimizer: An Optax optimizer of :math:`\tilde\theta`.
    spec: The specification; by default that of `derive_spec`.
    key: PRNG key of the orders of groups, and of random starts.
    steps: Number of steps; at least 1.
    project_every: After how many steps the permutations are found anew; at
      least 1.
    restarts: Random starts of the first weight matching.
    max_sweeps: As for `weight_matching`.
    tolerance: As for `weight_matching`.
    select: Which leaves count for the permutations, as for `weight_matching`.
      All floating-point leaves but running statistics are averaged and trained;
      running statistics are averaged.

  Returns:
    The permuted parameters of ``model``, and the permutations with the losses.

  Raises:
    TreeMismatchError: If the trees differ in structure, shape or dtype.
    SpecError: If the specification does not fit them.
    TypeError: If the parameters are traced.
    ValueError: If an entry or the loss of the start is not finite, the batches
      have no common leading axis, the loss is not a scalar, or an option is out
      of range.

  References:
    Ainsworth et al., `Git Re-Basin: Merging models modulo permutation
    symmetries <https://arxiv.org/abs/2209.04836>`_, 2022, section 3.3

  >>> import optax
  >>> reference = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0], [4.0]])}
  >>> model = {"a": jnp.array([[2.0, 1.0]]), "b": jnp.array([[4.0], [3.0]])}
  >>> spec = {"hidden": (_spec.Axis("a", 1), _spec.Axis("b", 0, False))}
  >>> loss = lambda p, x: jnp.mean((jnp.tanh(x @ p["a"]) @ p["b"] - 1.0) ** 2)
  >>> aligned, info = straight_through(
  ...   reference,
  ...   model,
  ...   loss,
  ...   jnp.ones((1, 2, 1)),
  ...   optax.sgd(0.1),
  ...   spec,
  ...   key=jax.random.key(0),
  ...   steps=2,
  ... )
  >>> print(aligned["a"], info.best_step)
  [[1. 2.]] 0
  """
  _weight_matching.check_options(
    restarts=restarts, max_sweeps=max_sweeps, tolerance=tolerance
  )
  for name, value in (("steps", steps), ("project_every", project_every)):
    if value < 1:
      raise ValueError(f"{name} must be at least 1; got {value}")
  number = _count_batches(batches)
  tree.check_match(reference, model, names=["reference", "model"])
  spec = _derive_spec.derive_spec(reference) if spec is None else spec
  key, start_key = jax.random.split(key)
  _, matching = _weight_matching.weight_matching(
    reference,
    model,
    spec,
    key=start_key,
    restarts=restarts,
    max_sweeps=max_sweeps,
    tolerance=tolerance,
    select=select,
  )
  counted = _similarity.counted_leaves(reference, select)
  treedef: Any = jax.tree.structure(reference)
  mask = treedef.unflatten(_similarity.counted_leaves(reference, None))
  reference, wide = _similarity.widened(reference), _similarity.widened(model)
  batches = jax.tree.map(jnp.asarray, batches)
  trained, untrained = tree.partition(reference, mask)
  # Optax relies on the default promotion rules.
  with jax.numpy_dtype_promotion("standard"):
    state = optimizer.init(trained)

  def evaluate(aligned: PyTree) -> float:
    return float(_mean_loss(reference, aligned, batches, loss_fn=loss_fn))

  permutations = matching.permutations
  aligned = _spec.apply_permutations(spec, wide, permutations)
  losses = [evaluate(aligned)]
  objectives = [float(matching.objectives[-1])]
  if not np.isfinite(losses[0]):
    raise ValueError(
      f"the loss halfway is {losses[0]} after weight matching; give a loss that"
      " is finite there"
    )
  best = 0, permutations
  for step, one in enumerate(jax.random.split(key, steps)):
    trained, state = _step(
      trained,
      state,
      reference,
      tree.partition(aligned, mask),
      batches,
      np.int32(step % number),
      loss_fn=loss_fn,
      optimizer=optimizer,
    )
    losses.append(losses[-1])
    objectives.append(objectives[-1])
    if (step + 1) % project_every:
      continue
    latent = tree.combine(trained, untrained)
    _similarity.check_finite(**{f"the trained copy, step {step + 1},": latent})
    found = _weight_matching.ascend(
      _weight_matching.Problem(spec, latent, wide, counted),
      permutations,
      one,
      max_sweeps=max_sweeps,
      tolerance=tolerance,
    )
    objectives[-1] = float(found.objectives[-1])
    if all(
      np.array_equal(order, permutations[group])
      for group, order in found.permutations.items()
    ):
      continue
    permutations = found.permutations
    aligned = _spec.apply_permutations(spec, wide, permutations)
    losses[-1] = evaluate(aligned)
    if losses[-1] < losses[best[0]]:
      best = step + 1, permutations
  return _spec.apply_permutations(spec, model, best[1]), StraightThroughInfo(
    permutations=best[1],
    losses=np.array(losses),
    best_step=best[0],
    objectives=np.array(objectives),
    n_iters=steps,
  )


def _count_batches(batches: PyTree) -> int:
  leaves = jax.tree.leaves(batches)
  shapes = [jnp.shape(leaf) for leaf in leaves]
  if not shapes or any(
    not shape or not shape[0] or shape[0] != shapes[0][0] for shape in shapes
  ):
    raise ValueError(
      "batches must be arrays with one leading axis of batches, at least one;"
      f" got shapes {shapes}"
    )
  return shapes[0][0]


def _loss(loss_fn: LossFn, params: PyTree, batch: PyTree) -> jax.Array:
  loss = loss_fn(params, batch)
  if jnp.shape(loss):
    raise ValueError(
      "loss_fn must return a scalar, the mean over the batch; got shape"
      f" {jnp.shape(loss)}"
    )
  return loss


@functools.partial(jax.jit, static_argnames="loss_fn")
def _mean_loss(
  reference: PyTree, aligned: PyTree, batches: PyTree, *, loss_fn: LossFn
) -> jax.Array:
  halfway = tree.lerp(reference, aligned, 0.5)
  return jnp.mean(
    jax.lax.map(lambda batch: _loss(loss_fn, halfway, batch), batches)
  )


@functools.partial(jax.jit, static_argnames=("loss_fn", "optimizer"))
def _step(
  trained: PyTree,
  state: Any,
  reference: PyTree,
  aligned: tuple[PyTree, PyTree],
  batches: PyTree,
  index: jax.Array,
  *,
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
) -> tuple[PyTree, Any]:
  import optax

  batch = jax.tree.map(
    lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False),
    batches,
  )
  projected, rest = aligned

  def halfway_loss(projected: PyTree) -> jax.Array:
    whole = tree.combine(projected, rest)
    return _loss(loss_fn, tree.lerp(reference, whole, 0.5), batch)

  # Taken at the permuted model and given to the copy: straight through.
  gradient = jax.grad(halfway_loss)(projected)
  with jax.numpy_dtype_promotion("standard"):
    updates, state = optimizer.update(gradient, state, trained)
    return optax.apply_updates(trained, updates), state
