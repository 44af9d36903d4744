"""Mode Path Fusion over a stream of tasks as an in-memory PyTorch program.

The same mathematics as the package's own strategy: all networks start from
theta_0 and see their own task; a uniform sample of each task is stored; from
the second task on a quadratic Bezier curve from the merged network to the new
one is fitted on all that is stored, its bend from their midpoint on, at one
t ~ U(0, 1) a step, and its middle is the merged network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks import _continual_protocol, _torch_epoch
from jaxmerge.continual import streams

# How a step is computed (see `_torch_epoch.Epoch`), and whether examples are
# gathered batch by batch or shuffled whole once an epoch.
STEPS = ("autograd", "fused", "foreach", "compiled")
DATA = ("gathered", "shuffled")
VARIANTS = tuple(f"{step}/{data}" for step in STEPS for data in DATA)

Tensors = list[torch.Tensor]
Draw = Callable[[int], Sequence[float]]


def _uniform(steps: int) -> Sequence[float]:
  return torch.rand(steps).tolist()


def _rate(first: float, last: float, step: int, total: int) -> float:
  """The learning rate: constant for half, then linear to nine tenths."""
  done = (step - round(0.5 * total)) / (round(0.4 * total) or 1)
  return first + (last - first) * min(max(done, 0.0), 1.0)


class Program:
  """Holds the normalised data and runs the protocol."""

  def __init__(self, protocol: _continual_protocol.Protocol):
    self._protocol = protocol
    train, test = _continual_protocol.load(protocol)
    stream = streams.class_incremental(
      train, test, num_tasks=protocol.num_tasks
    )
    scale, offset = _continual_protocol.normalization(
      protocol, np.asarray(train.images)
    )

    def tensors(images: np.ndarray, labels: np.ndarray) -> Tensors:
      x = torch.from_numpy(np.array(images).reshape(len(images), -1))
      x = x.to(torch.float32).mul_(scale.item()).add_(offset.item())
      return [x, torch.from_numpy(np.array(labels)).to(torch.int64)]

    # Float tensors of each task, from before the clock starts.
    self._train = [
      tensors(train.images[task.train], train.labels[task.train])
      for task in stream.tasks
    ]
    self._test = [
      tensors(test.images[task.test], test.labels[task.test])
      for task in stream.tasks
    ]
    self._compiled: dict[str, Callable[..., torch.Tensor]] = {}

  @property
  def image_size(self) -> int:
    """Number of inputs."""
    return self._train[0][0].shape[1]

  def _loss(self, name: str, compiled: bool) -> Callable[..., torch.Tensor]:
    loss: Any = {
      "network": _torch_epoch.network_loss,
      "curve": _torch_epoch.curve_loss,
    }[name]
    if not compiled:
      return loss
    if name not in self._compiled:
      self._compiled[name] = torch.compile(loss, dynamic=False)
    return self._compiled[name]

  def _fit(
    self,
    variant: str,
    trained: Tensors,
    ends: tuple[Tensors, Tensors] | None,
    x: torch.Tensor,
    y: torch.Tensor,
    epochs: int,
    points: Sequence[float],
  ) -> None:
    """Trains a network, or with ends a curve's bend, in place."""
    how, layout = variant.split("/")
    protocol = self._protocol
    first = (
      protocol.learning_rate if ends is None else protocol.curve_learning_rate
    )
    apart = how == "foreach" and ends is not None
    for weight in trained:
      weight.requires_grad_(not apart)
    optimizer = torch.optim.SGD(
      trained,
      lr=first,
      momentum=protocol.momentum,
      weight_decay=protocol.weight_decay,
      foreach=how == "autograd",
      fused=how != "autograd",
    )
    (group,) = optimizer.param_groups
    size = min(protocol.batch_size, len(x))
    total = epochs * -(-len(x) // size)
    step = 0
    for _ in range(epochs):
      losses = []
      order = torch.randperm(len(x))
      batches: Iterable[tuple[torch.Tensor, torch.Tensor]]
      if layout == "shuffled":
        batches = zip(x[order].split(size), y[order].split(size), strict=True)
      else:
        batches = (
          (x.index_select(0, rows), y.index_select(0, rows))
          for rows in order.split(size)
        )
      for images, labels in batches:
        group["lr"] = _rate(first, protocol.final_learning_rate, step, total)
        # The last, partial batch would compile anew.
        compiled = how == "compiled" and len(images) == size
        if ends is None:
          optimizer.zero_grad(set_to_none=True)
          loss = self._loss("network", compiled)(trained, images, labels)
          loss.backward()
        else:
          t = points[step]
          a, b, c = (1 - t) ** 2, 2 * t * (1 - t), t**2
          if apart:
            weights = torch._foreach_mul(ends[0], a)
            torch._foreach_add_(weights, trained, alpha=b)
            torch._foreach_add_(weights, ends[1], alpha=c)
            for weight in weights:
              weight.requires_grad_()
            loss = _torch_epoch.network_loss(weights, images, labels)
            gradients = list(torch.autograd.grad(loss, weights))
            torch._foreach_mul_(gradients, b)
            for weight, gradient in zip(trained, gradients, strict=True):
              weight.grad = gradient
          else:
            optimizer.zero_grad(set_to_none=True)
            loss = self._loss("curve", compiled)(
              trained, *ends, torch.tensor((a, b, c)), images, labels
            )
            loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        step += 1
      if not np.isfinite(torch.stack(losses).mean().item()):
        raise FloatingPointError("the PyTorch program's loss is not finite")
    for weight in trained:
      weight.requires_grad_(False)
      weight.grad = None

  def trial(
    self, variant: str, kernels: Sequence[np.ndarray]
  ) -> tuple[float, float]:
    """Seconds of an epoch of the first task's network, and of a curve."""
    start = [torch.from_numpy(np.ascontiguousarray(w.T)) for w in kernels]
    x, y = self._train[0]
    found = []
    for ends in (None, (start, start)):
      trained = [weight.clone() for weight in start]
      steps = -(-len(x) // min(self._protocol.batch_size, len(x)))
      begin = time.perf_counter()
      self._fit(variant, trained, ends, x, y, 1, _uniform(steps))
      found.append(time.perf_counter() - begin)
    return found[0], found[1]

  def run(
    self,
    network: str,
    curve: str,
    kernels: Sequence[np.ndarray],
    seed: int,
    draw: Draw = _uniform,
  ) -> tuple[float, np.ndarray, Tensors]:
    """Runs the protocol.

    Args:
      network: How the networks are trained, of `VARIANTS`.
      curve: How the curves are fitted, of `VARIANTS`.
      kernels: theta_0, [in, out].
      seed: Of all random numbers.
      draw: Draws so many t.

    Returns:
      Wall time, test accuracy by task, and the merged network.
    """
    torch.manual_seed(seed)
    protocol = self._protocol
    start = [torch.from_numpy(np.ascontiguousarray(w.T)) for w in kernels]
    begin = time.perf_counter()
    stored: list[Tensors] = []
    merged: Tensors = []
    for x, y in self._train:
      expert = [weight.clone() for weight in start]
      self._fit(network, expert, None, x, y, protocol.epochs, ())
      # What a reservoir holds in the end: a uniform sample.
      rows = torch.randperm(len(x))[: protocol.capacity]
      stored.append([x[rows], y[rows]])
      if not merged:
        merged = expert
        continue
      bend = [(a + b) / 2 for a, b in zip(merged, expert, strict=True)]
      images, labels = (torch.cat(parts) for parts in zip(*stored, strict=True))
      size = min(protocol.batch_size, len(images))
      steps = protocol.epochs * -(-len(images) // size)
      self._fit(
        curve,
        bend,
        (merged, expert),
        images,
        labels,
        protocol.epochs,
        draw(steps),
      )
      merged = [
        0.25 * a + 0.5 * b + 0.25 * c
        for a, b, c in zip(merged, bend, expert, strict=True)
      ]
    accuracies = []
    with torch.no_grad():
      for x, y in self._test:
        hits = _torch_epoch.network_logits(merged, x).argmax(dim=1) == y
        accuracies.append(hits.to(torch.float64).mean().item())
    return time.perf_counter() - begin, np.array(accuracies), merged
