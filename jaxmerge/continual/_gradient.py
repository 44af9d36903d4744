"""Loss and gradient of a task at a point, over many of its examples."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import tree as tree_lib
from jaxmerge.continual import _objective, _problem

PyTree = Any

# At most so many examples have their activations in memory at once.
_CHUNK = 50


@functools.lru_cache(maxsize=16)
def _compiled(
  logits_fn: _problem.LogitsFn,
) -> Callable[..., tuple[jax.Array, PyTree]]:
  """`run(params, masks, chunks) -> (loss, gradient)`, for all seeds."""

  def summed(params: PyTree, masks: jax.Array, chunk: Any) -> jax.Array:
    batch, weights = chunk
    logits = logits_fn(params, batch["input"])
    losses = _objective.cross_entropy(
      logits, batch["label"], masks[batch["task"]]
    )
    return (weights * losses).sum()

  def one(
    params: PyTree, masks: jax.Array, chunks: Any
  ) -> tuple[jax.Array, PyTree]:
    def body(total: Any, chunk: Any) -> tuple[Any, None]:
      found = jax.value_and_grad(summed)(params, masks, chunk)
      return jax.tree.map(jnp.add, total, found), None

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    sums, _ = jax.lax.scan(body, zeros, chunks)
    count = chunks[1].sum()
    return jax.tree.map(lambda leaf: leaf / count.astype(leaf.dtype), sums)

  return jax.jit(
    lambda params, masks, chunks: jax.lax.map(
      lambda given: one(given[0], given[1], chunks), (params, masks)
    )
  )


def mean_gradient(
  problem: _problem.Problem,
  params: PyTree,
  task: int,
  head: str,
  samples: int | None,
) -> tuple[jax.Array, PyTree]:
  """Mean cross-entropy of a task's training examples, and its gradient.

  Args:
    problem: the problem.
    params: the parameters, leaves with an axis of seeds.
    task: number of the task.
    head: classes that the loss is over, as in `Learner`.
    samples: number of examples, see `Problem.batches`; None for all.

  Returns:
    The losses `[seeds]`, and the gradients.
  """
  parts = problem.batches(task, samples)
  batch = {
    name: np.concatenate([part[name] for part in parts]) for name in parts[0]
  }
  size = len(batch["label"])
  count = -(-size // _CHUNK)
  chunk = -(-size // count)
  rows = np.arange(count * chunk)
  chunks = (
    {
      name: values[np.minimum(rows, size - 1)].reshape(
        -1, chunk, *values.shape[1:]
      )
      for name, values in batch.items()
    },
    (rows < size).astype(np.float32).reshape(-1, chunk),
  )
  own = problem.stream.scenario == "task-incremental"
  masks = _problem.head_masks(problem, "task" if own else head, task)
  return _compiled(problem.logits_fn)(
    params, _problem.seed_axis(problem, masks), chunks
  )


norms = jax.jit(jax.vmap(tree_lib.norm))
norms.__doc__ = """Norms of trees with an axis of seeds, `[seeds]`."""
