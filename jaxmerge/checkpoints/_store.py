"""A folder of Orbax checkpoints that survives damage and interruption."""

from __future__ import annotations

import functools
import os
import pathlib
import zlib
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

if TYPE_CHECKING:
  import orbax.checkpoint as ocp

PyTree = Any


class CheckpointError(ValueError):
  """A checkpoint folder cannot be used."""


def _is_key(leaf: Any) -> bool:
  return isinstance(leaf, jax.Array) and jnp.issubdtype(
    leaf.dtype, jax.dtypes.prng_key
  )


def _to_host(tree: PyTree) -> PyTree:
  """NumPy copies of all leaves; PRNG keys as their data."""
  return jax.tree.map(
    lambda leaf: np.array(jax.random.key_data(leaf) if _is_key(leaf) else leaf),
    tree,
  )


def _checksums(tree: PyTree) -> list[int]:
  return [
    zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    for leaf in jax.tree.leaves(tree)
  ]


class Store:
  """The last few checkpoints of one run, in one folder.

  A checkpoint is written under a temporary name and renamed, so that a
  process killed while writing leaves the earlier ones whole. Every leaf has
  a checksum; a damaged checkpoint is passed over for the one before it, and
  a warning says so.

  Args:
    directory: the folder; made when first written to.
    max_to_keep: number of checkpoints to keep, at least 1.

  Raises:
    ValueError: `max_to_keep` is below 1.

  >>> import tempfile
  >>> folder = tempfile.TemporaryDirectory()
  >>> with Store(folder.name) as store:
  ...   store.save(3, {"w": np.ones(2)}, {"note": "three"})
  ...   step, tree, metadata = store.restore({"w": np.zeros(2)})
  >>> step, tree["w"].tolist(), metadata
  (3, [1.0, 1.0], {'note': 'three'})
  >>> folder.cleanup()
  """

  def __init__(
    self, directory: str | os.PathLike[str], *, max_to_keep: int = 2
  ) -> None:
    """See the class."""
    if max_to_keep < 1:
      raise ValueError(f"max_to_keep must be at least 1, got {max_to_keep}.")
    self.directory = pathlib.Path(directory).absolute()
    self._max_to_keep = max_to_keep

  @functools.cached_property
  def _manager(self) -> ocp.CheckpointManager:
    # It takes long to import, and merging files of safetensors needs none.
    import orbax.checkpoint as ocp

    return ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=self._max_to_keep,
        create=True,
        # Left-overs of a killed process.
        cleanup_tmp_directories=True,
      ),
      item_names=("state", "metadata"),
    )

  def __enter__(self) -> Store:
    """Returns the store."""
    return self

  def __exit__(self, *_: object) -> None:
    """Closes the store."""
    self.close()

  def steps(self) -> list[int]:
    """Lists the steps of the checkpoints there are, in rising order."""
    if not self.directory.is_dir():
      return []
    return sorted(int(step) for step in self._manager.all_steps())

  def save(
    self, step: int, tree: PyTree, metadata: dict[str, Any] | None = None
  ) -> None:
    """Writes a checkpoint in the background.

    Args:
      step: its number, not negative; an existing one is replaced.
      tree: pytree of arrays; typed PRNG keys are allowed.
      metadata: anything that JSON can hold.
    """
    import orbax.checkpoint as ocp

    host = _to_host(tree)
    if step in self.steps():
      self._manager.delete(step)
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(host),
        metadata=ocp.args.JsonSave(
          {"user": metadata or {}, "checksums": _checksums(host)}
        ),
      ),
    )

  def restore(self, like: PyTree) -> tuple[int, PyTree, dict[str, Any]] | None:
    """Returns the newest checkpoint that is whole.

    Args:
      like: pytree of arrays with the structure, shapes and dtypes that were
        saved.

    Returns:
      Its step, its tree (NumPy arrays and PRNG keys) and its metadata; None
      if there is none.
    """
    for step in reversed(self.steps()):
      try:
        return step, *self._restore_step(step, like)
      except MemoryError:
        raise
      except Exception as error:  # Damage shows in many ways.
        logging.warning(
          "The checkpoint %s is damaged and set aside; an earlier one is "
          "used, if there is one (%s).",
          self.directory / str(step),
          str(error).splitlines()[0] if str(error) else type(error).__name__,
        )
        # Set aside, not deleted: it may be whole and `like` wrong.
        taken = len(list(self.directory.glob(f"damaged-{step}*")))
        aside = self.directory / f"damaged-{step}{f'.{taken}' * bool(taken)}"
        (self.directory / str(step)).rename(aside)
        self._manager.reload()
    return None

  def _restore_step(
    self, step: int, like: PyTree
  ) -> tuple[PyTree, dict[str, Any]]:
    import orbax.checkpoint as ocp

    target = _to_host(like)
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(target),
        metadata=ocp.args.JsonRestore(),
      ),
    )
    for (path, want), leaf in zip(
      jax.tree_util.tree_leaves_with_path(target),
      jax.tree.leaves(restored.state),
      strict=True,
    ):
      if np.shape(leaf) != want.shape or leaf.dtype != want.dtype:
        raise CheckpointError(
          f"{jax.tree_util.keystr(path)} is {leaf.dtype}{np.shape(leaf)}, "
          f"expected {want.dtype}{want.shape}"
        )
    host = _to_host(restored.state)
    if _checksums(host) != restored.metadata["checksums"]:
      raise CheckpointError("its checksums do not match")
    tree = jax.tree.map(
      lambda want, leaf: (
        jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(want))
        if _is_key(want)
        else leaf
      ),
      like,
      host,
    )
    return tree, restored.metadata["user"]

  def wait(self) -> None:
    """Blocks until everything is written."""
    if "_manager" in self.__dict__:
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and releases the threads."""
    if "_manager" in self.__dict__:
      self._manager.close()
