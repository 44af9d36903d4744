"""CLIP: an image and a text encoder with one space of embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmerge.models import _transformer

# CLIP's first releases said 2 and meant the largest token of a text.
_LEGACY_END = 2


class ClipSizes(NamedTuple):
  """The sizes of one of the two encoders; the defaults are those of B/32.

  Attributes:
    dim: the width of the residual stream.
    depth: the number of layers.
    heads: the number of attention heads, a divisor of `dim`.
    mlp_dim: the hidden width of the layers' networks.
    activation: of the layers' networks, by its name in a config.json.
    epsilon: of the LayerNorms.
    image_size: side of the images in pixels; of the image encoder.
    patch: side of a patch in pixels, a divisor of it; of the image encoder.
    vocab_size: number of tokens; of the text encoder.
    positions: the largest number of tokens of a text; of the text encoder.
    end: the token that ends a text; of the text encoder.
  """

  dim: int = 768
  depth: int = 12
  heads: int = 12
  mlp_dim: int = 3072
  activation: str = "quick_gelu"
  epsilon: float = 1e-5
  image_size: int = 224
  patch: int = 32
  vocab_size: int = 49408
  positions: int = 77
  end: int = _LEGACY_END


#: The text encoder of B/32 and B/16.
TEXT = ClipSizes(dim=512, heads=8, mlp_dim=2048)


class _Attention(nn.Module):
  sizes: ClipSizes
  dtype: jax.typing.DTypeLike | None
  causal: bool

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    def dense(name: str, y: jax.Array) -> jax.Array:
      return nn.Dense(self.sizes.dim, dtype=self.dtype, name=name)(y)

    query, key, value = (dense(f"{name}_proj", x) for name in "qkv")
    found = _transformer.attend(
      query, key, value, self.sizes.heads, mask, self.causal
    )
    return dense("out_proj", found)


class _Mlp(nn.Module):
  sizes: ClipSizes
  dtype: jax.typing.DTypeLike | None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = nn.Dense(self.sizes.mlp_dim, dtype=self.dtype, name="fc1")(x)
    y = _transformer.activation(self.sizes.activation)(y)
    return nn.Dense(self.sizes.dim, dtype=self.dtype, name="fc2")(y)


class _Layer(nn.Module):
  sizes: ClipSizes
  dtype: jax.typing.DTypeLike | None
  causal: bool

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    y = _transformer.layer_norm(x, self.sizes.epsilon, "layer_norm1")
    attention = _Attention(
      self.sizes, self.dtype, self.causal, name="self_attn"
    )
    x = x + attention(y, mask)
    y = _transformer.layer_norm(x, self.sizes.epsilon, "layer_norm2")
    return x + _Mlp(self.sizes, self.dtype, name="mlp")(y)


class _Layers(nn.Module):
  sizes: ClipSizes
  dtype: jax.typing.DTypeLike | None
  causal: bool
  remat: bool

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    kind = nn.remat(_Layer) if self.remat else _Layer
    for number in range(self.sizes.depth):
      layer = kind(self.sizes, self.dtype, self.causal, name=str(number))
      x = layer(x, mask)
    return x


class _Encoder(nn.Module):
  sizes: ClipSizes
  dtype: jax.typing.DTypeLike | None
  causal: bool
  remat: bool

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    return _Layers(
      self.sizes, self.dtype, self.causal, self.remat, name="layers"
    )(x, mask)


class _VisionEmbeddings(nn.Module):
  sizes: ClipSizes
  dtype: jax.typing.DTypeLike | None

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    sizes = self.sizes
    sides = (sizes.patch, sizes.patch)
    x = nn.Conv(
      sizes.dim,
      sides,
      sides,
      padding="VALID",
      use_bias=False,
      dtype=self.dtype,
      name="patch_embedding",
    )(images)
    x = x.reshape(len(x), -1, sizes.dim)
    token = self.param(
      "class_embedding", nn.initializers.normal(0.02), (sizes.dim,)
    )
    first = jnp.broadcast_to(token.astype(x.dtype), (len(x), 1, sizes.dim))
    x = jnp.concatenate([first, x], axis=1)
    count = (sizes.image_size // sizes.patch) ** 2 + 1
    places = nn.Embed(
      count, sizes.dim, dtype=self.dtype, name="position_embedding"
    )(jnp.arange(count, dtype=jnp.int32)[None])
    return x + places


class _Vision(nn.Module):
  sizes: ClipSizes
  dtype: jax.typing.DTypeLike | None
  remat: bool

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    epsilon = self.sizes.epsilon
    x = _VisionEmbeddings(self.sizes, self.dtype, name="embeddings")(images)
    # The name is misspelt in every checkpoint.
    x = _transformer.layer_norm(x, epsilon, "pre_layrnorm")
    x = _Encoder(self.sizes, self.dtype, False, self.remat, name="encoder")(x)
    return _transformer.layer_norm(x[:, 0], epsilon, "post_layernorm")


class _TextEmbeddings(nn.Module):
  sizes: ClipSizes
  dtype: jax.typing.DTypeLike | None

  @nn.compact
  def __call__(self, ids: jax.Array) -> jax.Array:
    def embed(size: int, name: str) -> nn.Embed:
      return nn.Embed(size, self.sizes.dim, dtype=self.dtype, name=name)

    places = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    x = embed(self.sizes.vocab_size, "token_embedding")(ids)
    return x + embed(self.sizes.positions, "position_embedding")(places)


class _Text(nn.Module):
  sizes: ClipSizes
  dtype: jax.typing.DTypeLike | None
  remat: bool

  @nn.compact
  def __call__(self, ids: jax.Array, mask: jax.Array | None) -> jax.Array:
    x = _TextEmbeddings(self.sizes, self.dtype, name="embeddings")(ids)
    x = _Encoder(self.sizes, self.dtype, True, self.remat, name="encoder")(
      x, mask
    )
    x = _transformer.layer_norm(x, self.sizes.epsilon, "final_layer_norm")
    if self.sizes.end == _LEGACY_END:
      last = ids.argmax(axis=-1)
    else:
      last = (ids == self.sizes.end).argmax(axis=-1)
    return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]


class Clip(nn.Module):
  """CLIP: embeddings of images and of texts, and their products.

  The leaves have Hugging Face's names, ``vision_model/encoder/layers/0`` and so
  on: `jaxmerge.checkpoints.hugging_face` needs no table. Methods:
  `encode_image`, `encode_text`.

  Attributes:
    vision: The sizes of the image encoder.
    text: The sizes of the text encoder.
    embedding: The width of the embeddings.
    dtype: What it reckons in; None for that of the parameters, float32.
    remat: Whether the layers' activations are computed again in the backward
      pass instead of held.

  Raises:
    ValueError: If a size is out of its range, or an input does not fit.

  References:
    Radford et al., `Learning transferable visual models from natural language
    supervision <https://arxiv.org/abs/2103.00020>`_, 2021

  >>> import jax
  >>> small = ClipSizes(8, 1, 2, 16, image_size=8, patch=4, vocab_size=9)
  >>> model = Clip(small, small, 6)
  >>> images, ids = jnp.zeros((2, 8, 8, 3)), jnp.array([[1, 5, 8]])
  >>> variables = model.init(jax.random.key(0), images, ids)
  >>> model.apply(variables, images, method="encode_image").shape
  (2, 6)
  """

  vision: ClipSizes = ClipSizes()
  text: ClipSizes = TEXT
  embedding: int = 512
  dtype: jax.typing.DTypeLike | None = None
  remat: bool = False

  def __post_init__(self) -> None:
    """Validates the attributes."""
    for name, sizes in (("vision", self.vision), ("text", self.text)):
      _transformer.check_sizes(
        f"Clip's {name} encoder",
        sizes.heads,
        sizes.dim,
        depth=sizes.depth,
        mlp_dim=sizes.mlp_dim,
        image_size=sizes.image_size,
        patch=sizes.patch,
        vocab_size=sizes.vocab_size,
        positions=sizes.positions,
      )
      _transformer.activation(sizes.activation)
    if self.vision.image_size % self.vision.patch:
      raise ValueError(
        f"patches of side {self.vision.patch} do not divide images of side"
        f" {self.vision.image_size}"
      )
    super().__post_init__()

  def setup(self) -> None:
    """Makes the parts."""
    self.vision_model = _Vision(self.vision, self.dtype, self.remat)
    self.text_model = _Text(self.text, self.dtype, self.remat)
    self.visual_projection = nn.Dense(
      self.embedding, use_bias=False, dtype=self.dtype
    )
    self.text_projection = nn.Dense(
      self.embedding, use_bias=False, dtype=self.dtype
    )
    # log(1 / 0.07), as the paper has it.
    self.logit_scale = self.param(
      "logit_scale", nn.initializers.constant(2.6592), ()
    )

  def encode_image(self, images: jax.Array) -> jax.Array:
    """Embeds images.

    Args:
      images: Normalised images, ``[b, side, side, 3]``.

    Returns:
      ``[b, embedding]``, not of length 1.
    """
    side = self.vision.image_size
    if images.ndim != 4 or images.shape[1:] != (side, side, 3):
      raise ValueError(
        f"the images have the shape {images.shape}, but this Clip takes [b,"
        f" {side}, {side}, 3]; resize them"
      )
    return self.visual_projection(self.vision_model(images))

  def encode_text(
    self, ids: jax.Array, mask: jax.Array | None = None
  ) -> jax.Array:
    """Embeds texts.

    Args:
      ids: Integer tokens, ``[b, n]``, with the token that ends a text.
      mask: bool ``[b, n]``, False for padding; None for no mask, which does the
        same where padding is behind the end.

    Returns:
      ``[b, embedding]``, not of length 1.
    """
    if ids.shape[1] > self.text.positions:
      raise ValueError(
        f"the texts have {ids.shape[1]} tokens, but this Clip has positions for"
        f" {self.text.positions}; cut them"
      )
    return self.text_projection(self.text_model(ids, mask))

  def __call__(
    self, images: jax.Array, ids: jax.Array, mask: jax.Array | None = None
  ) -> jax.Array:
    """The logits of each text for each image.

    Args:
      images: As in `encode_image`.
      ids: As in `encode_text`.
      mask: As in `encode_text`.

    Returns:
      float32 ``[images, texts]``: the cosine times ``exp(logit_scale)``.
    """
    image = _transformer.unit(self.encode_image(images))
    text = _transformer.unit(self.encode_text(ids, mask))
    return jnp.exp(self.logit_scale) * (image @ text.T)


def clip_from_config(config: Mapping[str, Any], **options: Any) -> Clip:
  """The network that a Hugging Face config.json describes.

  Args:
    config: what the file holds.
    **options: other attributes of `Clip`: dtype, remat.

  Returns:
    The network.

  Raises:
    ValueError: it is of another kind.

  >>> clip_from_config({"model_type": "clip"}).vision.patch
  32
  """
  kind = config.get("model_type")
  if kind != "clip":
    raise ValueError(
      f"config.json describes a model of the type {kind!r}, not 'clip'"
    )
  fields = {
    "dim": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "activation": "hidden_act",
    "epsilon": "layer_norm_eps",
    "image_size": "image_size",
    "patch": "patch_size",
    "vocab_size": "vocab_size",
    "positions": "max_position_embeddings",
    # transformers' own default, where the file does not say it.
    "end": "eos_token_id",
  }

  def sizes(name: str, default: ClipSizes) -> ClipSizes:
    part = config.get(f"{name}_config") or {}
    known = {field: part[key] for field, key in fields.items() if key in part}
    return default._replace(**known)

  text = TEXT
  if "eos_token_id" not in (config.get("text_config") or {}):
    text = text._replace(end=49407)
  return Clip(
    sizes("vision", ClipSizes()),
    sizes("text", text),
    config.get("projection_dim", 512),
    **options,
  )


def clip_from_open_clip(config: Mapping[str, Any], **options: Any) -> Clip:
  """The network that an open_clip_config.json describes.

  Args:
    config: its `model_cfg`: `embed_dim`, `vision_cfg`, `text_cfg`, and
      `quick_gelu` where it is so (OpenAI's weights).
    **options: other attributes of `Clip`: dtype, remat.

  Returns:
    The network.

  Raises:
    ValueError: it has what `Clip` does not.

  >>> tower = {"width": 768, "layers": 12}
  >>> config = {"embed_dim": 512, "text_cfg": {"width": 512, "heads": 8}}
  >>> clip_from_open_clip({**config, "vision_cfg": tower}).vision.patch
  16
  """
  known = {
    "vision_cfg": {
      "image_size",
      "layers",
      "width",
      "patch_size",
      "head_width",
      "mlp_ratio",
    },
    "text_cfg": {
      "context_length",
      "vocab_size",
      "width",
      "heads",
      "layers",
      "mlp_ratio",
    },
  }
  for part, names in known.items():
    unknown = sorted(set(config.get(part) or {}) - names)
    if unknown:
      raise ValueError(
        f"{part} of open_clip_config.json has {unknown[0]!r}, which Clip has"
        " not"
      )
  if not isinstance(config.get("embed_dim"), int):
    raise ValueError("open_clip_config.json has no embed_dim")
  depth = (config.get("vision_cfg") or {}).get("layers", 12)
  if not isinstance(depth, int):
    raise ValueError(
      f"vision_cfg has layers={depth}, a ResNet; Clip has a transformer"
    )
  activation = "quick_gelu" if config.get("quick_gelu") else "gelu"
  vision, text = config.get("vision_cfg") or {}, config.get("text_cfg") or {}

  def sizes(part: Mapping[str, Any], width: int, heads: int) -> ClipSizes:
    return ClipSizes(
      dim=width,
      depth=part.get("layers", 12),
      heads=heads,
      mlp_dim=int(width * part.get("mlp_ratio", 4.0)),
      activation=activation,
      image_size=part.get("image_size", 224),
      patch=part.get("patch_size", 16),
      vocab_size=part.get("vocab_size", 49408),
      positions=part.get("context_length", 77),
    )

  wide, narrow = vision.get("width", 768), text.get("width", 512)
  return Clip(
    sizes(vision, wide, wide // vision.get("head_width", 64)),
    sizes(text, narrow, text.get("heads", 8)),
    config["embed_dim"],
    **options,
  )
