"""Fuses networks of equal and of unequal widths by optimal transport.

    python -m experiments.fusion --workdir=runs/fusion \
      --config=experiments/configs/fusion.py:mnist-mlpnet

Trains A and B of the heterogeneous split in two widths, aligns one to the
other by every method, and prints the accuracy over the mixing proportion.
Killed at any moment and started again with the same workdir, it goes on. See
experiments/configs/fusion.py for the variants.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags

from experiments import (
  _cli,
  _fusion_report,
  _hardware,
  _mpf_report,
  _mpf_stages,
  _mpf_study,
  _publish,
  _workdir,
  mpf,
)
from jaxmerge import alignment, training, tree

PyTree = Any

_ROOT = pathlib.Path(__file__).parent.parent

# The flags are those of experiments.mpf, and --publish.

# For the draws of examples and of random alignments.
_EXAMPLES_STAGE, _RANDOM_STAGE = 100, 101


class Part(NamedTuple):
  """One sweep.

  Attributes:
    title: its heading.
    reference: width ("smaller" or "larger") and network of the reference.
    model: the same of the network that is aligned.
    methods: names, see `_fusion_report.LABELS`.
  """

  title: str
  reference: tuple[str, str]
  model: tuple[str, str]
  methods: tuple[str, ...]


_UNEQUAL = (
  "ot_weights",
  "ot_activations",
  "ot_importance",
  "ot_target",
  "sinkhorn",
  "random",
)
PARTS = (
  Part(
    "Equal widths: B into A",
    ("smaller", "model_a"),
    ("smaller", "model_b"),
    ("avg", "ot_weights", "ot_activations", "sinkhorn", "random"),
  ),
  Part(
    "Unequal widths: smaller A into larger B",
    ("larger", "model_b"),
    ("smaller", "model_a"),
    _UNEQUAL,
  ),
  Part(
    "Unequal widths: smaller B into larger A",
    ("larger", "model_a"),
    ("smaller", "model_b"),
    _UNEQUAL,
  ),
)


def check_config(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError where a field is out of its range."""
  if not config.proportions or not all(0 < w < 1 for w in config.proportions):
    raise ValueError(
      f"proportions must lie in (0, 1), got {config.proportions}."
    )
  if config.examples < 1:
    raise ValueError(f"examples must be at least 1, got {config.examples}.")


def _studies(
  config: ml_collections.ConfigDict, data_dir: str | None
) -> dict[str, _mpf_study.Study]:
  larger = config.mpf.copy_and_resolve_references()
  larger.network = config.larger
  return {
    "smaller": _mpf_study.build(config.mpf, data_dir),
    "larger": _mpf_study.build(larger, data_dir),
  }


def activations(
  study: _mpf_study.Study, params: PyTree, images: jax.Array
) -> dict[str, jax.Array]:
  """Outputs of the hidden layers before the ReLU, by the layer's name."""
  layers_fn = alignment.flax_activations(study.model)
  return alignment.group_activations(
    alignment.derive_spec(params),
    params,
    layers_fn(params, study.normalize(images)),
  )


def _aligners(
  config: ml_collections.ConfigDict,
) -> dict[str, Callable[..., PyTree]]:
  """Functions of reference, model, their activations, and a key."""

  def ot(importance: bool = False, **options: Any) -> Callable[..., PyTree]:
    def align(a: PyTree, b: PyTree, acts: Any, key: jax.Array) -> PyTree:
      del key
      given = dict(options)
      if options.get("by") == "activations":
        given["activations"] = acts
      if importance:
        given["importance"] = tuple(
          alignment.activation_norms(jax.tree.map(jax.nn.relu, side))
          for side in acts
        )
      return alignment.ot_align(a, b, **given)[0]

    return align

  return {
    "avg": lambda a, b, acts, key: alignment.keep_identity(a, b),
    "ot_weights": ot(),
    "ot_activations": ot(by="activations"),
    "ot_importance": ot(by="activations", importance=True),
    "ot_target": ot(outgoing="target"),
    "sinkhorn": ot(
      solver="sinkhorn",
      epsilon=config.epsilon,
      max_iterations=config.max_iterations,
    ),
    "random": lambda a, b, acts, key: alignment.random_alignment(a, b, key=key),
  }


def _seeds(params: PyTree, count: int) -> Iterator[PyTree]:
  for i in range(count):
    yield jax.tree.map(lambda leaf: leaf[i], params)  # noqa: B023


def _accuracy(study: _mpf_study.Study, params: PyTree) -> dict[str, Any]:
  means = training.evaluate(study.metric_fn, params, study.test, seed_axis=True)
  return _mpf_report.summary(100 * means["accuracy"].astype(np.float64))


def sweep(
  part: Part,
  config: ml_collections.ConfigDict,
  studies: dict[str, _mpf_study.Study],
  networks: dict[tuple[str, str], PyTree],
  images: jax.Array,
) -> dict[str, Any]:
  """Aligns by every method and evaluates every proportion.

  Args:
    part: which networks, which methods.
    config: the configuration.
    studies: data and networks of both widths.
    networks: parameters by width and name, seeds leading.
    images: examples whose activations are compared.

  Returns:
    Accuracies in per cent of the ends, and of each method by proportion.
  """
  study = studies[part.reference[0]]
  count = len(config.mpf.seeds)
  pairs = list(
    zip(
      _seeds(networks[part.reference], count),
      _seeds(networks[part.model], count),
      study.keys(_RANDOM_STAGE),
      strict=True,
    )
  )
  acts = [
    (
      activations(study, a, images),
      activations(studies[part.model[0]], b, images),
    )
    for a, b, _ in pairs
  ]
  methods = {}
  aligners = _aligners(config)
  for name in part.methods:
    aligned = [
      aligners[name](a, b, both, key)
      for (a, b, key), both in zip(pairs, acts, strict=True)
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *aligned)
    methods[name] = [
      _accuracy(study, tree.lerp(networks[part.reference], stacked, weight))
      for weight in config.proportions
    ]
  return {
    "title": part.title,
    "names": [
      f"{network[-1].upper()} ({studies[width].config.network})"
      for width, network in (part.reference, part.model)
    ],
    "reference": _accuracy(study, networks[part.reference]),
    "model": _accuracy(studies[part.model[0]], networks[part.model]),
    "methods": methods,
  }


def run(
  config: ml_collections.ConfigDict,
  workdir: str,
  data_dir: str | None = None,
  progress: bool = True,
) -> dict[str, Any]:
  """Runs the study, or goes on with it.

  Args:
    config: the configuration.
    workdir: folder of the run.
    data_dir: folder of prepared TFDS sets, None for the default one.
    progress: whether to show progress bars.

  Returns:
    What results.json holds.

  Raises:
    ValueError: bad input; one line says what and how to mend it.
    FloatingPointError: a loss became NaN or infinite.
  """
  # The studies first: a bad configuration must leave no workdir behind.
  check_config(config)
  studies = _studies(config, data_dir)
  with _workdir.open_workdir(workdir, config) as folder:
    networks: dict[tuple[str, str], PyTree] = {}
    seconds = 0.0
    for width, study in studies.items():
      for name in ("model_a", "model_b"):
        made, meta = _mpf_stages.run_stage(
          name,
          _mpf_stages.STAGES[name],
          study,
          {},
          folder / study.config.network,
          progress,
        )
        networks[width, name] = made["params"]
        seconds += meta["seconds"]
    begin = time.perf_counter()
    study = studies["smaller"]
    images = jnp.asarray(_examples(study, config.examples))
    parts = [sweep(part, config, studies, networks, images) for part in PARTS]
    results = {
      "config": _workdir.as_json(config),
      "sizes": study.sizes,
      "parts": parts,
      "versions": _hardware.versions(),
      "hardware": _hardware.hardware(study.num_devices),
      "seconds": {
        "training": seconds,
        "fusion": time.perf_counter() - begin,
      },
    }
    _workdir.write_json(folder / "results.json", results)
    _workdir.write_text(folder / "table.md", _fusion_report.table(results))
    _fusion_report.plot(results, folder / "sweep.png")
  return results


def _examples(study: _mpf_study.Study, count: int) -> np.ndarray:
  """Images of the training set, drawn by the first seed."""
  images = np.asarray(study.train.value["input"][0])
  if count > len(images):
    raise ValueError(
      f"examples is {count}, but there are {len(images)} training images."
    )
  rows = jax.random.permutation(study.keys(_EXAMPLES_STAGE)[0], len(images))
  return images[np.asarray(rows[:count])]


def main(argv: Sequence[str]) -> None:
  """Runs the study that the flags describe, and prints its tables."""
  if len(argv) > 1:
    raise ValueError(f"Unknown arguments: {' '.join(argv[1:])}")
  mpf.require_flags("config", "workdir")
  flag = flags.FLAGS
  results = run(flag.config, str(flag.workdir), flag.data_dir, flag.progress)
  print(_fusion_report.table(results))
  print(f"Files and pictures: {flag.workdir}")
  if _publish.PUBLISH.value:
    publish(results)


def publish(results: dict[str, Any], root: pathlib.Path = _ROOT) -> None:
  """Writes the results, the page made from them, and its picture."""
  for folder in ("experiments/results", "docs/results", "docs/images"):
    (root / folder).mkdir(parents=True, exist_ok=True)
  _workdir.write_json(root / "experiments/results/fusion.json", results)
  _workdir.write_text(
    root / "docs/results/fusion.md", _fusion_report.page(results)
  )
  _fusion_report.plot(results, root / "docs/images/fusion.png")


if __name__ == "__main__":
  _cli.run(main)
