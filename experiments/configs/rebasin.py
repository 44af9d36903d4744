"""Barriers between networks trained apart, before and after alignment.

    python -m experiments.rebasin --workdir=runs/rebasin-mnist \
      --config=experiments/configs/rebasin.py:mnist-mlp512

The variant is `<dataset>-<net>[-smoke]`: `net` is a name that
`jaxmerge.models.names` knows, such as mlp512 (3 x 512 with biases) or resnet20;
`smoke` is a run of seconds.

Expected on two cores (barrier of the train loss after weight matching):
  mnist-mlp512           0.011 ± 0.001 at learning rate 0.1 (as they are 1.51),
                         0.39 at 0.01 (1.31), 1.18 at 0.001 (1.55); 40 minutes
  cifar10-resnet20       2.87 (as they are 2.50), no alignment takes it away;
                         with REPAIR 1.93, after activation matching 0.49 of the
                         test loss; one pair of networks, 3 hours on one core
  cifar10-mlp512         0.235 ± 0.014 at learning rate 0.1 (as they are 1.40),
                         0.96 at 0.01 (1.72), after activation matching 0.69;
                         three pairs, 40 minutes on one core
"""

from __future__ import annotations

import ml_collections

#: Ways to bring the second network into the order of the first.
METHODS = (
  "naive",
  "random",
  "weights",
  "activations",
  "ot_weights",
  "ot_activations",
  "sinkhorn",
  "straight_through",
)


def get_config(variant: str = "mnist-mlp512") -> ml_collections.ConfigDict:
  """Returns the configuration of a variant, see the module.

  Args:
    variant: `<dataset>-<net>[-smoke]`.

  Returns:
    The configuration.

  Raises:
    ValueError: the variant is not of that form.
  """
  smoke = variant.endswith("-smoke")
  dataset, _, network = variant.removesuffix("-smoke").partition("-")
  if not dataset or not network:
    raise ValueError(
      f"Unknown variant {variant!r}. The form is <dataset>-<net>[-smoke], for "
      "instance mnist-mlp512."
    )
  config = ml_collections.ConfigDict()
  config.dataset, config.network = dataset, network
  # Each seed is a pair of networks, trained from different random numbers.
  config.seeds = (0, 1, 2)
  # A barrier is a property of the optimiser and of its learning rate.
  config.learning_rates = (0.1, 0.01, 0.001)
  # The rate falls linearly to this fraction of it, see `training.sgd`.
  config.final_fraction = 1e-3
  config.momentum = 0.9
  config.weight_decay = 5e-4
  config.epochs = 10
  config.batch_size = 128
  # Random crop after padding by so many pixels, and horizontal flips.
  config.crop_padding = 0
  config.flip = False
  config.methods = METHODS
  # Weight matching: random starts besides the identity.
  config.restarts = 1
  # Steps of the straight-through estimator.
  config.straight_through_steps = 200
  config.straight_through_rate = 0.01
  # Training examples: for activations and REPAIR, and for the train loss.
  config.matching_examples = 2_000
  config.repair_examples = 5_000
  config.profile_examples = 10_000
  config.profile_points = 11
  config.repair = True
  # Number of devices; 0 for all.
  config.devices = 0
  config.checkpoint_every = 1

  if config.network.startswith("resnet"):
    config.learning_rates = (0.1,)
    config.seeds = (0,)
    config.crop_padding, config.flip = 4, True
    # What two cores can do in about an hour.
    config.epochs = 5
    config.matching_examples = 256
    config.repair_examples = 2_000
    config.profile_examples = 2_000
    config.profile_points = 5
    config.straight_through_steps = 50
  elif config.dataset == "cifar10":
    config.learning_rates = (0.1, 0.01)
  if config.dataset == "digits":
    config.batch_size = 64
  if smoke:
    config.seeds = (0, 1)
    config.learning_rates = (0.1,)
    config.epochs = 2
    config.straight_through_steps = 5
    config.profile_points = 3
    config.matching_examples = config.repair_examples = 200
    config.profile_examples = 200
  return config
