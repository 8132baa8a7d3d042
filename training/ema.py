"""Exponential moving average of the network's weights, in one fused operation a step."""

from __future__ import annotations

import copy

import torch

from models import Backbone


class EMA:
    """Keeps `network`, a frozen copy in eval mode whose parameters follow the trained ones.

    After update s (counted from 1): ema <- d ema + (1 - d) weights, with d = decay, or under warm-up
    d = min(decay, (1 + s) / (10 + s)).
    """

    def __init__(self, network: Backbone, decay: float, warmup: bool = False) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay
        self.warmup = warmup
        self._averages = list(self.network.parameters())
        self._trained = network

    def decay_at(self, step: int) -> float:
        """The decay d of update `step`."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the weights; `step` counts optimiser updates from 1."""
        # asked for anew: moving a module replaces the storage of its parameters, and an alias would watch the old one
        weights = [parameter.detach() for parameter in self._trained.parameters()]
        torch._foreach_lerp_(self._averages, weights, 1 - self.decay_at(step))
