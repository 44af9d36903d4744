"""Checkpoints: training runs by Orbax, pre-trained weights by safetensors.

* `Store`: a folder of Orbax checkpoints that survives damage.
* `hugging_face`: folders of config.json and safetensors, as pytrees and back.
"""

from jaxmerge.checkpoints import hugging_face
from jaxmerge.checkpoints._store import CheckpointError, Store

__all__ = ["CheckpointError", "Store", "hugging_face"]
