"""The shape that all merge methods have, and the loop that runs one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax

from jaxmerge import tree
from jaxmerge.merging import _values

PyTree = Any
MergeState = Any


class InitFn(Protocol):
  """``init(base) -> state``."""

  def __call__(self, base: PyTree) -> MergeState:
    """Returns the state before the first model.

    Args:
      base: The starting parameters, as arrays. They fix the structure, the
        shapes and the dtypes of what is merged, and give the leaves that are
        not floating-point.
    """


class UpdateFn(Protocol):
  """``update(state, params, weight, statistics, donate=False) -> state``."""

  def __call__(
    self,
    state: MergeState,
    params: PyTree,
    weight: Any = 1.0,
    statistics: Any = None,
    *,
    donate: bool = False,
  ) -> MergeState:
    """Returns the state after one more model.

    Args:
      state: The state so far.
      params: The parameters of the model, of the structure of the base.
      weight: How much the model counts: a scalar, traced or not, a prefix of
        the tree, or a mapping from regular expressions of leaf names.
      statistics: What the method knows of the model's data, in the form that
        the method states; None for a method that needs none.
      donate: Whether the new state may take over the memory of ``state``,
        which is then of no more use. It saves a copy of what the method
        keeps, and the time to get memory; the base and the model are never
        given away.
    """


class FinalizeFn(Protocol):
  """``finalize(state) -> params``."""

  def __call__(self, state: MergeState) -> PyTree:
    """Returns the merge of the models so far; ``state`` may be used on."""


class MergeMethod(NamedTuple):
  """A merge method: a triple of pure functions, as in Optax.

  The models are given to it one at a time, so that the memory it needs does
  not grow with their number and the merge can be asked for after any of
  them::

    state = method.init(base)
    for params in models:
      state = method.update(state, params, donate=True)
    merged = method.finalize(state)

  Rules for every method. The state is a pytree of arrays of fixed structure,
  so that ``update`` can be compiled once and carried through ``lax.scan``.
  A leaf is treated without regard to the other leaves unless the method says
  otherwise, so that a checkpoint can be merged leaf by leaf. Inputs are not
  changed. Structure, shapes and dtypes are those of the base; half types are
  accumulated in float32; leaves that are not floating-point come from the
  base; ``update`` raises `TreeMismatchError` for any other tree. Options of a
  method, a PRNG key among them, are arguments of the function that makes it.
  ``finalize`` of a state without models gives the base.

  Attributes:
    init: ``init(base) -> state``.
    update: ``update(state, params, weight=1.0, statistics=None, *,
      donate=False) -> state``; statistics of the model's data are given to the
      methods that need them, and to no other.
    finalize: ``finalize(state) -> params``.
  """

  init: InitFn
  update: UpdateFn
  finalize: FinalizeFn


def check_models(models: Sequence[PyTree]) -> list[PyTree]:
  """The models as a list, or an error that says what is wrong with them."""
  if not isinstance(models, Sequence) or isinstance(models, str):
    raise ValueError(
      "models must be a sequence of parameter trees; got"
      f" {type(models).__name__}; give a list, or stream the models through"
      " the update function of a merge method"
    )
  if not models:
    raise ValueError("models is empty; give at least one parameter tree")
  return list(models)


def check_number(
  name: str, number: int, least: int = 1, most: int | None = None
) -> None:
  """Raises unless a method takes so many models."""
  if least <= number <= (most or number):
    return
  if most == least:
    wanted = f"exactly {least}"
  elif most is None:
    wanted = f"at least {least}"
  else:
    wanted = f"{least} to {most}"
  raise ValueError(
    f"{name} takes {wanted} model{'s' * (wanted != 'exactly 1')}; got {number}"
  )


def check_no_statistics(statistics: Any) -> None:
  """Raises for statistics that a method has no use for."""
  if statistics is not None:
    raise ValueError(
      "this merge method needs no statistics of the data; leave statistics out"
    )


def per_model_statistics(statistics: Any, num_models: int) -> list[Any]:
  """Statistics as a list with one entry for each model, None without any."""
  if statistics is None:
    return [None] * num_models
  if not isinstance(statistics, Sequence) or isinstance(statistics, str):
    raise ValueError(
      "statistics must be a sequence with one entry for each model; got"
      f" {type(statistics).__name__}"
    )
  return _values.per_model(statistics, num_models, "statistics")


def fold(
  method: MergeMethod,
  base: PyTree,
  models: Sequence[PyTree],
  weights: Sequence[Any] | jax.Array | None = None,
  statistics: Sequence[Any] | None = None,
) -> PyTree:
  """Merges models by running them through a method, in their order.

  All models are checked before the first is merged.

  Args:
    method: The merge method.
    base: The starting parameters (see `MergeMethod`).
    models: One or more trees of the structure, shapes and dtypes of ``base``.
    weights: One for each model, as the method takes them, or an array of
      shape [n]; by default each model has the weight one.
    statistics: One entry for each model, for a method that needs statistics
      of the data.

  Returns:
    The merged parameters, with the structure, shapes and dtypes of ``base``.

  Raises:
    TreeMismatchError: If a model differs from ``base`` in structure, shape or
      dtype.
    ValueError: If there are no models, not as many weights or statistics as
      models, or statistics are missing or given in vain.

  >>> from jaxmerge.merging import average_method
  >>> print(fold(average_method(), {"w": 0.0}, [{"w": 1.0}, {"w": 2.0}])["w"])
  1.5
  """
  models = check_models(models)
  names = ["base", *(f"model {i}" for i in range(len(models)))]
  tree.check_match(base, *models, names=names)
  entries = _values.per_model(
    1.0 if weights is None else weights, len(models), "weights"
  )
  found = per_model_statistics(statistics, len(models))
  state = method.init(base)
  for params, weight, one in zip(models, entries, found, strict=True):
    state = method.update(state, params, weight, statistics=one)
  return method.finalize(state)
