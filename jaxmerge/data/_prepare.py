"""Getting a TFDS set that is not there yet, or saying what would."""

from __future__ import annotations

import difflib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from jaxmerge.data._dataset import DataError
from jaxmerge.data._tfds import (
  PREPARABLE,
  Request,
  build_command,
  find_prepared,
  first_line,
  image_and_label,
  require,
)

# TFDS itself tries an unreachable address for minutes.
_CONNECT_SECONDS = 10.0


def prepare(
  request: Request, root: pathlib.Path, *, download: bool
) -> pathlib.Path:
  """Downloads and prepares a set, where this can be done without TensorFlow.

  Args:
    request: the set, which is not prepared.
    root: the folder of prepared sets.
    download: whether this may be done at all.

  Returns:
    The folder of the prepared set.

  Raises:
    DataError: it cannot be had; the message says why and what to do.
  """
  name = request.name
  if name not in PREPARABLE:
    raise _not_preparable(request, root)
  if not download:
    raise DataError(
      f"{name} is not prepared in {root}, and download is off: allow the"
      " download, or set data_dir (or TFDS_DATA_DIR) to a folder with it."
    )
  with require(name):
    from jaxmerge.data import _builders
  builder_class = _builders.builder_classes()[name]
  version = str(builder_class.VERSION)
  if request.config is not None or request.version not in (None, version):
    raise DataError(
      f"{request} is not prepared in {root} and cannot be: {name} has the"
      f" version {version} and no configurations; ask for {name!r}."
    )
  run_builder(builder_class, root)
  folder = find_prepared(request, root)
  if folder is None:
    raise DataError(f"{name} was prepared, but is not in {root}.")
  return folder


def run_builder(builder_class: Any, root: pathlib.Path) -> None:
  """Runs a builder, and turns what goes wrong into a `DataError`.

  Args:
    builder_class: one of `_builders.builder_classes()`.
    root: the folder of prepared sets.
  """
  import requests
  from tensorflow_datasets.core import download

  name = builder_class.name
  version = str(builder_class.VERSION)
  downloads = root / "downloads"
  try:
    builder = builder_class(data_dir=root)
    _check_reachable(name, builder.urls(), downloads)
    root.mkdir(parents=True, exist_ok=True)
    builder.download_and_prepare(
      download_dir=downloads, file_format="array_record"
    )
  except download.download_manager.NonMatchingChecksumError as error:
    raise DataError(
      f"a file of {name} did not arrive as it was published: try again, or put"
      f" the published file into {_manual_dir(downloads)}"
      f" ({first_line(error)})."
    ) from error
  except (requests.RequestException, download.DownloadError) as error:
    raise _no_download(name, downloads, first_line(error)) from error
  except OSError as error:
    if find_prepared(Request(name, None, version), root) is not None:
      return  # Another process prepared it meanwhile.
    raise DataError(
      f"{name} cannot be prepared in {root} ({first_line(error)}): set"
      " data_dir to a folder that can be written to and has room."
    ) from error


def _check_reachable(
  name: str, urls: Sequence[str], downloads: pathlib.Path
) -> None:
  """Fails in seconds where the files of a set cannot be downloaded."""
  import requests

  for url in urls:
    try:
      with requests.get(url, stream=True, timeout=_CONNECT_SECONDS) as response:
        problem = "" if response.ok else f"HTTP status {response.status_code}"
    except requests.RequestException as error:
      problem = type(error).__name__
    if problem and not _is_downloaded(url, downloads):
      raise _no_download(name, downloads, f"{problem} from {url}")


def _is_downloaded(url: str, downloads: pathlib.Path) -> bool:
  """Returns whether TFDS will find the file without the network."""
  if (_manual_dir(downloads) / url.rpartition("/")[2]).is_file():
    return True
  # Beside each downloaded file lies one that says where it came from.
  for path in downloads.rglob("*.INFO"):
    try:
      if url in json.loads(path.read_text(encoding="utf-8")).get("urls", ()):
        return True
    except (OSError, ValueError):
      continue
  return False


def _manual_dir(downloads: pathlib.Path) -> pathlib.Path:
  return downloads / "manual"


def _no_download(name: str, downloads: pathlib.Path, problem: str) -> DataError:
  return DataError(
    f"{name} is not prepared in {downloads.parent} and cannot be downloaded"
    f" ({problem}): run once with a network, set data_dir (or"
    " TFDS_DATA_DIR) to a folder with the prepared set, put its published"
    f" files into {_manual_dir(downloads)}, or take 'digits', which needs no"
    " download."
  )


def _not_preparable(request: Request, root: pathlib.Path) -> DataError:
  """Returns the error for a set that is not prepared and not one of ours."""
  with require(request.name):
    import tensorflow_datasets as tfds

  name = request.name
  known = tfds.list_builders(with_community_datasets=False)
  if name not in known:
    near = difflib.get_close_matches(name, ["digits", *PREPARABLE, *known])
    near = list(dict.fromkeys(near))
    hint = (
      f"did you mean {' or '.join(map(repr, near))}?"
      if near
      else (
        "choose 'digits', 'mnist' or another image classification set of TFDS."
      )
    )
    return DataError(
      f"there is no data set {name!r}, nor is one prepared in {root}: {hint}"
    )
  try:
    builder = tfds.builder_cls(name)(data_dir=root, config=request.config)
    info = builder.info
  except Exception:  # What a builder's own code raises is of any kind.
    info = None
  if info is not None:
    image_and_label(str(request), info)
  return DataError(
    f"{request} is not prepared in {root}, and only TensorFlow prepares it:"
    " once, run pip install 'jaxmerge[tfds-prepare]' and then"
    f" {build_command(request, root)}"
  )
