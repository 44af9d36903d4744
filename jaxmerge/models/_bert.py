"""BERT-type encoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmerge.models import _packing, _transformer


class BertOutput(NamedTuple):
  """What a `Bert` returns.

  Attributes:
    hidden: the last hidden states, ``[b, n, dim]``.
    pooled: the pooler's output, ``[b, dim]``; None without a pooler.
  """

  hidden: jax.Array
  pooled: jax.Array | None


class _Part(nn.Module):
  """A part of the network, with the sizes of the whole."""

  heads: int
  mlp_dim: int
  activation: str
  epsilon: float
  dtype: jax.typing.DTypeLike | None
  depth: int = 0
  remat: bool = False

  def _dense(self, features: int, name: str) -> nn.Dense:
    return nn.Dense(features, dtype=self.dtype, name=name)

  def _part(self, kind: type[_Part], name: str) -> _Part:
    return kind(
      self.heads,
      self.mlp_dim,
      self.activation,
      self.epsilon,
      self.dtype,
      self.depth,
      self.remat,
      name=name,
    )


class _Self(_Part):
  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    rows = (mask.shape[0], mask.shape[-1], x.shape[-1])
    query, key, value = (
      self._dense(x.shape[-1], name)(x).reshape(rows)
      for name in ("query", "key", "value")
    )
    found = _transformer.attend(query, key, value, self.heads, mask)
    return found.reshape(x.shape)


class _Output(_Part):
  @nn.compact
  def __call__(self, x: jax.Array, residual: jax.Array) -> jax.Array:
    y = self._dense(residual.shape[-1], "dense")(x)
    return _transformer.layer_norm(y + residual, self.epsilon, "LayerNorm")


class _Attention(_Part):
  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    return self._part(_Output, "output")(self._part(_Self, "self")(x, mask), x)


class _Intermediate(_Part):
  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = self._dense(self.mlp_dim, "dense")(x)
    return _transformer.activation(self.activation)(y)


class _Layer(_Part):
  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    x = self._part(_Attention, "attention")(x, mask)
    y = self._part(_Intermediate, "intermediate")(x)
    return self._part(_Output, "output")(y, x)


class _Layers(_Part):
  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    kind = nn.remat(_Layer) if self.remat else _Layer
    for number in range(self.depth):
      x = self._part(kind, str(number))(x, mask)
    return x


class _Encoder(_Part):
  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    return self._part(_Layers, "layer")(x, mask)


class _Embeddings(nn.Module):
  vocab_size: int
  dim: int
  positions: int
  types: int
  epsilon: float
  dtype: jax.typing.DTypeLike | None

  @nn.compact
  def __call__(
    self, ids: jax.Array, types: jax.Array, places: jax.Array
  ) -> jax.Array:
    def embed(size: int, name: str) -> nn.Embed:
      return nn.Embed(size, self.dim, dtype=self.dtype, name=name)

    x = embed(self.vocab_size, "word_embeddings")(ids)
    x = x + embed(self.types, "token_type_embeddings")(types)
    x = x + embed(self.positions, "position_embeddings")(places)
    return _transformer.layer_norm(x, self.epsilon, "LayerNorm")


class _Pooler(nn.Module):
  dtype: jax.typing.DTypeLike | None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return jnp.tanh(nn.Dense(x.shape[-1], dtype=self.dtype, name="dense")(x))


class Bert(nn.Module):
  """A BERT-type encoder of token ids, without dropout.

  The leaves have Hugging Face's names, ``embeddings/word_embeddings``,
  ``encoder/layer/0/attention/self/query`` and so on, so that
  `jaxmerge.alignment.bert_spec` and `jaxmerge.checkpoints.hugging_face` need no
  table of names. Attention and LayerNorm reckon in float32 whatever ``dtype``.

  Attributes:
    vocab_size: The number of tokens.
    dim: The width of the residual stream.
    depth: The number of layers.
    heads: The number of attention heads, a divisor of ``dim``.
    mlp_dim: The hidden width of the layers' networks.
    positions: The largest number of tokens of a text.
    types: The number of token types.
    activation: Of the layers' networks, by its name in a config.json.
    epsilon: Of the LayerNorms.
    pooler: Whether it ends with a pooler, a dense layer on the first token.
    dtype: What it reckons in, ``jnp.bfloat16`` say; None for that of the
      parameters, which are float32.
    remat: Whether the layers' activations are computed again in the backward
      pass instead of held.

  Raises:
    ValueError: If an attribute is unknown or out of its range, or a text is too
      long.

  References:
    Devlin et al., `BERT <https://arxiv.org/abs/1810.04805>`_, 2019

  >>> import jax
  >>> model = Bert(vocab_size=9, dim=8, depth=1, heads=2, mlp_dim=16)
  >>> ids = jnp.array([[1, 4, 2, 0]])
  >>> variables = model.init(jax.random.key(0), ids, ids > 0)
  >>> model.apply(variables, ids, ids > 0).hidden.shape
  (1, 4, 8)
  """

  vocab_size: int = 30522
  dim: int = 768
  depth: int = 12
  heads: int = 12
  mlp_dim: int = 3072
  positions: int = 512
  types: int = 2
  activation: str = "gelu"
  epsilon: float = 1e-12
  pooler: bool = False
  dtype: jax.typing.DTypeLike | None = None
  remat: bool = False

  def __post_init__(self) -> None:
    """Validates the attributes."""
    _transformer.check_sizes(
      "Bert",
      self.heads,
      self.dim,
      vocab_size=self.vocab_size,
      depth=self.depth,
      mlp_dim=self.mlp_dim,
      positions=self.positions,
      types=self.types,
    )
    _transformer.activation(self.activation)
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    ids: jax.Array,
    mask: jax.Array | _packing.Packing | None = None,
    types: jax.Array | None = None,
  ) -> BertOutput:
    """Encodes texts.

    Args:
      ids: Integer tokens, ``[b, n]``.
      mask: bool ``[b, n]``, False for padding; None for no padding; or what
        `pack_texts` made of it, which saves most of the work on padding.
      types: Integer token types, ``[b, n]``; None for 0.

    Returns:
      The output.
    """
    if ids.shape[1] > self.positions:
      raise ValueError(
        f"the texts have {ids.shape[1]} tokens, but this Bert has positions for"
        f" {self.positions}; cut them"
      )
    if types is None:
      types = jnp.zeros_like(ids)
    places = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    packing = None
    if mask is None:
      mask = jnp.ones(ids.shape, bool)
    if isinstance(mask, _packing.Packing):
      packing, mask = mask, _packing.attention_mask(mask)
      ids, types = (_packing.packed(part, packing) for part in (ids, types))
      places = packing.position
    x = _Embeddings(
      self.vocab_size,
      self.dim,
      self.positions,
      self.types,
      self.epsilon,
      self.dtype,
      name="embeddings",
    )(ids, types, places)
    # All tokens in one axis: XLA is slow at the gradients of products over two.
    shape = x.shape
    x = x.reshape(-1, self.dim)
    x = _Encoder(
      self.heads,
      self.mlp_dim,
      self.activation,
      self.epsilon,
      self.dtype,
      self.depth,
      self.remat,
      name="encoder",
    )(x, mask).reshape(shape)
    if packing is not None:
      x = _packing.unpacked(x, packing)
    pooled = None
    if self.pooler:
      pooled = _Pooler(self.dtype, name="pooler")(x[:, 0])
    return BertOutput(x, pooled)


def bert_from_config(config: Mapping[str, Any], **options: Any) -> Bert:
  """The network that a Hugging Face config.json describes.

  Args:
    config: what the file holds.
    **options: other attributes of `Bert`: pooler, dtype, remat.

  Returns:
    The network.

  Raises:
    ValueError: it is of another kind, or has what `Bert` does not.

  >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "vocab_size": 9}
  >>> bert_from_config({"model_type": "bert", **sizes}).dim
  8
  """
  kind = config.get("model_type")
  if kind != "bert":
    raise ValueError(
      f"config.json describes a model of the type {kind!r}, not 'bert'"
    )
  positions = config.get("position_embedding_type", "absolute")
  if positions != "absolute" or config.get("is_decoder", False):
    raise ValueError(
      "only encoders with absolute positions are known, not"
      f" position_embedding_type={positions!r} and"
      f" is_decoder={config.get('is_decoder', False)}"
    )
  # Field -> its name in config.json; both have the sizes of BERT base.
  fields = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "positions": "max_position_embeddings",
    "types": "type_vocab_size",
    "activation": "hidden_act",
    "epsilon": "layer_norm_eps",
  }
  known = {
    field: config[name] for field, name in fields.items() if name in config
  }
  return Bert(**known, **options)


def mean_embedding(hidden: jax.Array, mask: jax.Array) -> jax.Array:
  """The mean of the hidden states of a text's tokens, of length 1.

  Args:
    hidden: ``[b, n, dim]``.
    mask: bool ``[b, n]``, False for padding; at least one token a text.

  Returns:
    float32 ``[b, dim]``.

  References:
    Reimers and Gurevych, `Sentence-BERT <https://arxiv.org/abs/1908.10084>`_,
    2019

  >>> hidden = jnp.array([[[3.0, 4.0], [9.0, 9.0]]])
  >>> print(mean_embedding(hidden, jnp.array([[True, False]])))
  [[0.6 0.8]]
  """
  weights = mask.astype(jnp.float32)[:, :, None]
  total = (hidden.astype(jnp.float32) * weights).sum(axis=1)
  return _transformer.unit(total / weights.sum(axis=1))
