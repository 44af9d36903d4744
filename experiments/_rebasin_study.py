"""What the barrier study shares: data, network, losses, pairs of networks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from experiments import _classify
from experiments.configs import rebasin as rebasin_config
from jaxmerge import alignment, models, training
from jaxmerge import data as data_lib

PyTree = Any

# Images that a network normalises or is measured on at a time.
_CHUNK = 500


@dataclasses.dataclass(frozen=True)
class Study:
  """Everything that the stages need, on the devices.

  Attributes:
    config: the configuration.
    train: the training set, uint8 images and labels.
    test: the test set.
    profiled: rows of the training set that the train loss is measured on.
    matching: training examples for activations and for the straight-through
      estimator.
    repairing: images `[batches, b, h, w, c]` for REPAIR and for statistics.
    init: makes the initial variables from keys, one a network.
    loss_fn: per-example loss with the accuracy, as `training.fit` takes it.
    metric_fn: per-example loss and accuracy of variables.
    mean_loss_fn: mean loss of variables over a batch.
    activations_fn: pre-activations of variables by layer, for images.
    collect: the same, compiled.
    reset_fn: variables with BatchNorm statistics estimated anew; None for a
      network without.
    transform: augmentation of one example, or None.
    spec: which axes of the variables share a hidden dimension.
  """

  config: ml_collections.ConfigDict
  train: training.Replicated
  test: training.Replicated
  profiled: np.ndarray
  matching: dict[str, jax.Array]
  repairing: jax.Array
  init: Callable[[jax.Array], PyTree]
  loss_fn: Callable[..., Any]
  metric_fn: Callable[[PyTree, PyTree], PyTree]
  mean_loss_fn: Callable[[PyTree, PyTree], jax.Array]
  activations_fn: Callable[[PyTree, jax.Array], dict[str, jax.Array]]
  collect: Callable[[PyTree, jax.Array], dict[str, jax.Array]]
  reset_fn: Callable[[PyTree], PyTree] | None
  transform: Callable[[jax.Array, PyTree], PyTree] | None
  spec: alignment.PermutationSpec

  @property
  def num_devices(self) -> int:
    """Number of devices that share a batch."""
    return len(self.train.devices)


def check_config(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError where a field is out of its range."""
  if config.network not in models.names():
    raise ValueError(
      f"Unknown network {config.network!r}. Choose one of "
      f"{', '.join(models.names())}."
    )
  unknown = sorted(set(config.methods) - set(rebasin_config.METHODS))
  if unknown or not config.methods:
    raise ValueError(
      f"methods names {', '.join(unknown) or 'nothing'}. Choose from "
      f"{', '.join(rebasin_config.METHODS)}."
    )
  seeds = config.seeds
  if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
    raise ValueError(f"seeds must be distinct and not negative, got {seeds}.")
  if not config.learning_rates or min(config.learning_rates) <= 0:
    raise ValueError(
      f"learning_rates must be positive, got {config.learning_rates}."
    )
  for name, least in (
    ("epochs", 1),
    ("checkpoint_every", 1),
    ("profile_points", 3),
    ("matching_examples", 2),
    ("repair_examples", 2),
    ("profile_examples", 1),
  ):
    if config[name] < least:
      raise ValueError(f"{name} must be at least {least}, got {config[name]}.")
  if config.profile_points % 2 == 0:
    raise ValueError("profile_points must be odd: the midpoint is one of them.")


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
  test = data_lib.load(config.dataset, "test", data_dir=data_dir)
  images, labels = np.asarray(train.images), np.asarray(train.labels)
  training.plan_epoch(len(labels), config.batch_size, len(devices))
  normalize = _classify.normalizer(config.dataset, images, data_dir)
  model = models.get(config.network, num_classes=train.num_classes)
  example = jnp.zeros((1, *images.shape[1:]))
  shapes = jax.eval_shape(model.init, jax.random.key(0), example)
  has_stats = "batch_stats" in shapes

  def metric_fn(variables: PyTree, batch: PyTree) -> PyTree:
    logits = model.apply(variables, normalize(batch["input"]))
    return _classify.metrics(jnp.asarray(logits), batch["label"])

  def update(variables: PyTree, images: jax.Array) -> Any:
    return model.apply(
      variables, normalize(images), train=True, mutable=["batch_stats"]
    )

  def plain_loss(params: PyTree, batch: PyTree, key: jax.Array) -> Any:
    del key  # The networks are deterministic.
    values = metric_fn({"params": params}, batch)
    return values["loss"], {"accuracy": values["accuracy"]}

  def loss_with_stats(
    params: PyTree, stats: PyTree, batch: PyTree, key: jax.Array
  ) -> Any:
    del key
    variables = {"params": params, "batch_stats": stats}
    logits, new = update(variables, batch["input"])
    values = _classify.metrics(jnp.asarray(logits), batch["label"])
    return values["loss"], {"accuracy": values["accuracy"]}, new["batch_stats"]

  layers_fn = alignment.flax_activations(model)

  def activations_fn(variables: PyTree, images: jax.Array) -> Any:
    return layers_fn(variables, normalize(images))

  # The training examples in one random order; what is measured with comes from
  # its front.
  order = np.random.default_rng(0).permutation(len(labels))
  batches = max(1, min(config.repair_examples, len(order)) // _CHUNK)
  size = min(config.repair_examples // batches, len(order) // batches)
  repairing = jnp.asarray(
    images[order[: batches * size]].reshape(batches, size, *images.shape[1:])
  )

  def reset(variables: PyTree) -> PyTree:
    return alignment.reset_batch_stats(
      lambda variables, images: update(variables, images)[1]["batch_stats"],
      variables,
      repairing,
    )

  return Study(
    config=config,
    train=training.replicate({"input": images, "label": labels}, devices),
    test=training.replicate(
      {
        "input": np.asarray(test.images),
        "label": np.asarray(test.labels),
      },
      devices,
    ),
    profiled=np.sort(order[: config.profile_examples]),
    matching={
      "input": jnp.asarray(images[order[: config.matching_examples]]),
      "label": jnp.asarray(labels[order[: config.matching_examples]]),
    },
    repairing=repairing,
    init=jax.jit(jax.vmap(lambda key: dict(model.init(key, example)))),
    loss_fn=loss_with_stats if has_stats else plain_loss,
    metric_fn=metric_fn,
    mean_loss_fn=lambda *args: metric_fn(*args)["loss"].mean(),
    activations_fn=activations_fn,
    collect=jax.jit(activations_fn),
    reset_fn=reset if has_stats else None,
    transform=_classify.augmentation(config.crop_padding, config.flip),
    spec=_spec(config.network, shapes),
  )


def _spec(network: str, variables: PyTree) -> alignment.PermutationSpec:
  if network.startswith("resnet"):
    return alignment.resnet_spec(variables)
  if network.startswith("vit"):
    return alignment.vit_spec(variables)
  return alignment.derive_spec(variables)


def train_pairs(
  study: Study, rate: float, options: dict[str, Any]
) -> tuple[PyTree, dict[str, Any]]:
  """Trains two networks a seed, from random numbers of their own.

  Args:
    study: the study.
    rate: the learning rate.
    options: of the training loop, see `experiments._stage.run`.

  Returns:
    Variables with a leading axis, the first networks of all seeds and then the
    second ones; what is to be recorded.
  """
  config = study.config
  init_keys, keys = jax.vmap(jax.random.split, out_axes=1)(network_keys(study))
  variables = study.init(init_keys)
  num_examples = int(jax.tree.leaves(study.train.value)[0].shape[1])
  plan = training.plan_epoch(num_examples, config.batch_size, study.num_devices)
  result = training.fit(
    study.loss_fn,
    variables["params"],
    study.train,
    key=keys,
    state=variables.get("batch_stats"),
    optimizer=training.sgd(
      rate,
      rate * config.final_fraction,
      config.epochs,
      plan.steps,
      momentum=config.momentum,
      weight_decay=config.weight_decay,
    ),
    epochs=config.epochs,
    batch_size=config.batch_size,
    seed_axis=True,
    transform=study.transform,
    **options,
  )
  trained = {"params": result.params}
  if study.reset_fn is not None:
    trained["batch_stats"] = result.state
  return trained, {"steps": result.steps}


def network_keys(study: Study) -> jax.Array:
  """PRNG keys of the networks: the first ones of all seeds, then the second."""
  return jnp.stack(
    [
      jax.random.fold_in(jax.random.key(seed), side)
      for side in (0, 1)
      for seed in study.config.seeds
    ]
  )
