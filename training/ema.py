"""Exponential moving average of a network's weights, in one fused operation a step."""

from __future__ import annotations

import copy

import torch
from torch import nn


class EMA:
    """Keeps `network`, a frozen copy in eval mode whose parameters follow the trained ones.

    After update s (counted from 1): ema <- d ema + (1 - d) weights, with d = decay, or under warm-up
    d = min(decay, (1 + s) / (10 + s)).
    """

    def __init__(self, network: nn.Module, decay: float, warmup: bool = False) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay
        self.warmup = warmup
        # parameters, not their values: one that is moved stays the same object, so that the lists never go stale
        self._averages, self._trained = list(self.network.parameters()), list(network.parameters())

    def decay_at(self, step: int) -> float:
        """The decay d of update `step`."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the weights; `step` counts optimiser updates from 1."""
        torch._foreach_lerp_(self._averages, self._trained, 1 - self.decay_at(step))
