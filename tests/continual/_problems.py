"""A problem of a few hundred examples, for the tests of strategies."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from jaxmerge import continual
from jaxmerge.continual import replay, streams

CLASSES, TASKS, SEEDS, SIDE = 6, 3, 2, 3

Training = continual.Training
BRIEF = Training(0.05, epochs=1, batch_size=8)
# Full batches of one task's 32 examples: steps that can be redone by hand.
STEPS = Training(0.1, momentum=0.0, epochs=3, batch_size=32)


class Source(NamedTuple):
  """Images around a prototype a class."""

  inputs: np.ndarray
  labels: np.ndarray
  num_classes: int = CLASSES


def source(count: int, seed: int) -> Source:
  draws = np.random.default_rng(seed)
  prototypes = np.random.default_rng(99).normal(size=(CLASSES, SIDE, SIDE, 1))
  labels = np.arange(count * CLASSES) % CLASSES
  noise = draws.normal(size=(len(labels), SIDE, SIDE, 1))
  images = prototypes[labels] + 0.3 * noise
  return Source(images.astype(np.float32), labels.astype(np.int32))


def logits_fn(params, images):
  """A network without a hidden layer: gradients by hand."""
  return images.reshape(len(images), -1) @ params["out"]["kernel"]


def hidden_fn(params, images):
  hidden = jax.nn.relu(images.reshape(len(images), -1) @ params["in"]["kernel"])
  return hidden @ params["out"]["kernel"]


def init(key, hidden=False):
  first, second = jax.random.split(key)
  if not hidden:
    kernel = 0.1 * jax.random.normal(first, (SIDE**2, CLASSES))
    return {"out": {"kernel": kernel}}
  return {
    "in": {"kernel": 0.3 * jax.random.normal(first, (SIDE**2, 8))},
    "out": {"kernel": 0.3 * jax.random.normal(second, (8, CLASSES))},
  }


def problem(
  hidden=False, devices=1, capacity=8, per="task", seeds=SEEDS, **options
):
  """A problem; `stream` and `policy` replace its stream and its buffer's."""
  stream = options.pop("stream", None) or streams.class_incremental(
    source(20, 0), source(10, 1), num_tasks=TASKS, validation=0.2
  )
  buffer = None
  if capacity:
    buffer = replay.get(
      options.pop("policy", "reservoir"),
      capacity,
      per=per,
      num_classes=CLASSES,
      num_tasks=len(stream.tasks),
    )
  keys = jnp.stack([jax.random.key(seed) for seed in range(seeds)])
  return continual.make_problem(
    stream,
    hidden_fn if hidden else logits_fn,
    jax.vmap(lambda key: init(key, hidden))(keys),
    keys=keys,
    replay=buffer,
    devices=devices,
    **options,
  )


def observe(strategy, one, tasks=None):
  """The state after the tasks."""
  state = strategy.init(one)
  for task in range(one.num_tasks if tasks is None else tasks):
    state = strategy.observe(one, state, task)
  return state


def seed(tree, number):
  return jax.tree.map(lambda leaf: np.asarray(leaf[number]), tree)


def task_data(one, task):
  """The images and labels that a task is trained on."""
  rows = one.stream.tasks[task].train
  return one.stream.train["input"][rows], one.stream.train["label"][rows]


def logits(kernel, images):
  """The logits of the linear network, in float64."""
  return images.reshape(len(images), -1).astype(np.float64) @ kernel


def gradient(kernel, images, labels, mask=None):
  """Mean gradient of the cross-entropy of the linear network."""
  values = logits(kernel, images)
  if mask is not None:
    values = np.where(mask, values, -np.inf)
  errors = special.softmax(values, axis=1)
  errors[np.arange(len(labels)), labels] -= 1
  return images.reshape(len(images), -1).T.astype(float) @ errors / len(labels)
