"""Checkpoints of training runs and networks, by Orbax."""

from jaxmerge.checkpoints._store import CheckpointError, Store

__all__ = ["CheckpointError", "Store"]
