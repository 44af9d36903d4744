"""Checkpoints: training runs by Orbax, pre-trained weights by safetensors.

* `open`: any of them as a mapping of tensors that are read when needed.
* `Store`: a folder of Orbax checkpoints that survives damage.
* `hugging_face`: folders of config.json and safetensors, as pytrees and back.
* `open_clip`: the same of open_clip's layout.
"""

from jaxmerge.checkpoints import hugging_face, open_clip
from jaxmerge.checkpoints._lazy_tensor import LazyTensor
from jaxmerge.checkpoints._loaded_tensor import LoadedTensor
from jaxmerge.checkpoints._open import Checkpoint, open  # noqa: A004
from jaxmerge.checkpoints._store import CheckpointError, Store

__all__ = [
  "Checkpoint",
  "CheckpointError",
  "LazyTensor",
  "LoadedTensor",
  "Store",
  "hugging_face",
  "open",
  "open_clip",
]
