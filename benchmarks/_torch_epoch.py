"""An epoch of Mode Path Fusion as an in-memory PyTorch loop.

The same mathematics as the package's own: frozen ends, a trained bend, one
t ~ U(0, 1) a step, cross entropy at phi(t), SGD with momentum and weight decay,
every example once in a random order, the last partial batch included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional

# How the data lies in memory: normalised float32, or uint8 that is normalised
# batch by batch; gathered batch by batch, or shuffled whole once an epoch.
DATA = ("float32", "float32-shuffled", "uint8")
# How a step is computed; see `Epoch`.
STEPS = ("autograd", "fused", "foreach", "compiled")

VARIANTS = tuple(f"{step}/{data}" for step in STEPS for data in DATA)

Tensors = list[torch.Tensor]


def network_logits(
  weights: Sequence[torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
  for weight in weights[:-1]:
    x = functional.relu(functional.linear(x, weight))
  return functional.linear(x, weights[-1])


def network_loss(
  weights: Sequence[torch.Tensor], x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
  return functional.cross_entropy(network_logits(weights, x), y)


def curve_loss(
  bend: Tensors,
  start: Tensors,
  end: Tensors,
  coefficients: torch.Tensor,
  x: torch.Tensor,
  y: torch.Tensor,
) -> torch.Tensor:
  a, b, c = coefficients
  weights = [
    a * first + b * middle + c * last
    for first, middle, last in zip(start, bend, end, strict=True)
  ]
  return network_loss(weights, x, y)


def normalize(images: torch.Tensor, mean: float, std: float) -> torch.Tensor:
  """Converts uint8 images to normalised float32."""
  return images.to(torch.float32).div_(255).sub_(mean).div_(std)


class Epoch:
  """One curve epoch; `run()` trains for one more and returns its seconds.

  The ways to compute a step:

  * ``autograd``: phi(t) inside the graph, the optimiser's foreach kernels.
  * ``fused``: the same with the optimiser's fused kernel.
  * ``foreach``: phi(t) outside the graph by foreach kernels, gradients with
    respect to phi(t) scaled by 2t(1-t), the fused optimiser.
  * ``compiled``: ``autograd``'s loss and gradient through torch.compile, the
    fused optimiser.
  """

  def __init__(
    self,
    variant: str,
    images: torch.Tensor,
    labels: torch.Tensor,
    ends: tuple[Sequence[np.ndarray], Sequence[np.ndarray]],
    *,
    batch_size: int,
    mean: float,
    std: float,
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
  ):
    self.step, self.data = variant.split("/")
    self.mean, self.std, self.batch_size = mean, std, batch_size
    self.x, self.y = images, labels
    if self.data == "uint8" and images.dtype != torch.uint8:
      raise ValueError(f"{variant} needs uint8 images, got {images.dtype}")
    if self.data != "uint8" and images.dtype != torch.float32:
      raise ValueError(f"{variant} needs float32 images, got {images.dtype}")
    # nn.Linear's layout, [out, in].
    self.start, self.end = (
      [torch.from_numpy(np.ascontiguousarray(w.T)) for w in weights]
      for weights in ends
    )
    self.bend = [
      ((a + b) / 2).requires_grad_(self.step != "foreach")
      for a, b in zip(self.start, self.end, strict=True)
    ]
    fused = self.step != "autograd"
    self.optimizer = torch.optim.SGD(
      self.bend,
      lr=learning_rate,
      momentum=momentum,
      weight_decay=weight_decay,
      foreach=not fused,
      fused=fused,
    )
    self.loss: Callable[..., torch.Tensor] = curve_loss
    if self.step == "compiled":
      self.loss = torch.compile(curve_loss, dynamic=False)

  def batches(self):
    """Yields the epoch's batches, normalised."""
    order = torch.randperm(len(self.x))
    if self.data == "float32-shuffled":
      x, y = self.x[order], self.y[order]
      yield from zip(
        x.split(self.batch_size), y.split(self.batch_size), strict=True
      )
      return
    for rows in order.split(self.batch_size):
      x = self.x.index_select(0, rows)
      if self.data == "uint8":
        x = normalize(x, self.mean, self.std)
      yield x, self.y.index_select(0, rows)

  def train_step(
    self, x: torch.Tensor, y: torch.Tensor, t: float
  ) -> torch.Tensor:
    """Takes one step at phi(t) and returns the loss before it."""
    a, b, c = (1 - t) ** 2, 2 * t * (1 - t), t**2
    if self.step == "foreach":
      weights = torch._foreach_mul(self.start, a)
      torch._foreach_add_(weights, self.bend, alpha=b)
      torch._foreach_add_(weights, self.end, alpha=c)
      for weight in weights:
        weight.requires_grad_()
      loss = network_loss(weights, x, y)
      gradients = list(torch.autograd.grad(loss, weights))
      torch._foreach_mul_(gradients, b)
      for parameter, gradient in zip(self.bend, gradients, strict=True):
        parameter.grad = gradient
    else:
      self.optimizer.zero_grad(set_to_none=True)
      loss = self.loss(
        self.bend, self.start, self.end, torch.tensor((a, b, c)), x, y
      )
      loss.backward()
    self.optimizer.step()
    return loss.detach()

  def run(self) -> float:
    """Trains for one epoch and returns its seconds."""
    start = time.perf_counter()
    steps = -(-len(self.x) // self.batch_size)
    points = torch.rand(steps).tolist()
    losses = [
      self.train_step(x, y, t)
      for (x, y), t in zip(self.batches(), points, strict=True)
    ]
    mean = torch.stack(losses).mean().item()
    seconds = time.perf_counter() - start
    if not np.isfinite(mean):
      raise FloatingPointError("the PyTorch loop's loss is not finite")
    return seconds


def matmul_seconds(n: int, repeats: int = 5) -> float:
  """Times an [n, n] float32 product: the best of a few."""
  a, b, out = torch.rand(n, n), torch.rand(n, n), torch.empty(n, n)
  torch.mm(a, b, out=out)
  best = float("inf")
  for _ in range(repeats):
    start = time.perf_counter()
    torch.mm(a, b, out=out)
    best = min(best, time.perf_counter() - start)
  return best
