"""Pickled weights, read by PyTorch with nothing but tensors allowed."""

from __future__ import annotations

import os
import pathlib

import numpy as np

from jaxmerge.checkpoints import _store

#: Endings of files that are pickles.
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


# Names of files of weights; in a folder that has some, others are no weights.
_WEIGHTS = (
  "open_clip_pytorch_model.bin",
  "pytorch_model.bin",
  "pytorch_model-*-of-*.bin",
)


def find(folder: str | os.PathLike[str]) -> list[pathlib.Path]:
  """The pickled files of a folder, or the file itself."""
  path = pathlib.Path(folder)
  if path.is_file():
    return [path] if any(path.match(one) for one in PICKLES) else []
  return sorted({found for one in PICKLES for found in path.glob(one)})


def read(folder: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  """Reads all tensors of the pickled files of a folder.

  `torch.load(weights_only=True)` builds tensors and plain containers, and
  refuses whatever else a pickle asks for.

  Args:
    folder: the folder, or one file.

  Returns:
    Name -> array; bfloat16 as float32.

  Raises:
    CheckpointError: there is none, one holds something else, or two hold a
      tensor of one name.
    ImportError: PyTorch is missing.
  """
  files = find(folder)
  for name in _WEIGHTS:
    known = [file for file in files if file.match(name)]
    if known and pathlib.Path(folder).is_dir():
      files = known
      break
  if not files:
    raise _store.CheckpointError(
      f"{folder} holds no pickled weights ({', '.join(PICKLES)})."
    )
  try:
    import torch
  except ImportError as error:
    raise ImportError(
      "Reading pickled weights needs PyTorch: pip install torch. Safer: take"
      " the .safetensors file of the same model."
    ) from error
  found: dict[str, np.ndarray] = {}
  for file in files:
    try:
      content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # Of many kinds, by what the pickle holds.
      first = (str(error).strip().splitlines() or [""])[0]
      raise _store.CheckpointError(
        f"{file} holds more than weights, or is damaged, and was not read"
        f" ({first}). Take the .safetensors file of the same model."
      ) from error
    # Training scripts put the weights among other things.
    if isinstance(content, dict) and isinstance(
      content.get("state_dict"), dict
    ):
      content = content["state_dict"]
    if not isinstance(content, dict):
      raise _store.CheckpointError(
        f"{file} holds no mapping of names to tensors, but a"
        f" {type(content).__name__}. Take the file of the weights."
      )
    tensors = {
      name: value
      for name, value in content.items()
      if isinstance(value, torch.Tensor)
    }
    for name, value in tensors.items():
      if name in found:
        raise _store.CheckpointError(
          f"{file} holds {name!r}, as another file of the folder does. Remove"
          " one of them."
        )
      if value.dtype == torch.bfloat16:
        value = value.float()
      found[name] = value.detach().numpy()
  return found
