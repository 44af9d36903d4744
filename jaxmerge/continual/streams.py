"""Streams of tasks, made of labelled sets.

A stream is data: a pool of training and of test examples, and the rows of the
pools that belong to each task. The rows of the source sets are recorded, so
that a result can name the exact examples of every task.

Random choices depend on the seed alone, and not on the version of NumPy.
"""

from jaxmerge.continual._stream import (
  Source,
  Stream,
  StreamError,
  Task,
  as_json,
  describe,
)
from jaxmerge.continual._stream_classes import (
  class_incremental,
  data_incremental,
  task_incremental,
)
from jaxmerge.continual._stream_domains import domains, permuted, rotated

__all__ = (
  "Source",
  "Stream",
  "StreamError",
  "Task",
  "as_json",
  "class_incremental",
  "data_incremental",
  "describe",
  "domains",
  "permuted",
  "rotated",
  "task_incremental",
)
