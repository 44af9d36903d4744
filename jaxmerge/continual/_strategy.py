"""Strategies: a learner, a merge, and a fine-tuning, one task after another."""

from __future__ import annotations

import dataclasses
import functools
import time
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import merging
from jaxmerge.continual import (
  _learners,
  _objective,
  _problem,
  _rehearsal,
  _run,
  _training,
  merges,
)
from jaxmerge.continual import replay as replay_lib

PyTree = Any


class Finetune(NamedTuple):
  """Fine-tuning of the merged network on the buffer, after each merge.

  Attributes:
    training: the settings of the training run.
    distill: weight of the distillation from the soft targets of `teacher`,
      beside the cross-entropy of weight 1.
    temperature: of the distillation.
    teacher: "expert" for the network of the task, "merged" for the network
      before fine-tuning, or "both" for the mean of their logits.
    soup: number of fine-tunings, each with random numbers of its own, of whose
      networks the mean is taken (Wortsman et al., 2022).
  """

  training: _training.Training = _training.Training(0.01)
  distill: float = 0.0
  temperature: float = 2.0
  teacher: str = "merged"
  soup: int = 1


class StrategyState(NamedTuple):
  """What a strategy holds between tasks; leaves with an axis of seeds.

  Attributes:
    current: the network to evaluate.
    learner: the learner's state.
    merge: the merge's state.
    buffer: the replay buffer, or None.
    experts: the networks of all tasks, `[seeds, tasks, ...]`, or None.
  """

  current: PyTree
  learner: _learners.LearnerState
  merge: PyTree
  buffer: replay_lib.ReplayState | None
  experts: PyTree


class Strategy(NamedTuple):
  """A strategy: pure functions over a state.

      state = strategy.init(problem)
      for task in range(problem.num_tasks):
        state = strategy.observe(problem, state, task)
        a[task] = accuracies(problem, strategy.params(problem, state))

  Attributes:
    name: its name.
    init: `init(problem) -> state`, before the first task; checks that the
      strategy can do this problem.
    observe: `observe(problem, state, task) -> state`.
    params: `params(problem, state, task=None) -> parameters` to evaluate, for
      the examples of a task where it is given.
    measured: `measured(problem, task)`, whether there is a network to evaluate
      after this task.
    memory: `memory(problem, state, tasks) -> {"networks": ..., "examples":
      ...}`, bytes that one seed holds after so many tasks.
    needs_replay: whether it needs stored examples.
    by_task: whether `params` differs from task to task.
  """

  name: str
  init: Callable[[_problem.Problem], StrategyState]
  observe: Callable[[_problem.Problem, StrategyState, int], StrategyState]
  params: Callable[..., PyTree]
  measured: Callable[[_problem.Problem, int], bool]
  memory: Callable[[_problem.Problem, StrategyState, int], dict[str, int]]
  needs_replay: bool
  by_task: bool


def _stored_rows(
  problem: _problem.Problem, state: replay_lib.ReplayState | None
) -> np.ndarray:
  """Rows that the buffer holds, `[seeds, n]`; the same n for every seed."""
  if state is None:
    return np.zeros((problem.num_seeds, 0), np.int32)
  rows = [
    replay_lib.contents(jax.tree.map(lambda leaf, i=i: leaf[i], state))[0]
    for i in range(problem.num_seeds)
  ]
  return np.stack(rows)


@functools.lru_cache(maxsize=16)
def _add(
  replay: replay_lib.Replay,
) -> Callable[..., replay_lib.ReplayState]:
  def add(
    state: replay_lib.ReplayState,
    rows: jax.Array,
    labels: jax.Array,
    task: jax.Array,
    key: jax.Array,
    features: jax.Array | None,
  ) -> replay_lib.ReplayState:
    return replay.add(state, rows, labels, task, key, features=features)

  return jax.jit(jax.vmap(add, in_axes=(0, None, None, None, 0, 0)))


@functools.lru_cache(maxsize=16)
def _features(logits_fn: _problem.LogitsFn) -> Callable[..., jax.Array]:
  return jax.jit(jax.vmap(logits_fn, in_axes=(0, None)))


def _store(
  problem: _problem.Problem,
  state: replay_lib.ReplayState,
  task: int,
  params: PyTree,
) -> replay_lib.ReplayState:
  """Offers a task's examples to the buffer."""
  replay = problem.replay
  assert replay is not None
  rows = problem.stream.tasks[task].train
  # In a random order, the same in every run: a ring keeps the last ones.
  rows = np.random.Generator(np.random.PCG64(task)).permutation(rows)
  examples = problem.examples(rows)
  features = None
  if state.rank is not None:
    features = _features(problem.logits_fn)(params, examples["input"])
  return _add(replay)(
    state,
    rows,
    examples["label"],
    jnp.int32(task),
    problem.keys_for("buffer"),
    features,
  )


def _finetuned(
  problem: _problem.Problem,
  finetune: Finetune,
  merged: PyTree,
  expert: PyTree,
  task: int,
  rows: np.ndarray,
) -> PyTree:
  fill = functools.partial(_problem.seed_axis, problem)
  own = problem.stream.scenario == "task-incremental"
  masks = fill(_problem.head_masks(problem, "task" if own else "seen", task))
  frozen: dict[str, Any] = {
    "labels": {"masks": masks, "weight": fill(np.float32(1))}
  }
  names = ["labels"]
  if finetune.distill:
    teacher = {
      "expert": expert,
      "merged": merged,
      "both": (merged, expert),
    }[finetune.teacher]
    frozen["distill"] = {
      "teacher": teacher,
      "masks": masks,
      "weight": fill(np.float32(finetune.distill)),
      "temperature": fill(np.float32(finetune.temperature)),
    }
    names.append("distill")
  tuned = [
    _run.run(
      problem,
      finetune.training,
      _objective.Terms(tuple(names)),
      merged,
      rows,
      frozen,
      problem.keys_for("finetune", task, number),
    ).params
    for number in range(finetune.soup)
  ]
  return tuned[0] if len(tuned) == 1 else merging.average(tuned)


def _check_finetune(finetune: Finetune) -> None:
  _training.check(finetune.training, "finetune")
  if finetune.teacher not in ("expert", "merged", "both"):
    raise ValueError(
      f"Unknown teacher {finetune.teacher!r}. Choose expert, merged or both."
    )
  if finetune.distill < 0 or finetune.temperature <= 0:
    raise ValueError(
      "distill must not be negative and temperature must be positive, got "
      f"{finetune.distill} and {finetune.temperature}."
    )
  if finetune.soup < 1:
    raise ValueError(f"soup must be at least 1, got {finetune.soup}.")


class _Clock:
  """Reports the seconds of the parts of a task, where anyone wants to know."""

  def __init__(self, problem: _problem.Problem, task: int) -> None:
    self._report, self._task = problem.report, task
    self._begin = time.perf_counter()

  def stop(self, part: str, made: PyTree) -> None:
    """Reports how long a part took, which ends when this has been made."""
    if self._report is None:
      return
    jax.block_until_ready(made)
    now = time.perf_counter()
    seconds, self._begin = now - self._begin, now
    self._report("seconds", self._task, {part: seconds})


def nbytes(tree: PyTree) -> int:
  """Bytes of the leaves of a tree."""
  return sum(int(leaf.nbytes) for leaf in jax.tree.leaves(tree))


def compose(
  name: str,
  learner: _learners.Learner,
  *,
  merge: merges.Merge | None = None,
  finetune: Finetune | None = None,
  keep_experts: bool = False,
) -> Strategy:
  """Makes a strategy of its parts.

  After each task: the learner trains the task's network; its examples are
  offered to the buffer; the merge makes one network of it and of what was
  before; the fine-tuning goes on from there on the buffer.

  Args:
    name: the strategy's name.
    learner: trains the network of a task.
    merge: None for the task's network itself.
    finetune: None for no fine-tuning.
    keep_experts: keep the networks of all tasks, and evaluate each on its own.

  Returns:
    The strategy.

  Raises:
    ValueError: an option is out of its range.
  """
  if finetune is not None:
    _check_finetune(finetune)
  if learner.adapter is not None and (
    finetune is not None or (merge is not None and merge.runs_network)
  ):
    raise ValueError(
      f"The strategy {name} trains adapters, which are merged as they are: a"
      " fine-tuning, or a merge that runs the network, is not there for them."
      " Leave the adapter out, or choose another merge."
    )
  if merge is not None and merge.needs_start and learner.start != "merged":
    raise ValueError(
      f"The merge {merge.name} merges a task's training with where it started:"
      " give the learner start='merged'."
    )
  if merge is not None and merge.needs_path and learner.path is None:
    raise ValueError(
      f"The merge {merge.name} needs snapshots of the training: give the"
      " learner path=Path(...)."
    )
  rehearsal = learner.rehearsal
  online = rehearsal is not None and rehearsal.online
  needs_replay = (
    _learners.needs_replay(learner)
    or finetune is not None
    or (merge is not None and merge.needs_replay)
  )
  # What such a learner makes does not depend on the merge: shared by all. But
  # what goes with its network is not kept.
  shared = (
    learner.start != "merged"
    and not _learners.needs_replay(learner)
    and learner.path is None
    and learner.projection is None
  )
  label = f"{zlib.crc32(_learners.describe(learner).encode()):08x}"

  def _inner(problem: _problem.Problem) -> _problem.Problem:
    """The problem of what is trained: of the adapters, where these are."""
    if learner.adapter is None:
      return problem
    params = _learners.initial(learner, problem)
    return dataclasses.replace(problem, params=params)

  def init(problem: _problem.Problem) -> StrategyState:
    _learners.check(learner, problem)
    if problem.augment_on_host and merge is not None and merge.needs_replay:
      raise ValueError(
        f"The strategy {name} fits a curve on stored examples, which must lie "
        "on the devices: make the problem without augment_on_host."
      )
    if needs_replay and problem.replay is None:
      raise ValueError(
        f"The strategy {name} needs stored examples, but the problem has no "
        "replay buffer. Give make_problem(replay=...), or choose a strategy "
        "that needs no data."
      )
    buffer = None
    if online:
      buffer = _rehearsal.init_online(learner.rehearsal, problem)
    elif needs_replay and problem.replay is not None:
      buffer = jax.tree.map(
        functools.partial(_problem.seed_axis, problem),
        problem.replay.init(jax.ShapeDtypeStruct((), jnp.int32)),
      )
    inner = _inner(problem)
    experts = None
    if keep_experts:
      experts = jax.tree.map(
        lambda leaf: jnp.zeros(
          (len(leaf), problem.num_tasks, *leaf.shape[1:]), leaf.dtype
        ),
        inner.params,
      )
    return StrategyState(
      current=inner.params,
      learner=_learners.init(learner, problem),
      merge=None if merge is None else merge.init(inner),
      buffer=buffer,
      experts=experts,
    )

  def measured(problem: _problem.Problem, task: int) -> bool:
    return learner.rows != "stream" or task == problem.num_tasks - 1

  def start_of(problem: _problem.Problem, state: StrategyState) -> PyTree:
    return {
      "initial": lambda: _learners.initial(learner, problem),
      "last": lambda: state.learner.last,
      "merged": lambda: state.current,
    }[learner.start]()

  def learned(
    problem: _problem.Problem, state: StrategyState, task: int
  ) -> _learners.Learned:
    rows = (
      np.zeros((problem.num_seeds, 0), np.int32)
      if online
      else _stored_rows(problem, state.buffer)
    )
    return _learners.learn(
      learner,
      problem,
      state.learner,
      task,
      start_of(problem, state),
      rows,
      state.buffer if online else None,
    )

  def observe(
    problem: _problem.Problem, state: StrategyState, task: int
  ) -> StrategyState:
    if not measured(problem, task):
      return state
    # A checkpoint gives arrays of NumPy.
    state = jax.tree.map(jnp.asarray, state)
    buffer = state.buffer
    if learner.rows == "buffer" and buffer is not None:
      buffer = _store(problem, buffer, task, state.current)
      state = state._replace(buffer=buffer)
    _learners.report_start(learner, problem, start_of(problem, state), task)
    clock = _Clock(problem, task)
    anchor, path = start_of(problem, state), None
    if shared:
      expert, held = problem.once(
        f"experts/{label}/task-{task}",
        lambda: learned(problem, state, task)[:2],
        lambda: (
          _learners.initial(learner, problem),
          _learners.init(learner, problem),
        ),
      )
    else:
      expert, held, filled, anchor, path = learned(problem, state, task)
      buffer = filled if online else buffer
    if buffer is not None and not online and learner.rows != "buffer":
      buffer = _store(problem, buffer, task, expert)
    clock.stop("training", expert)
    merged, merge_state = expert, state.merge
    rows = np.zeros((problem.num_seeds, 0), np.int32)
    if not online:
      rows = _stored_rows(problem, buffer)
    if merge is not None:
      merged, merge_state = merge.update(
        _inner(problem),
        state.merge,
        merges.Step(state.current, expert, task, rows, anchor, path),
      )
    # One task's network needs no fine-tuning.
    if finetune is not None and task:
      merged = _finetuned(problem, finetune, merged, expert, task, rows)
    held = _learners.after_merge(learner, problem, held, merged, task)
    clock.stop("merging", (merged, held))
    experts = state.experts
    if experts is not None:
      experts = jax.tree.map(
        lambda held, one: held.at[:, task].set(one), experts, expert
      )
    return StrategyState(merged, held, merge_state, buffer, experts)

  def params(
    problem: _problem.Problem, state: StrategyState, task: int | None = None
  ) -> PyTree:
    found = state.current
    if state.experts is not None and task is not None:
      found = jax.tree.map(lambda leaf: leaf[:, task], state.experts)
    return _learners.network(learner, problem, found)

  def memory(
    problem: _problem.Problem, state: StrategyState, tasks: int
  ) -> dict[str, int]:
    seeds = problem.num_seeds
    networks = nbytes((state.current, state.learner)) // seeds
    if (
      learner.adapter is not None
      or learner.signs is not None
      or (merge is not None and merge.needs_initial)
    ):
      # What adapters are added to, what signs and task vectors are relative to.
      networks += nbytes(problem.params) // seeds
    if learner.start == "last" and merge is None and finetune is None:
      networks -= nbytes(state.current) // seeds  # One and the same.
    # Slots of networks that have not come yet are not held.
    held = nbytes(state.experts)
    if isinstance(state.merge, dict) and "experts" in state.merge:
      held += nbytes(state.merge)
    else:
      networks += nbytes(state.merge) // seeds
    networks += held // seeds * tasks // problem.num_tasks
    examples = 0
    if state.buffer is not None:
      one = jax.tree.map(lambda leaf: leaf[0], state.buffer)
      if online:
        examples = replay_lib.size_in_bytes(one)
      else:
        size = nbytes(problem.examples(np.zeros(1, np.int32)))
        examples = int(replay_lib.filled(one)) * size
    return {"networks": networks, "examples": examples}

  if online and (finetune is not None or (merge and merge.needs_replay)):
    raise ValueError(
      "A buffer that is filled while training holds examples, not rows: merges "
      "and fine-tuning on it are not there. Set online=False."
    )
  return Strategy(
    name,
    init,
    observe,
    params,
    measured,
    memory,
    needs_replay,
    keep_experts,
  )
