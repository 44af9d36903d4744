"""The loss landscape around a Mode Path Fusion: the paper's Figure 1.

    python -m experiments.mpf --workdir=runs/mnist \
      --config=experiments/configs/mpf.py:mnist-mlpnet \
      --config.seeds="(0, 1, 2)"
    python -m experiments.landscape --workdir=runs/landscape \
      --mpf_workdir=runs/mnist \
      --config=experiments/configs/landscape.py:mnist-mlpnet

The variant is `<dataset>-<net>[-smoke]`, that of the networks; `smoke` looks at
few points.

Expected of mnist-mlpnet, three seeds, on two cores that other work shared, in
8 minutes: barrier of the straight line in train loss 0.78 ± 0.09, after
alignment and along the curve 0; between t = 1/4 and 3/4 the line's largest
train loss is 27.9 ± 0.2 times the curve's. At t = 1 both are B, which has
hardly seen the special digit: with the ends it is 1.2 ± 0.1 times.
"""

from __future__ import annotations

import ml_collections


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
  flavour = parts[2] if len(parts) == 3 else ""
  if len(parts) not in (2, 3) or flavour not in ("", "smoke"):
    raise ValueError(
      f"Unknown variant {variant!r}. The form is <dataset>-<net>[-smoke], for "
      "instance mnist-mlpnet."
    )
  config = ml_collections.ConfigDict()
  config.dataset, config.network = parts[:2]
  # Points along every path, for profiles and for the curve in the plane.
  config.profile_points = 61
  # Points on each axis of the plane, which goes so far beyond the networks, in
  # units of its two lengths.
  config.plane_points = 21
  config.margin = 0.25
  # Which of the seeds the plane is drawn for, by its place.
  config.plane_seed = 0
  # Points of the plane between two writings of its file.
  config.chunk = 128
  # Examples that a device takes at a time.
  config.eval_batch_size = 1000
  if flavour == "smoke":
    config.profile_points = 5
    config.plane_points = 4
    config.chunk = 8
  return config
