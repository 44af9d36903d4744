"""The three hypotheses behind MagMax, measured on networks of `magmax.py`.

    python -m experiments.magmax_analysis --workdir=runs/magmax-analysis \
      --config=experiments/configs/magmax_analysis.py:clinc150-10

The variant is one of experiments/configs/magmax.py, whose first class order and
one of whose recipes are taken.
"""

from __future__ import annotations

import ml_collections

from experiments.configs import magmax


def get_config(variant: str = "clinc150-10") -> ml_collections.ConfigDict:
  """Returns the configuration of a variant, see the module.

  Args:
    variant: a variant of experiments/configs/magmax.py.

  Returns:
    The configuration.

  Raises:
    ValueError: the variant is unknown.
  """
  config = magmax.get_config(variant)
  # The one that both kinds of fine-tuning do better with on validation data.
  config.recipe = next(iter(config.recipes))
  # Kept fractions of a task vector, of Figure 1.
  config.densities = (0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
  # Fraction whose signs are compared, of Figure 2.
  config.top = 0.2
  # Leaves that Figure 4 is drawn without, too (`re.search` of their names):
  # weight decay alone moves the rows of words and positions that no text has,
  # task after task in the same direction.
  config.tables = "(word|position|token_type)_embeddings|token_embedding"
  return config
