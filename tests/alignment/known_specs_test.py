"""Tests of the specifications of residual networks and transformers.

Each is proved on the network itself: permuted parameters, same function.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxmerge import alignment, models, tree
from jaxmerge.alignment import Axis, SpecError

_NORMS = ("batch", "group", "layer", "none")


def _draw(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _filled(module, *inputs):
  """Random variables: no two neurons have the same bias, scale or variance."""
  shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
  leaves, treedef = jax.tree.flatten(shapes)
  values = [
    _draw(leaf.shape, i) / np.sqrt(max(1, np.prod(leaf.shape[:-1])))
    for i, leaf in enumerate(leaves)
  ]
  variables = treedef.unflatten([np.float32(value) for value in values])

  def positive(name, leaf):
    """Biases above 0, so that ReLU leaves neurons alive; variances."""
    positive = name.rpartition("/")[2] in ("bias", "scale", "var")
    return np.abs(leaf) + np.float32(0.3) if positive else leaf

  return tree.map_with_name(positive, variables)


def _sizes(spec, params):
  return alignment.group_sizes(spec, params)


def _placed(spec):
  return {(axis.leaf, axis.axis) for axes in spec.values() for axis in axes}


class _SelfAttention(nn.Module):
  """Attention with kernels [dim, dim], as BERT has it."""

  heads: int

  @nn.compact
  def __call__(self, x):
    def split(name):
      y = nn.Dense(x.shape[-1], name=name)(x)
      return y.reshape(*x.shape[:2], self.heads, -1)

    query, key, value = split("query"), split("key"), split("value")
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key)
    weights = nn.softmax(scores / query.shape[-1] ** 0.5)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)


class _AddNorm(nn.Module):
  """`dense` and `LayerNorm` around a residual connection."""

  @nn.compact
  def __call__(self, x, residual):
    x = nn.Dense(residual.shape[-1], name="dense")(x)
    return nn.LayerNorm(name="LayerNorm")(x + residual)


class _Attention(nn.Module):
  heads: int

  @nn.compact
  def __call__(self, x):
    y = _SelfAttention(self.heads, name="self")(x)
    return _AddNorm(name="output")(y, x)


class _Intermediate(nn.Module):
  width: int

  @nn.compact
  def __call__(self, x):
    return nn.gelu(nn.Dense(self.width, name="dense")(x))


class _Layer(nn.Module):
  heads: int
  hidden: int

  @nn.compact
  def __call__(self, x):
    x = _Attention(self.heads, name="attention")(x)
    y = _Intermediate(self.hidden, name="intermediate")(x)
    return _AddNorm(name="output")(y, x)


class _Layers(nn.Module):
  count: int
  heads: int
  hidden: int

  @nn.compact
  def __call__(self, x):
    for i in range(self.count):
      x = _Layer(self.heads, self.hidden, name=str(i))(x)
    return x


class _Encoder(nn.Module):
  count: int
  heads: int
  hidden: int

  @nn.compact
  def __call__(self, x):
    return _Layers(self.count, self.heads, self.hidden, name="layer")(x)


class _Embeddings(nn.Module):
  dim: int

  @nn.compact
  def __call__(self, ids):
    def embed(size, name):
      return nn.Embed(size, self.dim, name=name)

    words = embed(11, "word_embeddings")
    positions = embed(7, "position_embeddings")(jnp.arange(ids.shape[1])[None])
    types = embed(2, "token_type_embeddings")(jnp.zeros_like(ids))
    x = nn.LayerNorm(name="LayerNorm")(words(ids) + positions + types)
    return x, words.embedding


class _Pooler(nn.Module):
  @nn.compact
  def __call__(self, x):
    return jnp.tanh(nn.Dense(x.shape[-1], name="dense")(x[:, 0]))


class _BertModel(nn.Module):
  pooler: bool

  @nn.compact
  def __call__(self, ids):
    x, words = _Embeddings(8, name="embeddings")(ids)
    x = _Encoder(2, 4, 6, name="encoder")(x)
    return x, _Pooler(name="pooler")(x) if self.pooler else None, words


class _Transform(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.gelu(nn.Dense(x.shape[-1], name="dense")(x))
    return nn.LayerNorm(name="LayerNorm")(x)


class _Predictions(nn.Module):
  @nn.compact
  def __call__(self, x, words):
    x = _Transform(name="transform")(x) @ words.T
    bias = self.param("bias", nn.initializers.zeros, (words.shape[0],))
    return x + bias[None, None]


class _Cls(nn.Module):
  @nn.compact
  def __call__(self, x, words):
    return _Predictions(name="predictions")(x, words)


class _Bert(nn.Module):
  """A BERT with a head: a classifier, masked tokens, or the pooled output."""

  head: str

  @nn.compact
  def __call__(self, ids):
    x, pooled, words = _BertModel(self.head != "masked", name="bert")(ids)
    if self.head == "classifier":
      return nn.Dense(3, name="classifier")(pooled)
    if self.head == "masked":
      return _Cls(name="cls")(x, words)
    return pooled


_IDS = np.random.default_rng(0).integers(0, 11, (3, 5)).astype(np.int32)
_IMAGES = _draw((3, 8, 8, 3))


def _apply(module, params, inputs):
  whole = "params" in params
  return lambda p: module.apply(p if whole else {"params": p}, inputs)


def _check(spec, module, params, inputs):
  return alignment.check(
    spec, _apply(module, params, inputs), params, trials=2, tolerance=1e-5
  )


def _prove(test, spec, module, params, inputs):
  """The function stays, and would not with any leaf's axis left alone."""
  test.assertLess(_check(spec, module, params, inputs), 1e-5)
  apply_fn = jax.jit(_apply(module, params, inputs))
  want = apply_fn(params)
  for group, axes in spec.items():
    # A cycle: no neuron stays.
    n = _sizes(spec, params)[group]
    move = {group: np.roll(np.arange(n), 1)}
    for axis in axes:
      rest = {group: tuple(other for other in axes if other is not axis)}
      found = apply_fn(alignment.apply_permutations(rest, params, move))
      # A key's bias adds the same to a query's scores of all keys, which
      # softmax does not feel.
      if not axis.leaf.endswith("key/bias"):
        test.assertGreater(np.abs(found - want).max(), 1e-5, axis)


class ProofTest(parameterized.TestCase):
  @parameterized.parameters(*_NORMS)
  def test_resnet(self, norm):
    module = models.ResNet(depth=8, width=4, norm=norm, num_groups=2)
    variables = _filled(module, _IMAGES)
    num_groups = 2 if norm == "group" else None
    spec = alignment.resnet_spec(variables, num_groups=num_groups)
    _prove(self, spec, module, variables, _IMAGES)
    # Three streams and three blocks; nothing is left out but the ends.
    widths = {2} if norm == "group" else {4, 8, 16}
    self.assertLen(spec, 6)
    self.assertEqual(set(_sizes(spec, variables).values()), widths)
    for name, leaf in zip(
      tree.leaf_names(variables), jax.tree.leaves(variables), strict=True
    ):
      places = {place for leaf_, place in _placed(spec) if leaf_ == name}
      want = set(range(leaf.ndim)[-2:])
      if name == "params/Conv_0/kernel":
        want = {3}
      if name.startswith("params/Dense_0"):
        want -= {leaf.ndim - 1}
      self.assertEqual(places, want, name)

  def test_resnet_with_several_blocks_a_stage(self):
    module = models.ResNet(depth=14, width=2, norm="none")
    params = _filled(module, _IMAGES)["params"]
    spec = alignment.resnet_spec(params)
    self.assertLen(spec, 3 + 6)
    _check(spec, module, params, _IMAGES)

  def test_groups_of_channels_are_caught(self):
    """Channels that change their group of a GroupNorm change the function."""
    module = models.CNN(widths=(8,), norm="group", num_groups=4, num_classes=3)
    variables = _filled(module, _IMAGES)
    _check(
      alignment.vgg_spec(variables, num_groups=4), module, variables, _IMAGES
    )
    with self.assertRaisesRegex(SpecError, "group 'Conv_0' changes"):
      _check(alignment.vgg_spec(variables), module, variables, _IMAGES)

  @parameterized.product(
    norm=("batch", "group"), kind=("vgg", "flatten"), whole=(True, False)
  )
  def test_vgg_and_cnn(self, norm, kind, whole):
    if kind == "vgg":
      module = models.VGG(
        plan=(4, "M", 6), hidden=(5,), norm=norm, num_groups=2
      )
    else:
      module = models.CNN(
        widths=(4, 6), head="flatten", norm=norm, num_groups=2
      )
    variables = _filled(module, _IMAGES)
    spec = alignment.vgg_spec(
      variables if whole else variables["params"],
      num_groups=2 if norm == "group" else None,
    )
    if whole:
      _prove(self, spec, module, variables, _IMAGES)
      self.assertLen(spec, 3 if kind == "vgg" else 2)
    elif norm == "batch":
      # Statistics that stay behind are found.
      with self.assertRaisesRegex(SpecError, "changes the function"):
        alignment.check(
          spec,
          lambda params: module.apply({**variables, "params": params}, _IMAGES),
          variables["params"],
        )

  @parameterized.parameters("mean", "class")
  def test_vit(self, pool):
    module = models.ViT(
      patch=4, dim=8, depth=2, heads=4, mlp_dim=6, num_classes=3, pool=pool
    )
    params = _filled(module, _IMAGES)["params"]
    spec = alignment.vit_spec(params)
    _prove(self, spec, module, params, _IMAGES)
    self.assertEqual(
      _sizes(spec, params),
      {
        "stream": 8,
        "Block_0/Attention": 4,
        "Block_0/Dense_0": 6,
        "Block_1/Attention": 4,
        "Block_1/Dense_0": 6,
      },
    )

  @parameterized.parameters(
    ("classifier", {"pooler": 8}), ("masked", {}), ("pooled", {})
  )
  def test_bert(self, head, more):
    module = _Bert(head)
    params = _filled(module, _IDS)["params"]
    spec = alignment.bert_spec(params, heads=4)
    _prove(self, spec, module, params, _IDS)
    self.assertEqual(
      _sizes(spec, params),
      {
        "stream": 8,
        "layer/0/attention": 4,
        "layer/0/intermediate": 6,
        "layer/1/attention": 4,
        "layer/1/intermediate": 6,
      }
      | more,
    )

  def test_bert_without_a_name_above(self):
    params = _filled(_Bert("classifier"), _IDS)["params"]["bert"]
    spec = alignment.bert_spec(params, heads=4)
    pooled = lambda p: _BertModel(True).apply({"params": p}, _IDS)[1]  # noqa: E731
    alignment.check(spec, pooled, params, trials=1)
    self.assertIn(
      Axis("encoder/layer/1/output/dense/kernel", 1), spec["stream"]
    )
    # The pooled neurons are outputs here.
    self.assertNotIn("pooler", spec)


class WrongTest(parameterized.TestCase):
  """A specification that is wrong in one place names the leaf."""

  def _spec(self):
    module = models.ViT(
      patch=4, dim=8, depth=1, heads=2, mlp_dim=6, num_classes=3
    )
    params = _filled(module, _IMAGES)["params"]
    return module, params, dict(alignment.vit_spec(params))

  @parameterized.parameters(
    ("stream", "positions"),
    ("stream", "Block_0/Attention/out/bias"),
    ("Block_0/Attention", "Block_0/Attention/value/kernel"),
    ("Block_0/Dense_0", "Block_0/Dense_1/kernel"),
  )
  def test_axis_that_is_missing(self, group, leaf):
    module, params, spec = self._spec()
    rest = tuple(axis for axis in spec[group] if axis.leaf != leaf)
    self.assertLen(rest, len(spec[group]) - 1)
    with self.assertRaisesRegex(SpecError, f"'{leaf}' belongs to it"):
      _check({**spec, group: rest}, module, params, _IMAGES)

  def test_axis_too_many(self):
    module, params, spec = self._spec()
    leaf = "Block_0/Attention/query/kernel"
    heads = (*spec["Block_0/Attention"], Axis("Dense_0/bias", 0))
    with self.assertRaisesRegex(SpecError, "Dense_0/bias"):
      # 2 heads, 3 classes: caught by their numbers.
      _check({**spec, "Block_0/Attention": heads}, module, params, _IMAGES)
    wide = (*spec["Block_0/Attention"], Axis(leaf, 2, inner=2))
    with self.assertRaisesRegex(SpecError, f"'{leaf}' does not belong"):
      _check({**spec, "Block_0/Attention": wide}, module, params, _IMAGES)

  def test_streams_that_are_one(self):
    """The stage's stream without the block's last convolution."""
    module = models.ResNet(depth=8, width=4, norm="batch")
    variables = _filled(module, _IMAGES)
    spec = dict(alignment.resnet_spec(variables))
    leaf = "params/Block_0/Conv_1/kernel"
    spec["Conv_0"] = tuple(axis for axis in spec["Conv_0"] if axis.leaf != leaf)
    with self.assertRaisesRegex(SpecError, f"axis 3 of leaf '{leaf}' belongs"):
      _check(spec, module, variables, _IMAGES)


class ErrorsTest(parameterized.TestCase):
  def test_another_network(self):
    params = _filled(models.MLP(features=(4,)), _IMAGES)["params"]
    for build, leaf in (
      (alignment.resnet_spec, "Conv_0/kernel"),
      (alignment.vit_spec, "Patches/kernel"),
      (
        lambda params: alignment.bert_spec(params, 2),
        "embeddings/word_embeddings/embedding",
      ),
    ):
      with self.assertRaisesRegex(SpecError, f"have no leaf '{leaf}'"):
        build(params)

  def test_leaf_that_is_unknown(self):
    module = models.ResNet(depth=8, width=2)
    params = _filled(module, _IMAGES)["params"]
    params["Block_1"]["Extra"] = {"kernel": jnp.ones((2, 2))}
    with self.assertRaisesRegex(SpecError, "leaf 'Block_1/Extra/kernel'"):
      alignment.resnet_spec(params)

  @parameterized.parameters(0, 3)
  def test_heads(self, heads):
    params = _filled(_Bert("pooled"), _IDS)["params"]
    with self.assertRaisesRegex(SpecError, "divide the width 8 of leaf 'bert"):
      alignment.bert_spec(params, heads=heads)

  @parameterized.parameters(0, 3)
  def test_num_groups(self, num_groups):
    params = _filled(models.CNN(widths=(4,)), _IMAGES)["params"]
    with self.assertRaisesRegex(SpecError, "does not divide the 4 channels"):
      alignment.vgg_spec(params, num_groups=num_groups)


if __name__ == "__main__":
  absltest.main()
