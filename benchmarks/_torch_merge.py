"""Merge rules in plain PyTorch, as one writes them over state dicts.

Running sums in place where they do, `kthvalue` for the magnitudes to keep,
half types accumulated in float32, as the package's own rules do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Params = dict[str, torch.Tensor]


def average(models: Sequence[Params]) -> Params:
  """The mean of the models."""
  merged = {}
  for name, first in models[0].items():
    total = torch.zeros_like(first, dtype=torch.float32)
    for params in models:
      total += params[name]
    merged[name] = (total / len(models)).to(first.dtype)
  return merged


def fisher_average(
  models: Sequence[Params], fishers: Sequence[Params], floor: float = 1e-6
) -> Params:
  """The mean of the models, entry by entry weighted by their Fisher."""
  merged = {}
  for name, first in models[0].items():
    total = torch.zeros_like(first, dtype=torch.float32)
    divisor = torch.zeros_like(total)
    for params, fisher in zip(models, fishers, strict=True):
      weight = fisher[name].to(torch.float32).clamp(min=floor)
      total.addcmul_(weight, params[name].to(torch.float32))
      divisor += weight
    merged[name] = (total / divisor).to(first.dtype)
  return merged


def _tau(base: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
  return leaf.to(torch.float32) - base.to(torch.float32)


def magmax(
  base: Params, models: Sequence[Params], scale: float = 0.5
) -> Params:
  """Per entry the task vector of the largest magnitude; the later on ties."""
  merged = {}
  for name, start in base.items():
    best = torch.zeros_like(start, dtype=torch.float32)
    for params in models:
      tau = _tau(start, params[name])
      best = torch.where(tau.abs() >= best.abs(), tau, best)
    merged[name] = (start + scale * best).to(start.dtype)
  return merged


def dare(
  base: Params,
  models: Sequence[Params],
  density: float = 0.5,
  scale: float = 1.0,
) -> Params:
  """Drops entries of the task vectors at random, rescales and adds them."""
  merged = {}
  for name, start in base.items():
    total = torch.zeros_like(start, dtype=torch.float32)
    for params in models:
      tau = _tau(start, params[name])
      total += tau * (torch.rand_like(tau) < density) / density
    merged[name] = (start + scale * total).to(start.dtype)
  return merged


def _ties(taus: torch.Tensor, density: float) -> torch.Tensor:
  """TIES of task vectors [n, entries]."""
  entries = taus.shape[1]
  keep = max(1, int(density * entries))
  magnitudes = taus.abs()
  least = magnitudes.kthvalue(entries - keep + 1, dim=1, keepdim=True).values
  taus = torch.where(magnitudes >= least, taus, 0.0)
  sign = taus.sum(dim=0).sign()
  majority = sign.sum().sign()
  sign = torch.where(sign == 0, torch.where(majority > 0, 1.0, -1.0), sign)
  agrees = torch.where(sign > 0, taus > 0, taus < 0)
  total = torch.where(agrees, taus, 0.0).sum(dim=0)
  return total / agrees.sum(dim=0).clamp(min=1)


def ties_leaf(
  base: Params,
  models: Sequence[Params],
  density: float = 0.2,
  scale: float = 1.0,
) -> Params:
  """TIES, every leaf trimmed by itself."""
  merged = {}
  for name, start in base.items():
    taus = torch.stack([_tau(start, params[name]) for params in models])
    tau = _ties(taus.flatten(1), density).reshape(start.shape)
    merged[name] = (start + scale * tau).to(start.dtype)
  return merged


def ties_vector(
  base: Params,
  models: Sequence[Params],
  density: float = 0.2,
  scale: float = 1.0,
) -> Params:
  """TIES, every task vector trimmed as a whole."""
  taus = torch.stack(
    [
      torch.cat([_tau(base[name], params[name]).flatten() for name in base])
      for params in models
    ]
  )
  parts = _ties(taus, density).split([leaf.numel() for leaf in base.values()])
  return {
    name: (start + scale * tau.reshape(start.shape)).to(start.dtype)
    for (name, start), tau in zip(base.items(), parts, strict=True)
  }
