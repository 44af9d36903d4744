"""One epoch of training as one compiled program."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmerge import tree as tree_lib
from jaxmerge.training import _compile, _state

PyTree = Any
Metrics = dict[str, jax.Array]

#: `loss_fn(params, context) -> losses` or `(losses, metrics)`; in a run with
#: a state `(losses, metrics, new_state)`.
ContextLoss = Callable[[PyTree, _state.Context], Any]

#: `transform(key, example) -> example`, for one example.
Transform = Callable[[jax.Array, PyTree], PyTree]

#: `draw(key, step) -> pytree`, random numbers of one step.
Draw = Callable[[jax.Array, jax.Array], PyTree]


class Plan(NamedTuple):
  """How an epoch over `examples` examples is cut into steps.

  Attributes:
    examples: number of examples in an epoch.
    batch_size: global batch size.
    full_steps: number of whole batches.
    tail: size of the last, partial batch; 0 if there is none.
    devices: number of devices that share a batch.
  """

  examples: int
  batch_size: int
  full_steps: int
  tail: int
  devices: int

  @property
  def steps(self) -> int:
    """Number of optimizer steps in an epoch."""
    return self.full_steps + bool(self.tail)


def plan_epoch(examples: int, batch_size: int, devices: int) -> Plan:
  """Cuts an epoch into steps.

  Args:
    examples: number of examples, at least 1.
    batch_size: global batch size, divided evenly over the devices.
    devices: number of devices.

  Returns:
    The plan. The last partial batch is used, not dropped.

  Raises:
    ValueError: the batch is larger than the data, or does not divide.

  >>> plan_epoch(60000, 128, 1).steps
  469
  """
  if batch_size < 1:
    raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
  if batch_size > examples:
    raise ValueError(
      f"batch_size={batch_size} is larger than the data ({examples} "
      "examples). Choose a smaller batch."
    )
  if batch_size % devices:
    raise ValueError(
      f"batch_size={batch_size} is not divisible by the {devices} devices. "
      f"Choose a multiple of {devices}, or fewer devices."
    )
  full_steps, tail = divmod(examples, batch_size)
  return Plan(examples, batch_size, full_steps, tail, devices)


def _weighted_mean(
  values: jax.Array, weights: jax.Array | None, share: float
) -> jax.Array:
  """Mean over this device's real examples, so that pmean gives the batch's."""
  if values.ndim == 0:
    if weights is not None:
      raise ValueError(
        "The loss returned a scalar, but the last batch of the epoch does "
        "not divide over the devices and is padded. Return one loss an "
        "example, shape [examples], so that the padding can be left out."
      )
    return values * share
  if values.ndim != 1:
    raise ValueError(
      "A loss or metric must be a scalar or have shape [examples], got "
      f"shape {values.shape}."
    )
  if weights is None:
    return values.mean() * share
  weights = weights.astype(values.dtype)
  return (values * weights).sum() / values.shape[0] * share


def _split_output(
  output: Any, state: PyTree
) -> tuple[jax.Array, Metrics, PyTree]:
  """Takes apart what a loss returns in a run with this state."""
  parts = output if isinstance(output, tuple) else (output,)
  if state is None:
    if len(parts) > 2:
      raise ValueError(
        f"The loss returned {len(parts)} values, but the run has no state. "
        "Return the losses, alone or with metrics, or give state=..."
      )
    losses, metrics = parts if len(parts) == 2 else (parts[0], {})
    return losses, metrics, None
  if len(parts) != 3:
    raise ValueError(
      f"The loss returned {len(parts)} of 3 values: in a run with a state it "
      "returns (losses, metrics, new_state); metrics may be {}."
    )
  tree_lib.check_match(state, parts[2], names=("state", "the loss's new state"))
  return parts


def _mean_state(state: PyTree) -> PyTree:
  """The mean over devices; counters are the same on all of them."""
  return jax.tree.map(
    lambda leaf: (
      jax.lax.pmean(leaf, _state.DEVICE_AXIS)
      if tree_lib.is_float(leaf)
      else leaf
    ),
    state,
  )


def run_step(
  loss_fn: ContextLoss,
  optimizer: optax.GradientTransformation,
  transform: Transform | None,
  size: int,
  devices: int,
  state: _state.TrainState,
  frozen: PyTree,
  data: PyTree,
  rows: jax.Array,
  key: jax.Array,
  drawn: PyTree,
) -> tuple[_state.TrainState, Metrics]:
  """One optimizer step on `size` examples; `rows` are padded to the devices.

  Args:
    loss_fn: the loss.
    optimizer: the Optax optimizer; it is given `frozen` as an extra argument.
    transform: per-example augmentation, or None.
    size: number of real examples in the global batch.
    devices: number of devices.
    state: state before the step.
    frozen: leaves that are not trained.
    data: the whole data on this device, leaves `[examples, ...]`.
    rows: int32 `[padded size]`, the batch's rows of `data`.
    key: PRNG key of the step.
    drawn: the random numbers of the step.

  Returns:
    The state after the step and the batch's mean metrics.
  """
  share = rows.shape[0] // devices
  padded = rows.shape[0] != size
  begin = jax.lax.axis_index(_state.DEVICE_AXIS) * share

  def mine(values: jax.Array) -> jax.Array:
    if devices == 1:
      return values
    return jax.lax.dynamic_slice_in_dim(values, begin, share)

  my_rows = mine(rows)
  batch = jax.tree.map(lambda leaf: leaf[my_rows], data)
  # 0 for the loss, 1 for the augmentation: neither meets the other's keys.
  context = _state.Context(frozen, batch, jax.random.fold_in(key, 0), drawn)
  if transform is not None:
    # One key an example of the global batch: the same augmentation whatever
    # the number of devices.
    keys = jax.random.split(jax.random.fold_in(key, 1), rows.shape[0])
    context = context._replace(batch=jax.vmap(transform)(mine(keys), batch))
  weights = mine(jnp.arange(rows.shape[0]) < size) if padded else None
  context = context._replace(state=state.state, weights=weights)
  # Shares that hold padding count less; the mean over devices is then the
  # mean over the real examples.
  scale = rows.shape[0] / size

  def mean_loss(params: PyTree) -> tuple[jax.Array, tuple[Metrics, PyTree]]:
    losses, metrics, new_state = _split_output(
      loss_fn(params, context), state.state
    )
    if "loss" in metrics:
      raise ValueError(
        'A metric must not be named "loss": choose another name.'
      )
    reduce = functools.partial(_weighted_mean, weights=weights, share=scale)
    loss = reduce(losses)
    return loss, (
      {"loss": loss, **jax.tree.map(reduce, metrics)},
      new_state,
    )

  gradients, (metrics, new_state) = jax.grad(mean_loss, has_aux=True)(
    state.params
  )
  if devices > 1:
    gradients, metrics = jax.lax.pmean((gradients, metrics), _state.DEVICE_AXIS)
    new_state = _mean_state(new_state)
  update = optax.with_extra_args_support(optimizer).update
  updates, opt_state = update(
    gradients, state.opt_state, state.params, frozen=frozen
  )
  params = optax.apply_updates(state.params, updates)
  return (
    _state.TrainState(params, opt_state, state.step + 1, new_state),
    metrics,
  )


def run_epoch(
  loss_fn: ContextLoss,
  optimizer: optax.GradientTransformation,
  transform: Transform | None,
  draw: Draw | None,
  plan: Plan,
  reset_optimizer: bool,
  state: _state.TrainState,
  frozen: PyTree,
  indices: jax.Array,
  key: jax.Array,
  data: PyTree,
) -> tuple[_state.TrainState, Metrics]:
  """One epoch of one seed on one device; see `compile_epoch`."""
  order_key, step_key, draw_key = jax.random.split(key, 3)
  epoch = state.step // plan.steps
  order = jax.random.permutation(jax.random.fold_in(order_key, epoch), indices)
  if reset_optimizer:
    state = state._replace(opt_state=optimizer.init(state.params))
  # Hashes are drawn for the whole epoch at once: within the scan each would
  # be a handful of tiny kernels a step.
  numbers = state.step + jnp.arange(plan.steps, dtype=jnp.int32)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(step_key, numbers)
  drawn = None if draw is None else jax.vmap(draw, (None, 0))(draw_key, numbers)
  step = functools.partial(
    run_step,
    loss_fn,
    optimizer,
    transform,
    devices=plan.devices,
    frozen=frozen,
    data=data,
  )
  full = plan.full_steps
  whole = full * plan.batch_size

  def body(
    state: _state.TrainState, step_inputs: tuple[jax.Array, jax.Array, PyTree]
  ) -> tuple[_state.TrainState, Metrics]:
    rows, key, values = step_inputs
    return step(
      size=plan.batch_size, state=state, rows=rows, key=key, drawn=values
    )

  batches = order[:whole].reshape(full, plan.batch_size)
  state, metrics = jax.lax.scan(
    body,
    state,
    (batches, keys[:full], jax.tree.map(lambda leaf: leaf[:full], drawn)),
  )
  if plan.tail:
    missing = -plan.tail % plan.devices
    # The padding repeats the epoch's first rows: valid examples of weight 0.
    rows = jnp.concatenate([order[whole:], order[:missing]])
    state, last = step(
      size=plan.tail,
      state=state,
      rows=rows,
      key=keys[-1],
      drawn=jax.tree.map(lambda leaf: leaf[-1], drawn),
    )
    metrics = jax.tree.map(
      lambda many, one: jnp.concatenate([many, one[None]]), metrics, last
    )
  # The last update can spoil the parameters behind a finite loss.
  good = [
    jnp.isfinite(leaf).all()
    for leaf in jax.tree.leaves((state.params, state.state))
    if tree_lib.is_float(leaf)
  ]
  metrics["loss"] = (
    metrics["loss"]
    .at[-1]
    .set(jnp.where(jnp.stack(good).all(), metrics["loss"][-1], jnp.nan))
  )
  return state, metrics


@functools.lru_cache(maxsize=16)
def compile_epoch(
  loss_fn: ContextLoss,
  optimizer: optax.GradientTransformation,
  plan: Plan,
  devices: tuple[jax.Device, ...],
  transform: Transform | None = None,
  draw: Draw | None = None,
  reset_optimizer: bool = False,
) -> Callable[..., tuple[_state.TrainState, Metrics]]:
  """Compiles one epoch of several seeds on several devices.

  Equal arguments give the same function, so that runs that share them share
  one compilation.

  Args:
    loss_fn: `loss_fn(params, context)` returns one loss an example, shape
      `[examples]`, or a scalar mean, alone or with a dictionary of metrics
      of the same form; with a state, see `train`.
    optimizer: an Optax optimizer.
    plan: how the epoch is cut into steps.
    devices: the devices that share each batch.
    transform: `transform(key, example)`, augmentation of one example.
    draw: `draw(key, step)`, random numbers of a step, for `Context.drawn`.
    reset_optimizer: start every epoch with a fresh optimizer state.

  Returns:
    `epoch(state, frozen, indices, key, data) -> (state, metrics)`. Every
    leaf has a leading axis of devices and, but for those of `data`, a second
    one of seeds. `state` is donated. Metrics are per step.
  """

  def seeds(
    state: _state.TrainState,
    frozen: PyTree,
    indices: jax.Array,
    keys: jax.Array,
    data: PyTree,
  ) -> tuple[_state.TrainState, Metrics]:
    one = functools.partial(
      run_epoch,
      loss_fn,
      optimizer,
      transform,
      draw,
      plan,
      reset_optimizer,
      data=data,
    )
    if devices[0].platform in _compile.IN_TURN:
      return jax.lax.map(
        lambda seed: one(*seed), (state, frozen, indices, keys)
      )
    if len(indices) == 1:
      # Not vectorised: conditions in the loss stay conditions.
      given = jax.tree.map(lambda leaf: leaf[0], (state, frozen, indices, keys))
      return jax.tree.map(lambda leaf: leaf[None], one(*given))
    return jax.vmap(one)(state, frozen, indices, keys)

  mapped = jax.pmap(
    seeds,
    axis_name=_state.DEVICE_AXIS,
    devices=devices,
    donate_argnums=0,
  )
  return _compile.compile_once(mapped, devices[0])
