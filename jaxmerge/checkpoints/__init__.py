"""Checkpoints of training runs and networks, by Orbax."""

from jaxmerge.checkpoints._store import CheckpointError
from jaxmerge.checkpoints._store import Store

__all__ = ["CheckpointError", "Store"]
