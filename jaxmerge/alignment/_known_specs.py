"""Permutation specifications of residual networks and transformers."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np

from jaxmerge import tree
from jaxmerge.alignment import _derive_spec, _spec

PyTree = Any

#: The residual stream of a transformer.
STREAM = "stream"


def resnet_spec(
  params: PyTree, *, num_groups: int | None = None
) -> _spec.PermutationSpec:
  """The specification of a `jaxmerge.models.ResNet`.

  The channels of a residual stream are one group from the layer that begins
  it, the stem ``Conv_0`` or a ``Block_i/Shortcut``, to the next shortcut with
  a convolution. The channels within a block are a group of their own,
  ``Block_i/Conv_0``.

  Args:
    params: The parameters, alone or with ``batch_stats`` as the module's
      variables ``{"params": ..., "batch_stats": ...}``, whose statistics then
      belong to the groups as well.
    num_groups: For GroupNorm, its number of groups: a channel that changes its
      group would change the function, so that groups are permuted as wholes
      then. It cannot be seen in the parameters.

  Returns:
    The specification.

  Raises:
    SpecError: If the leaves are not those of the network.

  References:
    Ainsworth et al., `Git Re-Basin: Merging models modulo permutation
    symmetries <https://arxiv.org/abs/2209.04836>`_, 2022

  >>> import jax.numpy as jnp
  >>> params = {"Conv_0": {"kernel": jnp.ones((3, 3, 3, 4))}}
  >>> for layer in ("Conv_0", "Conv_1"):
  ...   block = params.setdefault("Block_0", {})
  ...   block[layer] = {"kernel": jnp.ones((3, 3, 4, 4))}
  >>> params["Dense_0"] = {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}
  >>> list(resnet_spec(params))
  ['Conv_0', 'Block_0/Conv_0']
  """
  build = _Builder("ResNet", params, num_groups)
  stream = "Conv_0"
  build.layer(stream, writes=stream, norm="Norm_0")
  for block in build.numbered("Block"):
    hidden = f"{block}/Conv_0"
    build.layer(hidden, stream, hidden, norm=f"{block}/Norm_0")
    following = stream
    if build.has(f"{block}/Shortcut"):
      following = f"{block}/Shortcut"
      build.layer(following, stream, following, norm=f"{block}/Norm_2")
    stream = following
    build.layer(f"{block}/Conv_1", hidden, stream, norm=f"{block}/Norm_1")
  build.layer("Dense_0", stream)
  return build.finish()


def vgg_spec(
  params: PyTree, *, num_groups: int | None = None
) -> _spec.PermutationSpec:
  """The specification of a `jaxmerge.models.VGG` or `jaxmerge.models.CNN`.

  Each layer but the last is a group, named as its module: ``Conv_i`` with
  ``Norm_i``, then ``Dense_i``.

  Args:
    params: As for `resnet_spec`.
    num_groups: As for `resnet_spec`.

  Returns:
    The specification.

  Raises:
    SpecError: If the leaves are not those of the network.

  >>> import jax.numpy as jnp
  >>> params = {
  ...   "Conv_0": {"kernel": jnp.ones((3, 3, 3, 4))},
  ...   "Norm_0": {"scale": jnp.ones(4), "bias": jnp.ones(4)},
  ...   "Dense_0": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)},
  ... }
  >>> [axis.leaf for axis in vgg_spec(params)["Conv_0"]]
  ['Conv_0/kernel', 'Norm_0/scale', 'Norm_0/bias', 'Dense_0/kernel']
  """
  build = _Builder("VGG", params, num_groups)
  chain = [*build.numbered("Conv"), *build.numbered("Dense")]
  reads = None
  for name in chain[:-1]:
    kind, _, number = name.partition("_")
    norm = f"Norm_{number}" if kind == "Conv" else None
    build.layer(name, reads, name, norm=norm)
    reads = name
  build.layer(chain[-1] if chain else "Dense_0", reads)
  return build.finish()


def vit_spec(params: PyTree) -> _spec.PermutationSpec:
  """The specification of a `jaxmerge.models.ViT`.

  The residual stream is the group ``stream``: patches, positions, class token,
  LayerNorms, and what reads from it and adds to it. In each block the heads
  are one group, ``Block_i/Attention``, and are permuted as wholes; the hidden
  neurons of its network are another, ``Block_i/Dense_0``.

  Args:
    params: The parameters, or ``{"params": ...}``; attention has leaves
      ``query``, ``key`` and ``value`` of shape ``[dim, heads, dim / heads]``.

  Returns:
    The specification.

  Raises:
    SpecError: If the leaves are not those of the network.

  >>> import jax.numpy as jnp
  >>> params = {
  ...   "Patches": {"kernel": jnp.ones((2, 2, 3, 4)), "bias": jnp.ones(4)},
  ...   "positions": jnp.ones((1, 9, 4)),
  ...   "Norm_0": {"scale": jnp.ones(4), "bias": jnp.ones(4)},
  ...   "Dense_0": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)},
  ... }
  >>> [axis.leaf for axis in vit_spec(params)["stream"]][2]
  'positions'
  """
  build = _Builder("ViT", params)
  build.layer("Patches", writes=STREAM)
  build.put(STREAM, "", "positions", -1)
  if build.has("", "class_token"):
    build.put(STREAM, "", "class_token", -1)
  for block in build.numbered("Block"):
    heads = f"{block}/Attention"
    build.norm(f"{block}/Norm_0", STREAM)
    for name in ("query", "key", "value"):
      build.put(STREAM, f"{heads}/{name}", "kernel", 0, incoming=False)
      build.put(heads, f"{heads}/{name}", "kernel", 1)
      build.put(heads, f"{heads}/{name}", "bias", 0)
    build.put(heads, f"{heads}/out", "kernel", 0, incoming=False)
    build.put(STREAM, f"{heads}/out", "kernel", 2)
    build.put(STREAM, f"{heads}/out", "bias", 0)
    hidden = f"{block}/Dense_0"
    build.norm(f"{block}/Norm_1", STREAM)
    build.layer(hidden, STREAM, hidden)
    build.layer(f"{block}/Dense_1", hidden, STREAM)
  build.norm("Norm_0", STREAM)
  build.layer("Dense_0", STREAM)
  return build.finish()


def bert_spec(params: PyTree, heads: int) -> _spec.PermutationSpec:
  """The specification of a BERT-type encoder in Hugging Face's Flax layout.

  The residual stream is the group ``stream``: the embeddings, all LayerNorms,
  and what reads from it and adds to it. In each layer the heads are one group,
  ``layer/i/attention``, and are permuted as wholes; the hidden neurons of its
  network are another, ``layer/i/intermediate``. The pooler's neurons are the
  group ``pooler`` where a classifier reads them, and are outputs otherwise. A
  head for masked tokens that shares the embeddings needs no axis of its own:
  the embeddings are one leaf.

  Args:
    params: The parameters, with ``embeddings/...`` and ``encoder/layer/i/...``
      at the top or below one name such as ``bert``; queries, keys and values
      have kernels ``[dim, dim]``.
    heads: The number of attention heads, which cannot be seen in them.

  Returns:
    The specification.

  Raises:
    SpecError: If the leaves are not those of such an encoder, or the heads do
      not divide its width.

  References:
    Devlin et al., `BERT <https://arxiv.org/abs/1810.04805>`_, 2019

  >>> import jax.numpy as jnp
  >>> vector, matrix = jnp.ones(4), jnp.ones((9, 4))
  >>> params = {
  ...   "embeddings": {
  ...     "word_embeddings": {"embedding": matrix},
  ...     "LayerNorm": {"scale": vector, "bias": vector},
  ...   }
  ... }
  >>> for axis in bert_spec(params, heads=2)["stream"]:
  ...   print(axis.leaf, axis.axis)
  embeddings/word_embeddings/embedding -1
  embeddings/LayerNorm/scale 0
  embeddings/LayerNorm/bias 0
  """
  build = _Builder("BERT", params)
  words = "embeddings/word_embeddings"
  root = next(
    (
      name.removesuffix(words)
      for name in build.modules
      if name == words or name.endswith(f"/{words}")
    ),
    "",
  )
  build.put(STREAM, f"{root}{words}", "embedding", -1)
  for kind in ("position_embeddings", "token_type_embeddings"):
    if build.has(f"{root}embeddings/{kind}", "embedding"):
      build.put(STREAM, f"{root}embeddings/{kind}", "embedding", -1)
  build.norm(f"{root}embeddings/LayerNorm", STREAM)
  width = build.shape(f"{root}{words}", "embedding")[-1]
  if heads < 1 or width % heads:
    raise _spec.SpecError(
      f"heads={heads} does not divide the width {width} of leaf"
      f" '{build.modules[root + words]['embedding']}'"
    )
  inner = width // heads
  for place in build.numbered(f"{root}encoder/layer/"):
    layer = place.removeprefix(f"{root}encoder/")
    attention, hidden = f"{layer}/attention", f"{layer}/intermediate"
    for name in ("query", "key", "value"):
      build.layer(
        f"{place}/attention/self/{name}", STREAM, attention, inner=inner
      )
    build.layer(
      f"{place}/attention/output/dense", attention, STREAM, read_inner=inner
    )
    build.norm(f"{place}/attention/output/LayerNorm", STREAM)
    build.layer(f"{place}/intermediate/dense", STREAM, hidden)
    build.layer(f"{place}/output/dense", hidden, STREAM)
    build.norm(f"{place}/output/LayerNorm", STREAM)
  _bert_heads(build, root)
  return build.finish()


def _bert_heads(build: _Builder, root: str) -> None:
  """What reads the last layer: pooler, classifiers, masked tokens."""
  pooler = f"{root}pooler/dense"
  classifiers = [
    name for name in ("classifier", "cls/seq_relationship") if build.has(name)
  ]
  reads = STREAM
  if build.has(pooler):
    build.layer(pooler, STREAM, "pooler" if classifiers else None)
    reads = "pooler"
  for name in classifiers:
    build.layer(name, reads)
  if build.has("qa_outputs"):
    build.layer("qa_outputs", STREAM)
  transform = "cls/predictions/transform"
  if build.has(f"{transform}/dense"):
    # Its outputs meet the embeddings, whose columns are the stream's.
    build.layer(f"{transform}/dense", STREAM, STREAM)
    build.norm(f"{transform}/LayerNorm", STREAM)
  if build.has("cls/predictions/decoder"):
    build.layer("cls/predictions/decoder", STREAM)
  build.leave("cls/predictions", "bias")


class _Builder:
  """Collects the axes of a known network, and notes which leaves are its.

  Args:
    network: The network's name, for messages.
    params: The parameters.
    num_groups: Channels of convolutions are permuted in this many blocks.
  """

  def __init__(
    self, network: str, params: PyTree, num_groups: int | None = None
  ) -> None:
    self.shapes = {
      name: np.shape(leaf)
      for name, leaf in zip(
        tree.leaf_names(params), jax.tree.leaves(params), strict=True
      )
    }
    self.modules = _derive_spec.module_leaves(self.shapes)
    self._params = params
    self._network = network
    self._num_groups = num_groups
    self._spec: dict[str, list[_spec.Axis]] = {}
    self._seen: set[str] = set()
    # Channels in a block of each group.
    self._inner: dict[str, int] = {}

  def has(self, module: str, last: str = "kernel") -> bool:
    """Whether there is such a leaf."""
    return last in self.modules.get(module, {})

  def shape(self, module: str, last: str) -> tuple[int, ...]:
    """The shape of a leaf that must be there."""
    return self.shapes[self._name(module, last)]

  def numbered(self, prefix: str) -> list[str]:
    """The modules ``prefix_0``, ``prefix_1``, ... or ``prefix/0``, ..."""
    separator = "" if prefix.endswith("/") else "_"
    pattern = re.compile(rf"({re.escape(prefix + separator)}\d+)(/|$)")
    found = {match[1] for match in map(pattern.match, self.modules) if match}
    return sorted(found, key=_derive_spec.natural)

  def _name(self, module: str, last: str) -> str:
    if not self.has(module, last):
      name = f"{module}/{last}" if module else last
      raise _spec.SpecError(
        f"the parameters have no leaf '{name}', which {self._network} has; give"
        " the specification as data"
      )
    return self.modules[module][last]

  def put(
    self,
    group: str,
    module: str,
    last: str,
    axis: int,
    *,
    incoming: bool = True,
    outer: int = 1,
    inner: int = 1,
  ) -> None:
    """Adds an axis of a leaf to a group."""
    name = self._name(module, last)
    self._seen.add(name)
    self._spec.setdefault(group, []).append(
      _spec.Axis(name, axis, incoming, outer, inner)
    )

  def leave(self, module: str, last: str) -> None:
    """Notes a leaf, if it is there, that keeps its order."""
    if self.has(module, last):
      self._seen.add(self.modules[module][last])

  def norm(self, module: str, group: str, inner: int = 1) -> None:
    """Adds all leaves of a normalisation, statistics among them."""
    for last in ("scale", "bias", "mean", "var"):
      if self.has(module, last):
        self.put(group, module, last, 0, inner=inner)

  def layer(
    self,
    module: str,
    reads: str | None = None,
    writes: str | None = None,
    *,
    norm: str | None = None,
    inner: int | None = None,
    read_inner: int | None = None,
  ) -> None:
    """Adds a kernel ``[..., inputs, outputs]``, its bias and normalisation.

    Args:
      module: The layer.
      reads: The group of its inputs, None for the network's.
      writes: The group of its outputs, None for the network's.
      norm: The normalisation behind it, where there is one.
      inner: Outputs in a block; by default as GroupNorm asks.
      read_inner: Inputs in a block; by default as they were written.
    """
    shape = self.shape(module, "kernel")
    self._seen.add(self._name(module, "kernel"))
    self.leave(module, "bias")
    if writes is not None:
      is_conv = len(shape) == 4
      if inner is None:
        inner = self._block(module, shape[-1]) if is_conv else 1
      self._inner.setdefault(writes, inner)
      self.put(writes, module, "kernel", len(shape) - 1, inner=inner)
      if self.has(module, "bias"):
        self.put(writes, module, "bias", 0, inner=inner)
      if norm is not None:
        self.norm(norm, writes, inner)
    if reads is not None:
      inner = read_inner or self._inner.get(reads, 1)
      # A dense layer behind flattened images has them in several places.
      outer = max(1, shape[-2] // self._width(reads))
      self.put(
        reads,
        module,
        "kernel",
        len(shape) - 2,
        incoming=False,
        outer=outer,
        inner=inner,
      )

  def _width(self, group: str) -> int:
    """How many outputs a group's first axis has, blocks unfolded."""
    first = self._spec[group][0]
    return self.shapes[first.leaf][first.axis] // first.outer

  def _block(self, module: str, width: int) -> int:
    groups = self._num_groups
    if groups is None:
      return 1
    if groups < 1 or width % groups:
      raise _spec.SpecError(
        f"num_groups={groups} does not divide the {width} channels of layer"
        f" '{module}'"
      )
    return width // groups

  def finish(self) -> _spec.PermutationSpec:
    """Checks that all leaves are placed, and that the groups agree."""
    strange = [name for name in self.shapes if name not in self._seen]
    if strange:
      raise _spec.SpecError(
        f"leaf '{strange[0]}' of shape {self.shapes[strange[0]]} is none of"
        f" {self._network}; pass only its leaves, or give the specification as"
        " data"
      )
    spec = {group: tuple(axes) for group, axes in self._spec.items()}
    _spec.group_sizes(spec, self._params)
    return spec
