"""Mode Path Fusion over a stream of tasks through the package's strategy."""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _continual_protocol, _jaxmerge_epoch
from jaxmerge import continual, models
from jaxmerge.continual import replay, strategies, streams
from jaxmerge.training import _epoch

PyTree = Any

_EVENTS = {
  "/jax/core/compile/jaxpr_trace_duration": "trace",
  "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
  "/jax/core/compile/backend_compile_duration": "compile",
}


class Result(NamedTuple):
  """What a run found and took.

  Attributes:
    seconds: Wall time.
    accuracies: Test accuracy by task, [seeds, tasks].
    params: The merged networks, with an axis of seeds.
    epochs_compiled: Programs of an epoch that were compiled.
    programs_compiled: Programs of any kind that were compiled.
    compile_seconds: Seconds of "trace", "lower" and "compile".
  """

  seconds: float
  accuracies: np.ndarray
  params: PyTree
  epochs_compiled: int
  programs_compiled: int
  compile_seconds: dict[str, float]


class Runner:
  """Runs the protocol; the first run of a number of seeds compiles."""

  def __init__(self, protocol: _continual_protocol.Protocol, **options: Any):
    """Loads the data.

    Args:
      protocol: The protocol.
      **options: Further options of the curve.
    """
    self._protocol = protocol
    train, test = _continual_protocol.load(protocol)
    self._stream = streams.class_incremental(
      train, test, num_tasks=protocol.num_tasks
    )
    images = np.asarray(train.images)
    self._image_size = int(np.prod(images.shape[1:]))
    scale, offset = (
      np.asarray(values, np.float32)
      for values in _continual_protocol.normalization(protocol, images)
    )
    model = models.get(_continual_protocol.NETWORK)

    def logits_fn(params: PyTree, images: jax.Array) -> jax.Array:
      # One channel: a number each.
      normalized = images.astype(jnp.float32) * scale.item() + offset.item()
      return jnp.asarray(model.apply({"params": params}, normalized))

    # One function, so that a second run finds what the first compiled.
    self._logits_fn = logits_fn
    training = continual.Training(
      protocol.learning_rate,
      protocol.final_learning_rate,
      momentum=protocol.momentum,
      weight_decay=protocol.weight_decay,
      epochs=protocol.epochs,
      batch_size=protocol.batch_size,
    )
    curve = training._replace(learning_rate=protocol.curve_learning_rate)
    self._strategy = strategies.get(
      "mpf", training=training, curve=curve, **options
    )
    self._compiled: dict[str, list[float]] = collections.defaultdict(list)
    jax.monitoring.register_event_duration_secs_listener(self._listen)

  def _listen(self, event: str, duration_secs: float, **kwargs: Any) -> None:
    del kwargs
    if event in _EVENTS:
      self._compiled[_EVENTS[event]].append(duration_secs)

  @property
  def sizes(self) -> list[int]:
    """Number of training examples of each task."""
    return [len(task.train) for task in self._stream.tasks]

  def run(self, seeds: Sequence[int]) -> Result:
    """Runs the protocol for some seeds at once.

    The initial networks are drawn before the clock starts; it ends when the
    accuracies are there.
    """
    params = jax.tree.map(
      lambda *leaves: np.stack(leaves),
      *[
        _jaxmerge_epoch.as_params(
          _continual_protocol.initial(self._image_size, seed)
        )
        for seed in seeds
      ],
    )
    self._compiled.clear()
    epochs = _epoch.compile_epoch.cache_info().misses
    start = time.perf_counter()
    problem = continual.make_problem(
      self._stream,
      self._logits_fn,
      params,
      keys=jnp.stack([jax.random.key(seed) for seed in seeds]),
      replay=replay.get(
        "reservoir",
        self._protocol.capacity,
        per="task",
        num_tasks=self._protocol.num_tasks,
      ),
      devices=1,
    )
    state = self._strategy.init(problem)
    for task in range(problem.num_tasks):
      state = self._strategy.observe(problem, state, task)
    merged = self._strategy.params(problem, state)
    accuracies = continual.accuracies(problem, merged)
    return Result(
      seconds=time.perf_counter() - start,
      accuracies=accuracies,
      params=merged,
      epochs_compiled=_epoch.compile_epoch.cache_info().misses - epochs,
      programs_compiled=len(self._compiled["compile"]),
      compile_seconds={
        name: sum(values) for name, values in self._compiled.items()
      },
    )
