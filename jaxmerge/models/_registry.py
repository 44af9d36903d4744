"""Networks by name."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from jaxmerge.models import _cnn, _mlp, _resnet, _vgg, _vit

# Name -> the class, and the attributes that the name stands for.
_NETWORKS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
  "mlpnet": (_mlp.MLP, {"features": (400, 200, 100)}),
  "mlplarge": (_mlp.MLP, {"features": (800, 400, 200)}),
  "mlphuge": (_mlp.MLP, {"features": (1024, 512, 256)}),
  "mlp512": (_mlp.MLP, {"features": (512, 512, 512), "use_bias": True}),
  "cnn": (_cnn.CNN, {}),
  "vgg11": (_vgg.VGG, {}),
  "resnet20": (_resnet.ResNet, {"depth": 20}),
  "vit-tiny": (_vit.ViT, {"dim": 192, "depth": 12, "heads": 3}),
}


def names(kind: type[nn.Module] | None = None) -> tuple[str, ...]:
  """Lists the names that `get` knows.

  Args:
    kind: A class of networks, such as `MLP`; None for all.

  Returns:
    The names.

  >>> names()[:3]
  ('mlpnet', 'mlplarge', 'mlphuge')
  >>> names(_resnet.ResNet)
  ('resnet20',)
  """
  return tuple(
    name
    for name, (found, _) in _NETWORKS.items()
    if kind is None or found is kind
  )


def get(name: str, num_classes: int = 10, **options: Any) -> Any:
  """Builds a network by name.

  Fully connected, without biases: ``mlpnet`` has hidden widths 400-200-100,
  ``mlplarge`` 800-400-200 and ``mlphuge`` 1024-512-256; ``mlp512`` has three
  of 512, with biases. Convolutional: ``cnn`` (widths 32-64-128), ``vgg11``
  and ``resnet20``; ``norm`` chooses their normalisation and ``width`` the
  channels of the ResNet. ``vit-tiny`` is 192 wide and 12 blocks deep.

  Args:
    name: One of `names`.
    num_classes: The number of logits.
    **options: Further attributes of the network's class, such as ``use_bias``
      or ``norm``; they replace those that the name stands for.

  Returns:
    The module; its variables come from ``module.init``.

  Raises:
    ValueError: If the name is unknown, or as the class does.

  >>> get("mlpnet", num_classes=5).features
  (400, 200, 100)
  >>> get("resnet20", width=64, norm="layer").depth
  20
  """
  if name not in _NETWORKS:
    raise ValueError(
      f"unknown model {name!r}; choose one of {', '.join(names())}"
    )
  kind, attributes = _NETWORKS[name]
  return kind(**{**attributes, "num_classes": num_classes, **options})
