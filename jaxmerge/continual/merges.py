"""Merges: what is made of the networks of the tasks so far."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmerge import alignment, curves, merging
from jaxmerge import tree as tree_lib
from jaxmerge.continual import _merge, _problem, _training
from jaxmerge.continual._merge import Merge, Step
from jaxmerge.continual._merge_became import became
from jaxmerge.continual._merge_trm import COEFFICIENTS, trm
from jaxmerge.continual._merge_tunable import tunable_magmax

__all__ = (
  "COEFFICIENTS",
  "Merge",
  "Step",
  "became",
  "buffer_loss",
  "by_rule",
  "curve",
  "running",
  "running_regmean",
  "simplex",
  "trm",
  "tunable_magmax",
)

PyTree = Any
State = _merge.State


def _check_align(align: str | None) -> None:
  if align not in (None, "ot", "weights"):
    raise ValueError(f"Unknown align {align!r}. Choose None, ot or weights.")


def _aligned(
  problem: _problem.Problem,
  step: Step,
  align: str | None,
  options: dict[str, Any],
) -> PyTree:
  """The expert in the order of the current network's neurons."""
  if align is None:
    return step.expert
  spec = problem.spec or alignment.derive_spec(
    jax.tree.map(lambda leaf: leaf[0], step.expert)
  )

  def one(current: PyTree, expert: PyTree) -> PyTree:
    if align == "ot":
      return alignment.ot_align(current, expert, spec, **options)[0]
    return alignment.weight_matching(
      current, expert, spec, key=jax.random.key(0), **options
    )[0]

  return _problem.per_seed(problem, one, step.current, step.expert)


def running(
  weight: str | float = "1/t", *, align: str | None = None, **options: Any
) -> Merge:
  """Running average: `current <- (1 - w) current + w expert`.

  Args:
    weight: w, "1/t" for that of the mean, or a number.
    align: None; "ot" for optimal transport of the expert to the current
      network (OT fusion), or "weights" for weight matching, before.
    **options: options of `jaxmerge.alignment.ot_align` or `weight_matching`.

  Returns:
    The merge.

  Raises:
    ValueError: an option is unknown.

  References:
    Singh and Jaggi, `Model fusion via optimal transport
    <https://arxiv.org/abs/1910.05653>`_, 2020

  >>> running().name
  'running(1/t)'
  """
  _merge.check_weight(weight)
  _check_align(align)

  def update(
    problem: _problem.Problem, state: State, step: Step
  ) -> tuple[PyTree, State]:
    if step.task == 0:
      return step.expert, state
    expert = _aligned(problem, step, align, options)
    share = _merge.share(weight, step.task)
    return tree_lib.lerp(step.current, expert, share), state

  parts = [str(weight), *([align] if align else [])]
  parts += [f"{name}={value}" for name, value in sorted(options.items())]
  return Merge(
    f"running({', '.join(parts)})",
    _merge.no_state,
    update,
    runs_network=align is not None,
  )


def by_rule(name: str, *, samples: int | None = None, **options: Any) -> Merge:
  """A rule of `jaxmerge.merging` on the networks of all tasks so far.

  A rule that streams holds its running state alone: MagMax one vector, whatever
  the number of tasks. The others hold all networks.

  Args:
    name: a name of `jaxmerge.merging.names`.
    samples: number of examples a task for the statistics that the rule needs
      (squared gradients, Gram matrices); None for all.
    **options: the rule's options.

  Returns:
    The merge.

  Raises:
    ValueError: the rule or an option is unknown.

  >>> by_rule("magmax", scale=1.0).name
  'magmax(scale=1.0)'
  """
  rule = merging.get(name, **options)
  if rule.info.max_models is not None:
    raise ValueError(
      f"{name} merges at most {rule.info.max_models} models, a stream has any "
      "number. Choose another rule."
    )

  def triple(problem: _problem.Problem, i: int) -> merging.MergeMethod:
    key = problem.keys_for("merge", name)[i] if rule.info.needs_key else None
    return rule.method(key)

  def statistics(problem: _problem.Problem, expert: PyTree, task: int) -> Any:
    if rule.info.statistics is None:
      return None
    inputs = [batch["input"] for batch in problem.batches(task, samples)]
    if rule.info.statistics == "gram_matrices":
      return _problem.gram_matrices(problem, expert, inputs)
    collect = getattr(merging, rule.info.statistics)
    own = _problem.own_logits(problem, task)
    return collect(own.logits_fn, expert, [own.prepare(one) for one in inputs])

  def init(problem: _problem.Problem) -> State:
    if not rule.info.streams:
      return {"experts": _merge.no_experts(problem)}
    start = triple(problem, 0).init
    return {"rule": _problem.per_seed(problem, start, problem.params)}

  def stream(
    problem: _problem.Problem, state: State, step: Step
  ) -> tuple[PyTree, State]:
    numbers = jnp.arange(problem.num_seeds)

    def one(i: jax.Array, expert: PyTree, mine: Any) -> Any:
      method = triple(problem, int(i))
      found = statistics(problem, expert, step.task)
      mine = method.update(mine, expert, statistics=found)
      return method.finalize(mine), mine

    merged, states = _problem.per_seed(
      problem, one, numbers, step.expert, state["rule"]
    )
    return merged, {"rule": states}

  def update(
    problem: _problem.Problem, state: State, step: Step
  ) -> tuple[PyTree, State]:
    if rule.info.streams:
      return stream(problem, state, step)
    held, models = _merge.with_expert(state["experts"], step)
    state = {"experts": held}
    if len(models) < rule.info.min_models:
      return step.expert, state
    keys = problem.keys_for("merge", name)

    def one(key: jax.Array, base: PyTree, models: list[PyTree]) -> PyTree:
      return rule(base, models, key=key)

    return _problem.per_seed(problem, one, keys, problem.params, models), state

  parts = [f"{key}={value}" for key, value in sorted(options.items())]
  return Merge(
    f"{name}({', '.join(parts)})" if parts else name,
    init,
    update,
    runs_network=rule.info.statistics is not None,
    needs_initial=rule.info.needs_base and not rule.info.streams,
  )


def running_regmean(
  *, alpha: float = 0.9, damping: float = 0.01, samples: int | None = None
) -> Merge:
  """RegMean of the current network and the expert, task after task.

  The current network counts with the sum of the Gram matrices of the tasks
  before, each of the inputs that the layers of its task's expert had on its
  task's data:

      W <- (G_1 + ... + G_t)^-1 ((G_1 + ... + G_{t-1}) W_current + G_t W_expert)

  So each layer keeps what the current network does on the inputs of the tasks
  before, and what the expert does on those of its own. One matrix a layer is
  held, whatever the number of tasks and of examples; no example is.

  Args:
    alpha: entries of the matrices off the diagonal are scaled by it, in [0, 1].
    damping: so many times its mean diagonal entry is added to the diagonal of
      each matrix, not negative. Without any, inputs that are nearly always
      zero get weights of any size, from which training on diverges.
    samples: number of a task's examples that its matrices are taken of; None
      for all.

  Returns:
    The merge.

  Raises:
    ValueError: an option is out of its range.

  References:
    Jin et al., `Dataless knowledge fusion by merging weights of language models
    <https://arxiv.org/abs/2212.09849>`_, 2023

  >>> running_regmean().name
  'running_regmean(alpha=0.9, damping=0.01)'
  """
  if not 0 <= alpha <= 1:
    raise ValueError(f"alpha must lie in [0, 1], got {alpha}.")
  if damping < 0:
    raise ValueError(f"damping must not be negative, got {damping}.")
  if samples is not None and samples < 1:
    raise ValueError(f"samples must be at least 1, got {samples}.")

  def damped(gram: jax.Array) -> jax.Array:
    size = len(gram)
    extra = damping * jnp.trace(gram) / size
    return gram + extra * jnp.eye(size, dtype=gram.dtype)

  def collect(problem: _problem.Problem, params: PyTree, task: int) -> Any:
    inputs = [batch["input"] for batch in problem.batches(task, samples)]
    found = _problem.gram_matrices(problem, params, inputs)
    return jax.tree.map(damped, found)

  def init(problem: _problem.Problem) -> State:
    def one(params: PyTree) -> Any:
      example = problem.stream.train["input"][:1]
      found = _problem.gram_matrices(problem, params, [example])
      return jax.tree.map(jnp.zeros_like, found)

    return {"grams": _problem.per_seed(problem, one, problem.params)}

  def update(
    problem: _problem.Problem, state: State, step: Step
  ) -> tuple[PyTree, State]:
    new = _problem.per_seed(
      problem,
      lambda params: collect(problem, params, step.task),
      step.expert,
    )
    total = jax.tree.map(jnp.add, state["grams"], new)
    if step.task == 0:
      return step.expert, {"grams": total}
    merged = _problem.per_seed(
      problem,
      lambda current, expert, old, new: merging.regmean(
        [current, expert], grams=[old, new], alpha=alpha
      ),
      step.current,
      step.expert,
      state["grams"],
      new,
    )
    return merged, {"grams": total}

  name = f"running_regmean(alpha={alpha}, damping={damping}"
  name += f", samples={samples})" if samples else ")"
  return Merge(name, init, update, runs_network=True)


def _check_t(t: str | float) -> None:
  if t not in ("1/t", "best") and not (
    isinstance(t, (int, float)) and 0 <= t <= 1
  ):
    raise ValueError(f"t must be '1/t', 'best' or lie in [0, 1], got {t!r}.")


@functools.lru_cache(maxsize=16)
def buffer_loss(
  logits_fn: _problem.LogitsFn,
) -> Callable[[PyTree, PyTree, jax.Array], Any]:
  """Cross-entropy over all classes, as `jaxmerge.curves` takes a loss."""

  def loss(params: PyTree, batch: PyTree, key: jax.Array) -> Any:
    del key
    logits = logits_fn(params, batch["input"])
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, batch["label"]
    )

  return loss


def curve(
  training: _training.Training = _training.CURVE,
  *,
  t: str | float = 0.5,
  hold_out: float = 0.2,
  align: str | None = None,
  **options: Any,
) -> Merge:
  """Mode Path Fusion of the current network and the expert, on the buffer.

  Args:
    training: of the curve.
    t: where on the curve the merged network is taken: a number, "1/t" for the
      expert's share among the tasks so far, or "best" for that of the smallest
      loss on stored examples that the curve is not fitted on.
    hold_out: their share of the buffer, for "best".
    align: as in `running`.
    **options: options of `jaxmerge.curves.fit_curve`: init, num_points,
      t_sampling, concentration, ...

  Returns:
    The merge.

  Raises:
    ValueError: an option is out of its range.

  References:
    Model Merging for Continual Learning (Mode Path Fusion), ETH Zurich.

  >>> curve().needs_replay
  True
  """
  _check_t(t)
  _training.check(training, "curve")
  _check_align(align)
  if not 0 < hold_out < 1:
    raise ValueError(f"hold_out must lie in (0, 1), got {hold_out}.")

  def update(
    problem: _problem.Problem, state: State, step: Step
  ) -> tuple[PyTree, State]:
    if step.task == 0:
      return step.expert, state
    expert = _aligned(problem, step, align, {})
    rows = step.buffer
    held = rows[:, :0]
    if t == "best":
      # Every so-manieth, so that each task has its part in both.
      every = max(2, round(1 / hold_out))
      chosen = np.arange(rows.shape[1]) % every == 0
      held, rows = rows[:, chosen], rows[:, ~chosen]
    place = 1 / (step.task + 1) if t == "1/t" else 0.5 if t == "best" else t
    run = _training.plan(training, rows)
    merged, info = curves.mode_path_fusion(
      buffer_loss(problem.logits_fn),
      step.current,
      expert,
      problem.train,
      key=problem.keys_for("curve", step.task),
      t=float(place),
      seed_axis=True,
      optimizer=run.optimizer,
      epochs=run.epochs,
      batch_size=run.batch_size,
      indices=run.rows,
      transform=problem.transform if training.augment else None,
      grid=2,
      grid_examples=1,
      **options,
    )
    if t == "best":
      merged = _best_on(problem, info.curve, held)
    return merged, state

  parts = [f"t={t}", *([align] if align else [])]
  parts += [f"{name}={value}" for name, value in sorted(options.items())]
  return Merge(
    f"curve({', '.join(parts)})", _merge.no_state, update, True, True
  )


def _best_on(problem: _problem.Problem, path: Any, held: np.ndarray) -> PyTree:
  """Each seed's network of the smallest loss on its own held-out rows."""
  grid = np.linspace(0, 1, 21)
  chosen = []
  for i in range(problem.num_seeds):
    # Control points come first, seeds second.
    one = jax.tree.map(lambda leaf, i=i: leaf[:, i : i + 1], path)
    _, losses = curves.profile(
      _loss_metric(problem.logits_fn),
      one,
      problem.train,
      len(grid),
      seed_axis=True,
      indices=held[i],
    )
    best = grid[int(np.argmin(losses[0]))]
    chosen.append(jax.tree.map(lambda leaf: leaf[0], one(float(best))))
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *chosen)


@functools.lru_cache(maxsize=16)
def _loss_metric(
  logits_fn: _problem.LogitsFn,
) -> Callable[[PyTree, PyTree], jax.Array]:
  loss = buffer_loss(logits_fn)

  def metric(params: PyTree, batch: PyTree) -> jax.Array:
    return loss(params, batch, jax.random.key(0))

  return metric


def simplex(
  training: _training.Training = _training.CURVE,
  *,
  concentration: float = 1.0,
) -> Merge:
  """The barycentre of a Bezier simplex between all networks, on the buffer.

  Args:
    training: of the simplex.
    concentration: of the Dirichlet distribution.

  Returns:
    The merge; it holds all networks.

  Raises:
    ValueError: an option is out of its range.

  References:
    Benton et al., `Loss surface simplexes
    <https://arxiv.org/abs/2102.13042>`_, 2021

  >>> simplex().name
  'simplex(concentration=1.0)'
  """
  _training.check(training, "simplex")
  if concentration <= 0:
    raise ValueError(f"concentration must be positive, got {concentration}.")

  def init(problem: _problem.Problem) -> State:
    return {"experts": _merge.no_experts(problem)}

  def update(
    problem: _problem.Problem, state: State, step: Step
  ) -> tuple[PyTree, State]:
    held, models = _merge.with_expert(state["experts"], step)
    state = {"experts": held}
    if step.task == 0:
      return step.expert, state
    run = _training.plan(training, step.buffer)
    merged, _ = curves.fit_simplex(
      buffer_loss(problem.logits_fn),
      models,
      problem.train,
      key=problem.keys_for("simplex", step.task),
      concentration=concentration,
      seed_axis=True,
      optimizer=run.optimizer,
      epochs=run.epochs,
      batch_size=run.batch_size,
      indices=run.rows,
      grid_examples=1,
      transform=problem.transform if training.augment else None,
    )
    return merged, state

  name = f"simplex(concentration={concentration})"
  return Merge(name, init, update, True, True)
