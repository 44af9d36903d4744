"""A network along a curve and on a plane in PyTorch, point after point."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def evaluate_sums(
  points: Sequence[Sequence[torch.Tensor]],
  weights: np.ndarray,
  images: torch.Tensor,
  labels: torch.Tensor,
  batch_size: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Mean loss and accuracy of bias-free ReLU networks at weighted sums.

  Args:
    points: Kernels [in, out] of every control point.
    weights: One row a network, [sums, points].
    images: Inputs [examples, in], normalized.
    labels: Integers [examples].
    batch_size: Examples at a time.

  Returns:
    Losses and accuracies [sums].
  """
  losses, accuracies = [], []
  with torch.inference_mode():
    for row in weights.tolist():
      kernels = [
        sum(w * kernel for w, kernel in zip(row, layer, strict=True))
        for layer in zip(*points, strict=True)
      ]
      loss, hits = torch.zeros(()), torch.zeros((), dtype=torch.int64)
      for start in range(0, len(images), batch_size):
        hidden = images[start : start + batch_size]
        targets = labels[start : start + batch_size]
        for kernel in kernels[:-1]:
          hidden = torch.relu_(hidden @ kernel)
        logits = hidden @ kernels[-1]
        loss += torch.nn.functional.cross_entropy(
          logits, targets, reduction="sum"
        )
        hits += (logits.argmax(dim=1) == targets).sum()
      losses.append(loss.item() / len(images))
      accuracies.append(hits.item() / len(images))
  return np.array(losses), np.array(accuracies)
