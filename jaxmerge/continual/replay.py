"""Replay buffers: which of the examples seen so far to keep.

A policy is a pair of pure functions, ``init`` and ``add``, and a buffer is a
pytree of arrays of fixed shapes (`ReplayState`), so that it can be carried
through `jax.lax.scan`, mapped over seeds, and saved. What an item is, is up to
the caller: a row number, an image, a tree of images and logits.

>>> import jax, numpy as np
>>> buffer = get("reservoir", 2, per="task", num_tasks=2)
>>> state = buffer.init({"row": 0})
>>> for task in range(2):
...   rows = {"row": 100 * task + np.arange(50)}
...   labels = np.zeros(50, int)
...   state = buffer.add(state, rows, labels, task, jax.random.key(0))
>>> contents(state)[2]
array([0, 0, 1, 1], dtype=int32)
"""

from __future__ import annotations

import difflib
from typing import Any

from jaxmerge.continual import _replay_stream
from jaxmerge.continual._replay_balanced import class_balanced
from jaxmerge.continual._replay_herding import herding
from jaxmerge.continual._replay_state import (
  AddFn,
  Replay,
  ReplayError,
  ReplayState,
  contents,
  counts,
  filled,
  sample,
  size_in_bytes,
  valid,
)
from jaxmerge.continual._replay_stream import reservoir, ring

__all__ = (
  "AddFn",
  "Replay",
  "ReplayError",
  "ReplayState",
  "class_balanced",
  "contents",
  "counts",
  "filled",
  "get",
  "herding",
  "names",
  "reservoir",
  "ring",
  "sample",
  "size_in_bytes",
  "valid",
)

_STREAM = {"reservoir": reservoir, "ring": ring}


def names() -> tuple[str, ...]:
  """Names of the policies.

  Returns:
    The names that `get` takes, sorted.

  >>> names()
  ('class_balanced', 'herding', 'reservoir', 'ring')
  """
  return tuple(sorted((*_STREAM, "class_balanced", "herding")))


def get(
  policy: str,
  capacity: int,
  *,
  per: str = "total",
  num_classes: int | None = None,
  num_tasks: int | None = None,
) -> Replay:
  """A policy by its name.

  Args:
    policy: One of `names`.
    capacity: Number of items to keep, >= 1: of all, or of each group.
    per: What ``capacity`` counts: "total", "class" or "task". class_balanced
      knows only "total"; herding does not know "task".
    num_classes: Number of classes that there will be; needed per class, and by
      class_balanced and herding.
    num_tasks: Number of tasks that there will be; needed per task.

  Returns:
    The policy.

  Raises:
    ReplayError: If the policy is unknown or does not know ``per``, or a number
      is out of its range or missing.

  >>> get("ring", 5, per="class", num_classes=10).slots
  50
  """
  if policy in _STREAM:
    groups: dict[Any, int | None] = {"class": num_classes, "task": num_tasks}
    if per in groups:
      _check_given(policy, f"per {per}", groups[per], per)
    return _STREAM[policy](capacity, per=per, num_groups=groups.get(per))
  if policy == "class_balanced":
    _replay_stream.check_per(policy, per, ("total",))
    number = _check_given(policy, "", num_classes, "class")
    return class_balanced(capacity, num_classes=number)
  if policy == "herding":
    _replay_stream.check_per(policy, per, ("total", "class"))
    number = _check_given(policy, "", num_classes, "class")
    return herding(capacity, num_classes=number, per=per)
  close = difflib.get_close_matches(str(policy), names(), 1)
  hint = f"; did you mean {close[0]!r}?" if close else ";"
  raise ReplayError(
    f"unknown replay policy {policy!r}{hint} choose from {', '.join(names())}"
  )


def _check_given(policy: str, per: str, number: int | None, kind: str) -> int:
  if number is None:
    name = {"class": "num_classes", "task": "num_tasks"}[kind]
    asked = f"{policy} {per}".strip()
    raise ReplayError(f"{asked} needs {name}; give {name} to get")
  return number
