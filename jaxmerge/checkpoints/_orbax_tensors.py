"""Checkpoints of Orbax, leaf by leaf."""

from __future__ import annotations

import functools
import pathlib
from typing import Any, cast

import jax
import numpy as np

from jaxmerge.checkpoints import _loaded_tensor, _store


def find(folder: pathlib.Path) -> pathlib.Path | None:
  """The folder of the arrays: itself, its item, or that of the last step."""
  steps = sorted(
    (int(child.name), child)
    for child in folder.iterdir()
    if child.is_dir() and child.name.isdigit()
  )
  places = [folder, *(step for _, step in steps[-1:])]
  for place in places:
    for item in (place, place / "state", place / "default", place / "params"):
      if (item / "_METADATA").exists():
        return item
  return None


def tensors(
  folder: pathlib.Path,
) -> dict[str, _loaded_tensor.LoadedTensor]:
  """Lists the arrays of a checkpoint by the paths of their leaves.

  Args:
    folder: what `find` returned.

  Returns:
    Path with slashes -> the tensor, unread.

  Raises:
    CheckpointError: it is damaged.
  """
  import orbax.checkpoint as ocp

  handler = ocp.PyTreeCheckpointer()
  try:
    metadata = handler.metadata(folder.absolute())
    item = getattr(metadata, "item_metadata", metadata)
    structure = item.tree if hasattr(item, "tree") else item
    found = jax.tree.flatten_with_path(structure)
    leaves, treedef = found[0], cast(Any, found[1])
  except Exception as error:  # Of many kinds, none of them ours.
    raise _store.CheckpointError(
      f"{folder} is no whole checkpoint of Orbax ({error}). Give the folder"
      " that was saved."
    ) from error

  def load(place: int) -> Any:
    kind = leaves[place][1]
    wanted = [ocp.PLACEHOLDER] * len(leaves)
    wanted[place] = jax.ShapeDtypeStruct(kind.shape, kind.dtype)
    how = [ocp.RestoreArgs(restore_type=np.ndarray)] * len(leaves)
    try:
      found = handler.restore(
        folder.absolute(),
        args=ocp.args.PyTreeRestore(
          item=treedef.unflatten(wanted), restore_args=treedef.unflatten(how)
        ),
      )
    except Exception as error:
      raise _store.CheckpointError(
        f"{folder} is damaged: {names[place]!r} cannot be read ({error})."
      ) from error
    return np.asarray(treedef.flatten_up_to(found)[place])

  names = ["/".join(str(_key(part)) for part in path) for path, _ in leaves]
  twice = {name for name in names if names.count(name) > 1}
  if twice or not leaves:
    what = f"has two leaves of the name {min(twice)!r}" if twice else "is empty"
    raise _store.CheckpointError(
      f"{folder} {what}. Give the folder of a whole checkpoint of Orbax, whose"
      " keys have no slash."
    )
  return {
    name: _loaded_tensor.LoadedTensor(
      name,
      tuple(kind.shape),
      kind.dtype,
      functools.partial(load, place),
    )
    for place, (name, (_, kind)) in enumerate(zip(names, leaves, strict=True))
    if hasattr(kind, "shape")
  }


def _key(part: Any) -> Any:
  for name in ("key", "idx", "name"):
    if hasattr(part, name):
      return getattr(part, name)
  return part
