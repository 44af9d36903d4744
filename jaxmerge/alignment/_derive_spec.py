"""Permutation specifications of plain networks, from their parameters."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmerge import tree
from jaxmerge.alignment import _spec

PyTree = Any
Shapes = Mapping[str, tuple[int, ...]]

_COLLECTIONS = ("params", "batch_stats")


def natural(name: str) -> list[tuple[str, int]]:
  """A sort key that puts Dense_2 before Dense_10.

  Args:
    name: Any text.

  Returns:
    Its parts without and with digits.

  >>> sorted(["Dense_10", "Dense_2"], key=natural)
  ['Dense_2', 'Dense_10']
  """
  return [
    (text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", name)
  ]


def module_leaves(shapes: Shapes) -> dict[str, dict[str, str]]:
  """For each module, without the collection, its leaves by their last name.

  Args:
    shapes: The shapes of all leaves by name.

  Returns:
    For each module the names of its leaves.

  >>> module_leaves({"params/a/kernel": (2, 3), "batch_stats/a/mean": (3,)})
  {'a': {'kernel': 'params/a/kernel', 'mean': 'batch_stats/a/mean'}}
  """
  modules: dict[str, dict[str, str]] = {}
  for name in shapes:
    parts = name.split("/")
    if parts[0] in _COLLECTIONS and len(parts) > 1:
      parts = parts[1:]
    modules.setdefault("/".join(parts[:-1]), {})[parts[-1]] = name
  return modules


def _layers(
  modules: Mapping[str, Mapping[str, str]],
  shapes: Shapes,
  layers: Sequence[str] | None,
) -> list[str]:
  """The modules with kernels, convolutions first, in their natural order."""
  known = [name for name, leaves in modules.items() if "kernel" in leaves]
  known.sort(
    key=lambda name: (len(shapes[modules[name]["kernel"]]) == 2, natural(name))
  )
  if layers is None:
    found = known
  else:
    found = [name.removeprefix("params/") for name in layers]
    for name, given in zip(found, layers, strict=True):
      if name not in known:
        raise _spec.SpecError(
          f"layer '{given}' is not in the parameters; their layers are: "
          + (", ".join(known) or "(none)")
        )
    if len(set(found)) != len(found):
      raise _spec.SpecError(f"layers names a layer twice: {list(layers)}")
  if not found:
    raise _spec.SpecError(
      "the parameters have no layer; a layer is a leaf 'kernel' of shape"
      " [..., inputs, outputs] and, beside it, at most a 'bias' of shape"
      " [outputs]"
    )
  for name in found:
    leaf = modules[name]["kernel"]
    if len(shapes[leaf]) < 2:
      raise _spec.SpecError(
        f"leaf '{leaf}' must have shape [..., inputs, outputs]; got"
        f" {shapes[leaf]}"
      )
    for last, other in modules[name].items():
      if last not in ("kernel", "bias"):
        raise _spec.SpecError(
          f"leaf '{other}' beside '{leaf}' is neither a kernel nor a bias, so"
          " that it cannot be seen where its neurons are; give the"
          " specification as data"
        )
  if layers is None:
    _check_order(
      found, {name: shapes[modules[name]["kernel"]] for name in found}
    )
  return found


def _check_order(found: Sequence[str], kernels: Shapes) -> None:
  """Raises where neither names nor widths say which layer comes first."""
  convolutions = [name for name in found if len(kernels[name]) > 2]
  kinds = [convolutions, found[len(convolutions) :]]
  if all(_are_numbered(kind) for kind in kinds):
    return
  pair = zip(found[:-1], found[1:], strict=True)
  if not all(_fits(kernels[one], kernels[other]) for one, other in pair):
    return  # An error of its own, by the layers' names.
  chains = list(itertools.islice(_chains(kinds, kernels), 2))
  if len(chains) > 1:
    raise _spec.SpecError(
      "the names of the layers do not say their order: "
      + " as well as ".join(", ".join(chain) for chain in chains)
      + " form a chain; name the layers from input to output in layers=[...]"
    )


def _are_numbered(names: Sequence[str]) -> bool:
  """Whether names are equal up to their numbers."""
  return len({re.sub(r"\d+", "0", name) for name in names}) < 2


def _chains(
  kinds: Sequence[Sequence[str]],
  kernels: Shapes,
  chain: tuple[str, ...] = (),
) -> Iterator[tuple[str, ...]]:
  """All chains that the widths allow, one kind after the other."""
  left = [[name for name in kind if name not in chain] for kind in kinds]
  here = next((i for i, kind in enumerate(left) if kind), None)
  if here is None:
    yield chain
    return
  # Of numbered layers the next one is known.
  several = left[here][:1] if _are_numbered(kinds[here]) else left[here]
  for name in several:
    if not chain or _fits(kernels[chain[-1]], kernels[name]):
      yield from _chains(kinds, kernels, (*chain, name))


def _fits(kernel: tuple[int, ...], following: tuple[int, ...]) -> bool:
  """Whether a layer's outputs, perhaps flattened, are the next one's inputs."""
  outputs, inputs = kernel[-1], following[-2]
  is_flat = len(kernel) > 2 and len(following) == 2
  return inputs == outputs or (is_flat and inputs % outputs == 0)


def derive_spec(
  params: PyTree, *, layers: Sequence[str] | None = None
) -> _spec.PermutationSpec:
  """The specification of an MLP or a plain convolutional network.

  The layers must form a chain: convolutions, then dense layers, each feeding
  the next through functions of single neurons, pooling, flattening, and
  normalisation. Each layer but the last is a group, named as its module, with
  the outputs of its kernel, its bias, its normalisation, and the inputs of the
  next kernel. A dense layer that takes a multiple of the neurons before it is
  taken to flatten images with the channels last.

  Args:
    params: Parameters with leaves ``kernel`` of shape ``[..., inputs,
      outputs]``, ``bias``, and those of normalisation (``scale``, ``bias``,
      ``mean``, ``var``), as Flax has them, with or without ``{"params": ...}``
      and ``{"batch_stats": ...}`` around them.
    layers: Names of the modules from input to output, the output layer last. By
      default all with a kernel, convolutions first, each kind in the natural
      order of their names, ``Dense_2`` before ``Dense_10``; names that differ
      in more than numbers must have widths that allow one order only. With it,
      other layers are left alone.

  Returns:
    The specification. Whether it fits the function, `check` finds out: it
    cannot be seen from parameters whether there is a residual connection, or
    how many groups a GroupNorm has.

  Raises:
    SpecError: If the layers do not form a chain, or could form another one, or
      a leaf cannot be placed.

  >>> import jax.numpy as jnp
  >>> params = {
  ...   "Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
  ...   "Dense_1": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)},
  ... }
  >>> for axis in derive_spec(params)["Dense_0"]:
  ...   print(axis.leaf, axis.axis)
  Dense_0/kernel 1
  Dense_0/bias 0
  Dense_1/kernel 0
  """
  shapes = {
    name: np.shape(leaf)
    for name, leaf in zip(
      tree.leaf_names(params), jax.tree.leaves(params), strict=True
    )
  }
  modules = module_leaves(shapes)
  chain = _layers(modules, shapes, layers)
  spec: dict[str, tuple[_spec.Axis, ...]] = {}
  for name, following in zip(chain[:-1], chain[1:], strict=True):
    kernel = modules[name]["kernel"]
    axes = [_spec.Axis(kernel, len(shapes[kernel]) - 1)]
    if "bias" in modules[name]:
      axes.append(_spec.Axis(modules[name]["bias"], 0))
    axes.append(_inputs(kernel, modules[following]["kernel"], shapes))
    spec[name] = tuple(axes)
  norms = _norms(modules, shapes, chain, layers is None)
  for name, leaves in norms.items():
    last = spec[name][-1]
    spec[name] = (
      *spec[name][:-1],
      *(_spec.Axis(leaf, 0) for leaf in leaves),
      last,
    )
  _spec.group_sizes(spec, params)
  return spec


def _inputs(kernel: str, following: str, shapes: Shapes) -> _spec.Axis:
  """The axis of the next kernel that takes a layer's outputs."""
  outputs, inputs = shapes[kernel][-1], shapes[following][-2]
  if not _fits(shapes[kernel], shapes[following]):
    raise _spec.SpecError(
      f"the layers do not form a chain: '{kernel}' has {outputs} outputs but"
      f" '{following}' takes {inputs} inputs; name the layers from input to"
      " output in layers=[...], or give the specification as data"
    )
  return _spec.Axis(
    following,
    len(shapes[following]) - 2,
    incoming=False,
    outer=inputs // outputs,
  )


def _norms(
  modules: Mapping[str, Mapping[str, str]],
  shapes: Shapes,
  chain: Sequence[str],
  whole_tree: bool,
) -> dict[str, list[str]]:
  """For each hidden layer the leaves of the normalisation behind it."""
  others = sorted(
    (name for name, leaves in modules.items() if "kernel" not in leaves),
    key=natural,
  )
  if not others or not whole_tree:
    return {}
  for name in others:
    for leaf in modules[name].values():
      if len(shapes[leaf]) != 1:
        raise _spec.SpecError(
          f"leaf '{leaf}' of shape {shapes[leaf]} is of no layer and of no"
          " normalisation; name the layers in layers=[...], or give the"
          " specification as data"
        )
  hidden = chain[:-1]
  if len(others) != len(hidden):
    raise _spec.SpecError(
      f"there are {len(others)} normalisations ({', '.join(others[:5])}) for"
      f" {len(hidden)} hidden layers, so that it cannot be seen which is whose;"
      " give the specification as data"
    )
  widths = {
    name: shapes[modules[layer]["kernel"]][-1]
    for layer, name in zip(hidden, others, strict=True)
  }
  for one, other in itertools.combinations(others, 2):
    if widths[one] == widths[other] and not _are_numbered((one, other)):
      raise _spec.SpecError(
        f"the names of the normalisations '{one}' and '{other}', of one width,"
        " do not say their order; give the specification as data"
      )
  found = {}
  for layer, name in zip(hidden, others, strict=True):
    outputs = shapes[modules[layer]["kernel"]][-1]
    leaves = list(modules[name].values())
    for leaf in leaves:
      if shapes[leaf] != (outputs,):
        raise _spec.SpecError(
          f"leaf '{leaf}' of shape {shapes[leaf]} does not fit the {outputs}"
          f" outputs of layer '{layer}'; give the specification as data"
        )
    found[layer] = leaves
  return found
