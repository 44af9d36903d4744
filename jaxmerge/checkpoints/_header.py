"""Headers of safetensors files: which tensor lies where, checked."""

from __future__ import annotations

import json
import math
import os
import pathlib
import struct
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxmerge.checkpoints import _store

#: Largest header that is read, that of the safetensors library.
MOST_BYTES = 100_000_000
_MOST_DIMENSIONS = 32

#: safetensors' word for a dtype -> the dtype.
DTYPES: dict[str, np.dtype[Any]] = {
  "BOOL": np.dtype(np.bool_),
  "U8": np.dtype(np.uint8),
  "I8": np.dtype(np.int8),
  "U16": np.dtype(np.uint16),
  "I16": np.dtype(np.int16),
  "U32": np.dtype(np.uint32),
  "I32": np.dtype(np.int32),
  "U64": np.dtype(np.uint64),
  "I64": np.dtype(np.int64),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F32": np.dtype(np.float32),
  "F64": np.dtype(np.float64),
  "C64": np.dtype(np.complex64),
}
_WORDS = {dtype: word for word, dtype in DTYPES.items()}


class Entry(NamedTuple):
  """Where one tensor of a file is.

  Attributes:
    dtype: its dtype.
    shape: its shape.
    start: its first byte in the file.
    stop: the byte after its last one.
  """

  dtype: np.dtype[Any]
  shape: tuple[int, ...]
  start: int
  stop: int


def word(dtype: Any) -> str:
  """safetensors' word for a dtype.

  Args:
    dtype: a dtype that the format has.

  Returns:
    The word.

  Raises:
    CheckpointError: the format has no such dtype.

  >>> word(np.float32)
  'F32'
  """
  kind = np.dtype(dtype)
  if kind not in _WORDS:
    raise _store.CheckpointError(
      f"safetensors has no dtype {kind}. Choose one of"
      f" {', '.join(str(one) for one in _WORDS)}."
    )
  return _WORDS[kind]


def _damaged(path: pathlib.Path, what: str) -> _store.CheckpointError:
  return _store.CheckpointError(
    f"{path} is no whole safetensors file: {what}. Download it again."
  )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """A mapping of JSON, in which no name may stand twice."""
  found = dict(pairs)
  if len(found) < len(pairs):
    raise ValueError("a name stands twice in it")
  return found


def _is_count(value: Any) -> bool:
  return type(value) is int and 0 <= value < 1 << 62


def _entry(path: pathlib.Path, name: str, found: Any, begin: int) -> Entry:
  """One entry of the header, checked but for its place among the others."""
  if not isinstance(found, dict):
    raise _damaged(path, f"its entry of {name!r} is no mapping")
  kind, shape = found.get("dtype"), found.get("shape")
  offsets = found.get("data_offsets")
  if not isinstance(kind, str) or kind not in DTYPES:
    raise _damaged(path, f"{name!r} has the unknown dtype {kind!r:.40}")
  if (
    not isinstance(shape, list)
    or len(shape) > _MOST_DIMENSIONS
    or not all(map(_is_count, shape))
    # NumPy counts so far, also where there is no entry.
    or math.prod(size or 1 for size in shape) * 16 >= 1 << 63
  ):
    raise _damaged(path, f"{name!r} has the shape {shape!r:.80}")
  if (
    not isinstance(offsets, list)
    or len(offsets) != 2
    or not all(map(_is_count, offsets))
  ):
    raise _damaged(path, f"{name!r} has the offsets {offsets!r:.80}")
  start, stop = offsets
  dtype = DTYPES[kind]
  size = math.prod(shape) * dtype.itemsize
  if stop - start != size:
    raise _damaged(
      path,
      f"{name!r} of {kind} {tuple(shape)} needs {size} bytes and has offsets"
      f" of {stop - start}",
    )
  return Entry(dtype, tuple(shape), begin + start, begin + stop)


def read_header(
  path: str | os.PathLike[str],
) -> tuple[dict[str, Entry], dict[str, str]]:
  """Reads the header of a file and checks it against the file.

  Args:
    path: of the file.

  Returns:
    Name -> where the tensor is; and the metadata.

  Raises:
    CheckpointError: the file cannot be read, is cut off or too long, its header
      is larger than `MOST_BYTES` or no such header, or tensors overlap, leave
      gaps or lie outside the file.
  """
  file = pathlib.Path(path)
  try:
    with file.open("rb") as opened:
      size = os.fstat(opened.fileno()).st_size
      first = opened.read(8)
      if len(first) < 8:
        raise _damaged(file, f"it has {len(first)} bytes")
      (length,) = struct.unpack("<Q", first)
      if length > min(MOST_BYTES, size - 8):
        raise _damaged(
          file,
          f"it announces a header of {length} bytes, and has {size} bytes (at"
          f" most {MOST_BYTES} of a header are read)",
        )
      text = opened.read(length)
  except OSError as error:
    raise _store.CheckpointError(
      f"{file} cannot be read ({error.strerror}). Give a file that can."
    ) from error
  try:
    content = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
  # Deep nesting is an error of recursion.
  except (ValueError, RecursionError) as error:
    raise _damaged(file, f"its header is no JSON ({error})"[:200]) from error
  if not isinstance(content, dict):
    raise _damaged(file, "its header is no mapping")
  metadata = content.pop("__metadata__", None) or {}
  if not isinstance(metadata, dict) or not all(
    isinstance(value, str) for value in metadata.values()
  ):
    raise _damaged(file, "its metadata is no mapping of texts")
  begin = 8 + length
  for name in content:
    try:
      name.encode()
    except UnicodeEncodeError as error:
      raise _damaged(file, f"it has the name {name!r}, which is no text") from (
        error
      )
  entries = {
    name: _entry(file, name, found, begin) for name, found in content.items()
  }
  place, last = begin, ""
  for name, entry in sorted(
    entries.items(), key=lambda pair: (pair[1].start, pair[1].stop)
  ):
    if entry.start < place:
      raise _damaged(file, f"{name!r} overlaps {last!r}")
    if entry.start > place:
      raise _damaged(
        file, f"{entry.start - place} bytes before {name!r} belong to no tensor"
      )
    place, last = entry.stop, name
  if place != size:
    raise _damaged(
      file,
      f"its tensors end at byte {place}, the file at {size}: it is"
      + (" cut off" if place > size else " too long"),
    )
  return entries, metadata


def make_header(
  entries: dict[str, tuple[Any, tuple[int, ...]]], metadata: dict[str, str]
) -> tuple[bytes, dict[str, Entry]]:
  """Makes the beginning of a file.

  Args:
    entries: name -> dtype and shape, in the order of the file.
    metadata: of the file.

  Returns:
    The bytes before the first tensor, and where each tensor is to be.

  Raises:
    CheckpointError: the format has no such dtype, or the header would be
      larger than `MOST_BYTES`.
  """
  place = 0
  content: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
  spans = {}
  for name, (dtype, shape) in entries.items():
    stop = place + math.prod(shape) * np.dtype(dtype).itemsize
    content[name] = {
      "dtype": word(dtype),
      "shape": list(shape),
      "data_offsets": [place, stop],
    }
    spans[name] = place, stop
    place = stop
  text = json.dumps(content, separators=(",", ":")).encode()
  # Blanks, so that tensors are aligned for readers that map the file.
  text += b" " * (-(8 + len(text)) % 64)
  if len(text) > MOST_BYTES:
    raise _store.CheckpointError(
      f"The header of {len(entries)} tensors would have {len(text)} bytes;"
      f" {MOST_BYTES} are allowed. Write more and smaller files."
    )
  begin = 8 + len(text)
  return struct.pack("<Q", len(text)) + text, {
    name: Entry(
      np.dtype(dtype),
      tuple(shape),
      begin + spans[name][0],
      begin + spans[name][1],
    )
    for name, (dtype, shape) in entries.items()
  }
