"""CLIP's checkpoints in the layout of open_clip, as pytrees and back.

The layout differs from Hugging Face's in its names, in one tensor for query,
key and value, and in projections that are not transposed.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxmerge.checkpoints import _safetensors, _store, hugging_face

PyTree = Any

#: The file of the weights in a folder.
WEIGHTS = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"

# open_clip's name -> Hugging Face's, one after the other.
_RENAMES = (
  (r"^text\.", ""),
  (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
  (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
  (
    r"^visual\.positional_embedding$",
    "vision_model.embeddings.position_embedding.weight",
  ),
  (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
  (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
  (r"^visual\.proj$", "visual_projection.weight"),
  (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
  (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
  (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
  (
    r"^positional_embedding$",
    "text_model.embeddings.position_embedding.weight",
  ),
  (r"^ln_final\.", "text_model.final_layer_norm."),
  (r"^text_projection$", "text_projection.weight"),
  (r"\.ln_([12])\.", r".layer_norm\1."),
  (r"\.mlp\.c_fc\.", ".mlp.fc1."),
  (r"\.mlp\.c_proj\.", ".mlp.fc2."),
  (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
)
_PROJECTIONS = ("visual_projection.weight", "text_projection.weight")
_FUSED = re.compile(r"(.*)\.attn\.in_proj_(weight|bias)")


class _Part(NamedTuple):
  """Where a tensor of Hugging Face's layout is in open_clip's.

  Attributes:
    shape: its shape, in Hugging Face's layout.
    source: the tensor of open_clip's.
    place: of the three that are one there, 0 to 2; None for all of it.
    transposed: whether it is transposed there.
  """

  shape: tuple[int, ...]
  source: str
  place: int | None = None
  transposed: bool = False


def tensor_name(name: str) -> str:
  """Hugging Face's name of a tensor of open_clip.

  >>> tensor_name("visual.transformer.resblocks.3.ln_1.weight")
  'vision_model.encoder.layers.3.layer_norm1.weight'
  """
  for pattern, new in _RENAMES:
    name = re.sub(pattern, new, name)
  return name


def _parts(infos: Mapping[str, Any]) -> dict[str, _Part]:
  """The tensors of Hugging Face's layout that a checkpoint has."""
  found: dict[str, _Part] = {}
  for source, info in infos.items():
    shape = tuple(info.shape)
    fused = _FUSED.fullmatch(source)
    if fused and shape and shape[0] % 3 == 0:
      layer, kind = tensor_name(f"{fused[1]}."), fused[2]
      for place, letter in enumerate("qkv"):
        found[f"{layer}self_attn.{letter}_proj.{kind}"] = _Part(
          (shape[0] // 3, *shape[1:]), source, place
        )
      continue
    name = tensor_name(source)
    turned = name in _PROJECTIONS and len(shape) == 2
    found[name] = _Part(
      shape[::-1] if turned else shape, source, transposed=turned
    )
  return found


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
  """Reads the sizes of the network from open_clip_config.json.

  Args:
    folder: of the checkpoint.

  Returns:
    What `jaxmerge.models.clip_from_open_clip` takes.

  Raises:
    CheckpointError: it is missing or damaged.
  """
  path = pathlib.Path(folder) / CONFIG
  try:
    config = json.loads(path.read_text())
    return dict(config.get("model_cfg", config))
  except OSError as error:
    raise _store.CheckpointError(
      f"{path} cannot be read ({error.strerror}). Give the folder of a whole"
      f" checkpoint: {CONFIG} and {WEIGHTS}."
    ) from error
  except (ValueError, TypeError, AttributeError) as error:
    raise _store.CheckpointError(
      f"{path} is damaged ({error}). Download it again."
    ) from error


def load(
  folder: str | os.PathLike[str],
  like: PyTree,
  *,
  dtype: Any = np.float32,
  weights_only: bool = False,
) -> PyTree:
  """Reads the parameters of a `jaxmerge.models.Clip`.

  Args:
    folder: of the checkpoint, or its one file.
    like: as in `hugging_face.load`, and so are the others.
    dtype: of the result.
    weights_only: whether pickled weights may be read.

  Returns:
    NumPy arrays, in the structure of `like`.

  Raises:
    CheckpointError: as in `hugging_face.load`.
  """
  path = pathlib.Path(folder)
  if (path / WEIGHTS).exists():
    path = path / WEIGHTS
  infos, read = hugging_face.opened(path, weights_only)
  parts = _parts(infos)

  def read_parts(names: list[str]) -> dict[str, np.ndarray]:
    whole = read(sorted({parts[name].source for name in names}))
    found = {}
    for name in names:
      part = parts[name]
      array = whole[part.source]
      if part.place is not None:
        size = part.shape[0]
        array = array[part.place * size : (part.place + 1) * size]
      found[name] = array.T if part.transposed else array
    return found

  return hugging_face.fit(folder, parts, read_parts, like, dtype=dtype)


def save(
  folder: str | os.PathLike[str],
  params: PyTree,
  *,
  source: str | os.PathLike[str],
  weights_only: bool = False,
) -> None:
  """Writes the parameters of a `jaxmerge.models.Clip` as open_clip has them.

  Args:
    folder: is made where it does not exist.
    params: the parameters.
    source: the folder that they came from, whose names are taken and whose
      other files (configuration, tokenizer) are copied.
    weights_only: whether the source may be pickled, see `load`.

  Raises:
    CheckpointError: the source cannot be read, is the folder itself, or has
      not the tensors of the parameters.
  """
  target, origin = pathlib.Path(folder), pathlib.Path(source)
  hugging_face.check_apart(target, origin)
  infos, _ = hugging_face.opened(
    origin / WEIGHTS if (origin / WEIGHTS).exists() else origin, weights_only
  )
  parts = _parts(infos)
  mine = hugging_face.to_tensors(params)
  if set(mine) != set(parts):
    odd = sorted(set(mine) ^ set(parts))
    raise _store.CheckpointError(
      f"{origin} and the parameters differ in {len(odd)} tensors:"
      f" {_safetensors.some(odd)}. Give the checkpoint that they came from."
    )
  pieces: dict[str, list[tuple[int, np.ndarray]]] = {}
  for name, part in parts.items():
    array = mine[name].T if part.transposed else mine[name]
    pieces.setdefault(part.source, []).append((part.place or 0, array))
  arrays = {
    name: np.concatenate([array for _, array in sorted(found, key=_first)])
    if len(found) > 1
    else found[0][1]
    for name, found in pieces.items()
  }
  _safetensors.write(target, arrays, single=WEIGHTS)
  hugging_face.copy_others(origin, target)


def _first(pair: tuple[int, np.ndarray]) -> int:
  return pair[0]
