"""Methods on task vectors: delta, sparsify, elect sign, combine, rescale."""

from __future__ import annotations

import functools
from typing import Any

import jax

from jaxmerge.merging import _combine, _leafwise, _sparsify

Array = jax.Array
Values = dict[str, Any]


@functools.cache
def task_vector_rule(
  combiner: _combine.Combiner,
  sparsifier: _sparsify.Sparsifier | None = None,
) -> _leafwise.LeafRule:
  r"""Makes the rule :math:`\theta_0 + \lambda C(S(\theta_i - \theta_0))`.

  Args:
    combiner: :math:`C`, from task vectors to one.
    sparsifier: :math:`S`, on each task vector; None for the identity.

  Returns:
    The rule; it needs the option `scale`, :math:`\lambda`, and those of the
    sparsifier.
  """

  def update(
    accumulator: Any, base: Array, leaf: Array, step: _leafwise.Step
  ) -> Any:
    tau = leaf - base
    keys: Any = (None, None)
    if step.key is not None:
      keys = jax.random.split(step.key)
    if sparsifier is not None:
      tau = sparsifier.apply(tau, step._replace(key=keys[0]))
    return combiner.update(accumulator, tau, step._replace(key=keys[1]))

  def finalize(
    accumulator: Any, base: Array, values: Values, total: Array | None
  ) -> Array:
    scale = values["scale"].astype(base.dtype)
    return base + scale * combiner.finalize(accumulator, total)

  def prepare(
    bases: list[Array],
    leaves: list[Array],
    values: list[Values],
    statistics: list[Any],
  ) -> Any:
    del statistics
    assert sparsifier is not None and sparsifier.prepare is not None
    taus = [leaf - base for base, leaf in zip(bases, leaves, strict=True)]
    return sparsifier.prepare(taus, values)

  whole = sparsifier is not None and sparsifier.prepare is not None
  return _leafwise.LeafRule(
    init=combiner.init,
    update=update,
    finalize=finalize,
    derive=None if sparsifier is None else sparsifier.derive,
    prepare=prepare if whole else None,
    summarize=combiner.summarize,
    spreads=combiner.spreads and (sparsifier is None or sparsifier.spreads),
  )
