"""Preferences for tasks by the similarity of their data to a target's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxmerge import tree
from jaxmerge.merging import _set_distances, _sparsify

_SIMILARITIES = ("cosine", "mmd", "ot", "labels")


def task_preferences(
  target: Any,
  sources: Sequence[Any],
  *,
  similarity: str = "cosine",
  temperature: float = 1.0,
  max_examples: int | None = 2048,
  epsilon: float = 0.05,
  max_iterations: int = 2000,
) -> np.ndarray:
  r"""How much each task should count for a target, by their data.

  From a distance :math:`D_i \ge 0` of the target's features to those of task i:

  .. math::
    w_i = \frac{\exp(-D_i / (t \bar D))}{\sum_j \exp(-D_j / (t \bar D))}, \quad
    \bar D = \frac{1}{T} \sum_j D_j

  with the temperature :math:`t`, so that the scale of the features is of no
  account; equal ones if all distances are zero. With x and y drawn from the
  target and from task i:

  * ``"cosine"``: :math:`D_i = 1 - \cos(\mathbb E\, x, \mathbb E\, y)`, of the
    mean features.
  * ``"mmd"``: the squared maximum mean discrepancy :math:`D_i = \mathbb E\,
    k(x, x') + \mathbb E\, k(y, y') - 2\, \mathbb E\, k(x, y)`, without pairs of
    an example with itself (unbiased) and not below 0, of the kernel
    :math:`k(x, y) = \exp(-\|x - y\|^2 / 2 \sigma^2)`, where :math:`\sigma` is
    the median distance between different examples of all sets (of 1024 of
    them, evenly spaced).
  * ``"ot"``: the Sinkhorn divergence :math:`D_i = \mathrm{OT}_\epsilon(x, y) -
    \frac12 \mathrm{OT}_\epsilon(x, x) - \frac12 \mathrm{OT}_\epsilon(y, y)` for
    squared distances, by ott-jax. In many dimensions samples are far apart
    whatever they are drawn from, so that all sources look alike: take a larger
    ``epsilon``, a smaller temperature, or fewer features.
  * ``"labels"``: there is no distance. With the share :math:`p(c)` of label c
    in the target's data, and :math:`q_i(c)` in the task's,
    :math:`w_i = \sum_c p(c)\, q_i(c) / \sum_j q_j(c)` over the labels that some
    task has, divided by the sum: the share of the target's labels that are
    task i's, those of several tasks divided among them.

  Args:
    target: Features of the target's data [n, d], floating-point; for
      ``"labels"`` integers [n].
    sources: Those of the data of each task, [n_i, d] or [n_i].
    similarity: One of the above.
    temperature: :math:`t`, positive; the smaller, the more the nearest task
      is preferred. Not used for labels.
    max_examples: How many examples of each set count for ``"mmd"`` and
      ``"ot"``, evenly spaced; None for all. They take time of the order of its
      square, and ``"ot"`` as much memory.
    epsilon: Strength of the entropy of ``"ot"`` relative to the mean squared
      distance between the same examples; positive.
    max_iterations: Largest number of Sinkhorn iterations; positive. Not to
      converge is a warning.

  Returns:
    float64 array [T] of the sum 1, the ``preferences`` of `tunable_magmax`.

  Raises:
    ValueError: If there are no sources, a set is empty, not finite, or of
      another shape or kind, or an option is out of its range.

  References:
    Hiroshima et al., `Tunable MAGMAX: Preference-Aware Model Merging for
    Continual Learning <https://arxiv.org/abs/2605.20803>`_, 2026

    Gretton et al., `A kernel two-sample test
    <https://jmlr.org/papers/v13/gretton12a.html>`_, 2012

    Feydy et al., `Interpolating between optimal transport and MMD using
    Sinkhorn divergences <https://arxiv.org/abs/1810.08278>`_, 2019

  >>> print(task_preferences([0, 0, 0, 1], [[0, 1], [2]], similarity="labels"))
  [1. 0.]
  >>> print(task_preferences([0, 0, 0, 1], [[0], [1]], similarity="labels"))
  [0.75 0.25]
  """
  _sparsify.check_choice(similarity, "similarity", _SIMILARITIES)
  _check_options(temperature, max_examples, epsilon, max_iterations)
  if not isinstance(sources, Sequence) or isinstance(sources, str):
    raise ValueError(
      "sources must be a sequence with one array for each task; got"
      f" {type(sources).__name__}"
    )
  if not sources:
    raise ValueError("sources is empty; give the data of at least one task")
  read = _labels if similarity == "labels" else _features
  first, *others = _read_all(read, target, sources)
  if similarity == "labels":
    return _shares(first, others)
  if similarity == "cosine":
    distances = _set_distances.cosine(first, others)
    return _softmax(distances, temperature)
  _check_sizes(similarity, max_examples, [first, *others])
  first = _set_distances.spaced(first, max_examples)
  others = [_set_distances.spaced(one, max_examples) for one in others]
  if similarity == "mmd":
    distances = _set_distances.mmd(first, others)
  else:
    distances = _set_distances.sinkhorn(
      first, others, float(epsilon), int(max_iterations)
    )
  return _softmax(distances, temperature)


def _check_options(
  temperature: float,
  max_examples: int | None,
  epsilon: float,
  max_iterations: int,
) -> None:
  for name, value in (("temperature", temperature), ("epsilon", epsilon)):
    if not 0 < value < np.inf:
      raise ValueError(f"{name} must be positive and finite; got {value}")
  for name, number in (
    ("max_examples", max_examples),
    ("max_iterations", max_iterations),
  ):
    if number is not None and (number < 1 or number != int(number)):
      raise ValueError(f"{name} must be a positive integer; got {number}")


def _name(place: int) -> str:
  return f"source {place - 1}" if place else "target"


def _read_all(
  read: Callable[[Any, str], np.ndarray], target: Any, sources: Sequence[Any]
) -> list[np.ndarray]:
  """The sets as arrays, the target's first, of one width."""
  sets = [read(one, _name(i)) for i, one in enumerate([target, *sources])]
  for i, one in enumerate(sets):
    if one.shape[1:] != sets[0].shape[1:]:
      raise ValueError(
        f"{_name(i)} has {one.shape[1]} features and target has"
        f" {sets[0].shape[1]}; take all from one layer of one network"
      )
  return sets


def _features(value: Any, name: str) -> np.ndarray:
  array = np.asarray(value)
  is_real = tree.is_float(array) and not np.iscomplexobj(array)
  if array.ndim != 2 or not array.size or not is_real:
    raise ValueError(
      f"{name} must be a floating-point matrix [examples, features], not empty;"
      f" got shape {array.shape} of {array.dtype}; reshape features to one row"
      " an example, or give labels with similarity='labels'"
    )
  # Half types overflow and round in sums.
  array = array.astype(tree.accumulation_dtype(array))
  if not np.isfinite(array).all():
    raise ValueError(
      f"{name} holds NaN or infinity; leave out the examples that do"
    )
  return array


def _labels(value: Any, name: str) -> np.ndarray:
  array = np.asarray(value)
  is_integer = np.issubdtype(array.dtype, np.integer)
  if array.ndim != 1 or not array.size or not is_integer:
    raise ValueError(
      f"{name} must be a vector of integer labels, not empty, with"
      f" similarity='labels'; got shape {array.shape} of {array.dtype}"
    )
  return array


def _check_sizes(
  similarity: str, max_examples: int | None, sets: Sequence[np.ndarray]
) -> None:
  if similarity != "mmd":
    return
  if max_examples == 1:
    raise ValueError("max_examples must be at least 2 for similarity='mmd'")
  for i, one in enumerate(sets):
    if len(one) < 2:
      raise ValueError(
        f"{_name(i)} has one example, of which there are no pairs; give more,"
        " or take similarity='cosine' or 'ot'"
      )


def _shares(target: np.ndarray, sources: Sequence[np.ndarray]) -> np.ndarray:
  classes, places = np.unique(
    np.concatenate([target, *sources]), return_inverse=True
  )
  ends = np.cumsum([len(target), *map(len, sources)])[:-1]
  shares = np.stack(
    [
      np.bincount(one, minlength=len(classes)) / len(one)
      for one in np.split(places, ends)
    ]
  )
  p, q = shares[0], shares[1:]
  total = q.sum(axis=0)
  is_known = total > 0
  if not p[is_known].any():
    raise ValueError(
      "no label of target is a label of any source; give labels of one"
      " numbering, or compare features"
    )
  found = (p * q)[:, is_known] / total[is_known]
  weights = found.sum(axis=1)
  return weights / weights.sum()


def _softmax(distances: np.ndarray, temperature: float) -> np.ndarray:
  mean = distances.mean()
  if mean == 0:
    return np.full(len(distances), 1 / len(distances))
  # From the nearest on, which underflows nowhere else.
  exponents = (distances.min() - distances) / (temperature * mean)
  weights = np.exp(exponents)
  return weights / weights.sum()
