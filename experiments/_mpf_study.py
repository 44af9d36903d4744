"""What the rows of the Mode Path Fusion study share: data, network, losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from experiments import _classify
from experiments.configs import mpf as mpf_config
from jaxmerge import curves, models, training
from jaxmerge import data as data_lib

PyTree = Any

RECIPES = ("corrected", "paper")
SPLITS = ("heterogeneous", "plain")


@dataclasses.dataclass(frozen=True)
class Study:
  """Everything that the stages need, on the devices.

  Attributes:
    config: the configuration.
    train: the training set, uint8 images and labels.
    test: the test set, or the held-out part of the training set.
    parts: rows of the training set that "a", "b" and "joint" train on, int32
      `[seeds, n]`.
    sizes: number of examples of every part, and of the test set.
    model: the network's module.
    normalize: makes a batch of images what the network takes.
    init: makes the initial parameters of all seeds from a stage's keys.
    loss_fn: per-example loss with the accuracy.
    metric_fn: per-example loss and accuracy of a network.
    ensemble_fn: the same of the mean logits of a pair of networks.
    transform: augmentation of one example, or None.
  """

  config: ml_collections.ConfigDict
  train: training.Replicated
  test: training.Replicated
  parts: dict[str, np.ndarray]
  sizes: dict[str, int]
  model: Any
  normalize: Callable[[jax.Array], jax.Array]
  init: Callable[[jax.Array], PyTree]
  loss_fn: Callable[[PyTree, PyTree, jax.Array], Any]
  metric_fn: Callable[[PyTree, PyTree], PyTree]
  ensemble_fn: Callable[[PyTree, PyTree], PyTree]
  transform: Callable[[jax.Array, PyTree], PyTree] | None

  @property
  def num_devices(self) -> int:
    """Number of devices that share a batch."""
    return len(self.train.devices)

  def keys(self, stage: int) -> jax.Array:
    """PRNG keys of a stage, one a seed."""
    return jnp.stack(
      [
        jax.random.fold_in(jax.random.key(seed), stage)
        for seed in self.config.seeds
      ]
    )


def check_config(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError where a field is out of its range."""
  if config.network not in models.names(models.MLP):
    raise ValueError(
      f"Unknown network {config.network!r}. Choose one of "
      f"{', '.join(models.names(models.MLP))}."
    )
  for name, known in (
    ("recipe", RECIPES),
    ("split", SPLITS),
  ):
    if config[name] not in known:
      raise ValueError(
        f"Unknown {name} {config[name]!r}. Choose one of {', '.join(known)}."
      )
  if (config.recipe == "paper") != config.base.reset_optimizer:
    raise ValueError(
      f"recipe is {config.recipe!r}, but the other fields are not of that "
      "recipe. Choose it by the variant: mnist-mlpnet-paper."
    )
  unknown = sorted(map(str, set(config.rows) - set(mpf_config.ROWS)))
  if unknown or not config.rows:
    raise ValueError(
      f"rows names {', '.join(unknown) or 'nothing'}. Choose from "
      f"{', '.join(mpf_config.ROWS)}."
    )
  if (
    not config.seeds
    or len(set(config.seeds)) != len(config.seeds)
    or not all(isinstance(seed, int) for seed in config.seeds)
    or not all(0 <= seed < 2**31 for seed in config.seeds)
  ):
    raise ValueError(
      "seeds must be distinct integers from 0 to 2**31 - 1, got "
      f"{config.seeds}."
    )
  if not 0 < config.fraction < 1:
    raise ValueError(f"fraction must lie in (0, 1), got {config.fraction}.")
  if not 0 <= config.holdout < 1:
    raise ValueError(f"holdout must lie in [0, 1), got {config.holdout}.")
  for name, least in (("checkpoint_every", 1), ("profile_points", 2)):
    if config[name] < least:
      raise ValueError(f"{name} must be at least {least}, got {config[name]}.")
  # Every setting that a later stage would refuse is refused now.
  curve = config.curve
  curves.check_options(
    curve.kind, curve.num_points, curve.t_sampling, curve.concentration
  )
  if curve.init not in ("line", "random", "network"):
    raise ValueError(
      f"Unknown curve.init {curve.init!r}. Choose one of line, network, random."
    )
  for settings, epochs in (
    (config.base, config.base.epochs),
    (curve, curve.epochs),
    (config.finetune, curve.epochs),
  ):
    training.sgd(
      settings.learning_rate,
      settings.final_learning_rate,
      epochs,
      1,
      momentum=settings.momentum,
      weight_decay=settings.weight_decay,
    )
  if config.crop_padding < 0:
    raise ValueError("crop_padding must not be negative.")


def _parts(
  config: ml_collections.ConfigDict, labels: np.ndarray
) -> dict[str, np.ndarray]:
  """The rows that every seed's A, B and joint network train on."""
  pairs = []
  for seed in config.seeds:
    if config.split == "plain":
      pair = data_lib.plain_split(
        len(labels), fraction=config.fraction, seed=seed
      )
    else:
      pair = data_lib.heterogeneous_split(
        labels,
        special_class=config.special_class,
        fraction=config.fraction,
        seed=seed,
      )
    pairs.append(pair)
  everything = np.arange(len(labels), dtype=np.int32)
  return {
    "a": np.stack([pair[0] for pair in pairs]),
    "b": np.stack([pair[1] for pair in pairs]),
    "joint": np.broadcast_to(everything, (len(pairs), len(labels))),
  }


def build(config: ml_collections.ConfigDict, data_dir: str | None) -> Study:
  """Loads the data and makes the study of a configuration.

  Args:
    config: the configuration.
    data_dir: folder of prepared TFDS sets, None for the default one.

  Returns:
    The study, its data on the devices.

  Raises:
    ValueError: a field is out of its range, or the data cannot be had.
  """
  check_config(config)
  devices = training.resolve_devices(config.devices or None)
  train = data_lib.load(config.dataset, "train", data_dir=data_dir)
  images, labels = np.asarray(train.images), np.asarray(train.labels)
  if config.holdout:
    # One fixed split for all seeds: they differ in what they train on it.
    held, rest = data_lib.plain_split(
      len(labels), fraction=config.holdout, seed=0
    )
    test_images, test_labels = images[held], labels[held]
    images, labels = images[rest], labels[rest]
  else:
    test = data_lib.load(config.dataset, "test", data_dir=data_dir)
    test_images, test_labels = np.asarray(test.images), np.asarray(test.labels)
  parts = _parts(config, labels)
  for name, rows in parts.items():
    # Checked for every part before the first is trained.
    try:
      training.plan_epoch(rows.shape[1], config.batch_size, len(devices))
    except ValueError as error:
      raise ValueError(f"Part {name}: {error}") from error
  sizes = {name: rows.shape[1] for name, rows in parts.items()}
  sizes["test"] = len(test_labels)

  normalize = _classify.normalizer(config.dataset, images, data_dir)
  model = models.get(
    config.network,
    num_classes=train.num_classes,
    use_bias=config.use_bias,
    kernel_init=config.kernel_init,
  )

  def logits(params: PyTree, images: jax.Array) -> jax.Array:
    return jnp.asarray(model.apply({"params": params}, normalize(images)))

  def metric_fn(params: PyTree, batch: PyTree) -> PyTree:
    return _classify.metrics(logits(params, batch["input"]), batch["label"])

  def ensemble_fn(pair: PyTree, batch: PyTree) -> PyTree:
    first, second = (logits(params, batch["input"]) for params in pair)
    return _classify.metrics((first + second) / 2, batch["label"])

  def loss_fn(params: PyTree, batch: PyTree, key: jax.Array) -> Any:
    del key  # The networks are deterministic.
    values = metric_fn(params, batch)
    return values["loss"], {"accuracy": values["accuracy"]}

  def init(keys: jax.Array) -> PyTree:
    example = jnp.zeros((1, *images.shape[1:]))
    return jax.vmap(lambda key: model.init(key, example)["params"])(keys)

  return Study(
    config=config,
    train=training.replicate({"input": images, "label": labels}, devices),
    test=training.replicate(
      {"input": test_images, "label": test_labels}, devices
    ),
    parts=parts,
    sizes=sizes,
    model=model,
    normalize=normalize,
    init=jax.jit(init),
    loss_fn=loss_fn,
    metric_fn=metric_fn,
    ensemble_fn=ensemble_fn,
    transform=_classify.augmentation(config.crop_padding, config.flip),
  )
