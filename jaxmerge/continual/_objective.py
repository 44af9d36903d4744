"""The losses of strategies: sums of terms, whose data are arguments.

A term's data (masks, weights, a teacher, a buffer) lie in `Context.frozen`, so
that one compiled epoch serves all tasks and all strengths of a term.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmerge import models, training
from jaxmerge import tree as tree_lib
from jaxmerge.continual import replay as replay_lib

PyTree = Any
Data = dict[str, Any]
LogitsFn = Callable[[PyTree, Any], jax.Array]
Transform = Callable[[jax.Array, PyTree], PyTree]


class Terms(NamedTuple):
  """What a loss is made of; hashable, so that equal ones compile once.

  Attributes:
    names: of the terms, from `labels`, `distill`, `replay`, `soft_replay`,
      `quadratic`, `path` and `project`.
    replay_batch: number of stored examples a step.
    online: the buffer that the run fills as it goes, or None.
    transform: augmentation of replayed examples, or None.
    adapter: low-rank adapters that are trained instead of the network, which is
      then `frozen["base"]`.
  """

  names: tuple[str, ...] = ("labels",)
  replay_batch: int = 0
  online: replay_lib.Replay | None = None
  transform: Transform | None = None
  adapter: models.Lora | None = None


def cross_entropy(
  logits: jax.Array, labels: jax.Array, mask: jax.Array
) -> jax.Array:
  """Cross-entropy over some of the classes.

  Args:
    logits: float `[b, classes]`.
    labels: int32 `[b]`.
    mask: bool `[b, classes]`, the classes that count.

  Returns:
    float `[b]`; infinite where the label is not among them.

  >>> mask = jnp.array([[True, True, False]])
  >>> print(cross_entropy(jnp.zeros((1, 3)), jnp.array([0]), mask).round(3))
  [0.693]
  """
  return optax.softmax_cross_entropy_with_integer_labels(
    jnp.where(mask, logits, -jnp.inf), labels
  )


def distillation(
  logits: jax.Array,
  targets: jax.Array,
  mask: jax.Array,
  temperature: jax.typing.ArrayLike,
  over: jax.Array | None = None,
) -> jax.Array:
  """Cross-entropy to a teacher's softened probabilities (Hinton et al., 2015).

      T^2 * sum_c -softmax(targets / T)_c * log softmax(logits / T)_c

  Args:
    logits: float `[b, classes]`.
    targets: the teacher's logits, of the same shape.
    mask: bool `[b, classes]`, the classes that the teacher knows; examples
      without any have the loss 0.
    temperature: T, positive.
    over: bool `[b, classes]`, the classes that the probabilities of `logits`
      are over, those of `mask` among them; None for the same. The teacher gives
      the others the probability 0.

  Returns:
    float `[b]`.

  >>> mask = jnp.array([[True, True], [False, False]])
  >>> zeros = jnp.zeros((2, 2))
  >>> print(distillation(zeros, zeros, mask, 1.0).round(3))
  [0.693 0.   ]
  """
  low = jnp.asarray(-1e9, logits.dtype)
  heat = jnp.asarray(temperature, logits.dtype)
  probs = jax.nn.softmax(jnp.where(mask, targets, low) / heat)
  own = mask if over is None else over
  log_probs = jax.nn.log_softmax(jnp.where(own, logits, low) / heat)
  losses = jnp.where(mask, -probs * log_probs, 0.0).sum(axis=-1)
  return heat**2 * losses


def quadratic_penalty(
  params: PyTree, center: PyTree, precision: PyTree
) -> jax.Array:
  """`1/2 * sum_i precision_i * (params_i - center_i)^2`, a scalar.

  >>> float(quadratic_penalty({"w": 3.0}, {"w": 1.0}, {"w": 0.5}))
  1.0
  """

  def part(p: jax.Array, c: jax.Array, f: jax.Array) -> jax.Array:
    squares = f * jnp.asarray(p - c).astype(jnp.result_type(f)) ** 2
    return squares.sum() if jnp.ndim(p) else squares

  parts = jax.tree.map(part, params, center, precision)
  return jnp.asarray(sum(jax.tree.leaves(parts))) / 2


def _pick(data: Data, chance: jax.Array) -> Data:
  """Stored examples at random places among the first `count`."""
  place = (chance * data["count"]).astype(jnp.int32)
  # A float32 chance just below 1 can round up to the count.
  place = jnp.clip(place, 0, data["count"].astype(jnp.int32) - 1)
  return jax.tree.map(lambda leaf: leaf[place], data["items"])


def _stored(
  terms: Terms, frozen: Data, context: training.Context, which: int
) -> tuple[Data, jax.Array]:
  """A batch of stored examples, augmented, and the weight of each."""
  if terms.online is None:
    batch = _pick(frozen["buffer"], context.drawn[which])
    # Nothing is stored before the second task.
    real = jnp.broadcast_to(
      (frozen["buffer"]["count"] > 0).astype(jnp.float32), (terms.replay_batch,)
    )
  else:
    key = jax.random.fold_in(context.key, 10 + which)
    batch, _, _, mask = replay_lib.sample(
      context.state["buffer"], key, terms.replay_batch
    )
    real = mask.astype(jnp.float32)
  if terms.transform is not None:
    keys = jax.random.split(
      jax.random.fold_in(context.key, 20 + which), terms.replay_batch
    )
    seen = {name: batch[name] for name in ("input", "label", "task")}
    batch = {**batch, **jax.vmap(terms.transform)(keys, seen)}
  return batch, real


def _replayed(
  logits_fn: LogitsFn,
  terms: Terms,
  params: PyTree,
  context: training.Context,
) -> jax.Array:
  """Mean loss on stored examples, a scalar."""
  total = jnp.zeros(())
  if "replay" in terms.names:
    data = context.frozen["replay"]
    batch, real = _stored(terms, context.frozen, context, 0)
    logits = logits_fn(params, batch["input"])
    losses = cross_entropy(logits, batch["label"], data["masks"][batch["task"]])
    losses = jnp.where(real > 0, losses, 0.0)
    total += data["weight"] * losses.mean()
  if "soft_replay" in terms.names:
    data = context.frozen["soft_replay"]
    batch, real = _stored(terms, context.frozen, context, 1)
    logits = logits_fn(params, batch["input"])
    squares = ((logits - batch["logits"]) ** 2).mean(axis=-1)
    total += data["weight"] * (real * squares).mean()
  return total


def _taught(logits_fn: LogitsFn, teacher: PyTree, images: Any) -> jax.Array:
  """The logits of a teacher; of several in a tuple their mean."""
  teachers = teacher if isinstance(teacher, tuple) else (teacher,)
  total = sum(logits_fn(one, images) for one in teachers)
  return jax.lax.stop_gradient(jnp.asarray(total) / len(teachers))


def _own(
  logits_fn: LogitsFn,
  terms: Terms,
  params: PyTree,
  context: training.Context,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Losses of the batch's examples, hits, and the logits."""
  frozen, batch = context.frozen, context.batch
  logits = logits_fn(params, batch["input"])
  mask = frozen["labels"]["masks"][batch["task"]]
  losses = frozen["labels"]["weight"] * cross_entropy(
    logits, batch["label"], mask
  )
  if "distill" in terms.names:
    data = frozen["distill"]
    targets = _taught(logits_fn, data["teacher"], batch["input"])
    masks = data["masks"][batch["task"]]
    over = data["over"][batch["task"]] if "over" in data else None
    losses += data["weight"] * distillation(
      logits, targets, masks, data["temperature"], over
    )
  hits = jnp.where(mask, logits, -jnp.inf).argmax(axis=-1)
  return losses, hits.astype(jnp.int32) == batch["label"], logits


def batch_mean(values: jax.Array, context: training.Context) -> jax.Array:
  """The mean over the global batch, the padding left out."""
  weights = context.weights
  real = jnp.ones(values.shape) if weights is None else weights
  real = real.astype(values.dtype)
  total = jax.lax.psum((values * real).sum(), training.DEVICE_AXIS)
  return total / jax.lax.psum(real.sum(), training.DEVICE_AXIS)


def with_gradient(loss: jax.Array, params: PyTree, grads: PyTree) -> jax.Array:
  """A scalar of that value whose gradient with respect to params is `grads`."""
  stop = jax.lax.stop_gradient
  product = tree_lib.dot(params, stop(grads))
  return stop(loss) + product - stop(product)


def _fill(
  terms: Terms, context: training.Context, logits: jax.Array
) -> replay_lib.ReplayState:
  """The online buffer after this batch, the same on every device."""
  batch = dict(context.batch)
  if "soft_replay" in terms.names:
    batch["logits"] = jax.lax.stop_gradient(logits)
  weights = context.weights
  mask = jnp.ones(batch["label"].shape, bool) if weights is None else weights
  batch, mask = jax.lax.all_gather(
    (batch, mask), training.DEVICE_AXIS, tiled=True
  )
  assert terms.online is not None
  return terms.online.add(
    context.state["buffer"],
    batch,
    batch["label"],
    batch["task"],
    jax.random.fold_in(context.key, 30),
    mask=mask,
  )


@functools.lru_cache(maxsize=64)
def loss_fn(
  logits_fn: LogitsFn, terms: Terms
) -> Callable[[PyTree, training.Context], Any]:
  """Makes the loss of a training run.

  Args:
    logits_fn: the network.
    terms: what the loss is made of.

  Returns:
    `loss(params, context)` for `training.train`. With the term `path` or an
    online buffer the run has a state.
  """
  by_gradient = bool({"path", "project"} & set(terms.names))

  def rest(params: PyTree, context: training.Context) -> jax.Array:
    """What does not depend on the batch's examples, a scalar."""
    total = jnp.zeros(())
    if not {"replay", "soft_replay"}.isdisjoint(terms.names):
      total += _replayed(logits_fn, terms, params, context)
    if "quadratic" in terms.names:
      data = context.frozen["quadratic"]
      total += data["weight"] * quadratic_penalty(
        params, data["center"], data["precision"]
      )
    return total

  def loss(params: PyTree, context: training.Context) -> Any:
    losses, hits, logits = _own(logits_fn, terms, params, context)
    metrics = {"accuracy": hits.astype(jnp.float32)}
    state = context.state
    if not by_gradient:
      losses += rest(params, context)
      if state is None:
        return losses, metrics
      return losses, metrics, {"buffer": _fill(terms, context, logits)}

    def mean(params: PyTree) -> jax.Array:
      own = _own(logits_fn, terms, params, context)[0]
      return batch_mean(own, context)

    value, grads = jax.value_and_grad(mean)(params)
    # Of a sum over devices each holds its own part.
    grads = jax.lax.pmean(grads, training.DEVICE_AXIS)
    new_state = dict(state)
    if "path" in terms.names:
      new_state["path"] = follow(state["path"], params, grads)
    if "project" in terms.names:
      grads = _projected(logits_fn, terms, params, grads, context)
      new_state["buffer"] = _fill(terms, context, logits)
    if "quadratic" in terms.names:
      extra, more = jax.value_and_grad(rest)(params, context)
      value, grads = value + extra, tree_lib.add(grads, more)
    whole = with_gradient(value, params, grads)
    return jnp.broadcast_to(whole, losses.shape), metrics, new_state

  lora = terms.adapter
  if lora is None:
    return loss

  def of_adapters(adapters: PyTree, context: training.Context) -> Any:
    return loss(
      models.lora_apply(lora, context.frozen["base"], adapters), context
    )

  return of_adapters


def _projected(
  logits_fn: LogitsFn,
  terms: Terms,
  params: PyTree,
  grads: PyTree,
  context: training.Context,
) -> PyTree:
  """A-GEM's gradient: no component against that of stored examples."""

  def stored(params: PyTree) -> jax.Array:
    batch, real = _stored(terms, context.frozen, context, 0)
    mask = context.frozen["replay"]["masks"][batch["task"]]
    logits = logits_fn(params, batch["input"])
    losses = cross_entropy(logits, batch["label"], mask)
    return jnp.where(real > 0, losses, 0.0).mean()

  reference = jax.grad(stored)(params)
  product = tree_lib.dot(grads, reference)
  square = tree_lib.dot(reference, reference)
  against = (product < 0) & (square > 0)
  share = jnp.where(against, product / jnp.where(against, square, 1.0), 0.0)
  return jax.tree.map(lambda g, r: g - share * r, grads, reference)


def start_path(params: PyTree) -> Data:
  """The state of the term `path` before a run, for all seeds."""
  zeros = jax.tree.map(jnp.zeros_like, params)
  return {"params": params, "grads": zeros, "credit": zeros}


def follow(path: Data, params: PyTree, grads: PyTree) -> Data:
  """Adds a step to SI's path integral: -gradient * step, entry by entry.

  Args:
    path: `params` and `grads` of the step before, and the `credit` so far.
    params: the parameters now.
    grads: the gradient of the task's loss there.

  Returns:
    The path with the step.
  """
  credit = jax.tree.map(
    lambda c, g, new, old: c - g * (new - old),
    path["credit"],
    path["grads"],
    params,
    path["params"],
  )
  stop = jax.lax.stop_gradient
  return {"params": stop(params), "grads": stop(grads), "credit": stop(credit)}
