"""The flag of the studies that keep their figures in the repository."""

from __future__ import annotations

from absl import flags

PUBLISH = flags.DEFINE_bool(
  "publish",
  False,
  "Keep the figures in experiments/results, their page in docs/results, and "
  "pictures in docs/images.",
)
