"""Optimal transport fusion of equal and of unequal widths, over proportions.

    python -m experiments.fusion --workdir=runs/fusion \
      --config=experiments/configs/fusion.py:mnist-mlpnet

The variant is `<dataset>-<net>[-smoke]`: `dataset` as in configs/mpf.py, `net`
is the smaller network, mlpnet or mlplarge; the larger one, mlplarge or mlphuge,
is about twice as wide. `smoke` is a run of seconds.

Expected of mnist-mlpnet, three seeds, test accuracy in per cent: equal widths,
OT by weights 96.4 at its best weight, average 95.8; smaller B (88.9) into
larger A 96.6. 16 minutes on two busy cores; see docs/results/fusion.md.
"""

from __future__ import annotations

import ml_collections

from experiments.configs import mpf

#: The larger network of each smaller one.
LARGER = {"mlpnet": "mlplarge", "mlplarge": "mlphuge"}


def get_config(variant: str = "digits-mlpnet") -> ml_collections.ConfigDict:
  """Returns the configuration of a variant, see the module.

  Args:
    variant: `<dataset>-<net>[-smoke]`.

  Returns:
    The configuration.

  Raises:
    ValueError: the variant is not of that form.
  """
  parts = variant.split("-")
  if (
    len(parts) not in (2, 3)
    or parts[1] not in LARGER
    or parts[2:] not in ([], ["smoke"])
  ):
    raise ValueError(
      f"Unknown variant {variant!r}. The form is <dataset>-<net>[-smoke] with"
      f" net one of {', '.join(LARGER)}, for instance mnist-mlpnet."
    )
  config = ml_collections.ConfigDict()
  # Data, split, and the training of all networks.
  config.mpf = mpf.get_config(variant)
  config.mpf.rows = ("model_a", "model_b")
  config.mpf.seeds = (0, 1, 2)
  config.larger = LARGER[parts[1]]
  # Weights of the network that is aligned.
  config.proportions = tuple(i / 10 for i in range(1, 10))
  # Training examples whose activations are compared.
  config.examples = 1_000
  # Sinkhorn's entropy relative to the mean cost.
  config.epsilon = 0.01
  config.max_iterations = 5_000
  if parts[2:]:
    config.mpf.seeds = (0, 1)
    config.mpf.base.epochs = 1
    config.proportions = (0.3, 0.7)
    config.examples = 50
    config.epsilon = 0.1
  return config
