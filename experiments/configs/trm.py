"""Merging without storage: trajectory regularised merging and its neighbours.

    python -m experiments.trm --workdir=runs/trm-10 \
      --config=experiments/configs/trm.py:clinc150-10

Variants:
  clinc150-<tasks>   all-MiniLM-L6-v2 on CLINC150, 5, 10 or 15 tasks; 50 texts a
                     class are trained on
  cifar10            split CIFAR-10, five tasks of two classes, 1000 images of
                     each, from a small convolutional network trained on half
                     of the classes, 4500 images of each
  digits             the same on the embedded set with an MLP; minutes
Each with the ending -ablations for the ablations of TRM instead of the other
strategies, and -smoke for one class order and one epoch.

A row names a strategy of `jaxmerge.continual.strategies` and its options.
docs/results/trm.md has the figures that were measured.
"""

from __future__ import annotations

from typing import Any

import ml_collections

VARIANTS = ("clinc150-5", "clinc150-10", "clinc150-15", "cifar10", "digits")


def _row(strategy: str, **options: Any) -> dict[str, Any]:
  return {"strategy": strategy, **options}


def _coefficients(
  iterations: int, batch_size: int, learning_rate: float = 0.1
) -> dict[str, Any]:
  """Settings of the optimisation of TRM's coefficients."""
  return {
    "optimizer": "adam",
    "learning_rate": learning_rate,
    "iterations": iterations,
    "batch_size": batch_size,
    "augment": False,
  }


def _main(mine: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
  """The strategies that are compared.

  Args:
    mine: options of all: the training, the classes of the loss.
    own: options of single rows.
  """
  training = {"training": mine["training"]}
  rows = {
    "joint": _row("joint", **training),
    "naive": _row("naive", **mine),
    "avg_half": _row("avg", weight=0.5, start="merged", **mine),
    "avg_1_t": _row("avg", weight="1/t", start="merged", **mine),
    "magmax": _row("merge:magmax", start="last", scale=0.5, **mine),
    "became": _row("became", **mine),
    "became_unprojected": _row("became", projection=None, **mine),
    "pam": _row("pam", **mine),
    "pam_network": _row("pam", adapter=None, **mine),
    "ewc": _row("ewc", **mine),
    "lwf": _row("lwf", **mine),
    "trm": _row("trm", **mine),
  }
  return {name: {**row, **own.get(name, {})} for name, row in rows.items()}


def _ablations(trm: dict[str, Any]) -> dict[str, Any]:
  """TRM with one thing changed."""
  path = trm["path"]
  other = "distance" if path["by"] == "step" else "step"
  changes: dict[str, dict[str, Any]] = {
    "trm": {},
    "no_alignment": {"alignment": 0.0},
    "no_consistency": {"consistency": 0.0},
    "no_responsiveness": {"responsiveness": 0.0},
    "no_gradient": {"augment_subspace": False},
    **{
      f"snapshots_{count}": {"path": {**path, "snapshots": count}}
      for count in (1, 2, 4, 8)
      if count != path["snapshots"]
    },
    f"by_{other}": {"path": {**path, "by": other}},
    "layer": {"granularity": "layer"},
    "leaf": {"granularity": "leaf"},
  }
  return {name: {**trm, **change} for name, change in changes.items()}


def _base() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  # Class orders, by seed.
  config.orders = (0, 1, 2)
  # The set that strategies are judged on; "validation" to choose settings by.
  config.judge = "test"
  # Training examples of each class; 0 for all.
  config.per_class = 0
  config.devices = 0
  return config


def _texts(tasks: int) -> ml_collections.ConfigDict:
  config = _base()
  config.kind = "texts"
  config.dataset = "clinc150"
  config.num_tasks = tasks
  config.per_class = 50
  config.length = 24
  config.buckets = (8, 10, 12, 14, 17, 22, 36)
  config.templates = ("{}",)
  config.logit_scale = 20.0
  config.model = ml_collections.ConfigDict(
    {
      "source": "sentence-transformers/all-MiniLM-L6-v2",
      "dtype": "",
      "remat": False,
    }
  )
  config.eval_batch_size = 100
  training = {
    "optimizer": "adamw",
    "learning_rate": 1.5e-4,
    "weight_decay": 0.1,
    "clip": 1.0,
    "schedule": "cosine",
    "warmup": 0.1,
    "batch_size": 50,
    "epochs": 2,
    "augment": False,
  }
  mine = {"training": training, "head": "task"}
  # As many steps as cost about a sixth of the task's training.
  iterations = max(1, 25 // tasks)
  fisher = {"samples": 100, "labels": "empirical", "chunk_size": 10}
  # By the labels' own gradients BECAME's coefficient is below 0.02 from the
  # fourth of ten tasks on; with 15 classes a task this costs about as much.
  exact = {"samples": 8, "labels": "exact"}
  config.rows = ml_collections.ConfigDict(
    _main(
      mine,
      {
        "became": exact,
        "became_unprojected": exact,
        "ewc": {**fisher, "weight": 1e5},
        "lwf": {"weight": 0.3},
        "magmax": {"scale": 0.75},
        "trm": {
          "alignment_head": "all",
          "weight": 0.5,
          "consistency": 0.1,
          "path": {"snapshots": 2, "by": "step"},
          "samples": 25,
          "coefficients": _coefficients(iterations, 20, 0.05 / iterations),
        },
      },
    ),
    sort_keys=False,
  )
  return config


def _of_images(dataset: str) -> ml_collections.ConfigDict:
  config = _base()
  config.kind = "images"
  config.dataset = dataset
  config.num_tasks = 5
  config.validation = 0.1
  small = dataset == "digits"
  # As many of each class, so that all tasks share their programs.
  config.per_class = 120 if small else 1000
  config.network = "mlpnet" if small else "cnn"
  config.network_options = ml_collections.ConfigDict(
    {"features": (64,)} if small else {"norm": "group"}
  )
  config.crop_padding, config.flip = (0, False) if small else (4, True)
  config.pretraining = ml_collections.ConfigDict(
    {
      "learning_rate": 0.05,
      "final_learning_rate": 5e-4,
      "weight_decay": 5e-4,
      "epochs": 10 if small else 6,
      "batch_size": 64,
      "augment": not small,
    }
  )
  training = {
    "learning_rate": 0.01,
    "final_learning_rate": 1e-4,
    "weight_decay": 5e-4,
    "epochs": 5 if small else 3,
    "batch_size": 32,
    "augment": not small,
  }
  # What is best of the task's own and all seen classes, on held-out data of the
  # digits; BUILD_NOTES.md has the figures.
  mine = {"training": training, "head": "task"}
  fisher = {"samples": 200}
  config.rows = ml_collections.ConfigDict(
    _main(
      mine,
      {
        "became": fisher,
        "became_unprojected": fisher,
        # On CIFAR-10 training with 1000 diverges.
        "ewc": {**fisher, "weight": 1e3 if small else 1e2},
        "avg_1_t": {"head": "seen"},
        "magmax": {"scale": 1.0},
        "trm": {
          "alignment_head": "seen" if small else "task",
          "weight": 1.0 if small else 0.5,
          "consistency": 1.0,
          "temperature": 1.0,
          "path": {"snapshots": 4, "by": "distance" if small else "step"},
          "samples": 100,
          "coefficients": _coefficients(10, 32),
        },
        "pam": {"adapter": {"rank": 8, "alpha": 16.0, "targets": "kernel"}},
      },
    ),
    sort_keys=False,
  )
  return config


def get_config(variant: str = "clinc150-10") -> ml_collections.ConfigDict:
  """Returns the configuration of a variant, see the module.

  Args:
    variant: the variant.

  Returns:
    The configuration.

  Raises:
    ValueError: the variant is unknown.
  """
  name = variant.removesuffix("-smoke")
  smoke, name = name != variant, name.removesuffix("-ablations")
  ablations = variant.removesuffix("-smoke") != name
  if name not in VARIANTS:
    raise ValueError(
      f"Unknown variant {variant!r}. Choose one of {', '.join(VARIANTS)}, with"
      " -ablations, -smoke or both."
    )
  set_name, _, tasks = name.partition("-")
  config = _texts(int(tasks)) if tasks else _of_images(set_name)
  config.variant = variant
  if ablations:
    rows = _ablations(config.rows.trm.to_dict())
    config.rows = ml_collections.ConfigDict(rows, sort_keys=False)
  if smoke:
    config.orders = (0,)
    for row in config.rows.values():
      row.training.epochs = 1
  return config
