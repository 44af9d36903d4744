"""Flax linen modules of the experiments, by name.

* `MLP`: a fully connected ReLU network.
* `CNN`, `VGG`, `ResNet`: convolutional networks with batch, group, layer or
  no normalisation; `BatchNorm` is their batch normalisation.
* `ViT`: a vision transformer.
* `Bert`: a BERT-type encoder, `bert_from_config` that of a config.json;
  `mean_embedding` makes one vector a text of its hidden states, `pack_texts`
  puts several texts into a row, a `Packing`.
* `Clip`, whose encoders have `ClipSizes`; `clip_from_config`, and
  `clip_from_open_clip` of open_clip's.
* `Lora`, `lora_init`, `lora_apply`: low-rank adapters of any of them.
* `class_embeddings`: a frozen head of the names of classes.
* `get`, `names`: the registry of named networks.
"""

from jaxmerge.models._bert import (
  Bert,
  BertOutput,
  bert_from_config,
  mean_embedding,
)
from jaxmerge.models._class_embeddings import class_embeddings
from jaxmerge.models._clip import (
  Clip,
  ClipSizes,
  clip_from_config,
  clip_from_open_clip,
)
from jaxmerge.models._cnn import CNN
from jaxmerge.models._lora import Lora, lora_apply, lora_init
from jaxmerge.models._mlp import MLP
from jaxmerge.models._norms import BatchNorm
from jaxmerge.models._packing import Packing, pack_texts
from jaxmerge.models._registry import get, names
from jaxmerge.models._resnet import ResNet
from jaxmerge.models._vgg import VGG
from jaxmerge.models._vit import ViT

__all__ = [
  "CNN",
  "MLP",
  "VGG",
  "BatchNorm",
  "Bert",
  "BertOutput",
  "Clip",
  "ClipSizes",
  "Lora",
  "Packing",
  "ResNet",
  "ViT",
  "bert_from_config",
  "class_embeddings",
  "clip_from_config",
  "clip_from_open_clip",
  "get",
  "lora_apply",
  "lora_init",
  "mean_embedding",
  "names",
  "pack_texts",
]
