"""The merge methods by name, and what each of them needs."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxmerge.merging import (
  _arcee_fusion,
  _average,
  _breadcrumbs,
  _consensus,
  _dare,
  _della,
  _emr,
  _fisher_average,
  _iso,
  _karcher,
  _leaves,
  _magmax,
  _method,
  _model_stock,
  _nearswap,
  _passthrough,
  _regmean,
  _sce,
  _slerp,
  _task_arithmetic,
  _ties,
  _tsv,
  _tunable_magmax,
  _weights,
)

PyTree = Any
Array = jax.Array

# Arguments of a list function that are not options.
_STATISTICS = ("fishers", "grams")
_ARGUMENTS = frozenset(
  {"base", "models", "model", "weights", "key", *_STATISTICS}
)


class MethodInfo(NamedTuple):
  """What a merge method needs and can do.

  Attributes:
    name: Its name, that of its function in `jaxmerge.merging`.
    summary: One line.
    options: Its options and their defaults; `inspect.Parameter.empty` for one
      that must be given. Those of `MergeOptions` come on top.
    needs_base: Whether it works on task vectors, and so needs the parameters
      that the models were tuned from.
    needs_key: Whether it draws random numbers, and so needs a PRNG key.
    needs_weights: Whether weights must be given.
    takes_weights: Whether weights may be given.
    statistics: Name of the function that collects the statistics of the data
      that it needs; None if it needs none.
    leafwise: Whether a leaf is merged without regard to the others.
    streams: Whether its state does not grow with the number of models.
    min_models: The least number of models.
    max_models: The largest number of models; None for any.
  """

  name: str
  summary: str
  options: dict[str, Any]
  needs_base: bool
  needs_key: bool
  needs_weights: bool
  takes_weights: bool
  statistics: str | None
  leafwise: bool
  streams: bool
  min_models: int
  max_models: int | None


class _Entry(NamedTuple):
  """A method as it is registered; flags as in `MethodInfo`.

  Attributes:
    merge: The function of a list.
    method: The function that makes the `MergeMethod`.
    needs_base: A flag, or a function of the options.
    leafwise: Likewise.
    min_models: A number, or a function of the options.
    divides: Whether weights are divided by their sum; likewise.
  """

  merge: Callable[..., PyTree]
  method: Callable[..., _method.MergeMethod]
  needs_base: bool | Callable[[Mapping[str, Any]], bool] = True
  leafwise: bool | Callable[[Mapping[str, Any]], bool] = True
  divides: bool | Callable[[Mapping[str, Any]], bool] = False
  streams: bool = True
  needs_weights: bool = False
  takes_weights: bool = True
  statistics: str | None = None
  min_models: int | Callable[[Mapping[str, Any]], int] = 1
  max_models: int | None = None


def _flag(
  value: bool | Callable[[Mapping[str, Any]], bool], options: Mapping[str, Any]
) -> bool:
  return bool(value(options) if callable(value) else value)


def _on_task_vectors(options: Mapping[str, Any]) -> bool:
  return bool(options["task_vectors"])


_FREE = _Entry(
  _average.average, _average.average_method, needs_base=False, divides=True
)

_ENTRIES: dict[str, _Entry] = {
  "arcee_fusion": _Entry(
    _arcee_fusion.arcee_fusion,
    _arcee_fusion.arcee_fusion_method,
    streams=False,
    takes_weights=False,
    max_models=1,
  ),
  "average": _FREE._replace(takes_weights=False),
  "breadcrumbs": _Entry(
    _breadcrumbs.breadcrumbs, _breadcrumbs.breadcrumbs_method
  ),
  "consensus": _Entry(
    _consensus.consensus,
    _consensus.consensus_method,
    leafwise=lambda options: options["multi_task"] != "ties",
    streams=False,
    min_models=lambda options: max(1, options["min_tasks"]),
  ),
  "dare": _Entry(_dare.dare, _dare.dare_method),
  "della": _Entry(_della.della, _della.della_method),
  "ema": _Entry(_average.ema, _average.ema_method),
  "emr_unified": _Entry(_emr.emr_unified, _emr.emr_unified_method),
  "fisher_average": _Entry(
    _fisher_average.fisher_average,
    _fisher_average.fisher_average_method,
    divides=True,
    needs_base=False,
    leafwise=lambda options: options["normalize"] != "vector",
    statistics="diagonal_fisher",
  ),
  "iso_c": _Entry(_iso.iso_c, _iso.iso_c_method),
  "iso_cts": _Entry(_iso.iso_cts, _iso.iso_cts_method, streams=False),
  "karcher_mean": _Entry(
    _karcher.karcher_mean,
    _karcher.karcher_mean_method,
    divides=True,
    needs_base=False,
    streams=False,
  ),
  "magmax": _Entry(_magmax.magmax, _magmax.magmax_method),
  "max_abs": _Entry(_magmax.max_abs, _magmax.max_abs_method),
  "model_stock": _Entry(
    _model_stock.model_stock,
    _model_stock.model_stock_method,
    streams=False,
    takes_weights=False,
    min_models=2,
  ),
  "multislerp": _Entry(
    _slerp.multislerp,
    _slerp.multislerp_method,
    divides=lambda options: options["normalize_weights"],
    needs_base=_on_task_vectors,
    streams=False,
  ),
  "nearswap": _Entry(
    _nearswap.nearswap,
    _nearswap.nearswap_method,
    streams=False,
    takes_weights=False,
    max_models=1,
  ),
  "nuslerp": _Entry(
    _slerp.nuslerp,
    _slerp.nuslerp_method,
    divides=True,
    needs_base=_on_task_vectors,
    streams=False,
    min_models=2,
    max_models=2,
  ),
  "passthrough": _Entry(
    _passthrough.passthrough,
    _passthrough.passthrough_method,
    needs_base=False,
    streams=False,
    takes_weights=False,
  ),
  "random_mix": _Entry(_magmax.random_mix, _magmax.random_mix_method),
  "regmean": _Entry(
    _regmean.regmean,
    _regmean.regmean_method,
    divides=True,
    needs_base=False,
    statistics="gram_matrices",
  ),
  "sce": _Entry(_sce.sce, _sce.sce_method, streams=False),
  "slerp": _Entry(
    _slerp.slerp,
    _slerp.slerp_method,
    needs_base=False,
    streams=False,
    takes_weights=False,
    min_models=2,
    max_models=2,
  ),
  "task_arithmetic": _Entry(
    _task_arithmetic.task_arithmetic,
    _task_arithmetic.task_arithmetic_method,
  ),
  "ties": _Entry(
    _ties.ties,
    _ties.ties_method,
    leafwise=lambda options: options["scope"] == "leaf",
  ),
  "tsv_merge": _Entry(_tsv.tsv_merge, _tsv.tsv_merge_method, streams=False),
  "tunable_magmax": _Entry(
    _tunable_magmax.tunable_magmax,
    _tunable_magmax.tunable_magmax_method,
    streams=False,
    takes_weights=False,
  ),
  "weighted_average": _FREE._replace(
    merge=_average.weighted_average, needs_weights=True
  ),
}


class RegisteredMethod(NamedTuple):
  """A merge method with its options, as `get` returns it.

  Attributes:
    info: What it needs with these options.
    options: The options that were given.
  """

  info: MethodInfo
  options: dict[str, Any]

  def __call__(
    self,
    base: PyTree,
    models: Sequence[PyTree],
    *,
    weights: Any = None,
    key: Array | None = None,
    statistics: Sequence[Any] | None = None,
  ) -> PyTree:
    """Merges a list of models.

    Args:
      base: The parameters that the models were tuned from. May be None if
        ``info.needs_base`` is False, and is not used then.
      models: The models.
      weights: One for each model; see `task_arithmetic`.
      key: PRNG key. May be None if ``info.needs_key`` is False, and is not
        used then.
      statistics: One entry for each model, as ``info.statistics`` collects
        them, if the method needs some.

    Returns:
      The merged parameters.

    Raises:
      TreeMismatchError: If the trees differ.
      ValueError: If there are too few models or too many, something that the
        method needs is missing, or a value is out of its range.
    """
    models = _method.check_models(models)
    self.check(
      base, len(models), weights=weights, key=key, statistics=statistics
    )
    given = {"base": base, "models": models, "model": models[0], "key": key}
    given |= dict.fromkeys(_STATISTICS, statistics)
    if not self.info.needs_base:
      del given["base"]
    if weights is not None:
      given["weights"] = weights
    merge = _ENTRIES[self.info.name].merge
    parameters = inspect.signature(merge).parameters
    options = {
      name: value
      for name, value in self.options.items()
      if name not in _ONLY_OF_TRIPLES
    }
    given = {name: value for name, value in given.items() if name in parameters}
    return merge(**given, **options)

  def method(self, key: Array | None = None) -> _method.MergeMethod:
    """The method as a triple.

    Args:
      key: PRNG key, as above.

    Returns:
      The triple. Give it one of the models as base if ``info.needs_base`` is
      False.

    Raises:
      ValueError: If the key is missing or an option is out of its range.
    """
    self._check_key(key)
    make = _ENTRIES[self.info.name].method
    return make(**({"key": key} if self.info.needs_key else {}), **self.options)

  def check(
    self,
    base: PyTree,
    num_models: int,
    *,
    weights: Any = None,
    key: Array | None = None,
    statistics: Sequence[Any] | None = None,
  ) -> None:
    """Raises if something is missing or must not be given.

    Args:
      base: The base, or None.
      num_models: Number of models.
      weights: Their weights, or None.
      key: PRNG key, or None.
      statistics: Statistics of the data, or None.

    Raises:
      ValueError: If so; the message says what to give.
    """
    info = self.info
    _method.check_number(
      info.name, num_models, info.min_models, info.max_models
    )
    if info.needs_base and base is None:
      raise ValueError(
        f"{info.name} needs the parameters that the models were tuned from;"
        " give them as base"
      )
    if info.needs_weights and weights is None:
      raise ValueError(f"{info.name} needs weights; give one for each model")
    if not info.takes_weights and weights is not None:
      raise ValueError(f"{info.name} takes no weights")
    if info.statistics is None:
      _method.check_no_statistics(statistics)
    elif statistics is None:
      raise ValueError(
        f"{info.name} needs statistics of the data of each model; collect them"
        f" with {info.statistics}"
      )
    self._check_key(key)

  def check_sums(self, weights: Any, params: PyTree, num_models: int) -> None:
    """Raises for weights that cannot be divided by their sum, if they are.

    Args:
      weights: One for each model, or None.
      params: One of the models; its leaves are not read.
      num_models: Number of models.

    Raises:
      ValueError: If the weights of a leaf sum to zero.
    """
    given = {**self.info.options, **self.options}
    if _flag(_ENTRIES[self.info.name].divides, given):
      _weights.check_sums(weights, params, num_models)

  def _check_key(self, key: Array | None) -> None:
    if self.info.needs_key and key is None:
      raise ValueError(
        f"{self.info.name} draws random numbers; give a PRNG key,"
        " jax.random.key(seed)"
      )


# Options that a list function takes from whether a base is given.
_ONLY_OF_TRIPLES = frozenset({"task_vectors"})


def names() -> tuple[str, ...]:
  """Names of the registered methods.

  `adamerging`, which trains coefficients on data, and `emr`, which gives one
  model a task, are functions only.

  Returns:
    The names that `get` and `info` take, sorted.

  >>> "ties" in names()
  True
  """
  return tuple(sorted(_ENTRIES))


@functools.cache
def _defaults(name: str) -> dict[str, Any]:
  parameters = inspect.signature(_ENTRIES[name].method).parameters.values()
  return {
    one.name: one.default
    for one in parameters
    if one.kind is not one.VAR_KEYWORD and one.name not in _ARGUMENTS
  }


def info(name: str, **options: Any) -> MethodInfo:
  """What a method needs and can do.

  Args:
    name: One of `names`.
    **options: Its options, since what it needs may depend on them.

  Returns:
    The description.

  Raises:
    ValueError: If the name or an option is unknown.

  >>> info("ties").leafwise, info("ties", scope="leaf").leafwise
  (False, True)
  """
  if name not in _ENTRIES:
    raise ValueError(_unknown("merge method", name, names()))
  entry, defaults = _ENTRIES[name], _defaults(name)
  # Passthrough has no leaves to select.
  shared = () if name == "passthrough" else _leaves.MergeOptions.__annotations__
  for option in options:
    if option not in defaults and option not in shared:
      raise ValueError(
        _unknown(f"option of {name}", option, [*defaults, *shared])
      )
  given = {**defaults, **options}

  doc = inspect.getdoc(entry.merge) or ""
  return MethodInfo(
    name=name,
    summary=doc.partition("\n")[0],
    options=dict(defaults),
    needs_base=_flag(entry.needs_base, given),
    needs_key="key" in inspect.signature(entry.method).parameters,
    needs_weights=entry.needs_weights,
    takes_weights=entry.takes_weights,
    statistics=entry.statistics,
    leafwise=_flag(entry.leafwise, given),
    streams=entry.streams,
    min_models=(
      entry.min_models(given)
      if callable(entry.min_models)
      else entry.min_models
    ),
    max_models=entry.max_models,
  )


def get(name: str, **options: Any) -> RegisteredMethod:
  """A method by its name, with its options.

  Args:
    name: One of `names`.
    **options: Options of the method and those of `MergeOptions`. Their values
      are checked when the method is used.

  Returns:
    The method: call it with a base and models, or ask it for the triple.

  Raises:
    ValueError: If the name or an option is unknown, or one is missing.

  >>> ties = get("ties", density=1.0)
  >>> print(ties({"w": 0.0}, [{"w": 1.0}, {"w": 3.0}, {"w": -2.0}])["w"])
  2.0
  """
  found = info(name, **options)
  for option, default in found.options.items():
    if default is inspect.Parameter.empty and option not in options:
      raise ValueError(f"{name} needs the option {option}")
  return RegisteredMethod(found, dict(options))


def _unknown(kind: str, given: str, known: Sequence[str]) -> str:
  close = difflib.get_close_matches(given, known, 1)
  hint = f"; did you mean {close[0]!r}?" if close else ";"
  return f"unknown {kind} {given!r}{hint} choose from {', '.join(known)}"
