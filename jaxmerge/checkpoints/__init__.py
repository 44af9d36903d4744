"""Checkpoints: training runs by Orbax, pre-trained weights by safetensors.

* `Store`: a folder of Orbax checkpoints that survives damage.
* `hugging_face`: folders of config.json and safetensors, as pytrees and back.
* `open_clip`: the same of open_clip's layout.
"""

from jaxmerge.checkpoints import hugging_face, open_clip
from jaxmerge.checkpoints._store import CheckpointError, Store

__all__ = ["CheckpointError", "Store", "hugging_face", "open_clip"]
