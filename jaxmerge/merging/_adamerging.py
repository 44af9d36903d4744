"""AdaMerging: coefficients of task vectors, learned on data without labels."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree
from jaxmerge.merging import (
  _agreeing,
  _leaves,
  _sparsify,
  _task_arithmetic,
  _values,
)

PyTree = Any
Array = jax.Array
LogitsFn = Callable[[PyTree, PyTree], Array]


class AdaMergingInfo(NamedTuple):
  """What `adamerging` found.

  Attributes:
    coefficients: The learned coefficients [T, L] of T tasks and L layers,
      float32.
    layers: The names of the layers, in the order of the coefficients; one,
      "all", with granularity "task".
    weights: The coefficients as `task_arithmetic` takes its weights: for each
      task a tree of the structure of the base.
    entropies: Mean entropies [steps, T] of the tasks' batches, in nats, each
      before the step.
    steps: Number of steps.
  """

  coefficients: Array
  layers: tuple[str, ...]
  weights: list[PyTree]
  entropies: Array
  steps: int


class _Program(NamedTuple):
  """What the compiled program is made for.

  Attributes:
    logits_fns: One for each task.
    optimizer: An Optax transformation.
    treedef: The structure of the parameters.
    places: Places of the leaves that are merged.
    constants: Places and values of the leaves that are no arrays.
    groups: For each merged leaf the number of its layer.
    steps: Number of steps.
    batch_size: Examples of each task in a step.
    clip: Bounds of the coefficients, or None.
  """

  logits_fns: tuple[LogitsFn, ...]
  optimizer: Any
  treedef: Any
  places: tuple[int, ...]
  constants: tuple[tuple[int, Any], ...]
  groups: tuple[int, ...]
  steps: int
  batch_size: int
  clip: tuple[float, float] | None


class _Tensors(NamedTuple):
  """The arrays that the compiled program is given.

  Attributes:
    bases: The base's merged leaves.
    models: Those of each model.
    others: The arrays that are not merged, by their places.
    data: The tasks' examples.
  """

  bases: list[Array]
  models: list[list[Array]]
  others: dict[int, Array]
  data: list[PyTree]


@functools.cache
def _adam(schedule: Callable[[Array], Any] | None) -> Any:
  """Adam by a schedule, or before it is scaled by the learning rate."""
  # A merge by formula needs no Optax. One object for each schedule, so that
  # the program is compiled once.
  import optax

  return optax.scale_by_adam() if schedule is None else optax.adam(schedule)


def _mean_entropy(logits: Array) -> Array:
  logits = logits.astype(tree.accumulation_dtype(logits))
  log_p = jax.nn.log_softmax(logits)
  # A class that is ruled out has the logit -inf, and adds nothing.
  finite = jnp.where(log_p == -jnp.inf, 0, log_p)
  return -(jnp.exp(log_p) * finite).sum(axis=-1).mean()


def _params(
  program: _Program, leaves: Sequence[Array], others: dict[int, Array]
) -> PyTree:
  found = dict(zip(program.places, leaves, strict=True))
  found |= others
  found |= dict(program.constants)
  return program.treedef.unflatten(found[i] for i in range(len(found)))


def _merge(
  program: _Program, tensors: _Tensors, coefficients: Array
) -> list[Array]:
  weights = [[row[group] for group in program.groups] for row in coefficients]
  return _task_arithmetic.task_arithmetic(
    tensors.bases, tensors.models, weights=weights, allow_nonfinite=True
  )


@functools.partial(jax.jit, static_argnames=("size", "batch_size", "steps"))
def _order(
  key: Array, task: Array, size: int, batch_size: int, steps: int
) -> Array:
  """Rows of a task's batches [steps, batch_size], without replacement."""
  key = jax.random.fold_in(key, task)
  per_epoch = size // batch_size
  keys = jax.random.split(key, -(-steps // per_epoch))
  orders = jax.vmap(lambda one: jax.random.permutation(one, size))(keys)
  orders = orders[:, : per_epoch * batch_size]
  return orders.reshape(-1, batch_size)[:steps]


def _size(data: PyTree) -> int:
  return int(np.shape(jax.tree.leaves(data)[0])[0])


def _entropies_and_gradient(
  program: _Program, tensors: _Tensors, coefficients: Array, rows: list[Array]
) -> tuple[Array, Array]:
  """The tasks' entropies [T], and the gradient of their sum [T, L]."""
  # The barriers tie the models to what changes from step to step, and to what
  # comes after the tasks: else all task vectors are computed once, and stored.
  tensors, coefficients = jax.lax.optimization_barrier((tensors, coefficients))
  merged = _merge(program, tensors, coefficients)
  entropies, gradients = [], None
  # Task after task, so that the activations of one are held at a time; the
  # way back through the merge is gone once.
  for logits_fn, data, places in zip(
    program.logits_fns, tensors.data, rows, strict=True
  ):

    def loss(
      leaves: list[Array],
      logits_fn: LogitsFn = logits_fn,
      data: PyTree = data,
      places: Array = places,
    ) -> Array:
      batch = jax.tree.map(
        lambda x: jnp.take(x, places, axis=0, mode="clip"), data
      )
      params = _params(program, leaves, tensors.others)
      return _mean_entropy(logits_fn(params, batch))

    entropy, gradient = jax.value_and_grad(loss)(merged)
    entropies.append(entropy.astype(jnp.float32))
    gradients = (
      gradient
      if gradients is None
      else jax.tree.map(jnp.add, gradients, gradient)
    )
  tensors, gradients = jax.lax.optimization_barrier((tensors, gradients))
  merge = functools.partial(_merge, program, tensors)
  _, pullback = jax.vjp(merge, coefficients)
  return jnp.stack(entropies), pullback(gradients)[0]


@functools.partial(jax.jit, static_argnames="program")
def _learn(
  program: _Program,
  coefficients: Array,
  rate: Array,
  tensors: _Tensors,
  orders: list[Array],
) -> tuple[Array, Array, Array]:
  """All steps: coefficients, entropies, and how many steps were taken."""
  history = jnp.zeros((program.steps, len(tensors.data)), jnp.float32)

  def proceeds(carry: Any) -> Array:
    step, _, _, history = carry
    last = history[jnp.maximum(step - 1, 0)]
    return (step < program.steps) & jnp.isfinite(last).all()

  def body(carry: Any) -> Any:
    step, coefficients, state, history = carry
    entropies, gradient = _entropies_and_gradient(
      program, tensors, coefficients, [order[step] for order in orders]
    )
    # Optax relies on the default promotion rules.
    with jax.numpy_dtype_promotion("standard"):
      updates, state = program.optimizer.update(gradient, state, coefficients)
    coefficients = coefficients + rate * updates.astype(rate.dtype)
    if program.clip is not None:
      coefficients = jnp.clip(coefficients, *program.clip)
    return step + 1, coefficients, state, history.at[step].set(entropies)

  with jax.numpy_dtype_promotion("standard"):
    state = program.optimizer.init(coefficients)
  start = (jnp.zeros((), jnp.int32), coefficients, state, history)
  # A while loop, which unlike a scan ends where an entropy is not finite.
  step, coefficients, _, history = jax.lax.while_loop(proceeds, body, start)
  return coefficients, history, step


def _grouped(
  names: Sequence[str],
  granularity: str,
  layers: str | Callable[[str], Any] | None,
) -> tuple[tuple[str, ...], tuple[int, ...]]:
  """The names of the layers, and the number of each leaf's."""
  _sparsify.check_choice(granularity, "granularity", ("layer", "task"))
  if granularity == "task":
    if layers is not None:
      raise ValueError(
        "layers groups leaves with granularity='layer'; with 'task' all share"
        " one coefficient"
      )
    return ("all",), (0,) * len(names)
  labels = [_label(name, layers) for name in names]
  places = {label: i for i, label in enumerate(dict.fromkeys(labels))}
  return tuple(places), tuple(places[label] for label in labels)


def _label(name: str, layers: str | Callable[[str], Any] | None) -> str:
  if layers is None:
    return name
  if callable(layers):
    return str(layers(name))
  try:
    match = re.search(layers, name)
  except re.error as error:
    raise ValueError(
      f"layers: {layers!r} is not a valid regular expression ({error})"
    ) from error
  return name if match is None else match.group()


def _check_functions(
  logits_fn: LogitsFn | Sequence[LogitsFn], tasks: int
) -> tuple[LogitsFn, ...]:
  if callable(logits_fn):
    return (logits_fn,) * tasks
  if len(logits_fn) != tasks:
    raise ValueError(
      f"got {len(logits_fn)} logits_fn for {tasks} models; give one for all"
      " tasks, or one for each"
    )
  return tuple(logits_fn)


def _check_data(
  data: Sequence[PyTree], tasks: int, batch_size: int
) -> list[PyTree]:
  if not isinstance(data, Sequence) or isinstance(data, str):
    raise ValueError(
      "data must be a sequence with the examples of each task; got"
      f" {type(data).__name__}"
    )
  if len(data) != tasks:
    raise ValueError(
      f"got data of {len(data)} tasks for {tasks} models; give the examples of"
      " each model's task, in the order of the models"
    )
  for i, one in enumerate(data):
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(one)]
    if not shapes or any(not shape or not shape[0] for shape in shapes):
      raise ValueError(
        f"data of task {i} hold no examples; give arrays with a leading axis of"
        f" examples, not of shapes {shapes}"
      )
    if len({shape[0] for shape in shapes}) > 1:
      raise ValueError(
        f"data of task {i} have different numbers of examples: {shapes}"
      )
    if batch_size > shapes[0][0]:
      raise ValueError(
        f"batch_size is {batch_size} but task {i} has {shapes[0][0]} examples;"
        " give a smaller batch or more examples"
      )
  return list(data)


def _check_logits(program: _Program, tensors: _Tensors) -> None:
  """Raises unless each function returns one row of logits an example."""
  for i, (logits_fn, data) in enumerate(
    zip(program.logits_fns, tensors.data, strict=True)
  ):
    batch = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
        (program.batch_size, *np.shape(x)[1:]), jnp.asarray(x).dtype
      ),
      data,
    )
    found = jax.eval_shape(
      lambda leaves, others, batch, fn=logits_fn: fn(
        _params(program, leaves, others), batch
      ),
      tensors.bases,
      tensors.others,
      batch,
    )
    shape = getattr(found, "shape", None)
    if (
      shape is None
      or len(shape) < 2
      or shape[0] != program.batch_size
      or not jnp.issubdtype(found.dtype, jnp.floating)
    ):
      raise ValueError(
        f"logits_fn of task {i} must return logits [{program.batch_size}, ...,"
        f" classes] for a batch of {program.batch_size} examples; got {found}"
      )


def _initial(
  init: Any, tasks: int, layers: int, clip: tuple[float, float] | None
) -> Array:
  try:
    start = jnp.asarray(init, jnp.float32)
  except (TypeError, ValueError) as error:
    raise ValueError(f"init must be numbers; got {init!r}") from error
  shape = start.shape
  if shape not in ((), (tasks,), (tasks, layers)):
    raise ValueError(
      f"init must be a scalar, or have shape ({tasks},) or ({tasks},"
      f" {layers}), one for each task or for its layers; got {shape}"
    )
  low, high = clip or (-np.inf, np.inf)
  _values.check_range(init, "init", low, high)
  if start.ndim == 1:
    start = start[:, None]
  return jnp.broadcast_to(
    start.reshape((1,) * (2 - start.ndim) + start.shape), (tasks, layers)
  )


def _positive(value: int, name: str) -> int:
  try:
    number = operator.index(value)
  except TypeError:
    number = 0
  if number < 1:
    raise ValueError(f"{name} must be an integer, at least 1; got {value!r}")
  return number


def _check_learning_rate(learning_rate: Any, optimizer: Any) -> None:
  if optimizer is not None:
    if not callable(getattr(optimizer, "update", None)):
      raise ValueError(
        "optimizer must be an Optax transformation, as optax.adam(1e-3) is;"
        f" got {optimizer!r}"
      )
  elif not callable(learning_rate):
    if np.ndim(learning_rate):
      raise ValueError("learning_rate must be one number, or a schedule")
    _values.check_range(learning_rate, "learning_rate", 0, np.inf)


def _bounds(clip: Any) -> tuple[float, float] | None:
  """The bounds as numbers, or an error that says what is wrong with them."""
  if clip is None:
    return None
  try:
    low, high = (float(bound) for bound in clip)
  except (TypeError, ValueError) as error:
    raise ValueError(
      f"clip must be two numbers, (low, high), or None; got {clip!r}"
    ) from error
  if not low <= high:
    raise ValueError(f"clip must have low <= high; got {low:g} and {high:g}")
  return low, high


def adamerging(
  logits_fn: LogitsFn | Sequence[LogitsFn],
  base: PyTree,
  models: Sequence[PyTree],
  data: Sequence[PyTree],
  *,
  key: Array,
  granularity: str = "layer",
  layers: str | Callable[[str], Any] | None = None,
  init: Any = 0.3,
  learning_rate: Any = 1e-3,
  optimizer: Any = None,
  steps: int = 500,
  batch_size: int = 16,
  density: float | None = None,
  clip: tuple[float, float] | None = (0.0, 1.0),
  **options: Unpack[_leaves.MergeOptions],
) -> tuple[PyTree, AdaMergingInfo]:
  r"""Learns the coefficients of task vectors by minimising entropy.

  .. math::
    \theta^l(\lambda) = \theta_0^l + \sum_i \lambda_i^l \tau_i^l, \quad
    \min_\lambda \sum_i \frac{1}{|B_i|} \sum_{x \in B_i}
      H(f_i(x; \theta(\lambda))), \quad H(p) = -\sum_c p_c \log p_c

  with a batch :math:`B_i` of each task in each step, drawn without replacement
  until its data are used up. No labels are needed: the data may be those that
  the merged model is to be used on.

  All steps are one compiled program, made once for the same functions (give
  the same function, not a new lambda each time), optimizer and shapes. Task
  vectors are not stored: a step reads base and models, and holds one merged
  model, its gradient, and the activations of one task.

  Args:
    logits_fn: ``logits_fn(params, batch) -> logits [b, ..., classes]``, pure;
      or one for each task, with its own head.
    base: :math:`\theta_0`, the parameters that all models were tuned from.
    models: One or more trees of the structure of the base, one a task.
    data: For each task its examples, a pytree of arrays with a leading axis of
      examples, which lie on the device as a whole.
    key: PRNG key, for the batches.
    granularity: "layer", one coefficient for each task and layer, or "task",
      one for each task.
    layers: Which leaves are a layer and share a coefficient: a function from a
      leaf's name to the layer's, or a regular expression (`re.search`), whose
      match is the layer's name, and which leaves unmatched leaves apart. By
      default each leaf is a layer, as in the paper's code.
    init: The coefficients before the first step: a scalar, or an array of
      shape [T] or [T, L], such as an earlier call's.
    learning_rate: That of Adam, a number or an Optax schedule; not used with
      an ``optimizer``.
    optimizer: An Optax transformation of the coefficients.
    steps: Number of steps, at least 1.
    batch_size: Examples of each task in a step.
    density: With a fraction in (0, 1], task vectors hold only what `ties`
      would take the mean of: the largest magnitudes, where they have the
      elected sign (AdaMerging++; the paper has 0.2). Models so trimmed are
      stored. Real leaves only.
    clip: Bounds that coefficients are set back to after each step, or None.
      The paper's code has the same bounds, but reads clipped coefficients and
      updates them as they are, so that one that has left them rests there.
    **options: See `MergeOptions`.

  Returns:
    The merged parameters, with the structure, shapes and dtypes of the base,
    and what was found.

  Raises:
    TreeMismatchError: If a model differs from the base.
    ValueError: If there are no models or no data, their numbers differ, an
      option is unknown or a value is out of its range, or a function does not
      return logits.
    FloatingPointError: If an entropy is NaN or infinite, at which the steps
      end, or a coefficient.

  References:
    Yang et al., `AdaMerging: Adaptive Model Merging for Multi-Task Learning
    <https://arxiv.org/abs/2310.02575>`_, 2023

  >>> def logits_fn(params, x):
  ...   return x @ params["w"]
  >>> base = {"w": jnp.zeros((2, 2))}
  >>> models = [{"w": jnp.eye(2)}, {"w": 2 * jnp.eye(2)}]
  >>> data = [jnp.eye(2), jnp.eye(2)]
  >>> params, info = adamerging(
  ...   logits_fn,
  ...   base,
  ...   models,
  ...   data,
  ...   key=jax.random.key(0),
  ...   learning_rate=0.1,
  ...   steps=20,
  ...   batch_size=2,
  ... )
  >>> print(info.layers, info.coefficients.tolist(), params["w"].tolist())
  ('w',) [[1.0], [1.0]] [[3.0, 0.0], [0.0, 3.0]]
  """
  _leaves.check_shared(options, "adamerging")
  clip = _bounds(clip)
  _values.check_key(key)
  _check_learning_rate(learning_rate, optimizer)
  select = options.get("select")
  parts = _leaves.take_apart(
    base,
    models,
    select=select,
    allow_nonfinite=options.get("allow_nonfinite", False),
  )
  tasks = len(models)
  if not parts.merged:
    raise ValueError("base has no floating-point leaf to merge")
  names, groups = _grouped(
    [leaf.name for leaf in parts.merged], granularity, layers
  )
  coefficients = _initial(init, tasks, len(names), clip)
  examples = _check_data(data, tasks, _positive(batch_size, "batch_size"))
  # A number is no part of the program, which it would be compiled anew for.
  rate = jnp.ones((), jnp.float32)
  if optimizer is None and callable(learning_rate):
    optimizer = _adam(learning_rate)
  elif optimizer is None:
    optimizer = _adam(None)
    rate = -jnp.asarray(learning_rate, jnp.float32)
  leaves = jax.tree.leaves(base)
  places = tuple(leaf.place for leaf in parts.merged)
  others = set(range(len(leaves))) - set(places)
  arrays = {i for i in others if isinstance(leaves[i], (jax.Array, np.ndarray))}
  program = _Program(
    _check_functions(logits_fn, tasks),
    optimizer,
    jax.tree.structure(base),
    places,
    tuple((i, leaves[i]) for i in sorted(others - arrays)),
    groups,
    _positive(steps, "steps"),
    operator.index(batch_size),
    clip,
  )
  tensors = _Tensors(
    [jnp.asarray(leaf) for leaf in parts.bases],
    [
      [jnp.asarray(leaf) for leaf in row]
      for row in zip(*parts.models, strict=True)
    ],
    {i: leaves[i] for i in arrays},
    examples,
  )
  if density is not None:
    if np.ndim(density):
      raise ValueError("density must be one number, or None")
    _values.check_range(density, "density", 0, 1, open_low=True)
    for leaf, one in zip(parts.merged, tensors.bases, strict=True):
      if jnp.iscomplexobj(one):
        raise ValueError(
          f"leaf '{leaf.name}' is complex and has no sign to elect; leave it"
          " out with select, or density"
        )
  _check_logits(program, tensors)
  if density is not None:
    tensors = tensors._replace(
      models=_agreeing.agreeing_models(tensors.bases, tensors.models, density)
    )
  orders = [
    _order(key, np.uint32(i), _size(one), program.batch_size, program.steps)
    for i, one in enumerate(examples)
  ]
  coefficients, entropies, taken = _learn(
    program, coefficients, rate, tensors, orders
  )
  _check_finite(entropies, coefficients, taken)
  weights = _weights(base, parts.merged, groups, coefficients)
  params = _task_arithmetic.task_arithmetic(
    base,
    [_leaves.rebuild(base, parts.merged, one, None) for one in tensors.models],
    weights=weights,
    select=select,
    dtype=options.get("dtype"),
    allow_nonfinite=True,
  )
  return params, AdaMergingInfo(coefficients, names, weights, entropies, steps)


def _weights(
  base: PyTree,
  merged: Sequence[_leaves.Leaf],
  groups: Sequence[int],
  coefficients: Array,
) -> list[PyTree]:
  treedef: Any = jax.tree.structure(base)
  zero = jnp.zeros((), coefficients.dtype)
  trees = []
  for row in coefficients:
    leaves = [zero] * treedef.num_leaves
    for leaf, group in zip(merged, groups, strict=True):
      leaves[leaf.place] = row[group]
    trees.append(treedef.unflatten(leaves))
  return trees


def _check_finite(entropies: Array, coefficients: Array, taken: Array) -> None:
  if _values.is_traced(entropies):
    return
  last = int(taken) - 1
  values = np.asarray(entropies[last])
  if not np.isfinite(values).all():
    task = int(np.argmin(np.isfinite(values)))
    raise FloatingPointError(
      f"the entropy of task {task} is {values[task]} at step {last}, counted"
      " from 0; lower the learning rate, or see whether the models give finite"
      " logits"
    )
  if not np.isfinite(np.asarray(coefficients)).all():
    raise FloatingPointError(
      f"a coefficient is not finite after step {last}, counted from 0; lower"
      " the learning rate, or see whether logits_fn has a finite gradient"
    )
