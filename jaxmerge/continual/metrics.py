"""What a continual learner achieved, from its matrix of accuracies.

`a[..., i, j]` is the accuracy on the test set of task j after learning task i,
both counted from 0; T is the number of tasks. Leading axes (seeds, methods) are
kept. An entry that was not measured is NaN, and so is every figure that needs
it. Accuracies lie in [0, 1] or in [0, 100]: nothing is rescaled, so a figure is
on the scale of the matrix, and a baseline must be on that scale too.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def final_accuracy(a: Any, sizes: Any = None) -> np.ndarray:
  """The accuracy over all tasks at the end of the stream.

      1/T sum_j a[T-1, j]        sum_j n_j a[T-1, j] / sum_j n_j

  The second form, with `sizes`, is the accuracy on the union of the test sets.

  Args:
    a: accuracies `[..., T, T]`.
    sizes: n_j, the number of test samples of each task `[T]`; None for tasks of
      equal weight.

  Returns:
    float64 `[...]`.

  Raises:
    ValueError: `a` is not a square matrix of accuracies, or `sizes` is not a
      positive number for each task.

  >>> float(final_accuracy([[0.5, 0.0], [0.25, 0.75]]))
  0.5
  >>> float(final_accuracy([[0.5, 0.0], [0.25, 0.75]], sizes=[100, 300]))
  0.625
  """
  return np.asarray(accuracies_over_tasks(a, sizes)[..., -1])


def average_accuracy(a: Any) -> np.ndarray:
  """The average incremental accuracy.

      1/T sum_i 1/(i+1) sum_{j<=i} a[i, j]

  Args:
    a: accuracies `[..., T, T]`; those above the diagonal are not used.

  Returns:
    float64 `[...]`.

  Raises:
    ValueError: `a` is not a square matrix of accuracies.

  References:
    Rebuffi et al., iCaRL: Incremental Classifier and Representation Learning,
    2017 (https://arxiv.org/abs/1611.07725).

  >>> float(average_accuracy([[1.0, 0.0], [0.25, 0.75]]))
  0.75
  """
  return np.asarray(accuracies_over_tasks(a).mean(axis=-1))


def learning_accuracy(a: Any) -> np.ndarray:
  """How well each task was known when it had just been learned.

      1/T sum_j a[j, j]

  Args:
    a: accuracies `[..., T, T]`; only the diagonal is used.

  Returns:
    float64 `[...]`.

  Raises:
    ValueError: `a` is not a square matrix of accuracies.

  References:
    Riemer et al., Learning to Learn without Forgetting by Maximizing Transfer
    and Minimizing Interference, 2019 (https://arxiv.org/abs/1810.11910).

  >>> float(learning_accuracy([[1.0, 0.0], [0.25, 0.75]]))
  0.875
  """
  return np.asarray(_diagonal(_matrix(a)).mean(axis=-1))


def backward_transfer(a: Any) -> np.ndarray:
  """What learning the later tasks did to the earlier ones.

      1/(T-1) sum_{j<T-1} a[T-1, j] - a[j, j]

  Negative where tasks were forgotten.

  Args:
    a: accuracies `[..., T, T]` of two tasks or more; the last row and the
      diagonal are used.

  Returns:
    float64 `[...]`.

  Raises:
    ValueError: `a` is not a square matrix of accuracies, or of one task.

  References:
    Lopez-Paz and Ranzato, Gradient Episodic Memory for Continual Learning, 2017
    (https://arxiv.org/abs/1706.08840).

  >>> float(backward_transfer([[1.0, 0.0], [0.25, 0.75]]))
  -0.75
  """
  a = _several(_matrix(a), "backward_transfer")
  return np.asarray((a[..., -1, :] - _diagonal(a))[..., :-1].mean(axis=-1))


def forward_transfer(a: Any, baseline: Any) -> np.ndarray:
  """What the earlier tasks did for a task before it was learned.

      1/(T-1) sum_{j>0} a[j-1, j] - baseline[j]

  Args:
    a: accuracies `[..., T, T]` of two tasks or more; the diagonal above the
      main one is used.
    baseline: the accuracy of the initial network on each task, `[T]` or
      `[..., T]`, on the scale of `a`; that on the first task is not used.

  Returns:
    float64 `[...]`.

  Raises:
    ValueError: `a` is not a square matrix of accuracies, or of one task, or
      `baseline` does not have an accuracy for each task.

  References:
    Lopez-Paz and Ranzato, Gradient Episodic Memory for Continual Learning, 2017
    (https://arxiv.org/abs/1706.08840).

  >>> float(forward_transfer([[1.0, 0.5], [0.25, 0.75]], [0.0, 0.25]))
  0.25
  """
  a = _several(_matrix(a), "forward_transfer")
  initial = _vector(baseline, a, "baseline")
  ahead = np.diagonal(a, offset=1, axis1=-2, axis2=-1)
  return np.asarray((ahead - initial[..., 1:]).mean(axis=-1))


def forgetting(a: Any) -> np.ndarray:
  """How far each task fell from the best it had been.

      1/(T-1) sum_{j<T-1} max_{j<=i<T-1} a[i, j] - a[T-1, j]

  The paper takes the maximum over all i < T-1; here those before task j was
  learned, when nothing could be forgotten, are left out, so that they need not
  be measured. It is at least minus `backward_transfer`.

  Args:
    a: accuracies `[..., T, T]` of two tasks or more; those above the diagonal
      are not used.

  Returns:
    float64 `[...]`; negative where the last task helped the others.

  Raises:
    ValueError: `a` is not a square matrix of accuracies, or of one task.

  References:
    Chaudhry et al., Riemannian Walk for Incremental Learning: Understanding
    Forgetting and Intransigence, 2018 (https://arxiv.org/abs/1801.10112).

  >>> float(forgetting([[1.0, 0.0], [0.25, 0.75]]))
  0.75
  """
  a = _several(_matrix(a), "forgetting")
  learned = np.tril(np.ones(a.shape[-2:], bool))
  best = np.where(learned, a, -np.inf)[..., :-1, :-1].max(axis=-2)
  return np.asarray((best - a[..., -1, :-1]).mean(axis=-1))


def intransigence(a: Any, joint: Any) -> np.ndarray:
  """How much worse a task was learned than it can be.

      1/T sum_j joint[j] - a[j, j]

  Args:
    a: accuracies `[..., T, T]`; only the diagonal is used.
    joint: the accuracy on each task of a reference model, `[T]` or `[..., T]`,
      on the scale of `a`. In the paper joint[j] is that of a model trained on
      the union of tasks 0..j.

  Returns:
    float64 `[...]`; negative where learning one task after another was better.

  Raises:
    ValueError: `a` is not a square matrix of accuracies, or `joint` does not
      have an accuracy for each task.

  References:
    Chaudhry et al., Riemannian Walk for Incremental Learning: Understanding
    Forgetting and Intransigence, 2018 (https://arxiv.org/abs/1801.10112).

  >>> float(intransigence([[0.75, 0.0], [0.25, 0.5]], [0.75, 1.0]))
  0.25
  """
  a = _matrix(a)
  return np.asarray((_vector(joint, a, "joint") - _diagonal(a)).mean(axis=-1))


def accuracies_over_tasks(a: Any, sizes: Any = None) -> np.ndarray:
  """The accuracy over the tasks seen so far, after each task.

      A[i] = sum_{j<=i} n_j a[i, j] / sum_{j<=i} n_j

  Args:
    a: accuracies `[..., T, T]`; those above the diagonal are not used.
    sizes: n_j, the number of test samples of each task `[T]`; None for tasks of
      equal weight.

  Returns:
    float64 `[..., T]`.

  Raises:
    ValueError: `a` is not a square matrix of accuracies, or `sizes` is not a
      positive number for each task.

  >>> accuracies_over_tasks([[1.0, 0.0], [0.25, 0.75]]).tolist()
  [1.0, 0.5]
  """
  a = _matrix(a)
  weights = _weights(sizes, a.shape[-1])
  # Not a product with a mask: NaN times 0 is NaN.
  learned = np.tril(np.ones(a.shape[-2:], bool))
  seen = np.where(learned, a * weights, 0.0).sum(axis=-1)
  return seen / np.cumsum(weights)


def summarize(
  a: Any, *, sizes: Any = None, baseline: Any = None, joint: Any = None
) -> dict[str, np.ndarray]:
  """Every figure of this module that the measurements allow.

  Left out are the figures that need an entry which was not measured (is NaN, at
  any place of the leading axes), transfer and forgetting in a stream of one
  task, and `forward_transfer` and `intransigence` without what they compare
  with. No value is NaN, so that each can be written to a JSON file.

  Args:
    a: accuracies `[..., T, T]`.
    sizes: the number of test samples of each task `[T]`, for `final_accuracy`
      and `accuracies_over_tasks` alone; None for tasks of equal weight.
    baseline: for `forward_transfer`; None to leave it out.
    joint: for `intransigence`; None to leave it out.

  Returns:
    The name of each function -> what it returns.

  Raises:
    ValueError: as in the functions.

  >>> found = summarize([[1.0, 0.0], [0.25, 0.75]])
  >>> {name: value.tolist() for name, value in found.items()}
  {'final_accuracy': 0.5, 'average_accuracy': 0.75, 'learning_accuracy': 0.875,
   'backward_transfer': -0.75, 'forgetting': 0.75,
   'accuracies_over_tasks': [1.0, 0.5]}
  >>> nan = float("nan")
  >>> list(summarize([[nan, nan], [0.5, 0.5]]))  # only the end is known
  ['final_accuracy']
  """
  a = _matrix(a)
  found = {
    "final_accuracy": final_accuracy(a, sizes),
    "average_accuracy": average_accuracy(a),
    "learning_accuracy": learning_accuracy(a),
  }
  if baseline is not None:
    _vector(baseline, a, "baseline")
  if a.shape[-1] > 1:
    found["backward_transfer"] = backward_transfer(a)
    found["forgetting"] = forgetting(a)
    if baseline is not None:
      found["forward_transfer"] = forward_transfer(a, baseline)
  if joint is not None:
    found["intransigence"] = intransigence(a, joint)
  found["accuracies_over_tasks"] = accuracies_over_tasks(a, sizes)
  return {
    name: value for name, value in found.items() if not np.isnan(value).any()
  }


def _matrix(a: Any) -> np.ndarray:
  """Returns `a` as float64 `[..., T, T]`, checked."""
  a = np.asarray(a, np.float64)
  if a.ndim < 2 or a.shape[-1] != a.shape[-2] or a.shape[-1] == 0:
    raise ValueError(
      "a must be square in its last two axes, a row after each task and a"
      f" column for each task: got shape {a.shape}. Write NaN where nothing was"
      " measured."
    )
  return _accuracies(a, "a")


def _vector(values: Any, a: np.ndarray, name: str) -> np.ndarray:
  """Returns an accuracy for each task, float64 `[T]` or `[..., T]`, checked."""
  values = np.asarray(values, np.float64)
  if values.shape not in (a.shape[-1:], a.shape[:-1]):
    wanted = " or ".join(map(str, dict.fromkeys((a.shape[-1:], a.shape[:-1]))))
    raise ValueError(
      f"{name} must have an accuracy for each task of a, shape {wanted}: got"
      f" shape {values.shape}."
    )
  return _accuracies(values, name)


def _accuracies(values: np.ndarray, name: str) -> np.ndarray:
  wrong = (values < 0) | (values > 100)
  if wrong.any():
    raise ValueError(
      f"{name} has the entry {values[wrong][0]:g}: accuracies lie in [0, 1] or"
      " in [0, 100], whichever is given is kept, and NaN stands for one that"
      " was not measured."
    )
  return values


def _weights(sizes: Any, num_tasks: int) -> np.ndarray:
  """Returns the weight of each task, float64 `[T]`."""
  if sizes is None:
    return np.ones(num_tasks)
  weights = np.asarray(sizes, np.float64)
  if weights.shape != (num_tasks,):
    raise ValueError(
      f"sizes must have the number of test samples of each of the {num_tasks}"
      f" tasks: got shape {weights.shape}."
    )
  if not (np.isfinite(weights) & (weights > 0)).all():
    raise ValueError(f"sizes must be positive numbers: got {weights.tolist()}.")
  return weights


def _several(a: np.ndarray, name: str) -> np.ndarray:
  if a.shape[-1] < 2:
    raise ValueError(
      f"{name} compares tasks, and this stream has one: leave it out, as"
      " summarize does."
    )
  return a


def _diagonal(a: np.ndarray) -> np.ndarray:
  return np.diagonal(a, axis1=-2, axis2=-1)
