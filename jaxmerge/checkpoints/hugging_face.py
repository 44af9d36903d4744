"""Checkpoints in Hugging Face's layout, as pytrees and back.

A tensor's name is the path of its leaf with dots, its last part translated:

| leaf | tensor |
|---|---|
| `kernel` `[in, out]` | `weight` `[out, in]` |
| `kernel` `[height, width, in, out]` | `weight` `[out, in, height, width]` |
| `scale` of a norm, `embedding` | `weight` |
| any other | its own name |

so networks whose modules have the names of the checkpoint, as
`jaxmerge.models.Bert` has, need no table.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxmerge import tree as tree_lib
from jaxmerge.checkpoints import _pickled, _safetensors, _store

PyTree = Any
Read = Callable[[list[str]], dict[str, np.ndarray]]

#: Buffers that are no parameters.
BUFFERS = (
  r"(^|.*\.)position_ids",
  r"(^|.*\.)rotary_emb\.inv_freq",
  r"(^|.*\.)attn\.masked_bias",
)
_WEIGHTS = ("kernel", "scale", "embedding")


def _named(tree: PyTree) -> dict[str, Any]:
  """Path -> leaf, in the order of the leaves."""
  names = tree_lib.leaf_names(tree)
  return dict(zip(names, jax.tree.leaves(tree), strict=True))


def tensor_name(path: str) -> str:
  """The tensor of a leaf.

  Args:
    path: of the leaf, with slashes.

  Returns:
    Its name.

  >>> tensor_name("encoder/layer/0/output/dense/kernel")
  'encoder.layer.0.output.dense.weight'
  """
  *modules, last = path.split("/")
  return ".".join([*modules, "weight" if last in _WEIGHTS else last])


def _to_tensor(path: str, leaf: Any) -> np.ndarray:
  array = np.asarray(leaf)
  if path.rpartition("/")[2] != "kernel":
    return array
  return array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)


def _tensor_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  if path.rpartition("/")[2] != "kernel":
    return shape
  if len(shape) not in (2, 4):
    raise _store.CheckpointError(
      f"The leaf '{path}' of shape {shape} is a kernel of neither a dense layer"
      " nor a convolution of images: its tensor is not known."
    )
  return tuple(shape[i] for i in ((1, 0) if len(shape) == 2 else (3, 2, 0, 1)))


def _to_leaf(path: str, tensor: np.ndarray) -> np.ndarray:
  if path.rpartition("/")[2] != "kernel":
    return tensor
  return tensor.T if tensor.ndim == 2 else tensor.transpose(2, 3, 1, 0)


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
  """Reads config.json.

  Args:
    folder: of the checkpoint.

  Returns:
    What it holds.

  Raises:
    CheckpointError: it is missing or damaged.
  """
  path = pathlib.Path(folder) / "config.json"
  try:
    config = json.loads(path.read_text())
  except OSError as error:
    raise _store.CheckpointError(
      f"{path} cannot be read ({error.strerror}). Give the folder of a whole"
      " checkpoint: config.json and model.safetensors."
    ) from error
  except ValueError as error:
    raise _store.CheckpointError(
      f"{path} is damaged ({error}). Download it again."
    ) from error
  if not isinstance(config, dict):
    raise _store.CheckpointError(
      f"{path} is damaged: it holds no object. Download it again."
    )
  return config


def locate(
  source: str | os.PathLike[str],
  *,
  revision: str | None = None,
  weights_only: bool = False,
) -> pathlib.Path:
  """The folder of a checkpoint, downloaded where it is a hub's id.

  Args:
    source: a folder, or an id such as "sentence-transformers/all-MiniLM-L6-v2".
    revision: branch, tag or commit of the hub's; None for the main one.
    weights_only: whether pickled weights are downloaded, too, see `load`.

  Returns:
    The folder.

  Raises:
    CheckpointError: there is no such folder, and the hub cannot be had.
  """
  path = pathlib.Path(source)
  if path.is_dir():
    return path
  name = os.fspath(source)
  if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
    raise _store.CheckpointError(
      f"{name} is no folder, and no id of a hub (owner/name). Give one of them."
    )
  advice = (
    f"Place its config.json, model.safetensors and tokenizer.json in a folder,"
    f" with a network by: hf download {name} --local-dir <folder>; then give"
    " the folder."
  )
  try:
    import huggingface_hub
  except ImportError as error:
    raise _store.CheckpointError(
      f"There is no folder {name}, and no huggingface_hub to download it: pip"
      f" install 'jaxmerge[hub]'. Or: {advice}"
    ) from error
  try:
    wanted = ["*.json", "*.safetensors", "*.txt"]
    found = huggingface_hub.snapshot_download(
      name,
      revision=revision,
      allow_patterns=[*wanted, "*.bin"] if weights_only else wanted,
    )
  except Exception as error:  # Of many kinds, none of them ours.
    raise _store.CheckpointError(
      f"There is no folder {name}, and the hub does not give it"
      f" ({type(error).__name__}: {error}). {advice}"
    ) from error
  return pathlib.Path(found)


def _prefix(infos: Mapping[str, Any], wanted: list[str]) -> str:
  """What all names begin with in the checkpoint: "", or "bert." say."""
  if any(name in infos for name in wanted):
    return ""
  first = wanted[0]
  found = {
    name.removesuffix(first) for name in infos if name.endswith(f".{first}")
  }
  return found.pop() if len(found) == 1 else ""


def opened(
  folder: str | os.PathLike[str], weights_only: bool
) -> tuple[Mapping[str, Any], Read]:
  """The tensors of a folder: name -> what has a shape; reads some of them."""
  path = pathlib.Path(folder)
  safe = path.suffix == ".safetensors" or any(path.glob("*.safetensors"))
  if weights_only and not safe and path.exists():
    arrays = _pickled.read(path)
    return arrays, lambda names: {name: arrays[name] for name in names}
  infos = _safetensors.tensors(path)
  return infos, lambda names: _safetensors.read(infos, names)


def load(
  folder: str | os.PathLike[str],
  like: PyTree,
  *,
  ignore: tuple[str, ...] = (),
  dtype: Any = np.float32,
  weights_only: bool = False,
) -> PyTree:
  """Reads the parameters of a network.

  Args:
    folder: of the checkpoint, or one .safetensors file.
    like: pytree of arrays or `jax.ShapeDtypeStruct`: the structure and shapes
      of the network's parameters.
    ignore: regular expressions of whole names of tensors that the network need
      not have, beside `BUFFERS`.
    dtype: of the result; None for that of the file.
    weights_only: whether a folder without safetensors may have its pickled
      files (pytorch_model.bin) read by `torch.load(weights_only=True)`. Without
      it they are refused.

  Returns:
    NumPy arrays, in the structure of `like`.

  Raises:
    CheckpointError: the folder cannot be read; a leaf has no tensor, or one of
      another shape; a tensor has no leaf. Nothing keeps its initial value.
  """
  infos, read = opened(folder, weights_only)
  return fit(folder, infos, read, like, ignore=ignore, dtype=dtype)


def fit(
  folder: str | os.PathLike[str],
  infos: Mapping[str, Any],
  read: Read,
  like: PyTree,
  *,
  ignore: tuple[str, ...] = (),
  dtype: Any = np.float32,
) -> PyTree:
  """Puts tensors into the structure of a network; see `load`.

  Args:
    folder: where they are, for messages.
    infos: name -> what has their shape.
    read: reads some of them.
    like: the network's parameters.
    ignore: of `load`.
    dtype: of `load`.

  Returns:
    The parameters.

  Raises:
    CheckpointError: see `load`.
  """
  named = _named(like)
  wanted = {tensor_name(path): path for path in named}
  if len(wanted) < len(named):
    raise _store.CheckpointError(
      "Two leaves of the network have the same tensor: rename one of them."
    )
  prefix = _prefix(infos, list(wanted))
  missing = [name for name in wanted if prefix + name not in infos]
  dropped = [*BUFFERS, *ignore]
  extra = [
    name
    for name in infos
    if name.removeprefix(prefix) not in wanted
    and not any(re.fullmatch(pattern, name) for pattern in dropped)
  ]
  shapes = [
    f"{prefix + name} has {infos[prefix + name].shape}, the leaf '{path}' needs"
    f" {_tensor_shape(path, tuple(named[path].shape))}"
    for name, path in wanted.items()
    if prefix + name in infos
    and infos[prefix + name].shape
    != _tensor_shape(path, tuple(named[path].shape))
  ]
  problems = []
  for what, names in (
    ("missing tensors", [prefix + name for name in missing]),
    ("tensors that the network has not", extra),
    ("tensors of another shape", shapes),
  ):
    if names:
      listed = _safetensors.some(names)
      problems.append(f"{len(names)} {what}: {listed}")
  if problems:
    raise _store.CheckpointError(
      f"{folder} does not fit the network: {'; '.join(problems)}. Make the"
      " network by the configuration that lies beside the weights"
      + (", or name what may be left out in ignore." if extra else ".")
    )
  arrays = read([prefix + name for name in wanted])
  leaves = {}
  for name, path in wanted.items():
    leaf = _to_leaf(path, arrays.pop(prefix + name))
    # Not ascontiguousarray, which gives a scalar an axis.
    leaves[path] = np.asarray(leaf, dtype, order="C")
  return jax.tree.unflatten(
    jax.tree.structure(like), [leaves[path] for path in named]
  )


def save(
  folder: str | os.PathLike[str],
  params: PyTree,
  *,
  source: str | os.PathLike[str] | None = None,
  dtype: Any = None,
  max_shard_bytes: int = 5_000_000_000,
  weights_only: bool = False,
) -> None:
  """Writes the parameters of a network so that transformers can load them.

  Args:
    folder: is made where it does not exist.
    params: the parameters.
    source: the folder that they came from: its other files (config.json, the
      tokenizer) are copied, and so are the tensors that the network has not.
    dtype: of the floating-point tensors; None for that of the parameters.
    max_shard_bytes: size from which on a further file is begun.
    weights_only: whether the source may be pickled, see `load`.

  Raises:
    CheckpointError: the source cannot be read, or is the folder itself.
  """
  target = pathlib.Path(folder)
  arrays = to_tensors(params)
  if dtype is not None:
    arrays = {name: array.astype(dtype) for name, array in arrays.items()}
  if source is not None:
    origin = pathlib.Path(source)
    check_apart(target, origin)
    infos, read = opened(origin, weights_only)
    prefix = _prefix(infos, list(arrays))
    arrays = {prefix + name: array for name, array in arrays.items()}
    rest = [name for name in infos if name not in arrays]
    arrays |= read(rest)
  _safetensors.write(target, arrays, max_shard_bytes=max_shard_bytes)
  if source is not None:
    copy_others(origin, target)


def to_tensors(params: PyTree) -> dict[str, np.ndarray]:
  """The tensors of a network by their names; see `tensor_name`."""
  return {
    tensor_name(path): _to_tensor(path, leaf)
    for path, leaf in _named(params).items()
  }


def check_apart(target: pathlib.Path, origin: pathlib.Path) -> None:
  """Raises `CheckpointError` where two folders are one."""
  if target.exists() and target.samefile(origin):
    raise _store.CheckpointError(
      f"{target} is the folder that the parameters came from: choose another"
      " one, so that nothing of it is lost."
    )


def copy_others(origin: pathlib.Path, target: pathlib.Path) -> None:
  """Copies configuration and tokenizer of a checkpoint."""
  for file in sorted(origin.rglob("*")):
    if file.suffix in (".json", ".txt") and file.name != _safetensors.INDEX:
      place = target / file.relative_to(origin)
      place.parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(file, place)
