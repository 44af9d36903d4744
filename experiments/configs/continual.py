"""Continual learning: any strategies on a stream of tasks.

    python -m experiments.continual --workdir=runs/continual \
      --config=experiments/configs/continual.py:digits

Variants:
  digits                    the embedded set, five tasks of two digits; minutes
  splitmnist-mpf-paper      Table 2 of the Mode Path Fusion paper
  splitmnist-replay-sweep   its Appendix C with the controls, buffers 16 to 512
  splitmnist-vandeven       the protocol of van de Ven and Tolias
  splitmnist-buzzega        the protocol of Buzzega et al.
  splitcifar10              split CIFAR-10, an MLP

A row names a strategy of `jaxmerge.continual.strategies` and its options;
`training`, `curve` and `finetune` are settings of `Training` and `Finetune`,
and `by_size` changes options for single buffer sizes. docs/results/continual.md
has the figures that were measured.
"""

from __future__ import annotations

from typing import Any

import ml_collections

VARIANTS = (
  "digits",
  "splitmnist-mpf-paper",
  "splitmnist-replay-sweep",
  "splitmnist-vandeven",
  "splitmnist-buzzega",
  "splitcifar10",
)


def _row(strategy: str, **options: Any) -> dict[str, Any]:
  return {"strategy": strategy, **options}


def _sgd(rate: float, epochs: int, **options: Any) -> dict[str, Any]:
  """The paper's SGD and schedule."""
  return {
    "learning_rate": rate,
    "final_learning_rate": min(rate / 10, 7e-5),
    "weight_decay": 5e-4,
    "epochs": epochs,
    "batch_size": 32,
    "augment": False,
    **options,
  }


def _tuned(
  rate: float, epochs: int, augment: bool = False, **options: Any
) -> dict[str, Any]:
  return {"training": _sgd(rate, epochs, augment=augment), **options}


def _paper(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Table 2: rows of the paper, and what it lacks."""
  config.buffer.sizes = (500,)
  curve = _sgd(0.07, 10)
  mine = {"training": _sgd(0.01, 10)}
  return {
    "joint": _row("joint", **mine),
    "naive": _row("naive", **mine),
    "avg": _row("avg", **mine),
    "ot": _row("ot", **mine),
    "mpf": _row("mpf", curve=curve, **mine),
    "mpf_1_t": _row("mpf", curve=curve, t="1/t", **mine),
    "mpf_best_t": _row("mpf", curve=curve, t="best", **mine),
    "mpf_random": _row("mpf", curve=curve, init="random", **mine),
    "avg_finetune": _row("avg", finetune=_tuned(0.01, 10), **mine),
    "buffer_only": _row("buffer_only", **mine),
    "magmax": _row("magmax", **mine),
    "max_abs": _row("merge:max_abs", **mine),
    "random_mix": _row("merge:random_mix", **mine),
    "ties": _row("merge:ties", **mine),
    "task_arithmetic": _row("merge:task_arithmetic", scale=0.3, **mine),
    "fisher_average": _row("merge:fisher_average", samples=200, **mine),
    "regmean": _row("merge:regmean", **mine),
    "ewc": _row("ewc", weight=1e2, samples=200, **mine),
    "lwf": _row("lwf", **mine),
    "er": _row("er", **mine),
  }


def _sweep(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Appendix C: settings were chosen on held-out data, see BUILD_NOTES.md."""
  config.buffer.sizes = (16, 32, 64, 128, 256, 512)
  config.crop_padding = 2
  mine = {"training": _sgd(0.01, 10)}
  curve = _sgd(0.07, 10)
  return {
    "mpf": _row("mpf", curve=curve, **mine),
    "mpf_random": _row("mpf", curve=curve, init="random", **mine),
    "mpf_finetune": _row("mpf", curve=curve, finetune=_tuned(0.01, 60), **mine),
    "avg_finetune": _row("avg", finetune=_tuned(0.01, 10), **mine),
    "ot_finetune": _row("ot", finetune=_tuned(0.01, 10), **mine),
    "avg_finetune_tuned": _row(
      "avg",
      finetune=_tuned(0.01, 60),
      by_size={
        str(size): {"finetune": _tuned(0.03, 60)} for size in (128, 256, 512)
      },
      **mine,
    ),
    "avg_finetune_augmented": _row(
      "avg",
      finetune=_tuned(0.01, 60, True),
      by_size={
        str(size): {"finetune": _tuned(0.03, 100, True)} for size in (256, 512)
      },
      **mine,
    ),
    "buffer_only": _row("buffer_only", **mine),
    "buffer_only_tuned": _row(
      "buffer_only",
      training=_sgd(0.03, 60),
      by_size={str(size): {"training": _sgd(0.01, 60)} for size in (16, 32)},
    ),
    "buffer_only_augmented": _row(
      "buffer_only", training=_sgd(0.03, 150, augment=True)
    ),
    "regmean_finetune": _row(
      "merge:regmean",
      finetune=_tuned(0.003, 30),
      by_size={
        str(size): {"finetune": _tuned(0.01, 60, True)}
        for size in (64, 128, 256, 512)
      },
      **mine,
    ),
    "regmean_replay": _row(
      "regmean_replay",
      training=_sgd(0.01, 3, augment=True),
      finetune=_tuned(0.003, 60, soup=3),
      by_size={
        str(size): {"finetune": _tuned(rate, 60, True, soup=3)}
        for size, rate in (
          (64, 0.01),
          (128, 0.01),
          (256, 0.02),
          (512, 0.02),
        )
      },
    ),
  }


def _vandeven(config: ml_collections.ConfigDict) -> dict[str, Any]:
  config.network, config.features = "mlp", (400, 400)
  config.use_bias = True
  config.buffer.per, config.buffer.sizes = "class", (100,)
  adam = {
    "optimizer": "adam",
    "learning_rate": 1e-3,
    "iterations": 2000,
    "batch_size": 128,
    "augment": False,
  }
  mine = {"training": adam}
  return {
    # As many steps as all tasks have together.
    "joint": _row("joint", training={**adam, "iterations": 10_000}),
    "naive": _row("naive", **mine),
    "er": _row("er", batch_size=128, weight=None, **mine),
    "lwf": _row("lwf", over="seen", **mine),
    "ewc": _row("ewc", weight=1e2, samples=200, head="seen", **mine),
    "si": _row("si", weight=1.0, head="seen", **mine),
  }


def _buzzega(config: ml_collections.ConfigDict) -> dict[str, Any]:
  config.network, config.features = "mlp", (100, 100)
  config.use_bias, config.kernel_init = True, "torch"
  config.buffer.per, config.buffer.sizes = "total", (200, 500)

  def once(rate: float, batch: int) -> dict[str, Any]:
    return {
      "learning_rate": rate,
      "momentum": 0.0,
      "epochs": 1,
      "batch_size": batch,
      "augment": False,
    }

  return {
    "joint": _row("joint", training=once(0.03, 10)),
    "naive": _row("naive", training=once(0.03, 10)),
    "er": _row(
      "er", training=once(0.01, 10), batch_size=10, online=True, head="all"
    ),
    "der++": _row(
      "der",
      training=once(0.03, 10),
      batch_size=128,
      alpha=0.2,
      beta=1.0,
      by_size={"500": {"batch_size": 10, "alpha": 1.0, "beta": 0.5}},
    ),
    "agem": _row("agem", training=once(0.03, 10), batch_size=128),
  }


def _cifar(config: ml_collections.ConfigDict) -> dict[str, Any]:
  config.dataset = "cifar10"
  config.seeds = (0, 1, 2)
  config.buffer.sizes = (100, 500)
  config.crop_padding, config.flip = 4, True
  mine = {"training": _sgd(0.01, 5)}
  return {
    "joint": _row("joint", training=_sgd(0.02, 10)),
    "naive": _row("naive", **mine),
    "avg_finetune": _row("avg", finetune=_tuned(0.01, 60, True), **mine),
    "buffer_only": _row("buffer_only", training=_sgd(0.01, 150, augment=True)),
    "mpf": _row("mpf", curve=_sgd(0.03, 10), **mine),
    "regmean_finetune": _row(
      "merge:regmean", finetune=_tuned(0.003, 60, True), **mine
    ),
    "regmean_replay": _row(
      "regmean_replay",
      training=_sgd(0.01, 3, augment=True),
      finetune=_tuned(0.01, 60, True, soup=3),
    ),
  }


def _digits(config: ml_collections.ConfigDict) -> dict[str, Any]:
  config.dataset = "digits"
  config.seeds = (0, 1, 2)
  config.buffer.sizes = (16, 64)
  mine = {"training": _sgd(0.05, 10)}
  return {
    "joint": _row("joint", **mine),
    "naive": _row("naive", **mine),
    "avg": _row("avg", **mine),
    "ot": _row("ot", **mine),
    "mpf": _row("mpf", curve=_sgd(0.07, 10), **mine),
    "avg_finetune": _row("avg", finetune=_tuned(0.02, 20), **mine),
    "buffer_only": _row("buffer_only", training=_sgd(0.05, 40)),
    "regmean_replay": _row(
      "regmean_replay",
      training=_sgd(0.02, 5),
      finetune=_tuned(0.01, 20),
    ),
  }


def get_config(variant: str = "digits") -> ml_collections.ConfigDict:
  """Returns the configuration of a variant, see the module.

  Args:
    variant: one of `VARIANTS`.

  Returns:
    The configuration.

  Raises:
    ValueError: the variant is unknown.
  """
  if variant not in VARIANTS:
    raise ValueError(
      f"Unknown variant {variant!r}. Choose one of {', '.join(VARIANTS)}."
    )
  config = ml_collections.ConfigDict()
  config.variant = variant
  config.dataset = "mnist"
  config.network = "mlpnet"
  # Widths of the network "mlp".
  config.features = ()
  config.use_bias = False
  config.kernel_init = "lecun_normal"
  config.seeds = (0, 1, 2, 3, 4)
  config.stream = ml_collections.ConfigDict()
  # class, task, data, or the domain-incremental permuted and rotated.
  config.stream.scenario = "class"
  config.stream.num_tasks = 5
  # Shuffles the classes; below 0 for their own order.
  config.stream.seed = -1
  # Share of the training data that is held out.
  config.stream.validation = 0.0
  # Of the rotated images, in degrees.
  config.stream.angles = (0.0, 15.0, 30.0, 45.0, 60.0)
  config.buffer = ml_collections.ConfigDict()
  config.buffer.policy = "reservoir"
  config.buffer.per = "task"
  config.buffer.sizes = (500,)
  # "test", or "validation" to choose settings by.
  config.judge = "test"
  # Random crop after padding by so many pixels, and horizontal flips, where a
  # row's settings ask for augmentation.
  config.crop_padding = 0
  config.flip = False
  config.devices = 0
  rows = {
    "digits": _digits,
    "splitmnist-mpf-paper": _paper,
    "splitmnist-replay-sweep": _sweep,
    "splitmnist-vandeven": _vandeven,
    "splitmnist-buzzega": _buzzega,
    "splitcifar10": _cifar,
  }[variant](config)
  # Tables keep the order.
  config.rows = ml_collections.ConfigDict(rows, sort_keys=False)
  return config
