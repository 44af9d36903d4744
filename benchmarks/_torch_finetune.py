"""A fine-tuning step of a sentence encoder in PyTorch transformers."""

from __future__ import annotations

import time

import numpy as np
import torch
import transformers
from torch.nn import functional

ATTENTION = ("eager", "sdpa")
OPTIMIZERS = ("foreach", "fused")
#: Batches padded to one length, or to their longest text.
PADDING = ("fixed", "longest")


class Steps:
  """AdamW steps on batches of texts; `run(padding)` returns their seconds.

  The network, the mean of the hidden states, the frozen head, the loss among
  the task's classes, the clipped gradient and AdamW are those of
  `experiments.magmax`.

  Attributes:
    loss: of the last step.
  """

  def __init__(
    self,
    folder: str,
    head: np.ndarray,
    ids: np.ndarray,
    labels: np.ndarray,
    batch_size: int,
    attention: str,
    optimizer: str,
  ):
    self._model = transformers.AutoModel.from_pretrained(
      folder, attn_implementation=attention, add_pooling_layer=False
    )
    # As here: no dropout.
    self._model.eval()
    self._head = torch.tensor(head)
    self._ids = torch.tensor(ids.astype(np.int64))
    self._labels = torch.tensor(labels.astype(np.int64))
    self._batch = batch_size
    self._optimizer = torch.optim.AdamW(
      self._model.parameters(),
      lr=5e-5,
      weight_decay=0.1,
      **{optimizer: True},
    )
    self.loss = float("nan")

  def run(self, padding: str) -> float:
    """Goes through the texts once."""
    begin = time.perf_counter()
    for start in range(0, len(self._ids), self._batch):
      ids = self._ids[start : start + self._batch]
      if padding == "longest":
        ids = ids[:, : int((ids != 0).sum(dim=1).max())]
      mask = (ids != 0).to(torch.int64)
      hidden = self._model(input_ids=ids, attention_mask=mask)[0]
      real = mask[:, :, None].to(hidden.dtype)
      mean = functional.normalize((hidden * real).sum(1) / real.sum(1))
      loss = functional.cross_entropy(
        mean @ self._head.T, self._labels[start : start + self._batch]
      )
      self._optimizer.zero_grad()
      loss.backward()
      torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
      self._optimizer.step()
    self.loss = float(loss.detach())
    return time.perf_counter() - begin
