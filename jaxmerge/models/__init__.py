"""Flax linen modules of the experiments, by name.

* `MLP`: a fully connected ReLU network.
* `get`, `names`: the registry of named networks.
"""

from jaxmerge.models._mlp import MLP
from jaxmerge.models._registry import get, names

__all__ = ["MLP", "get", "names"]
