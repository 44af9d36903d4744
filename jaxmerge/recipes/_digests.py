"""Checksums of tensors, made while they are read and written."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxmerge import checkpoints

Tensor = Any
_BLOCK = 1 << 22


def hasher() -> Any:
  """A new checksum, XXH3 of 128 bits: as fast as memory is read.

  Returns:
    It has `update` and `hexdigest`.

  Raises:
    ImportError: xxhash is missing.
  """
  try:
    import xxhash
  except ImportError as error:
    raise ImportError(
      "Checksums need xxhash: pip install 'jaxmerge[merge]'."
    ) from error
  return xxhash.xxh3_128()


def raw(array: np.ndarray) -> memoryview:
  """The bytes of a contiguous array."""
  return array.reshape(-1).view(np.uint8).data


def of_tensor(tensor: Tensor) -> str:
  """The checksum of a tensor's bytes.

  Args:
    tensor: a lazy tensor.

  Returns:
    Hexadecimal digits.
  """
  found = hasher()
  for start in range(0, tensor.size, _BLOCK):
    found.update(raw(tensor.read(start, min(start + _BLOCK, tensor.size))))
  return found.hexdigest()


class Digests:
  """Checksums of the tensors of files that a merge has read.

  Attributes:
    found: file -> name of the tensor -> checksum.
  """

  def __init__(self) -> None:
    """Makes an empty one."""
    self.found: dict[str, dict[str, str]] = {}

  def has(self, tensor: Tensor) -> bool:
    """Whether a tensor's checksum is known, or none of its own is wanted."""
    if not isinstance(tensor, checkpoints.LazyTensor):
      return True
    return tensor.name in self.found.get(str(tensor.file), {})

  def put(self, tensor: Tensor, digest: str) -> None:
    """Keeps a checksum.

    Args:
      tensor: whose it is.
      digest: the checksum.
    """
    self.found.setdefault(str(tensor.file), {})[tensor.name] = digest

  def add_parts(self, tensor: Tensor) -> None:
    """Reads what a tensor is made of, and keeps the checksums.

    Args:
      tensor: any tensor.
    """
    for part in getattr(tensor, "parts", ()):
      self.add_parts(part)
      if not self.has(part):
        self.put(part, of_tensor(part))
