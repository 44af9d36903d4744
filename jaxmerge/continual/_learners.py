"""Learners: how the network of one task is trained."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import models, training
from jaxmerge.continual import (
  _gradient,
  _objective,
  _path,
  _problem,
  _projection,
  _rehearsal,
  _run,
  _signs,
  _training,
  regularizers,
)
from jaxmerge.continual import replay as replay_lib

PyTree = Any
Data = dict[str, Any]

STARTS = ("initial", "last", "merged")
ROWS = ("task", "seen", "stream", "buffer")
HEADS = ("all", "seen", "task")

# Examples of a task that its loss and gradient at the start are reported of.
_START_SAMPLES = 200


class Learner(NamedTuple):
  """How the network of a task is trained.

  Attributes:
    training: the settings of the training run.
    start: where it starts: "initial" for the initial parameters, "last" for
      the network of the task before, "merged" for what the strategy has made
      of the tasks before.
    rows: what it is trained on: "task", "seen" for the data of all tasks so
      far, "stream" for those of all tasks (at the last one, before which there
      is no network), or "buffer".
    head: classes that the loss of the task's examples is over: "all", those
      "seen" so far, or those of the "task" alone.
    rehearsal: the part of stored examples, or None.
    regularizer: the regulariser, or None.
    adapter: low-rank adapters that are trained instead of the network.
    path: the snapshots to keep of the way, for a merge that needs them.
    projection: a training before this one, from the same start, whose steps
      spare the tasks before; this one goes on from where it ends.
    signs: how the parameters are held at the signs of the start.
  """

  training: _training.Training = _training.Training()
  start: str = "last"
  rows: str = "task"
  head: str = "all"
  rehearsal: _rehearsal.Rehearsal | None = None
  regularizer: regularizers.Regularizer | None = None
  adapter: models.Lora | None = None
  path: _path.Path | None = None
  projection: _projection.Projection | None = None
  signs: _signs.Signs | None = None


class LearnerState(NamedTuple):
  """What a learner holds between tasks.

  Attributes:
    last: the network of the last task, None where it is not needed.
    regularizer: the regulariser's state.
    projection: that of the projection.
  """

  last: PyTree
  regularizer: PyTree
  projection: PyTree = None


class Learned(NamedTuple):
  """What the training of a task has made.

  Attributes:
    params: the network; adapters, where these are trained.
    state: the learner's new state.
    buffer: the buffer that was filled while training, or None.
    anchor: where the last part of the training started: the start of the task,
      or where the projected training has ended.
    path: snapshots along the way, leaves `[seeds, snapshots, ...]`, or None.
  """

  params: PyTree
  state: LearnerState
  buffer: replay_lib.ReplayState | None
  anchor: PyTree
  path: PyTree


def check(learner: Learner, problem: _problem.Problem) -> None:
  """Raises ValueError for what the learner cannot do on this problem."""
  _training.check(learner.training, "training")
  for field, known in (("start", STARTS), ("rows", ROWS), ("head", HEADS)):
    if getattr(learner, field) not in known:
      raise ValueError(
        f"Unknown {field} {getattr(learner, field)!r}. Choose one of "
        f"{', '.join(known)}."
      )
  if learner.path is not None:
    _path.check(learner.path)
    _check_steps(learner, learner.path, problem)
  if learner.projection is not None:
    _projection.check(learner.projection)
    if not learner.projection.release:
      _check_projected(learner)
  if learner.signs is not None:
    _signs.check(learner.signs)
  if learner.adapter is not None:
    _check_adapter(learner, problem)
  if learner.rehearsal is not None:
    _rehearsal.check(learner.rehearsal, problem)


def _check_steps(
  learner: Learner, path: _path.Path, problem: _problem.Problem
) -> None:
  """Raises ValueError for a task with fewer steps than snapshots."""
  sizes = [len(task.train) for task in problem.stream.tasks]
  least = {"task": min(sizes), "seen": sizes[0], "stream": sum(sizes)}
  if learner.rows in least:  # What a buffer holds is not known before.
    rows = np.zeros((1, least[learner.rows]), np.int32)
    plan = _training.plan(learner.training, rows)
    _path.check_steps(path, plan.epochs * -(-rows.shape[1] // plan.batch_size))


def _check_projected(learner: Learner) -> None:
  """Raises ValueError for parts that a projected training has not."""
  for name in ("rehearsal", "regularizer", "signs", "path", "adapter"):
    if getattr(learner, name) is not None:
      raise ValueError(
        f"A projected training is over the task's labels alone, but the learner"
        f" has {name}. Set release=True, so that the learner's own training"
        " follows, or leave it out."
      )


def _check_adapter(learner: Learner, problem: _problem.Problem) -> None:
  """Raises ValueError for what adapters cannot be trained with."""
  parts = {
    "rehearsal": learner.rehearsal,
    "a projection": learner.projection,
    "a regulariser": learner.regularizer,
  }
  for name, part in parts.items():
    if part is not None:
      raise ValueError(
        f"Adapters are trained without {name}: leave the adapter out, or the"
        " other."
      )
  jax.eval_shape(lambda: initial(learner, problem))


def initial(learner: Learner, problem: _problem.Problem) -> PyTree:
  """What is trained, before the first task: the network, or new adapters."""
  lora = learner.adapter
  if lora is None:
    return problem.params
  return jax.vmap(functools.partial(models.lora_init, lora))(
    problem.keys_for("adapter"), problem.params
  )


@functools.lru_cache(maxsize=16)
def _apply(lora: models.Lora) -> Callable[[PyTree, PyTree], PyTree]:
  return jax.jit(jax.vmap(functools.partial(models.lora_apply, lora)))


def network(
  learner: Learner, problem: _problem.Problem, params: PyTree
) -> PyTree:
  """The network of what is trained."""
  if learner.adapter is None:
    return params
  return _apply(learner.adapter)(problem.params, params)


def describe(learner: Learner) -> str:
  """A name that is the same for equal learners, in any process."""
  regularizer = learner.regularizer
  # Functions have no names that last; its own name tells regularisers apart.
  plain = learner._replace(regularizer=None)
  return f"{plain!r} {regularizer.name if regularizer else None}"


def needs_replay(learner: Learner) -> bool:
  """Whether the learner uses stored examples."""
  return learner.rehearsal is not None or learner.rows == "buffer"


def init(learner: Learner, problem: _problem.Problem) -> LearnerState:
  """The state before the first task."""
  regularizer = learner.regularizer
  projection = learner.projection
  return LearnerState(
    last=initial(learner, problem) if learner.start == "last" else None,
    regularizer=None if regularizer is None else regularizer.init(problem),
    projection=None if projection is None else _projection.init(problem),
  )


def _labels(
  problem: _problem.Problem, learner: Learner, task: int
) -> dict[str, Any]:
  own = problem.stream.scenario == "task-incremental"
  head = "task" if own else learner.head
  return {
    "masks": _problem.seed_axis(
      problem, _problem.head_masks(problem, head, task)
    ),
    "weight": _problem.seed_axis(problem, np.float32(1)),
  }


def report_start(
  learner: Learner, problem: _problem.Problem, start: PyTree, task: int
) -> None:
  """Reports the loss and its gradient where a task's training starts.

  Over the classes of the task, whatever those of the learner's loss, so that
  learners can be compared.
  """
  if problem.report is None:
    return
  params = network(learner, problem, start)
  loss, gradient = _gradient.mean_gradient(
    problem, params, task, "task", _START_SAMPLES
  )
  problem.report(
    "start",
    task,
    {
      "loss": np.asarray(loss),
      "gradient_norm": np.asarray(_gradient.norms(gradient)),
    },
  )


def _projected(
  learner: Learner,
  problem: _problem.Problem,
  state: LearnerState,
  task: int,
  start: PyTree,
  rows: np.ndarray,
  labels: Data,
) -> training.TrainResult:
  """The training whose steps spare the tasks before."""
  projection = learner.projection
  assert projection is not None
  return _run.run(
    problem,
    projection.training or learner.training,
    _objective.Terms(),
    start,
    rows,
    {
      "labels": labels,
      "projection": _projection.data(projection, state.projection, task),
    },
    problem.keys_for("projection", task),
    last=_run.Projected(),
  )


def _loss(
  learner: Learner,
  problem: _problem.Problem,
  state: LearnerState,
  task: int,
  start: PyTree,
  buffer: np.ndarray,
  online: replay_lib.ReplayState | None,
) -> tuple[_objective.Terms, Data, Data]:
  """The terms of a task's loss, their data, and the state of the run."""
  names = ["labels"]
  run_state: Data = {}
  frozen: Data = {"labels": _labels(problem, learner, task)}
  rehearsal, regularizer = learner.rehearsal, learner.regularizer
  if rehearsal is not None:
    more, data = _rehearsal.terms(rehearsal, problem, task, buffer)
    names += more
    frozen |= {name: frozen.get(name, {}) | data[name] for name in data}
    if online is not None:
      run_state["buffer"] = online
  if regularizer is not None:
    for name, data in regularizer.terms(
      problem, state.regularizer, start, task
    ).items():
      frozen[name] = frozen.get(name, {}) | data
      names += [] if name == "labels" else [name]
    if regularizer.follows:
      names.append("path")
      run_state["path"] = _objective.start_path(start)
  if learner.adapter is not None:
    frozen["base"] = problem.params
  if learner.signs is not None:
    origin = problem.params
    if learner.adapter is not None:
      origin = jax.tree.map(jnp.zeros_like, start)
    frozen["signs"] = _signs.data(problem, learner.signs, start, origin, task)
  transform = (
    problem.transform if rehearsal is not None and rehearsal.augment else None
  )
  terms = _objective.Terms(
    tuple(names),
    0 if rehearsal is None else rehearsal.batch_size,
    problem.replay if online is not None else None,
    transform,
    learner.adapter,
  )
  return terms, frozen, run_state


def learn(
  learner: Learner,
  problem: _problem.Problem,
  state: LearnerState,
  task: int,
  start: PyTree,
  buffer: np.ndarray,
  online: replay_lib.ReplayState | None = None,
) -> Learned:
  """Trains the network of a task.

  Args:
    learner: the learner.
    problem: the problem.
    state: the learner's state.
    task: number of the task.
    start: the network that it starts from; adapters, where these are trained.
    buffer: int32 `[seeds, n]`, rows of the stored examples.
    online: the buffer that is filled while training, or None.

  Returns:
    What the training has made.
  """
  rows = {
    "task": lambda: problem.rows_of([task]),
    "seen": lambda: problem.rows_of(range(task + 1)),
    "stream": lambda: problem.rows_of(range(problem.num_tasks)),
    "buffer": lambda: buffer,
  }[learner.rows]()
  terms, frozen, run_state = _loss(
    learner, problem, state, task, start, buffer, online
  )
  anchor, released = start, True
  traces = []
  # The first task has nothing to spare.
  if learner.projection is not None and (
    task or not learner.projection.release
  ):
    labels = frozen["labels"]
    result = _projected(learner, problem, state, task, start, rows, labels)
    anchor, released = result.params, learner.projection.release
    traces.append(result.trace)
  last = None
  if learner.signs is not None or learner.path is not None:
    last = _run.Last(learner.signs, learner.path)
  if released:
    result = _run.run(
      problem,
      learner.training,
      terms,
      anchor,
      rows,
      frozen,
      problem.keys_for("learner", task),
      run_state or None,
      last,
    )
    traces.append(result.trace)
  if problem.report is not None:
    trace = {
      name: np.concatenate([one[name] for one in traces], axis=1)
      for name in traces[0]
    }
    problem.report("training", task, trace)
  after = result.state or {}
  regularizer = learner.regularizer
  if regularizer is not None:
    state = state._replace(
      regularizer=regularizer.after_task(
        problem, state.regularizer, result.params, task, after.get("path")
      )
    )
  if learner.start == "last":
    state = state._replace(last=result.params)
  path = None
  if learner.path is not None:
    path = _path.taken(learner.path, result.opt_state[-1])
  return Learned(result.params, state, after.get("buffer"), anchor, path)


def after_merge(
  learner: Learner,
  problem: _problem.Problem,
  state: LearnerState,
  params: PyTree,
  task: int,
) -> LearnerState:
  """The state once the strategy has made its network of the tasks so far."""
  if learner.projection is None:
    return state
  return state._replace(
    projection=_projection.after_task(
      problem, learner.projection, state.projection, params, task
    )
  )
