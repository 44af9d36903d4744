"""The training loop: epochs on the device, reports and checkpoints between."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from jaxmerge import tree as tree_lib
from jaxmerge.training import (
  _devices,
  _epoch,
  _host_data,
  _optimizers,
  _state,
)

PyTree = Any
Record = dict[str, Any]


class NonFiniteLossError(FloatingPointError):
  """The training loss became NaN or infinite."""


class Checkpoints(Protocol):
  """Where `train` keeps its state; see `jaxmerge.checkpoints.Store`."""

  def save(self, step: int, tree: PyTree, metadata: Record) -> None:
    """Writes a checkpoint."""

  def restore(self, like: PyTree) -> tuple[int, PyTree, Record] | None:
    """Returns the newest good checkpoint, or None."""

  def wait(self) -> None:
    """Blocks until everything is written."""


class TrainResult(NamedTuple):
  """What training returns.

  Attributes:
    params: the trained parameters.
    steps: number of optimizer steps in all.
    history: one record an epoch: `epoch`, `step`, `learning_rate`, `seconds`,
      `examples_per_second`, and the mean of every metric over the epoch, a
      list with one entry a seed.
    state: the last state of a run that has one, see `train`; else None.
    opt_state: the last state of the optimizer.
    trace: every metric at every step that this call made, `[seeds, steps]`.
  """

  params: PyTree
  steps: int
  history: list[Record]
  state: PyTree
  opt_state: PyTree
  trace: dict[str, np.ndarray]


def _num_examples(data: PyTree, axis: int) -> int:
  sizes = {leaf.shape[axis] for leaf in jax.tree.leaves(data)}
  if len(sizes) != 1:
    raise ValueError(
      "All leaves of the data must have the same number of examples, got "
      f"{sorted(sizes)}."
    )
  return sizes.pop()


def _key_data(keys: jax.Array) -> jax.Array:
  if jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
    return jax.random.key_data(keys)
  return keys


def _check_finite(
  losses: np.ndarray, first_step: int, optimizer: _optimizers.Optimizer
) -> None:
  """Raises if a loss `[seeds, steps]` is not finite."""
  bad = np.argwhere(~np.isfinite(losses.T))
  if bad.size:
    step, seed = bad[0]
    rate = float(optimizer.learning_rate(first_step + int(step)))
    raise NonFiniteLossError(
      f"The loss is {losses[seed, step]} at step {first_step + int(step)} "
      f"(learning rate {rate:g}, seed {int(seed)} of {len(losses)}). Lower "
      "the learning rate. The last good checkpoint, if any, is kept."
    )


def _record(
  metrics: dict[str, np.ndarray],
  plan: _epoch.Plan,
  first_step: int,
  rate: float,
  seconds: float,
) -> Record:
  """Summarises an epoch's per-step metrics `[seeds, steps]`."""
  sizes = np.full(plan.steps, plan.batch_size, np.float64)
  if plan.tail:
    sizes[-1] = plan.tail
  means = {
    name: [float(mean) for mean in values @ (sizes / plan.examples)]
    for name, values in sorted(metrics.items())
  }
  seeds = len(metrics["loss"])
  return {
    "epoch": first_step // plan.steps + 1,
    "step": first_step + plan.steps,
    "learning_rate": rate,
    "seconds": seconds,
    "examples_per_second": seeds * plan.examples / seconds,
    **means,
  }


def train(
  loss_fn: _epoch.ContextLoss,
  params: PyTree,
  data: PyTree,
  *,
  optimizer: _optimizers.Optimizer,
  epochs: int,
  batch_size: int,
  keys: jax.Array,
  frozen: PyTree = None,
  state: PyTree = None,
  indices: Any = None,
  transform: _epoch.Transform | None = None,
  draw: _epoch.Draw | None = None,
  reset_optimizer: bool = False,
  devices: Sequence[jax.Device] | int | None = None,
  checkpoints: Checkpoints | None = None,
  checkpoint_every: int = 1,
  on_epoch: Callable[[Record], None] | None = None,
  progress: str | None = None,
) -> TrainResult:
  """Trains several seeds at once: the low layer that everything stands on.

  An epoch is one compiled program: a scan over batches that are gathered on
  the device, mapped over devices (gradients averaged) and vectorised over
  seeds. The order of the examples, the augmentation and every other random
  choice depend on `keys`, the epoch and the step alone: not on the number of
  devices, and not on where a run was interrupted.

  Args:
    loss_fn: `loss_fn(params, context)` with a `Context`; returns one loss an
      example, shape `[examples]`, or their mean, alone or with a dictionary
      of metrics of the same form. With `state`, it returns
      `(losses, metrics, new_state)`.
    params: floating-point leaves with a leading axis of seeds.
    data: pytree of arrays `[examples, ...]`, a `Replicated`, or a `HostData`,
      which makes them anew for every epoch.
    optimizer: an `Optimizer`, for instance from `sgd`. A transformation that
      takes extra arguments (`optax.GradientTransformationExtraArgs`) is given
      those of `frozen` that belong to the seed, as `frozen`.
    epochs: number of epochs, at least 1.
    batch_size: global batch size, divisible by the number of devices. The
      last, partial batch of an epoch is used.
    keys: PRNG keys, one a seed.
    frozen: leaves with a leading axis of seeds that are not trained.
    state: what the loss reads as `context.state` and returns anew in every
      step, leaves with a leading axis of seeds: the running statistics of
      batch normalisation, say. It is not trained. After each step its
      floating-point leaves are averaged over the devices, the others must be
      the same on all. A layer that takes its statistics over the axis
      `DEVICE_AXIS`, and `context.weights` as a mask, makes the run the same
      on any number of devices, as `jaxmerge.models.BatchNorm` does.
    indices: int32 `[seeds, n]`, the rows of `data` that each seed trains on
      (one seed: `[1, n]`); None for all.
    transform: `transform(key, example) -> example`, augmentation on the
      device.
    draw: `draw(key, step)`, random numbers of a step, for `Context.drawn`;
      `key` is the run's. Drawn for a whole epoch at once.
    reset_optimizer: start every epoch with a fresh optimizer state.
    devices: as in `resolve_devices`; those of `data` if it is `Replicated`.
    checkpoints: where the state is kept. A run that finds one there goes on
      from it and ends as an unbroken run does, bit for bit.
    checkpoint_every: number of epochs between checkpoints.
    on_epoch: called with each epoch's record; after a resumption with the
      records of the earlier epochs, too.
    progress: label of a progress bar, None for none.

  Returns:
    The trained parameters and the states (with the axis of seeds), the
    history and the trace.

  Raises:
    TreeMismatchError: the loss's new state differs from the old one in
      structure, shape or dtype.
    ValueError: sizes that do not fit; nothing has been computed then.
    NonFiniteLossError: a loss became NaN or infinite.

  >>> def loss_fn(params, context):
  ...   return (params - context.frozen) ** 2 * context.batch
  >>> result = train(
  ...   loss_fn,
  ...   jnp.zeros(2),
  ...   np.ones(8, np.float32),
  ...   frozen=jnp.array([1.0, 2.0]),
  ...   epochs=50,
  ...   batch_size=8,
  ...   optimizer=_optimizers.sgd(0.1, 0.1, 50, 1, momentum=0.0),
  ...   keys=jax.random.split(jax.random.key(0)),
  ... )
  >>> [round(value, 1) for value in result.params.tolist()]
  [1.0, 2.0]
  """
  if epochs < 1 or checkpoint_every < 1:
    raise ValueError(
      "epochs and checkpoint_every must be at least 1, got "
      f"{epochs} and {checkpoint_every}."
    )
  if isinstance(data, _host_data.HostData):
    chosen, total = _devices.resolve_devices(devices), data.examples
  else:
    if not isinstance(data, _devices.Replicated):
      data = _devices.replicate(data, devices)
    chosen = data.devices
    total = _num_examples(data.value, axis=1)
  seeds = len(keys)
  if indices is None:
    indices = np.broadcast_to(np.arange(total, dtype=np.int32), (seeds, total))
  indices = np.asarray(indices, np.int32)
  if indices.ndim != 2 or len(indices) != seeds:
    raise ValueError(
      f"indices must have shape [{seeds}, n], got {indices.shape}."
    )
  if indices.size and not 0 <= indices.min() <= indices.max() < total:
    raise ValueError(
      f"indices must lie in [0, {total}), got {indices.min()} to "
      f"{indices.max()}."
    )
  plan = _epoch.plan_epoch(indices.shape[1], batch_size, len(chosen))

  def place(tree: PyTree) -> PyTree:
    return _devices.replicate(tree, chosen).value

  opt_state = jax.vmap(optimizer.transformation.init)(params)
  run_state = _state.TrainState(
    params, opt_state, jnp.zeros(seeds, jnp.int32), state
  )
  history: list[Record] = []
  traces: list[dict[str, np.ndarray]] = []
  identity = {
    "examples": plan.examples,
    "batch_size": batch_size,
    "keys": jax.device_get(_key_data(keys)).tolist(),
  }
  if checkpoints is not None:
    found = checkpoints.restore(run_state)
    if found is not None:
      _, run_state, metadata = found
      history = metadata["history"]
      if metadata["run"] != identity or len(history) > epochs:
        raise ValueError(
          f"The checkpoints are of another run: {metadata['run']} with "
          f"{len(history)} epochs done, not {identity} with {epochs} epochs. "
          "Choose another folder."
        )
  run = _epoch.compile_epoch(
    loss_fn,
    optimizer.transformation,
    plan,
    chosen,
    transform,
    draw,
    reset_optimizer,
  )
  done = len(history)
  if on_epoch is not None:
    for record in history:
      on_epoch(record)
  run_state, frozen, rows, keys = place((run_state, frozen, indices, keys))
  remaining = range(done, epochs)
  examples: Iterator[_devices.Replicated] = (
    _host_data.prefetched(data, remaining, chosen)
    if isinstance(data, _host_data.HostData)
    else itertools.repeat(data)
  )
  with tqdm.tqdm(
    total=epochs * seeds * plan.examples,
    initial=done * seeds * plan.examples,
    desc=progress,
    disable=progress is None,
    unit="ex",
    unit_scale=True,
  ) as bar:
    for epoch, given in zip(remaining, examples, strict=False):
      start = time.perf_counter()
      with jax.transfer_guard("disallow"):
        run_state, metrics = run(run_state, frozen, rows, keys, given.value)
      host = _devices.first_replica(metrics)
      traces.append(host)
      first_step = epoch * plan.steps
      _check_finite(host["loss"], first_step, optimizer)
      rate = float(optimizer.learning_rate(first_step))
      seconds = time.perf_counter() - start
      history.append(_record(host, plan, first_step, rate, seconds))
      last = epoch + 1 == epochs
      if checkpoints is not None and (
        last or (epoch + 1) % checkpoint_every == 0
      ):
        # A copy: the next epoch reuses the buffers of the donated state.
        copy = jax.tree.map(np.array, _devices.first_replica(run_state))
        checkpoints.save(
          history[-1]["step"],
          copy,
          {"history": list(history), "run": identity},
        )
      if on_epoch is not None:
        on_epoch(history[-1])
      bar.set_postfix(
        {
          name: f"{np.mean(value):.4f}"
          for name, value in history[-1].items()
          if isinstance(value, list)
        },
        refresh=False,
      )
      bar.update(seeds * plan.examples)
  if checkpoints is not None:
    checkpoints.wait()
  params, state, opt_state = jax.tree.map(
    lambda leaf: leaf.addressable_data(0)[0],
    (run_state.params, run_state.state, run_state.opt_state),
  )
  trace = {
    name: np.concatenate([part[name] for part in traces], axis=1)
    for name in (traces[0] if traces else ())
  }
  return TrainResult(
    params, epochs * plan.steps, history, state, opt_state, trace
  )


@functools.lru_cache(maxsize=16)
def context_loss(loss_fn: Callable[..., Any]) -> _epoch.ContextLoss:
  """Adapts `loss_fn(params, batch, key)` to the low layer's contract.

  In a run with a state the user's loss is `loss_fn(params, state, batch,
  key)`. The leaves that cannot be trained (integers, say) are expected in
  `context.frozen`.
  """

  def loss(params: PyTree, context: _state.Context) -> Any:
    whole = tree_lib.combine(params, context.frozen)
    if context.state is None:
      return loss_fn(whole, context.batch, context.key)
    if context.weights is not None:
      raise ValueError(
        "The last batch of the epoch does not divide over the devices and is "
        "padded, and the new state would take the padding in. Choose a "
        "batch_size or indices so that it divides, fewer devices, or "
        "training.train, whose loss gets the padding as context.weights."
      )
    return loss_fn(whole, context.state, context.batch, context.key)

  return loss


def fit(
  loss_fn: Callable[[PyTree, PyTree, jax.Array], Any],
  params: PyTree,
  data: PyTree,
  *,
  key: jax.Array,
  optimizer: _optimizers.Optimizer | None = None,
  learning_rate: float = 0.07,
  final_learning_rate: float = 7e-5,
  momentum: float = 0.9,
  weight_decay: float = 5e-4,
  epochs: int = 10,
  batch_size: int = 128,
  state: PyTree = None,
  seed_axis: bool = False,
  **options: Any,
) -> TrainResult:
  """Trains a network.

  Args:
    loss_fn: `loss_fn(params, batch, key)`; `batch` has the structure of
      `data`, `key` is that of the step. Returns one loss an example, shape
      `[examples]`, or their mean, alone or with a dictionary of metrics of
      the same form. With `state` it is `loss_fn(params, state, batch, key)`
      and returns `(losses, metrics, new_state)`.
    params: any pytree. Integer and boolean leaves are passed through.
    data: pytree of arrays `[examples, ...]`, or a `Replicated`.
    key: PRNG key; an array of keys with `seed_axis`.
    optimizer: replaces SGD and the four options that follow.
    learning_rate: initial learning rate of `sgd`.
    final_learning_rate: its learning rate at the end.
    momentum: its momentum.
    weight_decay: its weight decay.
    epochs: number of epochs.
    batch_size: global batch size.
    state: pytree of arrays that the loss carries from step to step untrained,
      such as `batch_stats`; see `train`. The last batch of an epoch must then
      divide over the devices (on one it does): a padded one would enter the
      state.
    seed_axis: every leaf of `params` and `state`, and `key`, has a leading
      axis of seeds that are trained at once.
    **options: the further options of `train`.

  Returns:
    The trained parameters, the number of steps, the history and the state.

  Raises:
    ValueError: see `train`.
    NonFiniteLossError: see `train`.

  >>> x = np.linspace(-1, 1, 64, dtype=np.float32)
  >>> def loss_fn(params, batch, key):
  ...   return (params["w"] * batch["x"] - batch["y"]) ** 2
  >>> result = fit(
  ...   loss_fn,
  ...   {"w": jnp.zeros(())},
  ...   {"x": x, "y": 3 * x},
  ...   key=jax.random.key(0),
  ...   batch_size=8,
  ...   weight_decay=0.0,
  ... )
  >>> round(float(result.params["w"]), 1), result.steps
  (2.9, 80)
  """
  if not seed_axis:
    params, state = jax.tree.map(
      lambda leaf: jnp.asarray(leaf)[None], (params, state)
    )
    key = key[None]
  if isinstance(data, _host_data.HostData):
    raise ValueError("fit takes no HostData: give it to training.train.")
  if not isinstance(data, _devices.Replicated):
    data = _devices.replicate(data, options.get("devices"))
  trained, frozen = tree_lib.partition(params)
  if not jax.tree.leaves(trained):
    raise ValueError(
      "params has no floating-point leaf: there is nothing to train."
    )
  if optimizer is None:
    optimizer = default_sgd(
      data,
      options.get("indices"),
      batch_size,
      epochs,
      learning_rate,
      final_learning_rate,
      momentum,
      weight_decay,
    )
  result = train(
    context_loss(loss_fn),
    trained,
    data,
    optimizer=optimizer,
    epochs=epochs,
    batch_size=batch_size,
    keys=key,
    frozen=frozen,
    state=state,
    **options,
  )
  params, state = tree_lib.combine(result.params, frozen), result.state
  if not seed_axis:
    params, state = jax.tree.map(lambda leaf: leaf[0], (params, state))
  return result._replace(params=params, state=state)


def default_sgd(
  data: _devices.Replicated,
  indices: Any,
  batch_size: int,
  epochs: int,
  learning_rate: float,
  final_learning_rate: float,
  momentum: float,
  weight_decay: float,
) -> _optimizers.Optimizer:
  """Makes `sgd` with the schedule over all the steps of a run.

  Args:
    data: the data on the devices.
    indices: int32 `[seeds, n]`, the rows that are trained on; None for all.
    batch_size: global batch size.
    epochs: number of epochs.
    learning_rate: initial learning rate.
    final_learning_rate: learning rate at the end.
    momentum: momentum.
    weight_decay: weight decay.

  Returns:
    The optimizer.

  Raises:
    ValueError: a value is out of its range.

  >>> data = _devices.replicate(np.zeros(10), 1)
  >>> optimizer = default_sgd(data, None, 4, 10, 0.1, 0.0, 0.9, 0.0)
  >>> float(optimizer.learning_rate(27))  # of 10 epochs of 3 steps
  0.0
  """
  examples = (
    _num_examples(data.value, axis=1)
    if indices is None
    else np.shape(indices)[-1]
  )
  plan = _epoch.plan_epoch(examples, batch_size, len(data.devices))
  return _optimizers.sgd(
    learning_rate,
    final_learning_rate,
    epochs,
    plan.steps,
    momentum=momentum,
    weight_decay=weight_decay,
  )
