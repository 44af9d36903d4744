"""Small networks with their specifications, written by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge.alignment import Axis


def draw(rng, *shape):
  return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)


def noisy(params, scale, seed=1):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: leaf + scale * jnp.asarray(rng.normal(size=leaf.shape), "f4"),
    params,
  )


def mlp(sizes=(5, 8, 7, 3), seed=0):
  """Parameters, specification and function of an MLP with biases."""
  rng = np.random.default_rng(seed)
  params = {
    f"Dense_{i}": {"kernel": draw(rng, m, n), "bias": draw(rng, n)}
    for i, (m, n) in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
  }
  depth = len(sizes) - 1
  spec = {
    f"hidden_{i}": (
      Axis(f"Dense_{i}/kernel", 1),
      Axis(f"Dense_{i}/bias", 0),
      Axis(f"Dense_{i + 1}/kernel", 0, incoming=False),
    )
    for i in range(depth - 1)
  }

  def apply_fn(params, x):
    for i in range(depth):
      layer = params[f"Dense_{i}"]
      x = x @ layer["kernel"] + layer["bias"][None]
      x = jnp.tanh(x) if i < depth - 1 else x
    return x

  return params, spec, apply_fn


def cnn(seed=0):
  """A plain CNN on 4 x 4 images of 2 channels, flattened before the head."""
  rng = np.random.default_rng(seed)
  params = {
    "params": {
      "Conv_0": {"kernel": draw(rng, 3, 3, 2, 6), "bias": draw(rng, 6)},
      "Conv_1": {"kernel": draw(rng, 3, 3, 6, 5), "bias": draw(rng, 5)},
      "Norm_0": {"scale": draw(rng, 6)},
      "Dense_0": {"kernel": draw(rng, 80, 3), "bias": draw(rng, 3)},
    },
    "batch_stats": {"Norm_0": {"mean": draw(rng, 6)}},
  }
  spec = {
    "first": (
      Axis("params/Conv_0/kernel", -1),
      Axis("params/Conv_0/bias", 0),
      Axis("params/Norm_0/scale", 0),
      Axis("batch_stats/Norm_0/mean", 0),
      Axis("params/Conv_1/kernel", -2, incoming=False),
    ),
    "second": (
      Axis("params/Conv_1/kernel", 3),
      Axis("params/Conv_1/bias", 0),
      Axis("params/Dense_0/kernel", 0, incoming=False, outer=16),
    ),
  }

  def conv(layer, x):
    x = jax.lax.conv_general_dilated(
      x,
      layer["kernel"],
      (1, 1),
      "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return x + layer["bias"][None, None, None]

  def apply_fn(variables, x):
    p = variables["params"]
    x = conv(p["Conv_0"], x.reshape(-1, 4, 4, 2))
    x = x - variables["batch_stats"]["Norm_0"]["mean"][None, None, None]
    x = jnp.tanh(x * p["Norm_0"]["scale"][None, None, None])
    x = jnp.tanh(conv(p["Conv_1"], x)).reshape(len(x), -1)
    return x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"][None]

  return params, spec, apply_fn


def transformer(seed=0, width=6, heads=3, head_width=2, hidden=8):
  """Two blocks with heads in one axis, an MLP and a residual stream."""
  rng = np.random.default_rng(seed)
  block = lambda: {  # noqa: E731
    "qkv": draw(rng, width, 3 * heads * head_width),
    "qkv_bias": draw(rng, 3 * heads * head_width),
    "out": draw(rng, heads * head_width, width),
    "up": draw(rng, width, hidden),
    "up_bias": draw(rng, hidden),
    "down": draw(rng, hidden, width),
    "scale": 1 + draw(rng, width),
  }
  params = {
    "embed": draw(rng, 4, width),
    "block_0": block(),
    "block_1": block(),
    "head": draw(rng, width, 3),
  }
  stream = [Axis("embed", 1), Axis("head", 0, incoming=False)]
  spec = {}
  for i in range(2):
    name = f"block_{i}"
    spec[f"heads_{i}"] = (
      Axis(f"{name}/qkv", 1, outer=3, inner=head_width),
      Axis(f"{name}/qkv_bias", 0, outer=3, inner=head_width),
      Axis(f"{name}/out", 0, incoming=False, inner=head_width),
    )
    spec[f"mlp_{i}"] = (
      Axis(f"{name}/up", 1),
      Axis(f"{name}/up_bias", 0),
      Axis(f"{name}/down", 0, incoming=False),
    )
    stream += [
      Axis(f"{name}/qkv", 0, incoming=False),
      Axis(f"{name}/out", 1),
      Axis(f"{name}/up", 0, incoming=False),
      Axis(f"{name}/down", 1),
      Axis(f"{name}/scale", 0),
    ]
  spec["stream"] = tuple(stream)

  def attend(block, x):
    qkv = x @ block["qkv"] + block["qkv_bias"][None, None]
    q, k, v = jnp.moveaxis(
      qkv.reshape(*x.shape[:2], 3, heads, head_width), 2, 0
    )
    scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k), axis=-1)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", scores, v)
    return mixed.reshape(*x.shape[:2], -1) @ block["out"]

  def apply_fn(params, x):
    x = x @ params["embed"]
    for i in range(2):
      block = params[f"block_{i}"]
      x = x + attend(block, x * block["scale"][None, None])
      up = jnp.tanh(x @ block["up"] + block["up_bias"][None, None])
      x = x + up @ block["down"]
    return x.mean(axis=1) @ params["head"]

  return params, spec, apply_fn


def inputs(name, seed=5):
  """A batch for the network of that name."""
  shapes = {"mlp": (16, 5), "cnn": (6, 32), "transformer": (3, 5, 4)}
  return draw(np.random.default_rng(seed), *shapes[name])


NETWORKS = {"mlp": mlp, "cnn": cnn, "transformer": transformer}
