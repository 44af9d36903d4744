"""Networks by name."""

from __future__ import annotations

from typing import Any

from jaxmerge.models._mlp import MLP

_MLP_FEATURES: dict[str, tuple[int, ...]] = {
  "mlpnet": (400, 200, 100),
  "mlplarge": (800, 400, 200),
  "mlphuge": (1024, 512, 256),
}


def names() -> tuple[str, ...]:
  """Lists the names that `get` knows.

  Returns:
    The names, from the smallest network to the largest.

  >>> names()
  ('mlpnet', 'mlplarge', 'mlphuge')
  """
  return tuple(_MLP_FEATURES)


def get(name: str, num_classes: int = 10, **options: Any) -> MLP:
  """Builds a network by name.

  ``mlpnet`` has hidden widths 400-200-100, ``mlplarge`` 800-400-200 and
  ``mlphuge`` 1024-512-256.

  Args:
    name: One of `names`.
    num_classes: The number of logits.
    **options: Further attributes of `MLP`, such as ``use_bias``.

  Returns:
    The module; its parameters come from ``module.init``.

  Raises:
    ValueError: If the name is unknown, or as `MLP` does.

  >>> get("mlpnet", num_classes=5).features
  (400, 200, 100)
  """
  if name not in _MLP_FEATURES:
    raise ValueError(
      f"unknown model {name!r}; choose one of {', '.join(names())}"
    )
  return MLP(features=_MLP_FEATURES[name], num_classes=num_classes, **options)
