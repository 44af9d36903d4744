"""Trajectory regularised merging as a merge of a stream."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import training
from jaxmerge import tree as tree_lib
from jaxmerge.continual import (
  _examples,
  _gradient,
  _merge,
  _problem,
  _subspace,
  _training,
  _trm,
)

PyTree = Any

#: Settings of the optimisation of the coefficients.
COEFFICIENTS = _training.Training(
  0.05, optimizer="adam", iterations=20, batch_size=32, augment=False
)


def _check(**values: float) -> None:
  for name, value in values.items():
    if not 0 <= value < float("inf"):
      raise ValueError(f"{name} must not be negative, and finite; got {value}.")


def trm(
  coefficients: _training.Training = COEFFICIENTS,
  *,
  weight: str | float = 0.5,
  granularity: str = "global",
  augment_subspace: bool = True,
  alignment: float = 1.0,
  consistency: float = 1.0,
  responsiveness: float = 0.1,
  target: float = 2.0,
  temperature: float = 2.0,
  head: str = "seen",
  samples: int | None = 200,
  derivative: str = "finite_difference",
  tolerance: float = 0.02,
) -> _merge.Merge:
  """Trajectory regularised merging of the current network and the expert.

  The merged network lies in the subspace of the task's training, through the
  network before the task, theta_m:

      theta(a) = theta_m + sum_j a_j d_j

  with d the task vector theta_t - theta_m, the negative gradient of the task's
  loss at the plain merge theta_m + w (theta_t - theta_m), as long as the way
  from the last snapshot to the end, and the snapshots less theta_m. Of each,
  what the ones before leave is taken, so that they are orthogonal, and in units
  of that the coefficients are. They start at the plain merge, and minimise on
  the task's examples

      alignment * cross-entropy
      + consistency * KL(old predictions || predictions), of the old classes
      + responsiveness * max(0, g - |gradient of the cross-entropy|)

  with g = `target` times that norm at the plain merge, on `samples` examples; a
  batch of the optimisation has a somewhat larger norm, by its noise. No earlier
  data and no earlier network but theta_m are held, nothing else between tasks.
  To `Problem.report` go the objectives at every step, the coefficients, the
  directions that degenerate, and the cosines of the merge and the snapshots.

  This is jaxmerge's own construction from the abstract of the paper, whose
  equations are not public.

  Args:
    coefficients: settings of the optimisation of the coefficients.
    weight: w of the plain merge, a number or "1/t".
    granularity: whether the coefficients are "global", or there are some for
      each "layer" (leaves whose names agree up to the first part with a
      number), or each "leaf".
    augment_subspace: whether the negative gradient is among the directions.
    alignment: weight of the cross-entropy.
    consistency: weight of the divergence.
    responsiveness: weight of the hinge.
    target: see above.
    temperature: T of the divergence.
    head: classes that the cross-entropy is over: "all", those "seen" so far, or
      those of the "task".
    samples: number of the task's examples that the gradient at the plain merge
      is taken of; None for all.
    derivative: of the hinge, "finite_difference" or "forward_over_reverse";
      parameters of half types need the second.
    tolerance: directions of which the ones before leave less than this part are
      dropped.

  Returns:
    The merge; it needs a learner with a path, whose tasks start at the merged
    network.

  Raises:
    ValueError: an option is out of its range; while merging, a task's training
      that has moved nothing.

  >>> trm().needs_path
  True
  """
  _merge.check_weight(weight)
  _training.check(coefficients, "coefficients")
  _check(
    alignment=alignment,
    consistency=consistency,
    responsiveness=responsiveness,
    target=target,
  )
  if not temperature > 0:
    raise ValueError(f"temperature must be positive, got {temperature}.")
  if not 0 < tolerance < 1:
    raise ValueError(f"tolerance must lie in (0, 1), got {tolerance}.")
  if head not in ("all", "seen", "task"):
    raise ValueError(f"Unknown head {head!r}. Choose all, seen or task.")
  if derivative not in _trm.DERIVATIVES:
    raise ValueError(
      f"Unknown derivative {derivative!r}. Choose one of "
      f"{', '.join(_trm.DERIVATIVES)}."
    )
  if granularity not in _subspace.GRANULARITIES:
    raise ValueError(
      f"Unknown granularity {granularity!r}. Choose one of "
      f"{', '.join(_subspace.GRANULARITIES)}."
    )
  if samples is not None and samples < 1:
    raise ValueError(f"samples must be at least 1, got {samples}.")
  weights = {
    "alignment": alignment,
    "consistency": consistency,
    "responsiveness": responsiveness,
  }
  terms = tuple(name for name, value in weights.items() if value)

  def init(problem: _problem.Problem) -> _merge.State:
    _check_dtypes(problem.params, derivative, responsiveness)
    return {}

  def update(
    problem: _problem.Problem, state: _merge.State, step: _merge.Step
  ) -> tuple[PyTree, _merge.State]:
    if step.task == 0:
      return step.expert, state
    fill = functools.partial(_problem.seed_axis, problem)
    share = _merge.share(weight, step.task)
    plain = tree_lib.lerp(step.current, step.expert, share)
    loss, gradient = _gradient.mean_gradient(
      problem, plain, step.task, head, samples
    )
    norm = _gradient.norms(gradient)
    labels = _subspace.group_names(step.current, granularity)
    groups = _subspace.group_numbers(labels)
    vectors = _trm.directions(
      step.current,
      step.expert,
      step.path,
      gradient if augment_subspace else None,
    )
    space = _subspace.span(groups, step.current, vectors, tolerance)
    length = _subspace.lengths(space)[:, 0]
    _check_moved(length, step.task)
    start = jnp.zeros(space.weights.shape[:-1], jnp.float32)
    start = start.at[..., 0].set(share)
    old = np.zeros_like(_problem.head_masks(problem, "all", step.task))
    old[:] = _problem.head_masks(problem, "seen", step.task - 1)
    own = problem.stream.scenario == "task-incremental"
    frozen = {
      "space": space,
      "masks": fill(
        _problem.head_masks(problem, "task" if own else head, step.task)
      ),
      "old": fill(old),
      "weights": {
        name: fill(np.float32(value)) for name, value in weights.items()
      },
      "temperature": fill(np.float32(temperature)),
      "threshold": jnp.float32(target) * norm,
      "reach": jnp.asarray(_trm.REACH * length, jnp.float32),
    }
    rows = problem.rows_of([step.task])
    plan = _training.plan(coefficients, rows)
    keys = problem.keys_for("trm", step.task)
    data, indices = _examples.of_run(
      problem, plan.rows, keys, coefficients.augment
    )
    result = training.train(
      _trm.loss_fn(problem.logits_fn, groups, terms, derivative),
      start,
      data,
      optimizer=plan.optimizer,
      epochs=plan.epochs,
      batch_size=plan.batch_size,
      keys=keys,
      frozen=frozen,
      indices=indices,
      transform=problem.transform if coefficients.augment else None,
      devices=problem.train.devices,
    )
    merged = _moved(groups)(space, result.params)
    if problem.report is not None:
      count = len(jax.tree.leaves(step.path)[0][0])
      names = _trm.direction_names(count, augment_subspace)
      # The snapshots are the last directions, the first one at the end.
      cosines = _subspace.cosines(space, np.asarray(result.params))
      problem.report(
        "trm",
        step.task,
        {
          **{f"step/{name}": value for name, value in result.trace.items()},
          "plain_loss": np.asarray(loss),
          "plain_gradient_norm": np.asarray(norm),
          "coefficients": np.asarray(result.params),
          "groups": list(dict.fromkeys(labels)),
          "directions": list(names),
          "dropped": [
            _trm.dropped_names(names, one) for one in _subspace.kept(space)
          ],
          "cosines": cosines[:, : -count - 1 : -1],
        },
      )
    return merged, state

  off = [name for name, value in weights.items() if not value]
  parts = [f"weight={weight}", granularity]
  parts += [] if augment_subspace else ["no gradient"]
  parts += [f"no {name}" for name in off]
  name = f"trm({', '.join(parts)})"
  return _merge.Merge(
    name, init, update, runs_network=True, needs_start=True, needs_path=True
  )


def _check_dtypes(
  params: PyTree, derivative: str, responsiveness: float
) -> None:
  half = [leaf.dtype for leaf in jax.tree.leaves(params) if leaf.itemsize < 4]
  if half and responsiveness and derivative == "finite_difference":
    raise ValueError(
      f"A finite difference is lost in parameters of {half[0]}: choose"
      " derivative='forward_over_reverse'."
    )


def _check_moved(length: np.ndarray, task: int) -> None:
  still = np.flatnonzero(~(length > 0))
  if still.size:
    raise ValueError(
      f"The training of task {task} (seed {still[0]}) has moved nothing: its"
      " trajectory has the length zero. Look at its learning rate and its"
      " number of steps."
    )


@functools.lru_cache(maxsize=16)
def _moved(groups: tuple[int, ...]) -> Any:
  return jax.jit(jax.vmap(functools.partial(_subspace.moved, groups)))
