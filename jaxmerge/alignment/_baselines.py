"""What an alignment has to beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxmerge import tree
from jaxmerge.alignment import (
  _derive_spec,
  _exact,
  _ot_align,
  _spec,
  _transport,
)

PyTree = Any


def keep_identity(reference: PyTree, model: PyTree) -> PyTree:
  """Leaves the model's neurons where they are: naive averaging.

  Args:
    reference: Parameters.
    model: Parameters of the same structure, shapes and dtypes.

  Returns:
    ``model``.

  Raises:
    TreeMismatchError: If the trees differ.

  >>> keep_identity({"w": 1.0}, {"w": 2.0})
  {'w': 2.0}
  """
  tree.check_match(reference, model, names=["reference", "model"])
  return model


def keep_first(reference: PyTree, model: PyTree) -> PyTree:
  """Ignores the model: the reference alone.

  Args:
    reference: Parameters.
    model: Parameters, of any shapes.

  Returns:
    ``reference``.

  >>> keep_first({"w": 1.0}, {"w": 2.0})
  {'w': 1.0}
  """
  del model
  return reference


def random_alignment(
  reference: PyTree,
  model: PyTree,
  spec: _spec.PermutationSpec | None = None,
  *,
  key: jax.Array,
  outgoing: str = "source",
) -> PyTree:
  """Brings the model's neurons into a random order, of the reference's widths.

  Of equal widths each permutation is equally likely. Of different widths the
  plans are exact transport for costs that are drawn uniformly, so that the
  model is widened or narrowed as `ot_align` would, but blindly.

  Args:
    reference: Parameters that give the widths.
    model: Parameters of the same structure and dtypes.
    spec: The specification of both; by default `derive_spec` of the reference.
    key: PRNG key.
    outgoing: As for `apply_plans`.

  Returns:
    The model's parameters, in the reference's shapes.

  Raises:
    SpecError: If the specification does not fit one of the trees.
    TreeMismatchError: If the trees differ in more than their widths.

  >>> import jax.numpy as jnp
  >>> params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0], [4.0]])}
  >>> spec = {
  ...   "hidden": (_spec.Axis("a", 1), _spec.Axis("b", 0, incoming=False))
  ... }
  >>> moved = random_alignment(params, params, spec, key=jax.random.key(1))
  >>> print((moved["a"] @ moved["b"]).item())
  11.0
  """
  if spec is None:
    spec = _derive_spec.derive_spec(reference)
  _transport.check_outgoing(outgoing)
  sizes = _ot_align.check_trees(spec, reference, model)
  keys = jax.random.split(key, max(1, len(sizes)))
  moves = {}
  for one, (group, size) in zip(keys, sizes.items(), strict=False):
    plan = _exact.exact_plan(jax.random.uniform(one, size))
    moves[group] = _transport.make_move(plan.plan, plan.permutation, outgoing)
  return _transport.move_tree(spec, model, moves)


def logit_ensemble(
  apply_fn: Callable[..., PyTree],
  models: Sequence[PyTree],
  weights: Sequence[float] | None = None,
) -> Callable[..., PyTree]:
  r"""The weighted mean of the outputs of several networks.

  .. math::
    f(x) = \sum_i w_i\, f_i(x)

  It costs as much as all of them together: what a merged network saves.

  Args:
    apply_fn: ``apply_fn(params, ...)`` returns a pytree of arrays.
    models: Parameters, at least one; shapes may differ if ``apply_fn`` allows.
    weights: One finite number a model; equal ones that sum to 1 by default.

  Returns:
    A function of what ``apply_fn`` takes besides the parameters.

  Raises:
    ValueError: If there is no model, or the weights do not fit.

  >>> fn = logit_ensemble(lambda p, x: p * x, [1.0, 2.0])
  >>> fn(10.0)
  15.0
  """
  if not models:
    raise ValueError("models is empty; give at least one")
  if weights is None:
    weights = [1 / len(models)] * len(models)
  if len(weights) != len(models) or not np.isfinite(weights).all():
    raise ValueError(
      f"weights must be {len(models)} finite numbers, one a model; got"
      f" {list(weights)}"
    )
  shares = [float(weight) for weight in weights]

  def ensemble(*args: Any, **kwargs: Any) -> PyTree:
    outputs = [apply_fn(params, *args, **kwargs) for params in models]
    return jax.tree.map(
      lambda *values: sum(
        share * value for share, value in zip(shares, values, strict=True)
      ),
      *outputs,
    )

  return ensemble
