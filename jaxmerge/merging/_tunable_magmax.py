"""Tunable MagMax: maximum-magnitude selection by quotas of preferences."""

from __future__ import annotations

import fractions
from collections.abc import Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.merging import (
  _choice,
  _gathered,
  _leaves,
  _method,
  _quota_assignment,
  _values,
  _weights,
)

PyTree = Any
Array = jax.Array

_NAME = "tunable_magmax"


def _merge_leaf(
  base: Array,
  leaves: Sequence[Array],
  weights: Array,
  values: dict[str, Array],
) -> Array:
  del weights
  key = jax.random.fold_in(values["key"], values["seed"])
  owner = _quota_assignment.assign(base, leaves, values["quotas"], key)
  tau = leaves[0] - base
  for task, leaf in enumerate(leaves[1:], 1):
    tau = jnp.where(owner == task, leaf - base, tau)
  return base + values["scale"].astype(base.dtype) * tau


_RULE = _gathered.GatherRule(_merge_leaf)


def _exactly(number: Any) -> fractions.Fraction:
  """A number as it is written: of ten entries, 0.7 are seven.

  The double next to 0.7 is less, and so would the floor be.
  """
  scalar = np.asarray(number)[()]
  if scalar.dtype.kind == "b":
    return fractions.Fraction(int(scalar))
  return fractions.Fraction(str(scalar))


def quotas(size: int, preferences: Sequence[Any]) -> np.ndarray:
  """How many of so many entries each task gets, exactly.

  Args:
    size: Number of entries.
    preferences: Numbers, one a task, not negative, whose sum is not zero.

  Returns:
    uint32 [T], of the sum `size`.

  >>> print(quotas(10, [0.1, 0.2, 0.7]), quotas(8, [1, 1, 1]))
  [1 2 7] [3 3 2]
  """
  shares = [_exactly(one) for one in preferences]
  total = sum(shares)
  found = [int(size * share / total) for share in shares]
  rest = size - sum(found)
  for task, share in enumerate(shares):
    # A model without a share gets nothing at all.
    if rest and share:
      found[task] += 1
      rest -= 1
  return np.array(found, np.uint32)


def _checked(preferences: Any) -> Any:
  """Preferences, if they are a sequence of numbers that are not negative."""
  if preferences is None:
    return None
  is_array = isinstance(preferences, (jax.Array, np.ndarray))
  if isinstance(preferences, str) or not (
    (is_array and preferences.ndim) or isinstance(preferences, Sequence)
  ):
    raise ValueError(
      "preferences must be a sequence with one number for each model; got"
      f" {preferences!r}"
    )
  found = jax.tree.leaves(preferences)
  for one in found:
    if _values.is_traced(one):
      raise ValueError(
        "preferences must be numbers, not traced values: how many entries each"
        " model gives is counted before compilation"
      )
    if np.asarray(one).dtype.kind not in "biufV":
      raise ValueError(f"preferences must be real numbers; got {one!r}")
    if not np.all(np.isfinite(one)) or np.any(one < 0):
      raise ValueError(
        f"preferences must be finite and not negative; got {one}; give 0 to a"
        " model that is to have no share"
      )
  if found and not any(np.any(one) for one in found):
    raise ValueError(
      "preferences are all zero; give at least one model a share"
    )
  # Within a transformation, entries of an array of JAX would be traced.
  return np.asarray(preferences) if is_array else preferences


def _quotas_of_leaves(preferences: Any, num_models: int) -> _leaves.PerLeaf:
  entries = _values.per_model(
    1 if preferences is None else preferences, num_models, "preferences"
  )

  def compute(base: PyTree, merged: Sequence[_leaves.Leaf]) -> list[np.ndarray]:
    columns = [
      _values.per_leaf(entry, base, f"preference {i}")
      for i, entry in enumerate(entries)
    ]
    leaves = jax.tree.leaves(base)
    found = []
    for leaf in merged:
      size = int(np.size(leaves[leaf.place]))
      if size > _choice.MOST:
        raise ValueError(
          f"leaf '{leaf.name}' has {size} entries, too many to choose from;"
          f" the most are {_choice.MOST}; leave it out by select"
        )
      mine = [column[leaf.place] for column in columns]
      if not any(mine):
        raise ValueError(
          f"preferences are all zero for leaf '{leaf.name}'; give at least one"
          " model a share"
        )
      found.append(quotas(size, mine))
    return found

  return _leaves.PerLeaf(compute)


def _merge(
  base: PyTree,
  models: Sequence[PyTree],
  key: Array,
  preferences: Any,
  scale: Any,
  weights: Any = None,
  **options: Unpack[_leaves.MergeOptions],
) -> PyTree:
  models = _method.check_models(models)
  preferences = _checked(preferences)
  _values.check_key(key)
  return _gathered.merge(
    _RULE,
    _NAME,
    base,
    models,
    weights,
    options={
      "scale": scale,
      "quotas": _quotas_of_leaves(preferences, len(models)),
      "key": _leaves.PerLeaf(lambda base, merged: [key] * len(merged)),
      "seed": _leaves.PerLeaf(lambda base, merged: [x.seed for x in merged]),
    },
    **options,
  )


def tunable_magmax_method(
  key: Array,
  *,
  preferences: Any = None,
  scale: Any = 0.5,
  **options: Unpack[_leaves.MergeOptions],
) -> _method.MergeMethod:
  """Tunable MagMax as a method that keeps the models; see `tunable_magmax`.

  Args:
    key: See `tunable_magmax`, as the rest.
    preferences: One for each model.
    scale: Scale of the merged task vector.
    **options: See `MergeOptions`.

  Returns:
    The method. Its ``update`` takes no weights.

  Raises:
    ValueError: If preferences are negative or not finite.

  >>> method = tunable_magmax_method(
  ...   jax.random.key(0), preferences=[1, 0], scale=1.0
  ... )
  >>> state = method.init({"w": 0.0})
  >>> for value in (1.0, -3.0):
  ...   state = method.update(state, {"w": value})
  >>> print(method.finalize(state)["w"])
  1.0
  """
  preferences = _checked(preferences)

  def merge(base: PyTree, models: Sequence[PyTree], *, weights: Any) -> PyTree:
    return _merge(base, models, key, preferences, scale, weights, **options)

  return _weights.unweighted(
    _gathered.gathering_method(merge, **options), _NAME, "give preferences"
  )


def tunable_magmax(
  base: PyTree,
  models: Sequence[PyTree],
  key: Array,
  *,
  preferences: Any = None,
  scale: Any = 0.5,
  **options: Unpack[_leaves.MergeOptions],
) -> PyTree:
  r"""Takes each parameter from one task, so many from each as is preferred.

  .. math::
    \theta = \theta_0 + \lambda \tau_{a}, \quad
    \tau_i = \theta_i - \theta_0, \quad
    |\{a = i\}| = q_i, \quad
    q_i = \lfloor n w_i \rfloor + \text{remainder}, \quad
    w_i = p_i / \sum_j p_j

  parameter by parameter, with exactly :math:`q_i` of the :math:`n` entries of
  each leaf from task i. The assignment a begins as that of MagMax, the largest
  :math:`|\tau_i|`, on ties the later task. From the last task to the second,
  one that has more than its quota gives up as many entries, drawn at random,
  each to the earlier task of the largest magnitude there. What the first task
  then has too much is shared out, at random, among the tasks that lack some:
  the second takes what it lacks, then the third, and so on.

  Where every task has its quota from the beginning, this is `magmax`, and
  nothing is drawn. The remainder of the division goes to the tasks from the
  first one on, one entry each; those of preference 0 get none.

  Unlike the weights of `magmax`, preferences do not scale task vectors: they
  are shares of the entries.

  Args:
    base: :math:`\theta_0`, the parameters before the first task.
    models: One or more trees of the structure of the base, in the order of
      the tasks.
    key: PRNG key. What is drawn for a leaf depends on the key and its name,
      not on the other leaves.
    preferences: :math:`p_i`, one for each model, not negative, not all zero,
      equal by default; `task_preferences` gives those of a set of data. Each
      may differ from leaf to leaf, as weights in `task_arithmetic`. Numbers are
      read as they are written, so that 0.7 of 10 entries are 7. They are data
      to the compiled program, but must not be traced.
    scale: :math:`\lambda`; see `magmax`.
    **options: See `MergeOptions`.

  Returns:
    The merged parameters, with the structure, shapes and dtypes of the base.

  Raises:
    TreeMismatchError: If a model differs from the base.
    ValueError: If there are no models, not as many preferences as models, or
      a value is out of its range.

  References:
    Hiroshima et al., `Tunable MAGMAX: Preference-Aware Model Merging for
    Continual Learning <https://arxiv.org/abs/2605.20803>`_, 2026

  >>> models = [{"w": jnp.full(8, value)} for value in (1.0, -3.0, 2.0)]
  >>> merged = tunable_magmax(
  ...   {"w": jnp.zeros(8)},
  ...   models,
  ...   jax.random.key(0),
  ...   preferences=[0.5, 0.25, 0.25],
  ...   scale=1.0,
  ... )
  >>> print(jnp.sort(merged["w"]))
  [-3. -3.  1.  1.  1.  1.  2.  2.]
  """
  return _merge(base, models, key, preferences, scale, **options)
