"""Fine-tuning a pre-trained network task after task, and merging.

    python -m experiments.magmax --workdir=runs/magmax-10 \
      --config=experiments/configs/magmax.py:clinc150-10

Variants:
  clinc150-<tasks>   all-MiniLM-L6-v2 on CLINC150, 5, 10, 15 or 30 tasks; 1 for
                     the joint training
  generated-<tasks>  a small CLIP of random weights on 20 classes of drawn
                     pictures: the whole path of images in minutes
  cifar100-<tasks>, imagenet_r-<tasks>, cub200-<tasks>, cars-<tasks>
                     CLIP ViT-B/16 as in the paper, for a GPU. The paper's
                     accuracy of MagMax (sequential fine-tuning is not in its
                     table): CIFAR-100 /5 /10 /20 /50 84.16 80.41 78.49 76.75,
                     ImageNet-R 83.60 83.33 82.27 81.75, CUB-200 /5 /10 /20
                     63.89 60.74 58.90, Cars 73.61 69.28 65.84
Each with the ending -smoke for a run with fewer examples' worth of training:
one recipe, one order, one epoch.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import ml_collections

#: Rules of the two kinds of fine-tuning, with the coefficient that the paper
#: (or the rule's own) has, and the ones that validation chooses from.
GRID = (0.25, 0.5, 0.75, 1.0, 1.25)
_SUMS = (0.05, 0.1, 0.2, 0.3, 0.5)


def _rule(
  learner: str,
  rule: str,
  fixed: float,
  grid: tuple[float, ...] = GRID,
  **options: float,
) -> dict[str, Any]:
  """A row that merges the networks of a learner."""
  return {
    "learner": learner,
    "rule": rule,
    "options": options,
    "fixed": fixed,
    "grid": grid,
  }


def _plain(learner: str) -> dict[str, Any]:
  """A row of the learner's last network."""
  return {"learner": learner, "rule": "", "options": {}, "fixed": 1.0}


def _rows() -> dict[str, dict[str, Any]]:
  """All rows of the paper's Tables 1 and 2, and of its ablation."""
  return {
    "joint": _plain("joint"),
    "sequential": _plain("sequential"),
    "independent": _plain("independent"),
    "avg": _rule("independent", "average", 1.0),
    "task_arithmetic": _rule("independent", "task_arithmetic", 0.3, _SUMS),
    "ties": _rule("independent", "ties", 0.55, density=0.2),
    "random_mix": _rule("independent", "random_mix", 1.0),
    "max_abs": _rule("independent", "magmax", 0.5),
    "magmax": _rule("sequential", "magmax", 0.5),
    "sequential_avg": _rule("sequential", "average", 1.0),
    "sequential_ties": _rule("sequential", "ties", 0.55, density=0.2),
    "sequential_random_mix": _rule("sequential", "random_mix", 1.0),
    "lwf": _plain("lwf"),
    "ewc": _plain("ewc"),
    "lwf_magmax": _rule("lwf", "magmax", 0.5),
    "ewc_magmax": _rule("ewc", "magmax", 0.5),
  }


def _base() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.kind = "texts"
  config.dataset = "clinc150"
  # Tokens of a text in training; longer ones are cut. In evaluation each text
  # is in the smallest bucket that it fits.
  config.length = 24
  config.buckets = (8, 10, 12, 14, 17, 22, 36)
  config.templates = ("{}",)
  config.logit_scale = 20.0
  config.model = ml_collections.ConfigDict()
  # A folder, or a hub's id.
  config.model.source = "sentence-transformers/all-MiniLM-L6-v2"
  # What it reckons in, "bfloat16" say; the parameters stay float32.
  config.model.dtype = ""
  config.model.remat = False
  # Each a class order: a seed, -1 for the set's own order, or all classes.
  config.orders = (0, 1, 2)
  config.num_tasks = 10
  # Training examples of each class, the first ones; 0 for all of them.
  config.per_class = 50
  config.training = ml_collections.ConfigDict(
    {
      "optimizer": "adamw",
      "weight_decay": 0.1,
      "clip": 1.0,
      "schedule": "cosine",
      "warmup": 0.1,
      "batch_size": 50,
      "epochs": 2,
    }
  )
  # What validation chooses from, for every row alike, on the first order. So
  # it does the coefficients.
  config.recipes = ml_collections.ConfigDict(
    {
      "lr-15e-5": {"learning_rate": 1.5e-4},
      "lr-5e-5": {"learning_rate": 5e-5},
    },
    sort_keys=False,
  )
  config.learners = ml_collections.ConfigDict(
    {
      "joint": {},
      "sequential": {},
      "independent": {},
      # The paper's weight and temperature.
      "lwf": {"weight": 0.3, "temperature": 2.0},
      "ewc": {
        "samples": 100,
        "labels": "empirical",
        "chunk_size": 10,
        # Instead of the recipes of all.
        "recipes": {
          "lr-5e-5-w-1e5": {"learning_rate": 5e-5, "weight": 1e5},
          "lr-15e-5-w-1e5": {"learning_rate": 1.5e-4, "weight": 1e5},
          "lr-15e-5-w-1e7": {"learning_rate": 1.5e-4, "weight": 1e7},
        },
      },
    }
  )
  config.rows = ml_collections.ConfigDict(_rows(), sort_keys=False)
  # Rows that are measured after each task, too, in the first class orders.
  config.curve_orders = 1
  config.curves = (
    "sequential",
    "magmax",
    "max_abs",
    "avg",
    "lwf",
    "ewc",
    "lwf_magmax",
    "ewc_magmax",
  )
  config.eval_batch_size = 100
  # While the best coefficient is the largest (smallest) of a row's grid, so
  # many times it (a part of it) is tried, too.
  config.grow = 1.5
  # Whether the networks of all tasks stay in the workdir.
  config.keep_experts = False
  # Rows whose network, of the first class order, is written as a checkpoint
  # that other libraries load, with the chosen coefficient.
  config.export = ("magmax",)
  config.devices = 0
  return config


#: Name -> TFDS set, its splits, CLIP's templates, the paper's epochs.
_IMAGES = {
  "cifar100": ("cifar100", ("train", "test"), "cifar100", 10),
  # TFDS has it in one split, shuffled.
  "imagenet_r": (
    "imagenet_r",
    ("test[:80%]", "test[80%:]"),
    "imagenet",
    10,
  ),
  "cub200": ("caltech_birds2011", ("train", "test"), "imagenet", 30),
  "cars": ("cars196", ("train", "test"), "cars", 30),
  "generated": ("generated", ("train", "test"), "cifar100", 10),
}


def _of_images(name: str) -> ml_collections.ConfigDict:
  """CLIP's image encoder on one of the paper's sets."""
  config = _base()
  del config.length, config.buckets, config.logit_scale, config.templates
  config.kind, config.per_class = "images", 0
  config.dataset, config.splits, config.templates, epochs = _IMAGES[name]
  # The class order of the published code (github.com/danielm1405/magmax); it
  # has none for Cars, whose own order is taken.
  file = pathlib.Path(__file__).with_name("magmax_orders.json")
  orders = json.loads(file.read_text())
  if name != "generated":
    config.orders = (tuple(orders[name]) if name in orders else -1,)
  # Share of the training images that settings are chosen by.
  config.validation = 0.1
  # A JSON file of names, for a set whose own names are codes (ImageNet-R).
  config.class_names_file = ""
  # Random parts of the images, on the host.
  config.augment = True
  config.model.source = "openai/clip-vit-base-patch16"
  config.model.dtype = "bfloat16"
  # Of open_clip's folders, whose file does not say it.
  config.model.quick_gelu = False
  # Whether pickled weights may be read, and nothing else of a pickle.
  config.model.weights_only = False
  config.training.batch_size, config.training.epochs = 128, epochs
  # The paper's 500 steps are longer than many of its tasks.
  config.recipes = ml_collections.ConfigDict(
    {"lr-1e-5": {"learning_rate": 1e-5}}
  )
  config.learners.ewc = ml_collections.ConfigDict(
    {
      "samples": 100,
      "labels": "empirical",
      "chunk_size": 4,
      "weight": 1e6,
    }
  )
  if name == "generated":
    config.model.source, config.model.dtype = "random", ""
    config.training.batch_size = 32
    config.recipes = ml_collections.ConfigDict(
      {"lr-1e-3": {"learning_rate": 1e-3}}
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
  smoke = variant.endswith("-smoke")
  name, _, rest = variant.removesuffix("-smoke").partition("-")
  if name not in ("clinc150", *_IMAGES) or not rest.isdigit():
    raise ValueError(
      f"Unknown variant {variant!r}. Choose <set>-<number of tasks>[-smoke]"
      f" with a set of clinc150, {', '.join(_IMAGES)}."
    )
  config = _base() if name == "clinc150" else _of_images(name)
  config.variant, config.num_tasks = variant, int(rest)
  # The joint training knows no tasks: once for all numbers of them.
  if config.num_tasks == 1:
    config.rows = ml_collections.ConfigDict({"joint": _plain("joint")})
    config.curves = config.export = ()
  elif name == "clinc150":
    del config.rows.joint
  if smoke:
    config.orders, config.training.epochs = (0,), 1
    config.recipes = {"only": next(iter(config.recipes.values()))}
    ewc = config.learners.ewc
    if "recipes" in ewc:
      ewc.recipes = {"only": next(iter(ewc.recipes.values()))}
    ewc.samples = 10
  return config
